"""Rebuilds every document of a service from events, beside the live ones and while the service runs.

The owner's documents come from its own store, those about foreign entities from the log up to the stored offsets. The
result is compared with the live documents at one position, in one snapshot, and then takes their place in a batch like
any other: it raises the head, applies the last events and changes the collections' names there.
"""

import asyncio
import hashlib
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar

import structlog

from libs.core.decider import Aggregate, Projection
from libs.core.envelope import Envelope, Frozen, UnknownEvent
from libs.core.errors import NewerVersion
from libs.core.ids import uuid7
from libs.runtime.consumer import Place
from libs.runtime.decisions import known_of
from libs.runtime.event_log.port import EventLog, Message, Subscription
from libs.runtime.event_store import EventStore, Head, canonical_document, envelope_of, head_of
from libs.runtime.leases import Leases
from libs.runtime.list_changes import ListChanges
from libs.runtime.mongo import (
    ASCENDING,
    MAJORITY,
    ClientSession,
    DeleteOne,
    Document,
    IndexModel,
    PyMongoError,
    ReplaceOne,
)
from libs.runtime.parking import COLLECTION as PARKED
from libs.runtime.passed_over import COLLECTION as PASSED_OVER
from libs.runtime.retention import forget_again
from libs.runtime.works import PureCodeFailed, state_of, stored_document

