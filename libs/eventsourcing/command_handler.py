"""The write path: concurrent commands are decided together and committed in one transaction per batch.

One batch is in flight at a time; while it is, the next one gathers, without any artificial wait. A batch is loaded,
decided and committed on a thread of its own as plain sequential code, which costs one hop to the thread and one back
whatever the number of round trips. A caller is answered only when its batch is durable.
"""

import asyncio
import os
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import structlog

from libs.contracts.registry import is_known
from libs.core.clock import Clock
from libs.core.decider import Act, Aggregate, ExpectedVersion, Projection
from libs.core.envelope import Envelope, Frozen, Metadata
from libs.core.errors import Conflict, DataSyncError, FixRequest, NewerVersion, RetryLater
from libs.core.sizes import text_bytes
from libs.eventsourcing.decisions import DecisionPass, Pending, Place, View, known_of
from libs.eventsourcing.event_store import Batch, DecisionOutdated, EventStore, Head, OffsetMove, OffsetMoved, SideWrite
from libs.eventsourcing.requests import (
    ConsumerWork,
    Entity,
    IdempotencyKey,
    Outcome,
    PureCodeFailed,
    Work,
    fold_stream,
    newer_version,
    stored_document,
)
from libs.mongodb.client import Document, PyMongoError
from libs.mongodb.pipeline import find
from libs.process.telemetry import BATCH_COMMANDS, COMMANDS, COMMANDS_WAITING, COMMIT_SECONDS

COMMANDS_MAX = 400
WAITING_MAX = 4_096
WAITING_BYTES_MAX = 64 * 1024 * 1024
DECISIONS_MAX = 5
RELEASE_SECONDS = 1.0

__all__ = [
    "CommandHandler",
    "ConsumerWork",
    "Entity",
    "IdempotencyKey",
    "Outcome",
    "PureCodeFailed",
    "Work",
    "fold_stream",
    "stored_document",
]

log = structlog.get_logger(__name__)

State = TypeVar("State", bound=Frozen)
Processed = tuple[Sequence[Envelope], list[Pending]]
"""The events that a batch committed, and its works that wait for the next one."""


