"""Rebuilds every document of a service from events, beside the live ones and while the service runs.

The owner's documents come from its own store, those about foreign entities from the log up to the stored offsets. The
result is compared with the live documents at one position, in one snapshot, and then takes their place in a batch like
any other: it raises the head, applies the last events and changes the collections' names there.
"""

import asyncio
import hashlib
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from itertools import chain, takewhile
from typing import Any, NoReturn, TypeVar

import structlog

from libs.core.decider import Aggregate, Projection, PureCodeFailed
from libs.core.envelope import Envelope, Frozen, UnknownEvent
from libs.core.errors import NewerVersion
from libs.core.ids import uuid7
from libs.event_log.port import EventLog, Message, OffsetOutOfRange, Subscription
from libs.eventsourcing.consumer import Place
from libs.eventsourcing.entities import state_of, stored_document
from libs.eventsourcing.event_store import PAGE_BYTES_MAX, EventStore
from libs.eventsourcing.head import Head, head_of
from libs.eventsourcing.list_changes import ListChanges
from libs.eventsourcing.parking import COLLECTION as PARKED
from libs.eventsourcing.passed_over import COLLECTION as PASSED_OVER
from libs.eventsourcing.retention import forget_again
from libs.eventsourcing.schema import create_indexes
from libs.eventsourcing.stored_events import canonical_document, envelope_of
from libs.eventsourcing.swap import SwapEnded, swap_collections
from libs.eventsourcing.view import known_of
from libs.mongodb.client import (
    ASCENDING,
    MAJORITY,
    ClientSession,
    DeleteOne,
    Document,
    IndexModel,
    PyMongoError,
    ReplaceOne,
    document_bytes,
)
from libs.mongodb.leases import Leases

EVENTS_TOGETHER = 1_000
WAITING_BYTES_MAX = 32 * 1024 * 1024
PARKED_BYTES_MAX = 64 * 1024 * 1024
DOCUMENTS_BYTES_MAX = 16 * 1024 * 1024
MESSAGE_BYTES = 2_048
"""What a message takes besides its value."""
TAIL_MAX = 200
CATCH_UPS_MAX = 50
DIFFERENCES_MAX = 20
LEASE = "rebuild"
LEASE_SECONDS = 30.0
LEASE_LOST = "the lease on rebuilds was lost, and another rebuild may have begun; run it again"
READ_SECONDS_MAX = 60.0
SILENCE_MAX = 3
GRACE_SECONDS = 5.0

NEWER = "only a newer version of the service can read it: run the rebuild with that version"

Result = TypeVar("Result")

log = structlog.get_logger(__name__)


class RebuildFailed(Exception):
    """The rebuild gave up; the live documents are untouched."""


@dataclass(frozen=True, slots=True)
class CollectionReport:
    """One collection, live against rebuilt, at the report's position.

    Args:
        live_hash, rebuilt_hash: SHA-256 over the canonical documents in the order of their ids.
        different: the first ids whose documents are missing, needless or different.
    """

    name: str
    live_count: int
    rebuilt_count: int
    live_hash: str
    rebuilt_hash: str
    different: tuple[Any, ...]
    different_count: int


@dataclass(frozen=True, slots=True)
class RebuildReport:
    """What a rebuild found and did."""

    position: int
    collections: tuple[CollectionReport, ...]
    swapped: bool
    seconds: float

    @property
    def is_equal(self) -> bool:
        return all(item.live_hash == item.rebuilt_hash for item in self.collections)


class _NotReadFar(Exception):
    """The consumer is ahead of what was read from the log; read on and try again."""


@dataclass(slots=True)
class _Moment:
    """A service's database at one point: the head, how far each followed topic was handled, and what was put aside."""

    head: Head
    places: dict[str, dict[int, Place]]
    parked: set[str]
    passed_over: set[str]


