"""Time as a dependency: the runtime passes a clock in, tests pass one that they move by hand."""

from datetime import UTC, datetime, timedelta
from typing import Protocol

import orjson


class Clock(Protocol):
    """Where the time of a command comes from."""

    def now(self) -> datetime:
        """The current time: timezone-aware, UTC, whole milliseconds (MongoDB's precision)."""


class SystemClock:
    """The machine's clock."""

    def now(self) -> datetime:
        return whole_milliseconds(datetime.now(UTC))


class ManualClock:
    """A clock for tests, which move it."""

    def __init__(self, start: datetime = datetime(2026, 1, 1, tzinfo=UTC)) -> None:
        self._now = whole_milliseconds(start)

    def now(self) -> datetime:
        return self._now

    def advance(self, seconds: float) -> None:
        self._now = whole_milliseconds(self._now + timedelta(seconds=seconds))


def whole_milliseconds(moment: datetime) -> datetime:
    """Cut to milliseconds, so that a time read from the store equals the one written."""
    return moment.replace(microsecond=moment.microsecond // 1000 * 1000)


def isoformat_z(moment: datetime) -> str:
    """ISO 8601 in UTC with ``Z`` and milliseconds: ``2026-02-21T10:30:00.000Z``."""
    # orjson formats a time eight times as fast as ``isoformat``, but not always with three decimals.
    text = orjson.dumps(moment, option=orjson.OPT_UTC_Z)
    if not text.endswith(b'Z"'):
        text = orjson.dumps(moment.astimezone(UTC), option=orjson.OPT_UTC_Z)
    return f"{text[1:20].decode()}.{moment.microsecond // 1000:03d}Z"


def duration_text(seconds: float) -> str:
    """A duration for people, in its two largest units: ``0.25 s``, ``2 min 5 s``, ``1 h 30 min``."""
    if round(seconds, 2) < 60:
        return f"{round(seconds, 2):g} s"
    minutes, whole_seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = ((hours, "h"), (minutes, "min"), (0 if hours else whole_seconds, "s"))
    return " ".join(f"{number} {unit}" for number, unit in parts if number)