class CommandHandler:
    """Executes commands against the service's store.

    Args:
        store: an opened event store.
        clock: gives every event its time.
        aggregates: all aggregates of the service: replays need to know them by name.
    """

    def __init__(self, store: EventStore, clock: Clock, aggregates: Iterable[Aggregate[Any]]) -> None:
        self._store = store
        self._clock = clock
        self._aggregates = {aggregate.name: aggregate for aggregate in aggregates}
        self._waiting: deque[Pending] = deque()
        self._waiting_bytes = 0
        self._wake = asyncio.Event()
        self._listeners: list[Callable[[Sequence[Envelope]], None]] = []
        self._batches: SimpleQueue[tuple[list[Pending], asyncio.Future[Processed]] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._loop_task: asyncio.Task[None] | None = None
        self._stopping = False

    def on_commit(self, listener: Callable[[Sequence[Envelope]], None]) -> None:
        """Call ``listener`` on the event loop with the events of each batch that this process committed, in order."""
        self._listeners.append(listener)

    def start(self) -> None:
        """Begin to take commands."""
        loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._work, args=(loop,), name="write-path", daemon=True)
        self._thread.start()
        self._loop_task = loop.create_task(self._run(), name="write-path")
        self._loop_task.add_done_callback(_crash_if_failed)

    async def close(self) -> None:
        """Finish what waits, then stop; later commands are refused with ``RetryLater``."""
        self._stopping = True
        self._wake.set()
        if self._loop_task is not None and self._thread is not None:
            await self._loop_task
            self._batches.put(None)
            self._thread.join()

    @property
    def waiting(self) -> int:
        """How many works wait for a batch."""
        return len(self._waiting)

    async def handle(
        self,
        aggregate: Aggregate[State],
        entity_id: int | str,
        command: Any,
        metadata: Metadata,
        *,
        expected_version: ExpectedVersion = None,
        side_writes: Sequence[SideWrite] = (),
        idempotency: IdempotencyKey | None = None,
    ) -> Entity[State]:
        """Execute one command and return the entity as it stands after it."""
        act = Act(aggregate, entity_id, command, expected_version)
        outcome = await self.execute(Work([act], metadata, side_writes, idempotency))
        entity = outcome.entities[0]
        assert entity is not None
        return entity

    async def execute(self, work: Work) -> Outcome:
        """Execute a work; durable when it returns.

        Raises:
            FixRequest: a refusal: of ``decide``, a taken unique key (``Conflict``), a stale ``expected_version``
                (``PreconditionFailed``), an event over its size (``TooLarge``), a reused Idempotency-Key.
            RetryLater: the queue is full, or the store can't be reached; nothing was done.
            OutcomeUnknown: the store did not say in time whether it was done.
        """
        acts = [(act, work.metadata) for act in work.acts]
        pending = self._enqueue(acts, (), None, work.side_writes, work.idempotency)
        outcome = await pending.future
        if pending.replay is not None:
            return await self._replayed(pending.replay)
        return outcome

    async def consume(self, work: ConsumerWork) -> Outcome:
        """Write a consumer's step; raises ``OffsetMoved`` when another instance took it."""
        return await self._enqueue(work.acts, work.projections, work.offset, work.side_writes, None).future

    def _enqueue(
        self,
        acts: Sequence[tuple[Act, Metadata]],
        projections: Sequence[tuple[Projection, Envelope]],
        offset: OffsetMove | None,
        side_writes: Sequence[SideWrite],
        idempotency: IdempotencyKey | None,
    ) -> Pending:
        if self._stopping:
            raise RetryLater("the service is shutting down", retry_after_seconds=1)
        size_bytes = sum(text_bytes(act.command) for act, _ in acts)
        is_over = self._waiting_bytes + size_bytes > WAITING_BYTES_MAX and self._waiting
        if len(self._waiting) >= WAITING_MAX or is_over:
            raise RetryLater("too many changes are waiting", code="overloaded", retry_after_seconds=1)
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        pending = Pending(acts, projections, offset, side_writes, idempotency, future, size_bytes)
        self._waiting.append(pending)
        self._waiting_bytes += size_bytes
        self._wake.set()
        return pending

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._waiting:
                batch = self._gather()
                begun_at = loop.time()
                processed: asyncio.Future[Processed] = loop.create_future()
                self._batches.put((batch, processed))
                committed, later = await processed
                self._waiting.extendleft(reversed(later))
                self._waiting_bytes += sum(pending.size_bytes for pending in later)
                _measure(batch, loop.time() - begun_at, len(self._waiting))
                if committed:
                    self._announce(committed)
                for pending in batch:
                    _answer(pending)
            if self._stopping:
                return

    def _gather(self) -> list[Pending]:
        if self._waiting[0].alone:
            return [self._next()]
        batch: list[Pending] = []
        while self._waiting and len(batch) < COMMANDS_MAX and not self._waiting[0].alone:
            pending = self._next()
            if not pending.future.cancelled():
                batch.append(pending)
        return batch

    def _next(self) -> Pending:
        pending = self._waiting.popleft()
        self._waiting_bytes -= pending.size_bytes
        return pending

    def _announce(self, committed: Sequence[Envelope]) -> None:
        for listener in self._listeners:
            listener(committed)

    # From here on everything runs on the write path's thread.

    def _work(self, loop: asyncio.AbstractEventLoop) -> None:
        """Process batches until told to end; an executor's futures would cost more than a lone command's decision."""
        while True:
            try:
                taken = self._batches.get(timeout=RELEASE_SECONDS if self._store.may_hold_locks else None)
            except Empty:
                self._store.release_locks_blocking()
                continue
            if taken is None:
                return
            batch, processed = taken
            result: Processed | BaseException
            try:
                result = self._process(batch)
            except BaseException as error:  # noqa: BLE001 - the loop raises it: a write path that fails ends the process
                result = error
            loop.call_soon_threadsafe(_settle, processed, result)

    def _process(self, batch: list[Pending]) -> Processed:
        """Decide and commit; sets each pending's result, or hands it back for the next batch."""
        open_works = batch
        later: list[Pending] = []
        while True:
            try:
                view, head = self._load(open_works)
                prepared, deferred = self._decide(open_works, view, head)
                later += deferred
                open_works = [pending for pending in open_works if pending.result is not None]
                if prepared.is_empty():
                    return (), later
                position = self._store.commit_blocking(prepared)
            except DecisionOutdated as outdated:
                open_works = self._again(open_works, outdated, later)
                if not open_works:
                    return (), later
                continue
            except OffsetMoved as moved:
                open_works = _without_offset(open_works, moved)
                continue
            except Exception as error:  # noqa: BLE001 - every caller gets the failure, whatever it was
                failure = error if isinstance(error, DataSyncError) else _store_failure(error)
                for pending in open_works:
                    pending.result = failure
                return (), later
            return self._committed(open_works, prepared, position), later

    def _again(self, open_works: list[Pending], outdated: DecisionOutdated, later: list[Pending]) -> list[Pending]:
        """Count a failed decision against its culprits; one that keeps failing is tried by itself, then refused."""
        culprits = [pending for pending in open_works if _concerns(pending, outdated)] or open_works
        for pending in culprits:
            pending.decisions += 1
            if pending.decisions >= 2 and len(open_works) > 1:
                pending.alone = True
        remaining = []
        for pending in open_works:
            pending.result, pending.replay = None, None
            if pending.decisions >= DECISIONS_MAX:
                pending.result = Conflict("the entity keeps changing; try again", code="contention")
            elif pending.alone and len(open_works) > 1:
                later.append(pending)
            else:
                remaining.append(pending)
        return remaining

    def _committed(self, open_works: list[Pending], prepared: Batch, position: int) -> Sequence[Envelope]:
        placed = {envelope.id: envelope.at(number) for number, envelope in enumerate(prepared.events, position + 1)}
        for pending in open_works:
            if isinstance(pending.result, Outcome) and pending.result.events:
                events = [placed[envelope.id] for envelope in pending.result.events]
                pending.result = Outcome(pending.result.entities, events)
        return list(placed.values())

    def _load(self, works: list[Pending]) -> tuple[View, Head]:
        """One query a collection for all that the batch will look at, all in one flight."""
        head = self._store.head_cached or self._store.head_blocking()
        wanted: dict[str, dict[int | str, Aggregate[Any]]] = {}
        foreign: dict[str, set[int | str]] = {}
        for pending in works:
            for act, _ in pending.acts:
                wanted.setdefault(act.aggregate.collection, {})[act.entity_id] = act.aggregate
            for projection, envelope in pending.projections:
                if (key := projection.key(envelope)) is not None:
                    foreign.setdefault(projection.collection, set()).add(key)
        idempotency = [pending.idempotency.id for pending in works if pending.idempotency]
        moves = [pending.offset.key for pending in works if pending.offset]
        sought: list[tuple[str, Collection[Any]]] = [(head.collections[name], wanted[name]) for name in wanted]
        sought += [(head.collections[name], foreign[name]) for name in foreign]
        sought += [(name, ids) for name, ids in (("idempotency", idempotency), ("offsets", moves)) if ids]
        finds = [find(name, {"_id": {"$in": list(ids)}}) for name, ids in sought]
        streams = _streams_of(wanted) if head.newer_types else {}
        if streams:
            criteria = {"stream": {"$in": list(streams)}, "type": {"$in": list(head.newer_types)}}
            finds.append(find("events", criteria, {"stream": 1, "type": 1, "schema_version": 1}))
        found = iter(self._store.pipeline.find(finds))
        view = View()
        for name, aggregates in wanted.items():
            for document in next(found):
                place = (name, document["_id"])
                try:
                    view.aggregates[place] = known_of(aggregates[document["_id"]], document)
                except (NewerVersion, PureCodeFailed) as error:
                    view.unreadable[place] = error
        for name in foreign:
            view.documents.update({(name, document["_id"]): document for document in next(found)})
        if idempotency:
            view.idempotency = {document["_id"]: document for document in next(found)}
        if moves:
            view.offsets = {document["_id"]: document["offset"] for document in next(found)}
        for document in next(found, ()):
            if not is_known(document["type"], document["schema_version"]):
                name, entity_id = streams[document["stream"]]
                view.unreadable[name, entity_id] = newer_version(wanted[name][entity_id], entity_id)
        return view, head

    def _decide(self, works: list[Pending], view: View, head: Head) -> tuple[Batch, list[Pending]]:
        """Decide every work in order; a second pass is needed only where a unique key turns out to be taken."""
        now = self._clock.now()
        pass_ = DecisionPass(now, view, head)
        pass_.run(works)
        # One command by itself harms nobody if the unique index refuses it: the index is asked at no further cost.
        if pass_.claimed and (len(works) > 1 or works[0].decisions):
            taken = self._owners(pass_.claimed, head)
            if any(owner != pass_.claimed[key] for key, owner in taken.items()):
                view.owners.update(taken)
                pass_ = DecisionPass(now, view, head)
                pass_.run(works)
        return pass_.batch(), pass_.later

    def _owners(self, keys: Collection[tuple[str, str]], head: Head) -> dict[tuple[str, str], int | str]:
        """Who holds which of these keys; what else the holders hold is nobody's question."""
        by_collection: dict[str, list[str]] = {}
        for collection, key in keys:
            by_collection.setdefault(collection, []).append(key)
        owners: dict[tuple[str, str], int | str] = {}
        finds = [
            find(head.collections[name], {"keys": {"$in": held}}, {"keys": 1}) for name, held in by_collection.items()
        ]
        for collection, documents in zip(by_collection, self._store.pipeline.find(finds), strict=True):
            for document in documents:
                places = ((collection, key) for key in document["keys"])
                owners.update({place: document["_id"] for place in places if place in keys})
        return owners

    async def _replayed(self, record: Document) -> Outcome:
        """Rebuild the answer of an earlier request from the entities at the versions that it left."""
        entities: list[Entity[Any] | None] = []
        for item in record["entities"]:
            aggregate = self._aggregates[item["aggregate"]]
            envelopes = self._store.read_stream(aggregate.stream(item["id"]), version_max=item["version"])
            entities.append(Entity(item["id"], item["version"], await fold_stream(aggregate, envelopes)))
        return Outcome(entities, replayed=True)