EVENTS_TOGETHER = 1_000
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
                    await self._store.create_indexes(shadow, self._indexes.get(logical, ()))
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
        for topic in dict.fromkeys(projection.topic for projection in self._projections):
            subscription = await stack.enter_async_context(self._event_log.subscribe(topic, {}))
            projections = [projection for projection in self._projections if projection.topic == topic]
            replay = _TopicReplay(topic, projections, subscription, moment.places.get(topic, {}))
            if topic in self._repaired:
                await replay.accept_what_the_log_holds()
            self._topics[topic] = replay

    async def _catch_up(self) -> None:
        """Apply events until only a few are left, which the swap can apply while it holds the head."""
        for _ in range(CATCH_UPS_MAX):
            moment = await asyncio.to_thread(self._moment, None)
            before = self._position
            await self._read_topics(moment)
            await asyncio.to_thread(self._apply_up_to, moment)
            if self._position - before <= TAIL_MAX:
                return

    async def _read_topics(self, moment: _Moment) -> None:
        for topic, replay in self._topics.items():
            await replay.read_up_to(replay.targets(moment.places.get(topic, {})))

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

    def _apply_up_to(self, moment: _Moment, session: ClientSession | None = None) -> None:
        """Bring the shadow documents to a moment; inside a transaction its progress is the caller's to keep."""
        for envelopes in self._own_events(moment.head, session):
            writes = _Writes(self._store, self._shadows, session)
            own = [(aggregate, item) for item in envelopes if (aggregate := self._aggregate_of(item)) is not None]
            if newer := next((item for _, item in own if not item.is_understood), None):
                raise RebuildFailed(f"{newer.type} {newer.id}: {NEWER}")
            writes.load((aggregate.collection, aggregate.id_type(item.entity_id)) for aggregate, item in own)
            for aggregate, envelope in own:
                writes.evolve(aggregate, envelope)
            writes.flush()
            if session is None:
                self._position = envelopes[-1].position
        for replay in self._topics.values():
            handled = replay.handled_by(moment)
            foreign = [message.envelope for message in handled.messages if message.envelope is not None]
            for start in range(0, len(foreign), EVENTS_TOGETHER):
                writes = _Writes(self._store, self._shadows, session)
                writes.project(replay.projections, foreign[start : start + EVENTS_TOGETHER])
                writes.flush()
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
            envelopes = [envelope_of(document, head.store_id) for document in found]
            if not envelopes:
                raise RebuildFailed(f"the events after position {position} are missing")
            yield envelopes
            position = envelopes[-1].position

    async def _compare(self) -> tuple[int, tuple[CollectionReport, ...]]:
        """Compare in one snapshot, to which the shadow documents are brought first."""
        session = await asyncio.to_thread(lambda: self._store.sync_database.client.start_session(snapshot=True))
        try:
            moment = await asyncio.to_thread(self._moment, session)
            await self._read_topics(moment)
            await asyncio.to_thread(self._apply_up_to, moment)
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
                return await asyncio.to_thread(self._store.swap_blocking, self._shadows, self._last_step)
            except _NotReadFar:
                continue
        raise RebuildFailed("the service's consumers are faster than the log can be read; try again later")

    def _last_step(self, session: ClientSession, before: Head) -> None:
        self._require_lease(session)
        moment = self._moment(session)
        moment.head = before
        for topic, replay in self._topics.items():
            if not replay.has_read(replay.targets(moment.places.get(topic, {}))):
                raise _NotReadFar
        self._apply_up_to(moment, session)
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
        read: the next offset to read, by partition.
        skipped: messages that were parked when their turn came; they count once they are no longer.
        accepted: for a topic under repair, the places to store: the log's end.
    """

    topic: str
    projections: Sequence[Projection]
    subscription: Subscription
    stored: dict[int, Place]
    read: dict[int, int] = field(default_factory=dict)
    highest: dict[int, int] = field(default_factory=dict)
    waiting: dict[int, deque[Message]] = field(default_factory=dict)
    skipped: list[Message] = field(default_factory=list)
    accepted: dict[int, Place] = field(default_factory=dict)
    store_id: str = ""
    _silence: int = 0

    def targets(self, places: Mapping[int, Place]) -> dict[int, int]:
        """The offsets up to which the topic counts as handled."""
        return {partition: place.offset for partition, place in (self.accepted or places).items()}

    def has_read(self, targets: Mapping[int, int]) -> bool:
        return all(self.read.get(partition, 0) >= offset for partition, offset in targets.items())

    async def read_up_to(self, targets: Mapping[int, int]) -> None:
        """Read until nothing below the targets can be missing."""
        deadline = time.monotonic() + READ_SECONDS_MAX
        while not self.has_read(targets):
            batch = await self.subscription.next_batch(EVENTS_TOGETHER, 1.0)
            if batch:
                self._take(batch)
                deadline = time.monotonic() + READ_SECONDS_MAX
                continue
            ends = await self.subscription.end_offsets()
            if any(offset > ends.get(partition, 0) for partition, offset in targets.items()):
                raise RebuildFailed(f"{self.topic} ends before the stored offsets; `datasync repair` it first")
            if time.monotonic() > deadline:
                raise RebuildFailed(f"{self.topic} can't be read up to the stored offsets")
            # A partition of which nothing comes up to its very end holds nothing: its messages have expired.
            silent = [partition for partition, offset in targets.items() if offset == ends[partition]]
            self._silence += 1
            if self._silence >= SILENCE_MAX:
                self.read.update({partition: targets[partition] for partition in silent if partition not in self.read})

    async def accept_what_the_log_holds(self) -> None:
        """For a repair: the events of the store that wrote last count, all of them, and nothing before."""
        ends = await self.subscription.end_offsets()
        self.stored = {}
        await self.read_up_to({partition: end for partition, end in ends.items() if end > 0})
        messages = [message for waiting in self.waiting.values() for message in waiting]
        if messages:
            self.store_id = _latest_store(messages)
        for partition, waiting in self.waiting.items():
            own = [message for message in waiting if message.store_id == self.store_id]
            position = max((message.position for message in own), default=0)
            self.accepted[partition] = Place(self.read[partition], position, self.store_id)
            self.waiting[partition] = deque(own)

    def handled_by(self, moment: _Moment) -> _Handled:
        """The messages to apply to get to a moment, in order; changes nothing here."""
        targets = self.targets(moment.places.get(self.topic, {}))
        handled = _Handled([], [], targets)
        for message in self.skipped:
            (handled.parked if self._is_skipped(message, moment) else handled.messages).append(message)
        for partition, waiting in self.waiting.items():
            for message in waiting:
                if message.offset >= targets.get(partition, 0):
                    break
                (handled.parked if self._is_skipped(message, moment) else handled.messages).append(message)
        return handled

    def _is_skipped(self, message: Message, moment: _Moment) -> bool:
        """Whether a message counts as not handled: it is parked, or the service passed over it as too new."""
        if message.id in moment.parked:
            return True
        if message.envelope is None:
            raise RebuildFailed(f"{self.topic}: the message {message.id} can't be decoded")
        if not message.envelope.is_understood and message.id not in moment.passed_over:
            raise RebuildFailed(f"{message.event_type} {message.event_id}: {NEWER}")
        return isinstance(message.envelope.data, UnknownEvent)

    def forget(self, handled: _Handled) -> None:
        """These are applied."""
        self.skipped = handled.parked
        for partition, waiting in self.waiting.items():
            while waiting and waiting[0].offset < handled.offsets.get(partition, 0):
                waiting.popleft()

    def _take(self, batch: Sequence[Message]) -> None:
        known = next((place.store_id for place in self.stored.values() if place.store_id), "")
        for message in batch:
            self.read[message.partition] = message.offset + 1
            foreign = known and message.store_id and message.store_id != known
            repeated = known and 0 < message.position <= self.highest.get(message.partition, 0)
            if foreign or repeated:
                continue
            self.highest[message.partition] = max(message.position, self.highest.get(message.partition, 0))
            self.waiting.setdefault(message.partition, deque()).append(message)


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
        self._lists: dict[str, ListChanges] = {}

    def load(self, wanted: Iterable[tuple[str, Any]]) -> None:
        """Fetch the documents that the next events concern, by logical collection name and id."""
        by_collection: dict[str, set[Any]] = {}
        for logical, identifier in wanted:
            if (logical, identifier) not in self._documents:
                by_collection.setdefault(logical, set()).add(identifier)
        for logical, identifiers in by_collection.items():
            self._documents.update(dict.fromkeys((logical, identifier) for identifier in identifiers))
            criteria = {"_id": {"$in": list(identifiers)}}
            for document in self._database[self._shadows[logical]].find(criteria, session=self._session):
                self._documents[logical, document["_id"]] = document

    def evolve(self, aggregate: Aggregate[Any], envelope: Envelope) -> None:
        """Fold one event into its entity's document, which is loaded."""
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

    def project(self, projections: Sequence[Projection], envelopes: Sequence[Envelope]) -> None:
        """Fold foreign events into the documents that they concern."""
        try:
            keyed = [
                (projection, key, envelope)
                for envelope in envelopes
                for projection in projections
                if (key := projection.key(envelope)) is not None
            ]
        except Exception as error:
            raise RebuildFailed(f"a projection's key: {error!r}") from error
        self.load((projection.collection, key) for projection, key, _ in keyed)
        for projection, key, envelope in keyed:
            try:
                after = projection.apply(self._documents[projection.collection, key], envelope)
            except Exception as error:
                raise RebuildFailed(f"{projection.collection}: {envelope.type} {envelope.id}: {error!r}") from error
            self._put(projection.collection, key, None if after is None else {**after, "_id": key})

    def flush(self) -> None:
        # The documents get their numbers here, so they are written after it.
        for logical, changes in self._lists.items():
            changes.write(self._database, self._shadows[logical], self._session)
        self._lists.clear()
        for logical, operations in self._operations.items():
            self._database[self._shadows[logical]].bulk_write(operations, ordered=True, session=self._session)
        self._operations.clear()

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


def _latest_store(messages: Sequence[Message]) -> str:
    """The store whose events were written last."""
    timed = [message for message in messages if message.envelope is not None and message.store_id]
    if not timed:
        return ""
    latest = max(timed, key=lambda message: (message.envelope.time if message.envelope else None, message.offset))
    return latest.store_id


def _offset_document(place: Place) -> Document:
    return {"offset": place.offset, "position": place.position, "store_id": place.store_id}


def _head_in(document: Document | None) -> Head:
    if document is None:
        raise RebuildFailed("the service has no store yet")
    return head_of(document)
