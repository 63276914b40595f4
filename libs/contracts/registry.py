"""Every public event by its type, and how stored older versions become the present one."""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import orjson
from pydantic import ValidationError

from libs.core.envelope import Event, unknown_event

Upcaster = Callable[[dict[str, Any]], dict[str, Any]]

_EVENTS: dict[str, type[Event]] = {}
_UPCASTERS: dict[tuple[str, int], Upcaster] = {}


class PublicEvent(Event):
    """An event that is published on a topic; a subclass needs only its fields and a docstring.

    ``class SourceCreated(CatalogEvent)`` registers the type ``source_created`` on the topic of ``CatalogEvent``.

    Class keywords:
        topic: given once, by the class that all events of the topic inherit from; that class is no event itself.
        registered: False for a class that only gives events their common fields.
    """

    def __init_subclass__(cls, *, topic: str | None = None, registered: bool = True, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if topic is not None:
            cls.TOPIC = topic
            return
        cls.TYPE = re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()
        if registered:
            register(cls)


def register(event: type[Event]) -> None:
    """Make an event known by its ``TYPE``; two classes with one type are a programming error."""
    known = _EVENTS.setdefault(event.TYPE, event)
    if known is not event:
        raise ValueError(f"two events have the type {event.TYPE!r}: {known} and {event}")


def register_upcaster(event_type: str, from_version: int, upcaster: Upcaster) -> None:
    """``upcaster`` turns the fields of version ``from_version`` into those of the next."""
    _UPCASTERS[event_type, from_version] = upcaster


@contextmanager
def known_meanwhile(events: Iterable[type[Event]]) -> Iterator[None]:
    """Within it, these events are known as well, in place of others of the same type: as a newer version knows them."""
    before = dict(_EVENTS)
    _EVENTS.update({event.TYPE: event for event in events})
    try:
        yield
    finally:
        _EVENTS.clear()
        _EVENTS.update(before)


def registered_events() -> tuple[type[Event], ...]:
    """In the order of their definition."""
    return tuple(_EVENTS.values())


def is_known(event_type: str, schema_version: int) -> bool:
    """Whether this release can read such events."""
    event = _EVENTS.get(event_type)
    return event is not None and schema_version <= event.SCHEMA_VERSION


def decode(event_type: str, schema_version: int, data_json: bytes, topic: str) -> tuple[Event, bool]:
    """Parse an event's fields, upcasting as needed.

    Returns:
        The event, and whether it holds everything that was written. Fields that only a newer release knows are left
        out; an event that only a newer release knows becomes an ``UnknownEvent``.

    Raises:
        LookupError: an older version that no upcaster converts.
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
