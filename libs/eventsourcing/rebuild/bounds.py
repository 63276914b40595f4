"""How much a rebuild reads, holds and writes at once, whatever the size of the service's data."""

EVENTS_TOGETHER = 1_000
EVENTS_BYTES_MAX = 4 * 1024 * 1024
"""Own events that are read at once."""
BUFFER_BYTES_MAX = 32 * 1024 * 1024
"""Messages that were read but not yet applied, of all topics together."""
MESSAGE_OVERHEAD_BYTES = 2_048
"""What a message takes in memory besides its value."""
PARKED_BYTES_MAX = 64 * 1024 * 1024
"""Parked messages of one topic."""
DOCUMENTS_BYTES_MAX = 16 * 1024 * 1024
"""Documents that are loaded, or wait to be written."""
TAIL_EVENTS_MAX = 200
"""The swap applies this many events while it blocks the service's writes."""
CATCH_UPS_MAX = 50
DIFFERENCES_MAX = 20
"""Ids that a report names for each collection."""
