"""A circuit breaker: while a service rejects connections, not every request tries to connect.

After Nygard's "Release It!": closed, open for a second, then half open, where one request probes for all.
"""

from collections.abc import Callable

FAILURES_MAX = 3
OPEN_SECONDS = 1.0


class Breaker:
    """Counts consecutive failures to connect to one service.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._failures = 0
        self._open_until = 0.0
        self._probing = False

    def refuses_for_seconds(self) -> float | None:
        """None if the request may try, in the half-open state as the probe; else for how long requests are rejected."""
        if self._failures < FAILURES_MAX:
            return None
        wait_seconds = self._open_until - self._clock()
        if wait_seconds > 0 or self._probing:
            return max(wait_seconds, 0.1)
        self._probing = True
        return None

    def connected(self) -> None:
        """The service accepted a connection."""
        self._failures = 0
        self._probing = False

    def failed(self) -> None:
        """The service did not accept a connection."""
        self._failures += 1
        self._probing = False
        self._open_until = self._clock() + OPEN_SECONDS

    def gave_up(self) -> None:
        """The attempt ended without showing whether the service accepts connections."""
        self._probing = False
