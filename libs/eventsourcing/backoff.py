"""Waits between attempts when a server does not answer."""

import asyncio
import random
from typing import Any

import structlog

from libs.mongodb.client import in_short, is_passing

FIRST_SECONDS = 0.1
DOUBLINGS_MAX = 10

log = structlog.get_logger(__name__)


class Backoff:
    """Waits after failures, twice as long after each, with jitter.

    Args:
        event: the name of the log event; of an outage only the first failure is a warning.
        seconds_max: the longest wait.
    """

    def __init__(self, event: str, seconds_max: float) -> None:
        self._event = event
        self._seconds_max = seconds_max
        self._failures = 0

    def reset(self) -> None:
        """An attempt succeeded."""
        self._failures = 0

    async def wait(self, error: Exception, **context: Any) -> None:
        """Log an error with its context, and wait."""
        self._failures += 1
        report = log.debug if is_passing(error) and self._failures > 1 else log.warning
        report(self._event, error=in_short(error), **context)
        longest_seconds = min(self._seconds_max, FIRST_SECONDS * 2.0 ** min(self._failures - 1, DOUBLINGS_MAX))
        await asyncio.sleep(longest_seconds * random.uniform(0.5, 1))
