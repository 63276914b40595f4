"""The write path: concurrent commands are decided together and committed in one transaction per batch.

One batch is in flight at a time; while it is, the next one gathers, without any artificial wait. A batch is loaded,
decided and committed on a thread of its own as plain sequential code, which costs one hop to the thread and one back
whatever the number of round trips. A caller is answered only when its batch is durable.
"""

import asyncio
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Generic, TypeVar

import structlog

from libs.core.clock import Clock
from libs.core.decider import Act, Aggregate, Projection
from libs.core.envelope import EVENT_SIZE_BYTES_MAX, Envelope, Event, Frozen, Metadata
from libs.core.errors import (
    Conflict,
    DataSyncError,
    FieldError,
    FixRequest,
    NotFound,
    PreconditionFailed,
    RetryLater,
    TooLarge,
    Unprocessable,
)
from libs.core.ids import uuid7
from libs.runtime.event_store import Batch, DecisionOutdated, EventStore, Head, OffsetMove, OffsetMoved, SideWrite
from libs.runtime.mongo import Document, PyMongoError

COMMANDS_MAX = 400
DOCUMENTS_MAX = 1_000
BATCH_BYTES_MAX = 8 * 1024 * 1024
WAITING_MAX = 4_096
DECISIONS_MAX = 5

log = structlog.get_logger(__name__)

State = TypeVar("State", bound=Frozen)


@dataclass(frozen=True, slots=True)
class IdempotencyKey:
    """``id`` is the hash of principal, method, path and key; ``request_hash`` that of the body."""

    id: str
    request_hash: str


@dataclass(frozen=True, slots=True)
class Entity(Generic[State]):
    """An entity as it stands at a version."""

    id: int | str
    version: int
    state: State


@dataclass(frozen=True, slots=True)
class Work:
    """Commands that take effect together or not at all."""

    acts: Sequence[Act]
    metadata: Metadata
    side_writes: Sequence[SideWrite] = ()
    idempotency: IdempotencyKey | None = None


