"""Events and the envelope that every stored or published event travels in."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

EVENT_SIZE_BYTES_MAX = 900 * 1024


class Frozen(BaseModel):
    """The parent of every message and state: immutable, and its constructor rejects unknown fields.

    What another release wrote is validated with ``extra="ignore"``, or ``extra="allow"`` if it is written back.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")


class Event(Frozen):
    """Something that happened, in the past tense.

    Class attributes:
        TYPE: the name in the store, and on the log within ``datasync.<topic>.<TYPE>.v<SCHEMA_VERSION>``.
        TOPIC: the topic that it is published on.
        SCHEMA_VERSION: raised by incompatible changes of the fields; older versions are upcast when they are read.
    """

    TYPE: ClassVar[str]
    TOPIC: ClassVar[str]
    SCHEMA_VERSION: ClassVar[int] = 1

    @classmethod
    def versioned_type(cls) -> str:
        """The type with the version of its fields: what a release is able to read, or not."""
        return f"{cls.TYPE}.v{cls.SCHEMA_VERSION}"


class UnknownEvent(Event):
    """An event that only a newer release knows. It is passed on unchanged; no decision is based on it."""


@lru_cache(maxsize=256)
def unknown_event(event_type: str, topic: str) -> UnknownEvent:
    """The placeholder for events of this type. Their fields are only in the envelope's ``data_json``."""
    known_by_name: type[UnknownEvent] = type("UnknownEvent", (UnknownEvent,), {"TYPE": event_type, "TOPIC": topic})
    return known_by_name()


@dataclass(frozen=True, slots=True)
class Metadata:
    """Who caused an event, and as part of which request.

    Args:
        actor: the username or key name that histories show; ``system`` for DataSync itself.
        project_id: the project that owns the stream; None outside projects.
        correlation_id: the id of the request that started the chain of events.
        causation_id: the id of the event that this one reacts to; None if a request caused it.
        traceparent: the command's W3C trace context.
    """

    actor: str = "system"
    project_id: int | None = None
    correlation_id: str = ""
    causation_id: str | None = None
    traceparent: str | None = None

    @classmethod
    def stored(cls, document: Mapping[str, Any]) -> "Metadata":
        """That of a stored event's document."""
        return cls(
            actor=document["actor"],
            project_id=document["project_id"],
            correlation_id=document["correlation_id"],
            causation_id=document["causation_id"],
            traceparent=document["traceparent"],
        )


@dataclass(frozen=True, slots=True)
class Envelope:
    """An event with its place in the store.

    Args:
        id: UUIDv7.
        stream: ``source-42``.
        version: 1, 2, … within the stream.
        position: 1, 2, … within the owner's store, without gaps; 0 until it is committed.
        store_id: the store that assigned the position; it differs if the database was restored or replaced.
        data: the event, parsed from ``data_json`` and upcast.
        data_json: the event's fields as JSON text, byte for byte as on the log.
        schema_version: the version of ``data_json``; None for the current one, ``data.SCHEMA_VERSION``.
        is_understood: False if ``data`` lacks something that a newer release wrote into ``data_json``.
    """

    id: str
    stream: str
    version: int
    position: int
    store_id: str
    time: datetime
    data: Event
    data_json: bytes
    metadata: Metadata
    schema_version: int | None = None
    is_understood: bool = True

    def at(self, position: int) -> "Envelope":
        """A copy with this position. (``dataclasses.replace`` takes ten times as long.)"""
        return Envelope(
            self.id,
            self.stream,
            self.version,
            position,
            self.store_id,
            self.time,
            self.data,
            self.data_json,
            self.metadata,
        )

    @property
    def type(self) -> str:
        return self.data.TYPE

    @property
    def entity_id(self) -> str:
        """What follows the first hyphen of the stream's name."""
        return self.stream.split("-", 1)[1]
