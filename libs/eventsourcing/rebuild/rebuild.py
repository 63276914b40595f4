"""Rebuilds the documents of a service from events, while the service runs, and swaps them for the live ones.

fold      own events and the events of followed topics, into shadow collections
catch up  until only a few events are missing
compare   live and rebuilt documents at one position, in one snapshot
swap      in one transaction that blocks the service's writes: apply the last events, exchange the names
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import structlog

from libs.core.decider import Aggregate, Projection
from libs.event_log.port import EventLog
from libs.eventsourcing.event_store import EventStore
from libs.eventsourcing.offsets import OFFSETS, Checkpoints, document_of, of_topic
from libs.eventsourcing.rebuild import bounds
from libs.eventsourcing.rebuild.comparison import compare
from libs.eventsourcing.rebuild.foreign_events import ForeignEvents
from libs.eventsourcing.rebuild.lease import RebuildLease
from libs.eventsourcing.rebuild.own_events import OwnEvents
from libs.eventsourcing.rebuild.report import CollectionReport, RebuildFailed, RebuildReport
from libs.eventsourcing.rebuild.shadows import Shadows
from libs.eventsourcing.rebuild.snapshot import Snapshot, read_snapshot
from libs.eventsourcing.retention import forget_again
from libs.eventsourcing.schema import create_indexes
from libs.eventsourcing.swap import SwapEnded, swap_collections
from libs.mongodb.client import ASCENDING, ClientSession, IndexModel

GRACE_SECONDS = 5.0

log = structlog.get_logger(__name__)


class _NotYetRead(Exception):
    """The service has handled messages that the rebuild has not read yet."""


class EventSourced(Protocol):
    """The parts of a service's definition that say which documents it has."""

    @property
    def aggregates(self) -> Sequence[Aggregate[Any]]: ...
    @property
    def projections(self) -> Sequence[Projection]: ...
    @property
    def indexes(self) -> Mapping[str, Sequence[IndexModel]]: ...


@dataclass(frozen=True, slots=True)
class TopicRepair:
    """The checkpoints of a stopped topic: those that no longer fit the log, and those that replace them."""

    stored: Checkpoints
    replaced_by: Checkpoints