@dataclass(frozen=True, slots=True)
class ConsumerWork:
    """What a consumer's step writes in one transaction with the offset that it moves to."""

    offset: OffsetMove
    projections: Sequence[tuple[Projection, Envelope]] = ()
    acts: Sequence[tuple[Act, Metadata]] = ()
    side_writes: Sequence[SideWrite] = ()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a work came to.

    Args:
        entities: one for each act, as it stands after it; None where an ignorable refusal left nothing.
        replayed: True when an earlier request with the same Idempotency-Key had done it.
    """

    entities: Sequence[Entity[Any] | None]
    events: Sequence[Envelope] = ()
    replayed: bool = False


class PureCodeFailed(Exception):
    """``decide``, ``evolve`` or ``apply`` raised something other than a refusal: a defect, the same every time."""


@dataclass(slots=True, eq=False)
class _Pending:
    """A work that waits for its batch."""

    acts: Sequence[tuple[Act, Metadata]]
    projections: Sequence[tuple[Projection, Envelope]]
    offset: OffsetMove | None
    side_writes: Sequence[SideWrite]
    idempotency: IdempotencyKey | None
    future: "asyncio.Future[Outcome]"
    decisions: int = 0
    alone: bool = False
    result: Outcome | BaseException | None = None
    replay: Document | None = None


_Key = tuple[str, int | str]


@dataclass(slots=True)
class _Known:
    """One document as the batch sees it: what was loaded, then what the batch made of it."""

    version: int
    state: Frozen | None
    project_id: int | None
    keys: tuple[str, ...]
    document: Document | None = None


@dataclass(slots=True)
class _View:
    """Everything a batch decides on."""

    aggregates: dict[_Key, _Known] = field(default_factory=dict)
    documents: dict[_Key, Document | None] = field(default_factory=dict)
    offsets: dict[str, int] = field(default_factory=dict)
    idempotency: dict[str, Document] = field(default_factory=dict)
    owners: dict[tuple[str, str], int | str | None] = field(default_factory=dict)
    """Who holds a unique key of a collection: an entity id, or None for nobody; absent while not asked for."""


class _Later(Exception):
    """This work has to wait for the batch before it: it meets what that batch is about to change."""


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
        self._waiting: deque[_Pending] = deque()
        self._wake = asyncio.Event()
        self._listeners: list[Callable[[Sequence[Envelope]], None]] = []
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="write-path")
        self._loop_task: asyncio.Task[None] | None = None
        self._stopping = False

    def on_commit(self, listener: Callable[[Sequence[Envelope]], None]) -> None:
        """Call ``listener`` on the event loop with the events of each batch that this process committed, in order."""
        self._listeners.append(listener)

    def start(self) -> None:
        """Begin to take commands."""
        self._loop_task = asyncio.get_running_loop().create_task(self._run(), name="write-path")
        self._loop_task.add_done_callback(_crash_if_failed)

    async def close(self) -> None:
        """Finish what waits, then stop; later commands are refused with ``RetryLater``."""
        self._stopping = True
        self._wake.set()
        if self._loop_task is not None:
            await self._loop_task
        self._thread.shutdown(wait=True)

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
        expected_version: int | None = None,
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
    ) -> _Pending:
        if self._stopping:
            raise RetryLater("the service is shutting down", retry_after_seconds=1)
        if len(self._waiting) >= WAITING_MAX:
            raise RetryLater("too many changes are waiting", code="overloaded", retry_after_seconds=1)
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        pending = _Pending(acts, projections, offset, side_writes, idempotency, future)
        self._waiting.append(pending)
        self._wake.set()
        return pending

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._waiting:
                batch = self._gather()
                committed, later = await loop.run_in_executor(self._thread, self._process, batch)
                self._waiting.extendleft(reversed(later))
                if committed:
                    self._announce(committed)
                for pending in batch:
                    _answer(pending)
            if self._stopping:
                return

    def _gather(self) -> list[_Pending]:
        if self._waiting[0].alone:
            return [self._waiting.popleft()]
        batch: list[_Pending] = []
        while self._waiting and len(batch) < COMMANDS_MAX and not self._waiting[0].alone:
            pending = self._waiting.popleft()
            if not pending.future.cancelled():
                batch.append(pending)
        return batch

    def _announce(self, committed: Sequence[Envelope]) -> None:
        for listener in self._listeners:
            listener(committed)

    # From here on everything runs on the write path's thread.

    def _process(self, batch: list[_Pending]) -> tuple[Sequence[Envelope], list[_Pending]]:
        """Decide and commit; sets each pending's result, or hands it back for the next batch."""
        assert threading.current_thread().name.startswith("write-path")
        open_works = batch
        later: list[_Pending] = []
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

    def _again(self, open_works: list[_Pending], outdated: DecisionOutdated, later: list[_Pending]) -> list[_Pending]:
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

    def _committed(self, open_works: list[_Pending], prepared: Batch, position: int) -> Sequence[Envelope]:
        placed = {envelope.id: envelope.at(number) for number, envelope in enumerate(prepared.events, position + 1)}
        for pending in open_works:
            if isinstance(pending.result, Outcome) and pending.result.events:
                events = [placed[envelope.id] for envelope in pending.result.events]
                pending.result = Outcome(pending.result.entities, events)
        return list(placed.values())

    def _load(self, works: list[_Pending]) -> tuple[_View, Head]:
        """One query a collection for all that the batch will look at."""
        head = self._store.head_cached or self._store.head_blocking()
        view = _View()
        wanted: dict[str, dict[int | str, Aggregate[Any]]] = {}
        foreign: dict[str, set[int | str]] = {}
        for pending in works:
            for act, _ in pending.acts:
                wanted.setdefault(act.aggregate.collection, {})[act.entity_id] = act.aggregate
            for projection, envelope in pending.projections:
                if (key := projection.key(envelope)) is not None:
                    foreign.setdefault(projection.collection, set()).add(key)
        database = self._store.sync_database
        for name, aggregates in wanted.items():
            for document in database[head.collections[name]].find({"_id": {"$in": list(aggregates)}}):
                view.aggregates[name, document["_id"]] = _known(aggregates[document["_id"]], document)
        for name, keys in foreign.items():
            for document in database[head.collections[name]].find({"_id": {"$in": list(keys)}}):
                view.documents[name, document["_id"]] = document
        if idempotency := [pending.idempotency.id for pending in works if pending.idempotency]:
            for document in database["idempotency"].find({"_id": {"$in": idempotency}}):
                view.idempotency[document["_id"]] = document
        if moves := [pending.offset.key for pending in works if pending.offset]:
            for document in database["offsets"].find({"_id": {"$in": moves}}):
                view.offsets[document["_id"]] = document["offset"]
        return view, head

    def _decide(self, works: list[_Pending], view: _View, head: Head) -> tuple[Batch, list[_Pending]]:
        """Decide every work in order; a second pass is needed only where a unique key turns out to be taken."""
        now = self._clock.now()
        pass_ = _Pass(now, view, head)
        pass_.run(works)
        # One command by itself harms nobody if the unique index refuses it: the index is asked at no further cost.
        if pass_.claimed and (len(works) > 1 or works[0].decisions):
            taken = self._owners(pass_.claimed, head)
            if any(owner != pass_.claimed[key] for key, owner in taken.items()):
                view.owners.update(taken)
                pass_ = _Pass(now, view, head)
                pass_.run(works)
        return pass_.batch(), pass_.later

    def _owners(self, keys: Iterable[tuple[str, str]], head: Head) -> dict[tuple[str, str], int | str]:
        by_collection: dict[str, list[str]] = {}
        for collection, key in keys:
            by_collection.setdefault(collection, []).append(key)
        owners: dict[tuple[str, str], int | str] = {}
        for collection, wanted in by_collection.items():
            documents = self._store.sync_database[head.collections[collection]].find(
                {"keys": {"$in": wanted}}, {"keys": 1}
            )
            for document in documents:
                owners.update({(collection, key): document["_id"] for key in document["keys"]})
        return owners

    async def _replayed(self, record: Document) -> Outcome:
        """Rebuild the answer of an earlier request from the entities at the versions that it left."""
        entities: list[Entity[Any] | None] = []
        for item in record["entities"]:
            aggregate = self._aggregates[item["aggregate"]]
            envelopes = await self._store.read_stream(aggregate.stream(item["id"]), version_max=item["version"])
            entities.append(Entity(item["id"], item["version"], fold(aggregate, envelopes)))
        return Outcome(entities, replayed=True)


