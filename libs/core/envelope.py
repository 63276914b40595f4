"""Events and the envelope that every stored or published event travels in."""

from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import ClassVar

from pydantic import BaseModel, ConfigDict

EVENT_SIZE_BYTES_MAX = 900 * 1024


class Frozen(BaseModel):
    """The parent of every message and state: immutable, and strict about the fields that it is made with.

    What another version wrote is read with ``extra="ignore"``, or ``extra="allow"`` where it is written back.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")


class Event(Frozen):
    """Something that happened, in the past tense.

    Class attributes:
        TYPE: the name in the store and, inside ``datasync.<topic>.<TYPE>.v<schema>``, on the log.
        TOPIC: the log topic that carries it.
        SCHEMA_VERSION: raised when the fields change; older versions are upcast on read.
    """

    TYPE: ClassVar[str]
    TOPIC: ClassVar[str]
    SCHEMA_VERSION: ClassVar[int] = 1

    @classmethod
    def versioned_type(cls) -> str:
        """What a version can read or not: the type and the version of its fields."""
        return f"{cls.TYPE}.v{cls.SCHEMA_VERSION}"


class UnknownEvent(Event):
    """An event that only a newer version knows: passed on as it is, never decided on."""


@lru_cache(maxsize=256)
def unknown_event(event_type: str, topic: str) -> UnknownEvent:
    """Stands for any event of this type; what it says is only in its envelope's ``data_json``."""
    known_by_name: type[UnknownEvent] = type("UnknownEvent", (UnknownEvent,), {"TYPE": event_type, "TOPIC": topic})
    return known_by_name()


@dataclass(frozen=True, slots=True)
class Metadata:
    """Who caused an event and in which conversation.

    Args:
        actor: the username or key name shown in histories (``system`` for the platform itself).
        project_id: the project that owns the stream, None outside projects.
        correlation_id: the request id of the first cause.
        causation_id: the id of the event that this one reacts to, None for a request.
        traceparent: W3C trace context of the command.
    """

    actor: str = "system"
    project_id: int | None = None
    correlation_id: str = ""
    causation_id: str | None = None
    traceparent: str | None = None


@dataclass(frozen=True, slots=True)
class Envelope:
    """One event with its place in the store.

    Args:
        id: UUIDv7.
        stream: ``source-42``.
        version: 1, 2, … within the stream.
        position: 1, 2, … within the owner's store, without gaps; 0 while it is not committed.
        store_id: the store that gave the position; another one means a restored or foreign database.
        data_json: the event's fields as JSON text, the very bytes that the log carries.
        data: the same, parsed and upcast.
        schema_version: of ``data_json``; None: the present one of ``data``.
        is_understood: False where ``data`` lacks something that a newer version wrote into ``data_json``.
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
        """The same event at its place in the store (``dataclasses.replace`` costs ten times as much)."""
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
