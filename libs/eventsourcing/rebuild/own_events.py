"""Folds a service's own events, from its event store, into the shadows of its aggregates' collections."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from libs.core.decider import Aggregate
from libs.core.envelope import Envelope
from libs.eventsourcing.event_store import EventStore
from libs.eventsourcing.head import Head
from libs.eventsourcing.rebuild import bounds
from libs.eventsourcing.rebuild.report import NEWER_VERSION, RebuildFailed
from libs.eventsourcing.rebuild.shadow_writer import ShadowWriter
from libs.eventsourcing.rebuild.shadows import Shadows
from libs.eventsourcing.stored_events import envelope_of
from libs.mongodb.client import ASCENDING, MAJORITY, ClientSession, Document


class OwnEvents:
    """The own events of a service, in order.

    ``position`` is that of the last event that was folded.
    """

    def __init__(self, store: EventStore, aggregates: Sequence[Aggregate[Any]], shadows: Shadows) -> None:
        self._store = store
        self._aggregates = {aggregate.name: aggregate for aggregate in aggregates}
        self._shadows = shadows
        self.position = 0

    def fold(self, head: Head, session: ClientSession | None = None) -> None:
        """Fold all events up to the head. It blocks.

        Args:
            session: a transaction, which may be aborted and run again: then ``position`` does not move.
        """
        for page in self._pages(head, session):
            known = [(aggregate, event) for event in page if (aggregate := self._aggregate_of(event)) is not None]
            if newer := next((event for _, event in known if not event.is_understood), None):
                raise RebuildFailed(f"{newer.type} {newer.id}: {NEWER_VERSION}")
            ShadowWriter(self._store, self._shadows, session).evolve(known)
            if session is None:
                self.position = page[-1].position

    def _aggregate_of(self, event: Envelope) -> Aggregate[Any] | None:
        return self._aggregates.get(event.stream.split("-", 1)[0])

    def _pages(self, head: Head, session: ClientSession | None) -> Iterator[list[Envelope]]:
        if not self._aggregates:
            return
        events = self._store.sync_database["events"]
        if session is None:
            events = events.with_options(read_concern=MAJORITY)
        position = self.position
        while position < head.position:
            criteria = {"position": {"$gt": position, "$lte": head.position}}
            found = events.find(criteria, session=session).sort("position", ASCENDING).limit(bounds.EVENTS_TOGETHER)
            page = _page(found, head.store_id)
            if not page:
                raise RebuildFailed(f"the events after position {position} are missing")
            yield page
            position = page[-1].position


def _page(documents: Iterable[Document], store_id: str) -> list[Envelope]:
    """The first of these events, as many as fit into ``EVENTS_BYTES_MAX``; at least one."""
    page: list[Envelope] = []
    size_bytes = 0
    for document in documents:
        page.append(envelope_of(document, store_id))
        size_bytes += len(document["data"])
        if size_bytes >= bounds.EVENTS_BYTES_MAX:
            break
    return page