class Rebuild:
    """A rebuild of one service.

    Args:
        store: the service's opened store.
        event_log: where foreign events come from.
        aggregates, projections, indexes: as in the service's definition.
        repaired_topics: topics whose stored offsets no longer fit the log: their projections are built from what the
            log holds of its present store, and the offsets are set to its end.
    """

    def __init__(
        self,
        store: EventStore,
        event_log: EventLog,
        *,
        aggregates: Sequence[Aggregate[Any]] = (),
        projections: Sequence[Projection] = (),
        indexes: Mapping[str, Sequence[IndexModel]] | None = None,
        repaired_topics: Sequence[str] = (),
    ) -> None:
        self._store = store
        self._event_log = event_log
        self._aggregates = {aggregate.name: aggregate for aggregate in aggregates}
        self._projections = projections
        self._indexes = indexes or {}
        self._repaired = set(repaired_topics)
        self._shadows: dict[str, str] = {}
        self._position = 0
        self._topics: dict[str, _TopicReplay] = {}
        self._holder = ""

    async def run(self, *, swap: bool = True, grace_seconds: float = GRACE_SECONDS) -> RebuildReport:
        """Rebuild, compare, and swap unless only the comparison is wanted.

        Args:
            swap: False leaves the live documents and drops the rebuilt ones.
            grace_seconds: how long readers may still use the former collections before they are dropped.

        Raises:
            RebuildFailed: nothing was changed.
        """
        started = time.monotonic()
        leases = Leases(self._store.database["leases"], LEASE_SECONDS)
        self._holder = leases.holder
        position, collections = await _exclusively(leases, lambda: self._run(swap, grace_seconds))
        report = RebuildReport(position, collections, swap, time.monotonic() - started)
        log.info("rebuilt", swapped=swap, position=position, equal=report.is_equal, seconds=round(report.seconds, 3))
        return report

    async def _run(self, swap: bool, grace_seconds: float) -> tuple[int, tuple[CollectionReport, ...]]:
        async with AsyncExitStack() as stack:
            await self._make_shadows()
            replaced = list(self._shadows.values())
            try:
                await self._open_topics(stack)
                await self._catch_up()
                for logical, shadow in self._shadows.items():
                    await create_indexes(self._store.database, shadow, self._indexes.get(logical, ()))
                await forget_again(self._store.database, self._shadows)
                compared = await self._compare()
                if swap:
                    former = dict((await self._store.head()).collections)
                    await self._swap()
                    replaced = [former[logical] for logical in self._shadows]
                    await asyncio.sleep(grace_seconds)
            finally:
                await self._drop(replaced)
        return compared

    def _require_lease(self, session: ClientSession | None = None) -> None:
        """Renew the lease, or fail: its next holder drops our shadows. Within a transaction nobody else can take it."""
        renewed = self._store.sync_database["leases"].update_one(
            {"_id": LEASE, "holder": self._holder},
            [{"$set": {"expires_at": {"$add": ["$$NOW", int(LEASE_SECONDS * 1000)]}}}],
            session=session,
        )
        if renewed.matched_count != 1:
            raise RebuildFailed(LEASE_LOST)

    async def _make_shadows(self) -> None:
        aggregates = self._aggregates.values()
        names = [aggregate.collection for aggregate in aggregates]
        names += [aggregate.listing.collection for aggregate in aggregates if aggregate.listing is not None]
        names += [projection.collection for projection in self._projections]
        live = set((await self._store.head()).collections.values())
        # Their maker has lost the lease, so it can neither swap nor report any more.
        existing = set(await self._store.database.list_collection_names())
        left_over = [name for name in existing - live if name.split("__rebuilt_")[0] in names and "__rebuilt_" in name]
        await self._drop(left_over)
        suffix = uuid7().replace("-", "")
        for name in dict.fromkeys(names):
            self._shadows[name] = f"{name}__rebuilt_{suffix}"
            await self._store.database.create_collection(self._shadows[name])

    async def _drop(self, names: Iterable[str]) -> None:
        for name in names:
            await self._store.database.drop_collection(name)

    async def _open_topics(self, stack: AsyncExitStack) -> None:
        moment = await asyncio.to_thread(self._moment, None)
        topics = list(dict.fromkeys(projection.topic for projection in self._projections))
        for topic in topics:
            projections = [projection for projection in self._projections if projection.topic == topic]
            stored, waiting_bytes_max = moment.places.get(topic, {}), WAITING_BYTES_MAX // len(topics)
            replay = _TopicReplay(topic, projections, self._event_log, stored, waiting_bytes_max)
            stack.push_async_callback(replay.close)
            await replay.open({})
            if topic in self._repaired:
                await replay.accept_what_the_log_holds()
            self._topics[topic] = replay

    async def _catch_up(self) -> None:
        """Apply events until only a few are left, which the swap can apply while it holds the head."""
        for _ in range(CATCH_UPS_MAX):
            moment = await asyncio.to_thread(self._moment, None)
            before = self._position
            await self._reach(moment)
            if self._position - before <= TAIL_MAX:
                return

    def _moment(self, session: ClientSession | None) -> _Moment:
        """Where the service stands; consistent in itself only within a session."""
        database = self._store.sync_database
        if session is None:
            database = database.with_options(read_concern=MAJORITY)
        head = _head_in(database["head"].find_one({"_id": "head"}, session=session))
        places: dict[str, dict[int, Place]] = {}
        for document in database["offsets"].find({}, session=session):
            topic, partition = document["_id"].rsplit("/", 1)
            place = Place(document["offset"], document["position"], document["store_id"])
            places.setdefault(topic, {})[int(partition)] = place
        parked, passed_over = (
            {document["_id"] for document in database[name].find({}, {"_id": 1}, session=session)}
            for name in (PARKED, PASSED_OVER)
        )
        return _Moment(head, places, parked, passed_over)

    async def _reach(self, moment: _Moment) -> None:
        """Bring the shadow documents to a moment, in portions that fit into memory."""
        await asyncio.to_thread(self._apply_own, moment.head)
        for topic, replay in self._topics.items():
            async with aclosing(replay.portions(replay.targets(moment.places.get(topic, {})))) as portions:
                async for _ in portions:
                    await asyncio.to_thread(self._apply_foreign, replay, moment)

    def _apply_own(self, head: Head, session: ClientSession | None = None) -> None:
        """Apply the service's own events; inside a transaction the progress is the caller's to keep."""
        for envelopes in self._own_events(head, session):
            own = [(aggregate, item) for item in envelopes if (aggregate := self._aggregate_of(item)) is not None]
            if newer := next((item for _, item in own if not item.is_understood), None):
                raise RebuildFailed(f"{newer.type} {newer.id}: {NEWER}")
            _Writes(self._store, self._shadows, session).evolve(own)
            if session is None:
                self._position = envelopes[-1].position

    def _apply_foreign(self, replay: "_TopicReplay", moment: _Moment, session: ClientSession | None = None) -> None:
        """Apply what was read of a topic, up to the moment."""
        handled = replay.handled_by(moment)
        foreign = [message.envelope for message in handled.messages if message.envelope is not None]
        for start in range(0, len(foreign), EVENTS_TOGETHER):
            writes = _Writes(self._store, self._shadows, session)
            writes.project(replay.projections, foreign[start : start + EVENTS_TOGETHER])
        if session is None:
            replay.forget(handled)

    def _aggregate_of(self, envelope: Envelope) -> Aggregate[Any] | None:
        return self._aggregates.get(envelope.stream.split("-", 1)[0])

    def _own_events(self, head: Head, session: ClientSession | None) -> Iterator[list[Envelope]]:
        if not self._aggregates:
            return
        events = self._store.sync_database["events"]
        if session is None:
            events = events.with_options(read_concern=MAJORITY)
        position = self._position
        while position < head.position:
            criteria = {"position": {"$gt": position, "$lte": head.position}}
            found = events.find(criteria, session=session).sort("position", ASCENDING).limit(EVENTS_TOGETHER)
            envelopes = _page(found, head.store_id)
            if not envelopes:
                raise RebuildFailed(f"the events after position {position} are missing")
            yield envelopes
            position = envelopes[-1].position

    async def _compare(self) -> tuple[int, tuple[CollectionReport, ...]]:
        """Compare in one snapshot, to which the shadow documents are brought first."""
        session = await asyncio.to_thread(lambda: self._store.sync_database.client.start_session(snapshot=True))
        try:
            moment = await asyncio.to_thread(self._moment, session)
            await self._reach(moment)
            reports = [
                await asyncio.to_thread(self._compare_collection, logical, moment.head, session)
                for logical in self._shadows
            ]
        finally:
            await asyncio.to_thread(session.end_session)
        await asyncio.to_thread(self._require_lease)
        return moment.head.position, tuple(reports)

    def _compare_collection(self, logical: str, head: Head, session: ClientSession) -> CollectionReport:
        database = self._store.sync_database
        live = database[head.collections[logical]].find({}, session=session).sort("_id", ASCENDING)
        rebuilt = database[self._shadows[logical]].find({}).sort("_id", ASCENDING)
        live_hash, rebuilt_hash = hashlib.sha256(), hashlib.sha256()
        live_count = rebuilt_count = 0
        different: list[Any] = []
        different_count = 0
        aggregate = next((item for item in self._aggregates.values() if item.collection == logical), None)
        for ours, theirs in _side_by_side(live, rebuilt):
            left, right = (b"" if item is None else canonical_document(item) for item in (ours, theirs))
            if aggregate is not None and ours is not None and theirs is not None and left != right:
                left = canonical_document(_as_written_now(aggregate, ours, theirs))
            if ours is not None:
                live_count += 1
                live_hash.update(left + b"\n")
            if theirs is not None:
                rebuilt_count += 1
                rebuilt_hash.update(right + b"\n")
            if left != right:
                different_count += 1
                different.append((ours or theirs or {})["_id"])
                del different[DIFFERENCES_MAX:]
        return CollectionReport(
            name=logical,
            live_count=live_count,
            rebuilt_count=rebuilt_count,
            live_hash=live_hash.hexdigest(),
            rebuilt_hash=rebuilt_hash.hexdigest(),
            different=tuple(different),
            different_count=different_count,
        )

    async def _swap(self) -> None:
        for _ in range(CATCH_UPS_MAX):
            await self._catch_up()
            try:
                return await asyncio.to_thread(swap_collections, self._store, self._shadows, self._last_step)
            except (_NotReadFar, SwapEnded):
                continue
        raise RebuildFailed("the service's consumers are faster than the log can be read; try again later")

    def _last_step(self, session: ClientSession, before: Head) -> None:
        self._require_lease(session)
        moment = self._moment(session)
        moment.head = before
        for topic, replay in self._topics.items():
            if not replay.has_read(replay.targets(moment.places.get(topic, {}))):
                raise _NotReadFar
        self._apply_own(before, session)
        for replay in self._topics.values():
            self._apply_foreign(replay, moment, session)
        for topic in self._repaired & self._topics.keys():
            writes = [
                ReplaceOne[Document]({"_id": f"{topic}/{partition}"}, _offset_document(place), upsert=True)
                for partition, place in self._topics[topic].accepted.items()
            ]
            self._store.sync_database["offsets"].delete_many(
                {"_id": {"$gte": f"{topic}/", "$lt": f"{topic}0"}}, session=session
            )
            if writes:
                self._store.sync_database["offsets"].bulk_write(writes, session=session)


