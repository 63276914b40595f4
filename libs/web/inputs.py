"""What the bodies and queries of requests share."""

import unicodedata
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from libs.core.validation import PastMoment

NAME_LENGTH_MAX = 255
NUMBER_MAX = 2**53
"""The largest integer that every JSON reader keeps exactly (RFC 8259 section 6)."""

HISTORY_EVENTS_MAX = 1_000


def canonical_name(name: str) -> str:
    """Trimmed and composed (Unicode NFC), so that names that look equal are equal.

    Raises:
        ValueError: empty, over 255 characters, or with control characters.
    """
    cleaned = unicodedata.normalize("NFC", name).strip()
    if not 1 <= len(cleaned) <= NAME_LENGTH_MAX:
        raise ValueError(f"must be 1 to {NAME_LENGTH_MAX} characters")
    if not cleaned.isprintable():
        raise ValueError("must not contain control characters")
    return cleaned


Name = Annotated[str, AfterValidator(canonical_name)]
Number = Annotated[int, Field(ge=1, le=NUMBER_MAX)]
"""An id or a version."""


class Body(BaseModel):
    """A body of the project family: unknown fields are ignored, as the clients of this API expect."""

    model_config = ConfigDict(frozen=True, extra="ignore", hide_input_in_errors=True)


class StrictBody(BaseModel):
    """A body of the other families: an unknown field is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)


class Query(BaseModel):
    """Query parameters; unknown ones are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", hide_input_in_errors=True)


class StrictQuery(BaseModel):
    """Query parameters; an unknown one is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class OneQuery(Query):
    """``as_of``: show the entity as it stood at that moment."""

    as_of: PastMoment | None = Field(
        default=None,
        description="The state after the last event at or before this moment, which is an instant: "
        "`2026-02-21T10:30:00Z` is the beginning of that second. Times of events have milliseconds.",
        examples=["2026-02-21T10:30:00.000Z"],
    )


class HistoryQuery(Query):
    """``before``: only events below this version, newest first."""

    before: Number = NUMBER_MAX
    limit: int = Field(default=100, ge=1, le=HISTORY_EVENTS_MAX)


class PageQuery(Query):
    """``before``: the id of the last entity of the page before; newest first."""

    before: str | None = Field(default=None, min_length=1, max_length=64)
    limit: int = Field(default=100, ge=1, le=1_000)