def _streams_of(wanted: Mapping[str, Mapping[int | str, Aggregate[Any]]]) -> dict[str, Place]:
    return {
        aggregate.stream(entity_id): (collection, entity_id)
        for collection, aggregates in wanted.items()
        for entity_id, aggregate in aggregates.items()
    }


def _concerns(pending: Pending, outdated: DecisionOutdated) -> bool:
    streams = {act.aggregate.stream(act.entity_id) for act, _ in pending.acts}
    if outdated.streams:
        return not streams.isdisjoint(outdated.streams)
    if outdated.keys:
        if not isinstance(pending.result, Outcome):
            return False
        return any(
            entity is not None and not set(act.aggregate.unique_keys(entity.state)).isdisjoint(outdated.keys)
            for (act, _), entity in zip(pending.acts, pending.result.entities, strict=False)
        )
    return True


def _without_offset(works: list[Pending], moved: OffsetMoved) -> list[Pending]:
    remaining = []
    for pending in works:
        if pending.offset is not None and pending.offset.key == str(moved):
            pending.result = moved
        else:
            remaining.append(pending)
    return remaining


def _store_failure(error: Exception) -> BaseException:
    if isinstance(error, PyMongoError):
        log.warning("store_failed", error=type(error).__name__)
        return RetryLater("the store failed; the change was not made", retry_after_seconds=1)
    log.error("write_path_failed", exc_info=error)
    return error