@dataclass(slots=True)
class _Handled:
    """The messages of a topic that a moment has behind it, and those of them that were parked then."""

    messages: list[Message]
    parked: list[Message]
    offsets: dict[int, int]


@dataclass(slots=True)
class _TopicReplay:
    """What was read of a topic and is not yet applied.

    Args:
        stored: the places when the rebuild began: they name the store whose events count.
        waiting_bytes_max: how much is read before it has to be applied.
        read: the next offset to read, by partition.
        skipped: messages that were parked when their turn came; they count once they are no longer.
        accepted: for a topic under repair, the places to store: the log's end.
    """

    topic: str
    projections: Sequence[Projection]
    event_log: EventLog
    stored: Mapping[int, Place]
    waiting_bytes_max: int
    read: dict[int, int] = field(default_factory=dict)
    highest: dict[int, int] = field(default_factory=dict)
    waiting: dict[int, deque[Message]] = field(default_factory=dict)
    waiting_bytes: int = 0
    skipped: list[Message] = field(default_factory=list)
    accepted: dict[int, Place] = field(default_factory=dict)
    store_id: str = ""
    subscription: Subscription = field(init=False)
    _opened: AsyncExitStack = field(default_factory=AsyncExitStack)
    _silence: int = 0

    async def open(self, offsets: Mapping[int, int]) -> None:
        """Read from these offsets, or from the beginning of a partition that is not named."""
        await self.close()
        try:
            self.subscription = await self._opened.enter_async_context(self.event_log.subscribe(self.topic, offsets))
        except OffsetOutOfRange as error:
            raise RebuildFailed(f"{self.topic} expires faster than it can be read: {error}") from error

    async def close(self) -> None:
        await self._opened.aclose()

    def targets(self, places: Mapping[int, Place]) -> dict[int, int]:
        """The offsets up to which the topic counts as handled."""
        return {partition: place.offset for partition, place in (self.accepted or places).items()}

    def has_read(self, targets: Mapping[int, int]) -> bool:
        return all(self.read.get(partition, 0) >= offset for partition, offset in targets.items())

    async def portions(self, targets: Mapping[int, int]) -> AsyncGenerator[None, None]:
        """Read until nothing below the targets can be missing; yields whenever what waits has to be applied."""
        async for batch in self._batches(targets):
            for message in batch:
                self._take(message)
            if self.waiting_bytes >= self.waiting_bytes_max:
                yield
                if self.waiting_bytes >= self.waiting_bytes_max / 2:
                    await self._drop_what_is_ahead()
        yield

    async def _batches(self, targets: Mapping[int, int]) -> AsyncIterator[Sequence[Message]]:
        advanced_at = time.monotonic()
        while not self.has_read(targets):
            batch = await self.subscription.next_batch(EVENTS_TOGETHER, 1.0)
            if batch:
                partition, now = batch[0].partition, time.monotonic()
                advanced_at = now if batch[0].offset < targets.get(partition, 0) else advanced_at
                self.read[partition] = batch[-1].offset + 1
                yield batch
                advanced_at += time.monotonic() - now
            else:
                await self._find_silent(targets)
            if time.monotonic() - advanced_at > READ_SECONDS_MAX:
                raise RebuildFailed(f"{self.topic} can't be read up to the stored offsets")

    async def _find_silent(self, targets: Mapping[int, int]) -> None:
        """A partition of which nothing comes up to its very end holds nothing: its messages have expired."""
        ends = await self.subscription.end_offsets()
        if any(offset > ends.get(partition, 0) for partition, offset in targets.items()):
            raise RebuildFailed(f"{self.topic} ends before the stored offsets; `datasync repair` it first")
        silent = [partition for partition, offset in targets.items() if offset == ends[partition]]
        self._silence += 1
        if self._silence >= SILENCE_MAX:
            self.read.update({partition: targets[partition] for partition in silent if partition not in self.read})

    async def _drop_what_is_ahead(self) -> None:
        """Make room for what is still below the targets: the rest is read again in its turn."""
        for partition, waiting in self.waiting.items():
            if waiting:
                self.read[partition] = waiting[0].offset
            if first := next((message.position for message in waiting if message.position > 0), 0):
                self.highest[partition] = first - 1
        self.waiting.clear()
        self.waiting_bytes = 0
        await self.open(self.read)

    async def accept_what_the_log_holds(self) -> None:
        """For a repair: the events of the store that wrote last count, all of them, and nothing before."""
        ends = await self.subscription.end_offsets()
        highest: dict[int, dict[str, int]] = {}
        latest: tuple[datetime, int] | None = None
        async for batch in self._batches({partition: end for partition, end in ends.items() if end > 0}):
            for message in batch:
                positions = highest.setdefault(message.partition, {})
                positions[message.store_id] = max(message.position, positions.get(message.store_id, 0))
                if message.envelope is None or not message.store_id:
                    continue
                written = (message.envelope.time, message.offset)
                if latest is None or written > latest:
                    latest, self.store_id = written, message.store_id
        self.accepted = {
            partition: Place(self.read[partition], positions.get(self.store_id, 0), self.store_id)
            for partition, positions in highest.items()
        }
        self.read.clear()
        await self.open({})

    def handled_by(self, moment: _Moment) -> _Handled:
        """The messages to apply to get to a moment, in order; changes nothing here."""
        targets = self.targets(moment.places.get(self.topic, {}))
        handled = _Handled([], [], targets)
        below = (
            takewhile(partial(_is_below, targets.get(partition, 0)), waiting)
            for partition, waiting in self.waiting.items()
        )
        for message in chain(self.skipped, *below):
            if message.id in moment.parked:
                handled.parked.append(message)
            elif self._is_known(message, moment):
                handled.messages.append(message)
        return handled

    def _is_known(self, message: Message, moment: _Moment) -> bool:
        """Whether this version can apply the message; what it passed over as too new, it can not."""
        if message.envelope is None:
            raise RebuildFailed(f"{self.topic}: the message {message.id} can't be decoded")
        if not message.envelope.is_understood and message.id not in moment.passed_over:
            raise RebuildFailed(f"{message.event_type} {message.event_id}: {NEWER}")
        return not isinstance(message.envelope.data, UnknownEvent)

    def forget(self, handled: _Handled) -> None:
        """These are applied."""
        self.skipped = handled.parked
        if sum(map(_size_bytes, self.skipped)) > PARKED_BYTES_MAX:
            raise RebuildFailed(f"too much of {self.topic} is parked; `datasync parked --retry` it first")
        for partition, waiting in self.waiting.items():
            while waiting and waiting[0].offset < handled.offsets.get(partition, 0):
                self.waiting_bytes -= _size_bytes(waiting.popleft())

    def _take(self, message: Message) -> None:
        if self.accepted:
            known, is_foreign = self.store_id, message.store_id != self.store_id
        else:
            known = next((place.store_id for place in self.stored.values() if place.store_id), "")
            is_foreign = bool(known and message.store_id and message.store_id != known)
        is_repeated = known and 0 < message.position <= self.highest.get(message.partition, 0)
        if is_foreign or is_repeated:
            return
        self.highest[message.partition] = max(message.position, self.highest.get(message.partition, 0))
        self.waiting.setdefault(message.partition, deque()).append(message)
        self.waiting_bytes += _size_bytes(message)