class _Pass:
    """One run through a batch's works, from the loaded documents to what is to be written."""

    def __init__(self, now: datetime, view: _View, head: Head) -> None:
        self._now = now
        self._view = view
        self._head = head
        self._aggregates: dict[_Key, _Known] = {}
        self._documents: dict[_Key, Document | None] = {}
        self._holders: dict[tuple[str, str], int | str | None] = {}
        self._begun: set[str] = set()
        self._events: dict[int, list[Envelope]] = {}
        self._size_bytes = 0
        self._size_documents = 0
        self.claimed: dict[tuple[str, str], int | str] = {}
        self.later: list[_Pending] = []
        self._accepted: list[_Pending] = []

    def run(self, works: Sequence[_Pending]) -> None:
        for pending in works:
            pending.result = None
            if self._accepted and self._full():
                self.later.append(pending)
                continue
            try:
                pending.result = self._work(pending)
            except _Later:
                self.later.append(pending)
            except (FixRequest, OffsetMoved, PureCodeFailed) as refusal:
                pending.result = refusal

    def batch(self) -> Batch:
        """What the accepted works write together."""
        batch = Batch(self._head.collections)
        for pending in self._accepted:
            assert isinstance(pending.result, Outcome)
            batch.events += pending.result.events
            batch.side_writes += pending.side_writes
            if pending.offset is not None:
                batch.offsets.append(pending.offset)
            if pending.idempotency is not None:
                batch.idempotency.append(self._idempotency_record(pending, pending.result))
        for (collection, identifier), known in self._aggregates.items():
            assert known.state is not None
            document = stored_document(identifier, known.version, known.project_id, known.keys, known.state)
            new = (collection, identifier) not in self._view.aggregates
            (batch.inserts if new else batch.replacements).setdefault(collection, []).append(document)
        for (collection, identifier), projected in self._documents.items():
            if projected is None:
                batch.removals.setdefault(collection, []).append(identifier)
            else:
                batch.replacements.setdefault(collection, []).append({**projected, "_id": identifier})
        return batch

    def _full(self) -> bool:
        return self._size_bytes >= BATCH_BYTES_MAX or self._size_documents >= DOCUMENTS_MAX

    def _work(self, pending: _Pending) -> Outcome:
        if (key := pending.idempotency) is not None:
            if key.id in self._begun:
                raise _Later
            if (record := self._view.idempotency.get(key.id)) is not None:
                if record["request_hash"] != key.request_hash:
                    raise Unprocessable("this Idempotency-Key was used with another request")
                pending.replay = record
                return Outcome((), replayed=True)
        if (
            pending.offset is not None
            and self._view.offsets.get(pending.offset.key, 0) != pending.offset.expected_offset
        ):
            raise OffsetMoved(pending.offset.key)
        draft = _Draft(self, pending)
        outcome = draft.decide()
        draft.accept()
        if key is not None:
            self._begun.add(key.id)
        self._accepted.append(pending)
        self._size_documents += len(outcome.events) * 2 + len(pending.side_writes) + len(pending.projections)
        self._size_bytes += sum(len(envelope.data_json) for envelope in outcome.events)
        return outcome

    def _idempotency_record(self, pending: _Pending, outcome: Outcome) -> Document:
        assert pending.idempotency is not None
        entities = [
            {"aggregate": act.aggregate.name, "id": entity.id, "version": entity.version}
            for (act, _), entity in zip(pending.acts, outcome.entities, strict=True)
            if entity is not None
        ]
        return {
            "_id": pending.idempotency.id,
            "request_hash": pending.idempotency.request_hash,
            "entities": entities,
            "created_at": self._now,
        }