class Rebuild:
    """One rebuild of one service.

    Args:
        store: the service's store, opened.
        event_log: the log that the service follows.
        aggregates, projections, indexes: as in the service's definition.
        repairs: by topic: its projections are built up to the new checkpoints, which the swap stores.
    """

    def __init__(
        self,
        store: EventStore,
        event_log: EventLog,
        *,
        aggregates: Sequence[Aggregate[Any]] = (),
        projections: Sequence[Projection] = (),
        indexes: Mapping[str, Sequence[IndexModel]] | None = None,
        repairs: Mapping[str, TopicRepair] | None = None,
    ) -> None:
        self._store = store
        self._event_log = event_log
        self._aggregates = aggregates
        self._projections = projections
        self._indexes = indexes or {}
        self._repairs = repairs or {}
        self._lease = RebuildLease(store)
        self._shadows = Shadows(store, _collections(aggregates, projections))
        self._own = OwnEvents(store, aggregates, self._shadows)
        self._topics: list[ForeignEvents] = []

    @classmethod
    def of(
        cls,
        definition: EventSourced,
        store: EventStore,
        event_log: EventLog,
        *,
        repairs: Mapping[str, TopicRepair] | None = None,
    ) -> "Rebuild":
        """The rebuild of everything that a service's definition names."""
        return cls(
            store,
            event_log,
            aggregates=definition.aggregates,
            projections=definition.projections,
            indexes=definition.indexes,
            repairs=repairs,
        )

    async def run(self, *, swap: bool = True, grace_seconds: float = GRACE_SECONDS) -> RebuildReport:
        """Rebuild, compare, and swap unless only the comparison is wanted.

        Args:
            swap: False keeps the live documents and drops the rebuilt ones.
            grace_seconds: how long the former collections are kept for reads that have begun.

        Raises:
            RebuildFailed: nothing was changed.
        """
        started_at = time.monotonic()
        position, collections = await self._lease.hold(lambda: self._run(swap, grace_seconds))
        report = RebuildReport(position, collections, swap, time.monotonic() - started_at)
        log.info("rebuilt", swapped=swap, position=position, equal=report.is_equal, seconds=round(report.seconds, 3))
        return report

    async def _run(self, swap: bool, grace_seconds: float) -> tuple[int, tuple[CollectionReport, ...]]:
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self._shadows.drop_unused)
            await self._shadows.create()
            await self._open_topics(stack)
            await self.catch_up()
            await self._create_indexes()
            await forget_again(self._store.database, self._shadows.names)
            compared = await self._compare()
            if swap:
                await self.swap()
                await asyncio.sleep(grace_seconds)
        return compared

    async def _open_topics(self, stack: AsyncExitStack) -> None:
        stored = (await asyncio.to_thread(read_snapshot, self._store)).checkpoints
        topics = list(dict.fromkeys(projection.topic for projection in self._projections))
        for topic in topics:
            repair = self._repairs.get(topic)
            events = ForeignEvents(
                self._store,
                self._event_log,
                self._shadows,
                topic,
                [projection for projection in self._projections if projection.topic == topic],
                stored.get(topic, {}),
                None if repair is None else repair.replaced_by,
                bounds.BUFFER_BYTES_MAX // len(topics),
            )
            await stack.enter_async_context(events.reader)
            self._topics.append(events)

    async def catch_up(self) -> None:
        """Fold events until so few are missing that the swap can apply them while it blocks the service's writes."""
        for _ in range(bounds.CATCH_UPS_MAX):
            before = self._own.position
            await self._reach(await asyncio.to_thread(read_snapshot, self._store))
            if self._own.position - before <= bounds.TAIL_EVENTS_MAX:
                return

    async def _reach(self, snapshot: Snapshot) -> None:
        await asyncio.to_thread(self._own.fold, snapshot.head)
        for topic in self._topics:
            await topic.reach(snapshot)

    async def _create_indexes(self) -> None:
        for name in self._shadows:
            await create_indexes(self._store.database, self._shadows[name], self._indexes.get(name, ()))

    async def _compare(self) -> tuple[int, tuple[CollectionReport, ...]]:
        """The position of the comparison, and what it found in each collection."""
        session = await asyncio.to_thread(lambda: self._store.sync_database.client.start_session(snapshot=True))
        try:
            snapshot = await asyncio.to_thread(read_snapshot, self._store, session)
            await self._reach(snapshot)
            reports = await asyncio.to_thread(self._compare_all, snapshot, session)
        finally:
            await asyncio.to_thread(session.end_session)
        await asyncio.to_thread(self._lease.require)
        return snapshot.head.position, reports

    def _compare_all(self, snapshot: Snapshot, session: ClientSession) -> tuple[CollectionReport, ...]:
        database = self._store.sync_database
        aggregates = {aggregate.collection: aggregate for aggregate in self._aggregates}
        return tuple(
            compare(
                name,
                database[snapshot.head.collections[name]].find({}, session=session).sort("_id", ASCENDING),
                database[self._shadows[name]].find({}).sort("_id", ASCENDING),
                aggregates.get(name),
            )
            for name in self._shadows
        )

    async def swap(self) -> None:
        """Make the shadows the live collections."""
        former = (await self._store.head()).collections
        for _ in range(bounds.CATCH_UPS_MAX):
            await self.catch_up()
            try:
                await asyncio.to_thread(
                    swap_collections, self._store, self._shadows.names, lambda session, _: self.finish(session)
                )
            except (_NotYetRead, SwapEnded):
                continue
            return self._shadows.swapped([former[name] for name in self._shadows])
        raise RebuildFailed("the service's consumers are faster than the log can be read; try again later")

    def finish(self, session: ClientSession) -> None:
        """The last step, in the transaction of the swap; it may be aborted and run again.

        While the transaction is open nothing else can write, so the snapshot is final.
        """
        self._lease.require(session)
        snapshot = read_snapshot(self._store, session)
        if not all(topic.has_read(snapshot) for topic in self._topics):
            raise _NotYetRead
        self._own.fold(snapshot.head, session)
        for topic in self._topics:
            topic.fold(snapshot, session)
        for name, repair in self._repairs.items():
            self._replace_checkpoints(name, repair, snapshot, session)

    def _replace_checkpoints(self, topic: str, repair: TopicRepair, snapshot: Snapshot, session: ClientSession) -> None:
        if snapshot.checkpoints.get(topic, {}) != repair.stored:
            raise RebuildFailed(f"{topic} was repaired or read meanwhile; nothing was changed")
        offsets = self._store.sync_database[OFFSETS]
        offsets.delete_many(of_topic(topic), session=session)
        if repair.replaced_by:
            documents = [document_of(topic, *item) for item in repair.replaced_by.items()]
            offsets.insert_many(documents, session=session)


def _collections(aggregates: Sequence[Aggregate[Any]], projections: Sequence[Projection]) -> list[str]:
    """The logical names of the collections, each once."""
    names = [aggregate.collection for aggregate in aggregates]
    names += [aggregate.listing.collection for aggregate in aggregates if aggregate.listing is not None]
    names += [projection.collection for projection in projections]
    return list(dict.fromkeys(names))