def _crash_if_failed(task: "asyncio.Task[None]") -> None:
    """A write path that died would leave every caller waiting; a new process recovers by itself."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.critical("write_path_died", exc_info=error)
        os._exit(70)


def _settle(processed: "asyncio.Future[Processed]", result: Processed | BaseException) -> None:
    if processed.done():
        return
    if isinstance(result, BaseException):
        processed.set_exception(result)
    else:
        processed.set_result(result)


_ENDED = {outcome: COMMANDS.labels(outcome) for outcome in ("committed", "refused", "failed")}


def _measure(batch: Sequence[Pending], seconds: float, waiting: int) -> None:
    ended = dict.fromkeys(_ENDED, 0)
    for pending in batch:
        if pending.result is not None:
            ended[_outcome(pending)] += 1
    for outcome, number in ended.items():
        if number:
            _ENDED[outcome].inc(number)
    BATCH_COMMANDS.observe(ended["committed"])
    COMMIT_SECONDS.observe(seconds)
    COMMANDS_WAITING.set(waiting)


def _outcome(pending: Pending) -> str:
    match pending.result:
        case FixRequest():
            return "refused"
        case BaseException():
            return "failed"
        case _:
            return "committed"


def _answer(pending: Pending) -> None:
    if pending.result is None or pending.future.done():
        return
    if isinstance(pending.result, BaseException):
        pending.future.set_exception(pending.result)
    else:
        pending.future.set_result(pending.result)