class _Draft:
    """One work's effects, kept apart until all of it is accepted."""

    def __init__(self, batch: _Pass, pending: _Pending) -> None:
        self._batch = batch
        self._pending = pending
        self._aggregates: dict[_Key, _Known] = {}
        self._documents: dict[_Key, Document | None] = {}
        self._holders: dict[tuple[str, str], int | str | None] = {}
        self._events: list[Envelope] = []

    def decide(self) -> Outcome:
        for projection, envelope in self._pending.projections:
            self._project(projection, envelope)
        entities = [self._act(act, metadata) for act, metadata in self._pending.acts]
        return Outcome(entities, self._events)

    def accept(self) -> None:
        self._batch._aggregates.update(self._aggregates)
        self._batch._documents.update(self._documents)
        self._batch._holders.update(self._holders)

    def _project(self, projection: Projection, envelope: Envelope) -> None:
        try:
            key = projection.key(envelope)
            if key is None:
                return
            place = (projection.collection, key)
            before = self._documents.get(
                place, self._batch._documents.get(place, self._batch._view.documents.get(place))
            )
            self._documents[place] = projection.apply(before, envelope)
        except Exception as error:
            raise PureCodeFailed(f"{projection.collection}: {envelope.type} {envelope.id}: {error!r}") from error

    def _act(self, act: Act, metadata: Metadata) -> Entity[Any] | None:
        place = (act.aggregate.collection, act.entity_id)
        known = (
            self._aggregates.get(place) or self._batch._aggregates.get(place) or self._batch._view.aggregates.get(place)
        )
        try:
            return self._decided(act, metadata, place, known)
        except FixRequest:
            if not act.ignore_refusal:
                raise
            return None if known is None or known.state is None else Entity(act.entity_id, known.version, known.state)

    def _decided(self, act: Act, metadata: Metadata, place: _Key, known: _Known | None) -> Entity[Any]:
        known = known or _Known(0, None, None, ())
        if act.expected_version is not None and act.expected_version != known.version:
            raise PreconditionFailed(f"the current version is {known.version}, not {act.expected_version}")
        if known.project_id is not None and metadata.project_id not in (None, known.project_id):
            raise NotFound(f"{act.aggregate.name} {act.entity_id} does not exist")
        project_id = known.project_id if known.version else metadata.project_id
        if metadata.project_id != project_id:
            metadata = replace(metadata, project_id=project_id)
        try:
            events = act.aggregate.decide(known.state, act.command)
            state, version, envelopes = self._evolved(act, metadata, known, events)
            keys = tuple(act.aggregate.unique_keys(state)) if state is not None else ()
        except DataSyncError:
            raise
        except Exception as error:
            raise PureCodeFailed(f"{act.aggregate.name} {act.entity_id}: {act.command!r:.200}: {error!r}") from error
        if not envelopes:
            if state is None:
                raise NotFound(f"{act.aggregate.name} {act.entity_id} does not exist")
            return Entity(act.entity_id, version, state)
        self._claim(act, known.keys, keys)
        self._aggregates[place] = _Known(version, state, project_id, keys)
        self._events += envelopes
        assert state is not None
        return Entity(act.entity_id, version, state)

    def _evolved(
        self, act: Act, metadata: Metadata, known: _Known, events: Sequence[Event]
    ) -> tuple[Frozen | None, int, list[Envelope]]:
        state, version = known.state, known.version
        envelopes = []
        for event in events:
            version += 1
            envelope = Envelope(
                id=uuid7(),
                stream=act.aggregate.stream(act.entity_id),
                version=version,
                position=0,
                store_id=self._batch._head.store_id,
                time=self._batch._now,
                data=event,
                data_json=_encoded(event),
                metadata=metadata,
            )
            state = act.aggregate.evolve(state, envelope)
            envelopes.append(envelope)
        return state, version, envelopes

    def _claim(self, act: Act, before: tuple[str, ...], after: tuple[str, ...]) -> None:
        collection = act.aggregate.collection
        for key in set(before) - set(after):
            self._holders[collection, key] = None
        for key in after:
            if key in before:
                continue
            place = (collection, key)
            self._batch.claimed.setdefault(place, act.entity_id)
            holder = self._batch._holders.get(place, self._batch._view.owners.get(place, _UNKNOWN))
            if self._batch._holders.get(place, _UNKNOWN) is None:
                # Freed earlier in this very batch: the unique index would meet both documents at once.
                raise _Later
            current = self._holders.get(place, holder)
            if current not in (None, _UNKNOWN, act.entity_id):
                field_error = FieldError(act.aggregate.conflict_field, act.aggregate.conflict_message, "taken")
                raise Conflict(act.aggregate.conflict_message, code="already_exists", errors=[field_error])
            self._holders[place] = act.entity_id


