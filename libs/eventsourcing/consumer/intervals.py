"""How often a consumer does what."""

WAIT_SECONDS = 1.0
"""The longest wait for messages."""
RETRY_SECONDS = 1.0
"""Between two looks for parked messages that are to be retried."""
CATCH_UP_SECONDS = 30.0
"""Between two attempts to handle messages that were passed over."""
LAG_SECONDS = 5.0
"""Between two measurements of the lag."""
STOPPED_POLL_SECONDS = 2.0
"""Between two looks whether a stopped topic was repaired."""
BACKOFF_SECONDS_MAX = 10.0
