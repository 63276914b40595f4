"""Schedules: frequencies as people write them, and the ticks of a cron expression in UTC."""

import re
from datetime import UTC, datetime, timedelta

from cronsim import CronSim, CronSimError

from libs.core.errors import FieldError, InvalidInput

FREQUENCY_LENGTH_MAX = 200

_NICKNAMES = {
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
    "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@hourly": "0 * * * *",
}
_EVERY = re.compile(r"every(?:\s+(\d{1,4}))?\s+(minute|min|hour|day|week|month)s?", re.IGNORECASE)
_SINGLE_UNIT = {
    "minute": "* * * * *",
    "hour": _NICKNAMES["@hourly"],
    "day": _NICKNAMES["@daily"],
    "week": _NICKNAMES["@weekly"],
    "month": _NICKNAMES["@monthly"],
}
_SOME_DAY = datetime(2024, 1, 1, tzinfo=UTC)


def parse_frequency(text: str) -> str:
    """The five-field cron expression for a frequency; empty for a job that is started by hand.

    Args:
        text: five cron fields, a nickname such as ``@hourly``, ``every 15 minutes``, or empty.

    Raises:
        InvalidInput: anything else, or an expression that never matches.
    """
    frequency = " ".join(text.split())
    if not frequency:
        return ""
    if len(frequency) > FREQUENCY_LENGTH_MAX:
        raise _invalid(f"is longer than {FREQUENCY_LENGTH_MAX} characters")
    if frequency.startswith("@"):
        return _nickname(frequency.lower())
    if frequency.lower().startswith("every"):
        return _interval(frequency)
    return _cron(frequency)


def next_tick(cron: str, after: datetime) -> datetime | None:
    """The first tick after a time, None if there is none."""
    return next(CronSim(cron, after), None)


def latest_tick(cron: str, until: datetime) -> datetime | None:
    """The last tick at or before a time, None if there is none."""
    just_after = until.replace(microsecond=0) + timedelta(seconds=1)
    return next(CronSim(cron, just_after, reverse=True), None)


def _nickname(text: str) -> str:
    if text not in _NICKNAMES:
        raise _invalid(f"{text[:40]!r} is not known; use one of {', '.join(sorted(_NICKNAMES))}")
    return _NICKNAMES[text]


def _interval(text: str) -> str:
    found = _EVERY.fullmatch(text)
    if found is None:
        raise _invalid(f"{text[:60]!r} is not a frequency; write for example 'every 15 minutes' or 'every 2 hours'")
    count, unit = int(found[1] or 1), found[2].lower()
    unit = "minute" if unit == "min" else unit
    if unit == "minute" and count == 60:
        count, unit = 1, "hour"
    if unit == "hour" and count == 24:
        count, unit = 1, "day"
    if count == 1:
        return _SINGLE_UNIT[unit]
    if unit == "minute" and 0 < count < 60 and 60 % count == 0:
        return f"*/{count} * * * *"
    if unit == "hour" and 0 < count < 24 and 24 % count == 0:
        return f"0 */{count} * * *"
    raise _invalid(
        f"'every {count} {unit}s' cannot be written as a cron expression; minutes must divide 60, hours must divide "
        "24, and days, weeks and months must be 1"
    )


def _cron(text: str) -> str:
    fields = text.split()
    if len(fields) != 5:
        raise _invalid(f"has {len(fields)} fields; a cron expression has five (minute hour day month weekday)")
    try:
        first = next(CronSim(text, _SOME_DAY), None)
    except CronSimError as error:
        raise _invalid(f"{text!r} is not a cron expression: {error}") from None
    if first is None:
        raise _invalid(f"{text!r} never matches")
    return text


def _invalid(message: str) -> InvalidInput:
    return InvalidInput(f"frequency: {message}", errors=[FieldError("frequency", message)])