@dataclass(frozen=True, slots=True)
class _Fold:
    """One event's change of one document, which is loaded when it runs."""

    logical: str
    identifier: Any
    run: Callable[[], None]


class _Writes:
    """Folds events into shadow documents: loads each once, and writes every state that it passes through, in order.

    Writing each state keeps to the unique keys at every step, as the live documents did.
    """

    def __init__(self, store: EventStore, shadows: Mapping[str, str], session: ClientSession | None) -> None:
        self._database = store.sync_database
        self._shadows = shadows
        self._session = session
        self._documents: dict[tuple[str, Any], Document | None] = {}
        self._operations: dict[str, list[ReplaceOne[Document] | DeleteOne]] = {}
        self._operations_bytes = 0
        self._lists: dict[str, ListChanges] = {}

    def evolve(self, events: Sequence[tuple[Aggregate[Any], Envelope]]) -> None:
        """Fold events into their entities' documents."""
        self._fold(
            [
                _Fold(
                    aggregate.collection,
                    aggregate.id_type(envelope.entity_id),
                    partial(self._evolve, aggregate, envelope),
                )
                for aggregate, envelope in events
            ]
        )

    def project(self, projections: Sequence[Projection], envelopes: Sequence[Envelope]) -> None:
        """Fold foreign events into the documents that they concern."""
        try:
            folds = [
                _Fold(projection.collection, key, partial(self._project, projection, key, envelope))
                for envelope in envelopes
                for projection in projections
                if (key := projection.key(envelope)) is not None
            ]
        except Exception as error:
            raise RebuildFailed(f"a projection's key: {error!r}") from error
        self._fold(folds)

    def _fold(self, folds: Sequence[_Fold]) -> None:
        """Run these in order, in halves where their documents are too large to be held together."""
        if not self._load(folds):
            middle = len(folds) // 2
            self._fold(folds[:middle])
            self._fold(folds[middle:])
            return
        for fold in folds:
            fold.run()
            if self._operations_bytes > DOCUMENTS_BYTES_MAX:
                self._flush()
        self._flush()
        self._documents.clear()

    def _load(self, folds: Sequence[_Fold]) -> bool:
        """Fetch the documents; False, and none of them, when they are too large together."""
        size_bytes = 0
        by_collection: dict[str, set[Any]] = {}
        for fold in folds:
            by_collection.setdefault(fold.logical, set()).add(fold.identifier)
        for logical, identifiers in by_collection.items():
            self._documents.update(dict.fromkeys((logical, identifier) for identifier in identifiers))
            criteria = {"_id": {"$in": list(identifiers)}}
            with self._database[self._shadows[logical]].find(criteria, session=self._session) as found:
                for document in found:
                    size_bytes += document_bytes(document)
                    if size_bytes > DOCUMENTS_BYTES_MAX and len(folds) > 1:
                        self._documents.clear()
                        return False
                    self._documents[logical, document["_id"]] = document
        return True

    def _evolve(self, aggregate: Aggregate[Any], envelope: Envelope) -> None:
        identifier = aggregate.id_type(envelope.entity_id)
        before = self._documents[aggregate.collection, identifier]
        try:
            state: Frozen | None = None if before is None else state_of(aggregate, before)
            after = aggregate.evolve(state, envelope)
            keys = tuple(aggregate.unique_keys(after))
            number = self._numbered(aggregate, before, state, after)
        except Exception as error:
            raise RebuildFailed(f"{aggregate.name}: {envelope.type} {envelope.id}: {error!r}") from error
        project_id = envelope.metadata.project_id if before is None else before["project_id"]
        document = stored_document(identifier, envelope.version, project_id, keys, after, number, envelope.time)
        if aggregate.listing is not None and number is not None and number < 0:
            self._lists[aggregate.listing.collection].documents.append((document, number))
        self._put(aggregate.collection, identifier, document)

    def _project(self, projection: Projection, key: Any, envelope: Envelope) -> None:
        try:
            after = projection.apply(self._documents[projection.collection, key], envelope)
        except Exception as error:
            raise RebuildFailed(f"{projection.collection}: {envelope.type} {envelope.id}: {error!r}") from error
        self._put(projection.collection, key, None if after is None else {**after, "_id": key})

    def _flush(self) -> None:
        # The documents get their numbers here, so they are written after it.
        for logical, changes in self._lists.items():
            changes.write(self._database, self._shadows[logical], self._session)
        self._lists.clear()
        for logical, operations in self._operations.items():
            self._database[self._shadows[logical]].bulk_write(operations, ordered=True, session=self._session)
        self._operations.clear()
        self._operations_bytes = 0

    def _numbered(
        self, aggregate: Aggregate[Any], document: Document | None, before: Frozen | None, after: Frozen
    ) -> int | None:
        """The entity's place in its lists after the event; below zero until it is flushed."""
        listing = aggregate.listing
        if listing is None:
            return None
        changes = self._lists.setdefault(listing.collection, ListChanges())
        names = () if before is None else listing.lists(before)
        return changes.follow(names, listing.lists(after), None if document is None else document.get("number"))

    def _put(self, logical: str, identifier: Any, document: Document | None) -> None:
        self._documents[logical, identifier] = document
        operation: ReplaceOne[Document] | DeleteOne = (
            DeleteOne({"_id": identifier})
            if document is None
            else ReplaceOne({"_id": identifier}, document, upsert=True)
        )
        self._operations.setdefault(logical, []).append(operation)
        self._operations_bytes += 0 if document is None else document_bytes(document)


