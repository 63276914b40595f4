"""Every public event by its type, and how stored older versions become the present one."""

from collections.abc import Callable, Iterable
from typing import Any

import orjson
from pydantic import ValidationError

from libs.core.envelope import Event, unknown_event

Upcaster = Callable[[dict[str, Any]], dict[str, Any]]

_EVENTS: dict[str, type[Event]] = {}
_UPCASTERS: dict[tuple[str, int], Upcaster] = {}


def register(events: Iterable[type[Event]]) -> None:
    """Make events known by their ``TYPE``; two classes with one type are a programming error."""
    for event in events:
        known = _EVENTS.setdefault(event.TYPE, event)
        if known is not event:
            raise ValueError(f"two events are called {event.TYPE!r}: {known} and {event}")


def register_upcaster(event_type: str, from_version: int, upcaster: Upcaster) -> None:
    """``upcaster`` turns the fields of version ``from_version`` into those of the next."""
    _UPCASTERS[event_type, from_version] = upcaster


def registered_events() -> tuple[type[Event], ...]:
    return tuple(_EVENTS.values())


def is_known(event_type: str, schema_version: int) -> bool:
    """Whether this version can read such events."""
    event = _EVENTS.get(event_type)
    return event is not None and schema_version <= event.SCHEMA_VERSION


def decode(event_type: str, schema_version: int, data_json: bytes, topic: str) -> tuple[Event, bool]:
    """Parse an event's fields, upcasting as needed.

    Returns:
        The event, and whether all that was written is in it. Fields that only a newer version knows are left out; an
        event that only a newer version knows is an ``UnknownEvent``.

    Raises:
        LookupError: an older version without a way to the present one.
        ValueError: fields that don't fit the event.
    """
    if not is_known(event_type, schema_version):
        return unknown_event(event_type, topic), False
    event = _EVENTS[event_type]
    if schema_version == event.SCHEMA_VERSION:
        try:
            return event.model_validate_json(data_json), True
        except ValidationError:
            return event.model_validate_json(data_json, extra="ignore"), False
    fields = orjson.loads(data_json)
    for version in range(schema_version, event.SCHEMA_VERSION):
        fields = _UPCASTERS[event_type, version](fields)
    return event.model_validate(fields, extra="ignore"), True
