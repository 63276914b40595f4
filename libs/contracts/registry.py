"""Every public event by its type, and how stored older versions become the present one."""

from collections.abc import Callable, Iterable
from typing import Any

import orjson

from libs.core.envelope import Event

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


def decode(event_type: str, schema_version: int, data_json: bytes) -> Event:
    """Parse an event's fields, upcasting as needed.

    Raises:
        LookupError: no such event type, or a version without a way to the present one.
        ValueError: fields that don't fit the event.
    """
    event = _EVENTS[event_type]
    if schema_version == event.SCHEMA_VERSION:
        return event.model_validate_json(data_json)
    fields = orjson.loads(data_json)
    for version in range(schema_version, event.SCHEMA_VERSION):
        fields = _UPCASTERS[event_type, version](fields)
    return event.model_validate(fields)