async def _exclusively(leases: Leases, work: Callable[[], Awaitable[Result]]) -> Result:
    """One rebuild of a service at a time; ends ``work`` when the lease is lost meanwhile."""
    if not await leases.acquire(LEASE):
        raise RebuildFailed("another rebuild of this service is running")
    working = asyncio.ensure_future(work())
    renewing = asyncio.create_task(_renew(leases), name="rebuild-lease")
    try:
        await asyncio.wait({working, renewing}, return_when=asyncio.FIRST_COMPLETED)
        return await (working if working.done() else renewing)
    finally:
        for task in (working, renewing):
            task.cancel()
        # Retrieves their exceptions, which the event loop would otherwise report.
        await asyncio.gather(working, renewing, return_exceptions=True)
        await leases.release(LEASE)


async def _renew(leases: Leases) -> NoReturn:
    held_until = time.monotonic() + LEASE_SECONDS
    while True:
        await asyncio.sleep(LEASE_SECONDS / 6)
        asked_at = time.monotonic()
        try:
            if not await leases.acquire(LEASE):
                raise RebuildFailed(LEASE_LOST)
            held_until = asked_at + LEASE_SECONDS
        except PyMongoError as error:
            log.warning("lease_store_unavailable", lease=LEASE, error=type(error).__name__)
            if time.monotonic() >= held_until:
                raise RebuildFailed(LEASE_LOST) from error


