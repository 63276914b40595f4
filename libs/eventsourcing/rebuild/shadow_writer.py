"""Folds events into the documents of shadow collections: each document is loaded once, each of its states written.

Because every state is written, in order, the documents satisfy the unique indexes at every step, as the live ones did.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from libs.core.decider import Aggregate, Projection
from libs.core.envelope import Envelope, Frozen
from libs.eventsourcing.entities import state_of, stored_document
from libs.eventsourcing.event_store import EventStore
from libs.eventsourcing.list_changes import ListChanges
from libs.eventsourcing.rebuild import bounds
from libs.eventsourcing.rebuild.report import RebuildFailed
from libs.eventsourcing.rebuild.shadows import Shadows
from libs.mongodb.client import ClientSession, DeleteOne, Document, ReplaceOne, document_bytes


@dataclass(frozen=True, slots=True)
class _Change:
    """What one event changes in one document: ``apply`` gets it as it is, and returns it as it will be."""

    collection: str
    key: Any
    event: Envelope
    apply: Callable[[Document | None], Document | None]


class ShadowWriter:
    """Writes to shadow collections. It blocks.

    Args:
        session: the transaction to write in, if there is one.
    """

    def __init__(self, store: EventStore, shadows: Shadows, session: ClientSession | None) -> None:
        self._database = store.sync_database
        self._shadows = shadows
        self._session = session
        self._documents: dict[tuple[str, Any], Document | None] = {}
        self._operations: dict[str, list[ReplaceOne[Document] | DeleteOne]] = {}
        self._operations_bytes = 0
        self._lists: dict[str, ListChanges] = {}

    def evolve(self, events: Sequence[tuple[Aggregate[Any], Envelope]]) -> None:
        """Fold own events into the documents of their entities."""
        self._run(
            [
                _Change(
                    aggregate.collection,
                    aggregate.id_type(event.entity_id),
                    event,
                    partial(self._evolved, aggregate, event),
                )
                for aggregate, event in events
            ]
        )

    def project(self, projections: Sequence[Projection], events: Sequence[Envelope]) -> None:
        """Fold another service's events into the projections."""
        try:
            changes = [
                _Change(projection.collection, key, event, partial(_projected, projection, key, event))
                for event in events
                for projection in projections
                if (key := projection.key(event)) is not None
            ]
        except Exception as error:
            raise RebuildFailed(f"a projection's key: {error!r}") from error
        self._run(changes)

    def _run(self, changes: Sequence[_Change]) -> None:
        """Make changes in order, in halves if their documents are too large to be held together."""
        if not self._load(changes):
            middle = len(changes) // 2
            self._run(changes[:middle])
            self._run(changes[middle:])
            return
        for change in changes:
            place = (change.collection, change.key)
            try:
                after = change.apply(self._documents[place])
            except Exception as error:
                raise RebuildFailed(f"{change.collection}: {change.event.type} {change.event.id}: {error!r}") from error
            self._documents[place] = after
            self._write_later(change.collection, change.key, after)
            if self._operations_bytes > bounds.DOCUMENTS_BYTES_MAX:
                self._flush()
        self._flush()
        self._documents.clear()

    def _load(self, changes: Sequence[_Change]) -> bool:
        """Load the documents; False, and none of them, if they are too large together."""
        size_bytes = 0
        keys: dict[str, set[Any]] = {}
        for change in changes:
            keys.setdefault(change.collection, set()).add(change.key)
        for collection, of_collection in keys.items():
            self._documents.update(dict.fromkeys((collection, key) for key in of_collection))
            criteria = {"_id": {"$in": list(of_collection)}}
            with self._database[self._shadows[collection]].find(criteria, session=self._session) as found:
                for document in found:
                    size_bytes += document_bytes(document)
                    if size_bytes > bounds.DOCUMENTS_BYTES_MAX and len(changes) > 1:
                        self._documents.clear()
                        return False
                    self._documents[collection, document["_id"]] = document
        return True

    def _evolved(self, aggregate: Aggregate[Any], event: Envelope, document: Document | None) -> Document:
        before: Frozen | None = None if document is None else state_of(aggregate, document)
        after = aggregate.evolve(before, event)
        number = self._number(aggregate, document, before, after)
        project_id = event.metadata.project_id if document is None else document["project_id"]
        keys = tuple(aggregate.unique_keys(after))
        identifier = aggregate.id_type(event.entity_id)
        evolved = stored_document(identifier, event.version, project_id, keys, after, number, event.time)
        if aggregate.listing is not None and number is not None and number < 0:
            self._lists[aggregate.listing.collection].documents.append((evolved, number))
        return evolved

    def _number(
        self, aggregate: Aggregate[Any], document: Document | None, before: Frozen | None, after: Frozen
    ) -> int | None:
        """The entity's number in its lists after the event; below zero until it is reserved by ``_flush``."""
        listing = aggregate.listing
        if listing is None:
            return None
        changes = self._lists.setdefault(listing.collection, ListChanges())
        names = () if before is None else listing.lists(before)
        return changes.move(names, listing.lists(after), None if document is None else document.get("number"))

    def _write_later(self, collection: str, key: Any, document: Document | None) -> None:
        operation: ReplaceOne[Document] | DeleteOne = (
            DeleteOne({"_id": key}) if document is None else ReplaceOne({"_id": key}, document, upsert=True)
        )
        self._operations.setdefault(collection, []).append(operation)
        self._operations_bytes += 0 if document is None else document_bytes(document)

    def _flush(self) -> None:
        # This sets the numbers in documents that are written below.
        for collection, changes in self._lists.items():
            changes.write(self._database, self._shadows[collection], self._session)
        self._lists.clear()
        for collection, operations in self._operations.items():
            self._database[self._shadows[collection]].bulk_write(operations, ordered=True, session=self._session)
        self._operations.clear()
        self._operations_bytes = 0


def _projected(projection: Projection, key: Any, event: Envelope, document: Document | None) -> Document | None:
    after = projection.apply(document, event)
    return None if after is None else {**after, "_id": key}