_UNKNOWN: Any = object()


def fold(aggregate: Aggregate[State], envelopes: Iterable[Envelope]) -> State:
    """The state after these events; raises ``NotFound`` when there are none."""
    state: State | None = None
    for envelope in envelopes:
        state = aggregate.evolve(state, envelope)
    if state is None:
        raise NotFound(f"no such {aggregate.name}")
    return state


def stored_document(
    identifier: int | str, version: int, project_id: int | None, keys: Sequence[str], state: Frozen
) -> Document:
    """The owner's document of an entity: a pure function of its events, so that a rebuild gives the same."""
    document: Document = {"_id": identifier, "version": version, "project_id": project_id, "state": state.model_dump()}
    if keys:
        document["keys"] = list(keys)
    return document


def _known(aggregate: Aggregate[Any], document: Document) -> _Known:
    state = aggregate.state.model_validate(document["state"])
    return _Known(document["version"], state, document["project_id"], tuple(document.get("keys", ())))


def _encoded(event: Event) -> bytes:
    encoded = event.model_dump_json().encode()
    if len(encoded) > EVENT_SIZE_BYTES_MAX:
        sizes = {name: sys.getsizeof(value) for name, value in event}
        largest = max(sizes, key=lambda name: sizes[name])
        message = f"{largest} is too large: {len(encoded)} bytes in all, at most {EVENT_SIZE_BYTES_MAX}"
        raise TooLarge(message, errors=[FieldError(largest, "is too large", "too_large")])
    return encoded


def _concerns(pending: _Pending, outdated: DecisionOutdated) -> bool:
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


def _without_offset(works: list[_Pending], moved: OffsetMoved) -> list[_Pending]:
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


def _answer(pending: _Pending) -> None:
    if pending.result is None or pending.future.done():
        return
    if isinstance(pending.result, BaseException):
        pending.future.set_exception(pending.result)
    else:
        pending.future.set_result(pending.result)