def _as_written_now(aggregate: Aggregate[Any], live: Document, rebuilt: Document) -> Document:
    """A live document that an earlier version wrote, with what this version would add to the same state."""
    try:
        known = known_of(aggregate, live)
    except (KeyError, NewerVersion, PureCodeFailed):
        return live
    assert known.state is not None
    time = known.time or rebuilt.get("time")
    return stored_document(
        live["_id"], known.version, known.project_id, known.keys, known.state, known.number, time, known.others
    )


def _side_by_side(
    live: Iterable[Document], rebuilt: Iterable[Document]
) -> Iterator[tuple[Document | None, Document | None]]:
    """Documents with the same id together; both sides are sorted by id, so nothing is kept."""
    ours, theirs = iter(live), iter(rebuilt)
    left, right = next(ours, None), next(theirs, None)
    while left is not None or right is not None:
        order = 0
        if left is None or right is None:
            order = 1 if left is None else -1
        elif left["_id"] != right["_id"]:
            order = -1 if left["_id"] < right["_id"] else 1
        yield (left if order <= 0 else None), (right if order >= 0 else None)
        if order <= 0:
            left = next(ours, None)
        if order >= 0:
            right = next(theirs, None)


def _page(documents: Iterable[Document], store_id: str) -> list[Envelope]:
    """The first of these events, as many as are small enough together."""
    envelopes: list[Envelope] = []
    size_bytes = 0
    for document in documents:
        envelopes.append(envelope_of(document, store_id))
        size_bytes += len(document["data"])
        if size_bytes >= PAGE_BYTES_MAX:
            break
    return envelopes


def _is_below(offset: int, message: Message) -> bool:
    return message.offset < offset


def _size_bytes(message: Message) -> int:
    return len(message.raw) + MESSAGE_BYTES


def _offset_document(place: Place) -> Document:
    return {"offset": place.offset, "position": place.position, "store_id": place.store_id}


def _head_in(document: Document | None) -> Head:
    if document is None:
        raise RebuildFailed("the service has no store yet")
    return head_of(document)
