"""Turns Pydantic's errors into the API's: the field's path, a message and a code."""

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any

from pydantic import AfterValidator, AwareDatetime, BeforeValidator, ValidationError

from libs.core.errors import FieldError

FINDINGS_MAX = 20
MOMENT = "must be a moment with its zone, such as 2026-02-21T10:30:00Z (in a URL a + is written %2B)"

_MOMENT = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d(?::\d\d(?:\.\d+)?)?(?:[Zz]|[+-]\d\d:?\d\d)", re.ASCII)


def _as_written(value: Any) -> Any:
    """Refuse numbers, which Pydantic would read as seconds since 1970: ``2026`` is more likely a year."""
    if isinstance(value, str) and _MOMENT.fullmatch(value) is None:
        raise ValueError(MOMENT)
    return value


def _in_utc(moment: datetime) -> datetime:
    try:
        return moment.astimezone(UTC)
    except OverflowError:
        raise ValueError("is before the year 1 or after the year 9999 in UTC") from None


PastMoment = Annotated[AwareDatetime, BeforeValidator(_as_written), AfterValidator(_in_utc)]
"""A time that a caller gives (RFC 3339), in UTC."""

_WORDS = {
    "missing": ("is required", "missing"),
    "extra_forbidden": ("is not a known field", "unknown_field"),
    "model_type": ("must be a JSON object", "invalid"),
    "model_attributes_type": ("must be a JSON object", "invalid"),
    "dict_type": ("must be a JSON object", "invalid"),
    "datetime_parsing": (MOMENT, "invalid"),
    "datetime_from_date_parsing": (MOMENT, "invalid"),
    "timezone_aware": (MOMENT, "invalid"),
}
# Pydantic's names of a union's members, which it puts into an error's path.
_MEMBER = re.compile(r"constrained-\w+|literal\[.*\]|function-.*|nullable\[.*\]")
_SUBJECT = re.compile(r"^(?:Input|String|List|Dictionary|Value|Data) should ")


def field_errors(error: ValidationError, prefix: str = "") -> list[FieldError]:
    """One error for each field; of a union, the messages of its members joined by "or".

    Args:
        prefix: the path of the value itself.
    """
    found: dict[str, FieldError] = {}
    for item in error.errors(include_url=False, include_input=False):
        field = _path(prefix, item["loc"])
        message, code = _words(item)
        known = found.get(field)
        found[field] = FieldError(field, message if known is None else f"{known.message}, or {message}", code)
    return list(found.values())[:FINDINGS_MAX]


def _path(prefix: str, location: tuple[int | str, ...]) -> str:
    parts = [part for part in location if isinstance(part, int) or _MEMBER.fullmatch(part) is None]
    within = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
    return (prefix + within).removeprefix(".")


def _words(item: Mapping[str, Any]) -> tuple[str, str]:
    words = _WORDS.get(item["type"])
    if words is not None:
        return words
    message = str(item["msg"]).removeprefix("Value error, ").replace(" after validation", "")
    message = _SUBJECT.sub("must ", message)
    return message[:1].lower() + message[1:], "invalid"
