"""What one transaction of a service's store writes, as a value."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from libs.core.envelope import Envelope
from libs.eventsourcing.list_changes import ListChanges
from libs.mongodb.client import Document


@dataclass(slots=True)
class Batch:
    """What one transaction writes. Event ids are fixed in it, so it can't take effect twice however often it is run.

    Args:
        collections: the collection names that it was decided on; if they were swapped since, the commit fails.
        newer_types: the newer version's event types that it was decided on; if there are others now, the commit fails.
        kinds: those of ``events``.
        inserts, replacements, removals: documents by logical collection name.
        lists: changes of counted lists, by the logical name of the collection that holds the counts.
    """

    collections: Mapping[str, str]
    newer_types: frozenset[str] = frozenset()
    kinds: frozenset[str] = frozenset()
    events: list[Envelope] = field(default_factory=list)
    inserts: dict[str, list[Document]] = field(default_factory=dict)
    replacements: dict[str, list[Document]] = field(default_factory=dict)
    removals: dict[str, list[Any]] = field(default_factory=dict)
    lists: dict[str, ListChanges] = field(default_factory=dict)
    side_writes: list["SideWrite"] = field(default_factory=list)
    idempotency: list[Document] = field(default_factory=list)
    offsets: list["OffsetMove"] = field(default_factory=list)

    def is_empty(self) -> bool:
        return not (
            self.events
            or self.inserts
            or self.replacements
            or self.removals
            or self.side_writes
            or self.idempotency
            or self.offsets
        )


@dataclass(frozen=True, slots=True)
class OffsetMove:
    """A consumer's next offset in one partition, valid only from the offset that the consumer started from."""

    topic: str
    partition: int
    expected_offset: int
    next_offset: int
    position: int
    store_id: str

    @property
    def key(self) -> str:
        return f"{self.topic}/{self.partition}"


@dataclass(frozen=True, slots=True)
class SideWrite:
    """A plain document written with a command: replaced or inserted by ``_id``, deleted if ``document`` is None."""

    collection: str
    id: Any
    document: Mapping[str, Any] | None


class DecisionOutdated(Exception):
    """Something that a batch was decided on has changed; decide again.

    Args:
        streams: the streams that changed, if known.
        keys: the unique keys that were taken, if known.
    """

    def __init__(self, reason: str, *, streams: Sequence[str] = (), keys: Sequence[str] = ()) -> None:
        super().__init__(reason)
        self.streams = tuple(streams)
        self.keys = tuple(keys)


class OffsetMoved(Exception):
    """Another instance consumed this partition meanwhile; read the stored offset again."""
