"""The head of a service's store: one document that every batch increments, which serialises the service's writers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from libs.contracts.registry import is_known
from libs.eventsourcing.batch import Batch


@dataclass(frozen=True, slots=True)
class Head:
    """The store's head.

    Args:
        position: of the last committed event.
        batches: how many batches were committed; if it is unchanged, nothing was written.
        store_id: made with the database; a restored or another database has another one.
        collections: the live collection's name of each aggregate and projection, by its logical name.
        kinds: the event types, with versions, that the store may hold, such as ``source_created.v1``.
    """

    position: int
    batches: int
    store_id: str
    collections: Mapping[str, str]
    kinds: frozenset[str]

    @property
    def newer_types(self) -> frozenset[str]:
        """The event types that only a newer version can read."""
        parts = (kind.rsplit(".v", 1) for kind in self.kinds)
        return frozenset(event_type for event_type, version in parts if not is_known(event_type, int(version)))


def head_of(document: Mapping[str, Any]) -> Head:
    """The head in its stored document."""
    return Head(
        document["position"],
        document["batches"],
        document["store_id"],
        dict(document["projections"]),
        frozenset(document.get("kinds", ())),
    )


@dataclass(frozen=True, slots=True)
class ExpectedHead:
    """The head that a batch is written on, and what else its statements depend on.

    Args:
        head: before the batch.
        numbers: the next number of each list's collection, by its logical name.
    """

    head: Head
    numbers: Mapping[str, int]

    def suffices_for(self, batch: Batch) -> bool:
        """Whether the batch can be written on it without reading the head first."""
        return (
            batch.collections == self.head.collections
            and batch.newer_types == self.head.newer_types
            and batch.kinds <= self.head.kinds
            and all(name in self.numbers for name, changes in batch.lists.items() if changes.entering)
        )

    def after(self, batch: Batch) -> "ExpectedHead":
        """What the next batch can expect if no other writer commits before it."""
        head = Head(
            self.head.position + len(batch.events),
            self.head.batches + 1,
            self.head.store_id,
            self.head.collections,
            self.head.kinds if batch.kinds <= self.head.kinds else self.head.kinds | batch.kinds,
        )
        entered = {
            name: self.numbers[name] + changes.entering for name, changes in batch.lists.items() if changes.entering
        }
        return ExpectedHead(head, {**self.numbers, **entered})


@dataclass(slots=True)
class HeadCache:
    """The head as this process last read it, shared by those who read it."""

    head: Head | None = None
