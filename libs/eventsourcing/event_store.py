"""A service's event store in MongoDB: the ``head`` document, the ``events`` collection, and the batch that raises both.

Every batch first raises ``head`` in its transaction, which serialises the writers of one service: positions have no
gaps, and whoever reads them in order can't skip an event that commits late.
"""

import random
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import Any

import orjson
import structlog

from libs.contracts.registry import decode, is_known
from libs.core.envelope import Envelope, Metadata
from libs.core.errors import OutcomeUnknown, RetryLater
from libs.core.ids import uuid7
from libs.eventsourcing.list_changes import ListChanges
from libs.mongodb.client import (
    ASCENDING,
    DESCENDING,
    DURABLE,
    MAJORITY,
    Client,
    ClientSession,
    Collection,
    ConnectionFailure,
    Cursor,
    Database,
    Document,
    IndexModel,
    OperationFailure,
    PyMongoError,
    SyncCollection,
    duplicate_key_of,
    synchronous,
)
from libs.mongodb.pipeline import (
    TRANSIENT,
    UNKNOWN_COMMIT,
    Pipeline,
    StatementRefused,
    Transactions,
    Write,
    removal,
    replacement,
    write_commands,
)
from libs.mongodb.wake_ups import WAKE_UPS

OUTCOME_SECONDS_MAX = 10.0
SWAP_SECONDS_MAX = 4.0
"""How long a batch waits for a swap to let go of the head before it ends it; well below ``OUTCOME_SECONDS_MAX``."""
SWAP = "swap"
WRITE_CONFLICT = 112
INTERRUPTED = 11601
IDEMPOTENCY_SECONDS = 24 * 3600
"""A capped collection that every batch with events adds a line to, so that who follows them is woken."""
WAKE_UPS_BYTES = 64 * 1024
PAGE_BYTES_MAX = 4 * 1024 * 1024

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Head:
    """The store's head.

    Args:
        position: of the last committed event.
        batches: how often it was raised; where it is unchanged, nothing was written.
        store_id: made with the database; a restored or other one differs.
        collections: the live collection's name of each aggregate and projection, by its logical name.
        kinds: the events that the store may hold, such as ``source_created.v1``.
    """

    position: int
    batches: int
    store_id: str
    collections: Mapping[str, str]
    kinds: frozenset[str]

    @property
    def newer_types(self) -> frozenset[str]:
        """The types of events that only a newer version can read; computed once for each set of kinds."""
        return _newer_types(self.kinds)


@dataclass(frozen=True, slots=True)
class _Standing:
    """What a batch is written on.

    Args:
        head: before the batch.
        numbers: the next number of each list's collection, by its logical name.
    """

    head: Head
    numbers: Mapping[str, int]

    def serves(self, batch: "Batch") -> bool:
        """Whether the batch can be written without asking the store for anything."""
        return (
            batch.collections == self.head.collections
            and batch.newer_types == self.head.newer_types
            and batch.kinds <= self.head.kinds
            and all(name in self.numbers for name, changes in batch.lists.items() if changes.entered)
        )

    def after(self, batch: "Batch") -> "_Standing":
        head = Head(
            self.head.position + len(batch.events),
            self.head.batches + 1,
            self.head.store_id,
            self.head.collections,
            self.head.kinds if batch.kinds <= self.head.kinds else self.head.kinds | batch.kinds,
        )
        entered = {
            name: self.numbers[name] + changes.entered for name, changes in batch.lists.items() if changes.entered
        }
        return _Standing(head, {**self.numbers, **entered})


@dataclass(frozen=True, slots=True)
class OffsetMove:
    """A consumer's step in one partition, from the offset that it started from."""

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
    """A plain document written with a command: replaced or inserted by ``_id``, deleted where ``document`` is None."""

    collection: str
    id: Any
    document: Mapping[str, Any] | None


@dataclass(slots=True)
class Batch:
    """What one transaction writes: a value, so that running it again can't do anything else.

    Args:
        collections: the collection names that the decisions were made on; the commit fails if they were swapped.
        newer_types: the newer version's events that the decisions took into account; likewise.
        kinds: those of ``events``.
        inserts, replacements, removals: documents by logical collection name.
        lists: what changes in counted lists, by the logical collection name of their counts.
    """

    collections: Mapping[str, str]
    newer_types: frozenset[str] = frozenset()
    kinds: frozenset[str] = frozenset()
    events: list[Envelope] = field(default_factory=list)
    inserts: dict[str, list[Document]] = field(default_factory=dict)
    replacements: dict[str, list[Document]] = field(default_factory=dict)
    removals: dict[str, list[Any]] = field(default_factory=dict)
    lists: dict[str, ListChanges] = field(default_factory=dict)
    side_writes: list[SideWrite] = field(default_factory=list)
    idempotency: list[Document] = field(default_factory=list)
    offsets: list[OffsetMove] = field(default_factory=list)
    attempted: bool = False

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


class DecisionOutdated(Exception):
    """Something that a batch was decided on has changed; decide again.

    Args:
        streams: the streams at fault, when known.
        keys: the unique keys at fault, when known.
    """

    def __init__(self, reason: str, *, streams: Sequence[str] = (), keys: Sequence[str] = ()) -> None:
        super().__init__(reason)
        self.streams = tuple(streams)
        self.keys = tuple(keys)


class OffsetMoved(Exception):
    """Another instance consumed this partition meanwhile; read the stored offset again."""


class SwapEnded(Exception):
    """A swap held the head for longer than its writers wait."""


def document_of(envelope: Envelope) -> Document:
    """The stored form of an event."""
    metadata = envelope.metadata
    return {
        "_id": envelope.id,
        "stream": envelope.stream,
        "version": envelope.version,
        "position": envelope.position,
        "type": envelope.data.TYPE,
        "schema_version": envelope.schema_version or envelope.data.SCHEMA_VERSION,
        "topic": envelope.data.TOPIC,
        "time": envelope.time,
        "data": envelope.data_json.decode(),
        "actor": metadata.actor,
        "project_id": metadata.project_id,
        "correlation_id": metadata.correlation_id,
        "causation_id": metadata.causation_id,
        "traceparent": metadata.traceparent,
    }


def envelope_of(document: Mapping[str, Any], store_id: str) -> Envelope:
    """The event in a stored document, upcast to its present version."""
    data_json = document["data"].encode()
    data, is_understood = decode(document["type"], document["schema_version"], data_json, document["topic"])
    return Envelope(
        id=document["_id"],
        stream=document["stream"],
        version=document["version"],
        position=document["position"],
        store_id=store_id,
        time=document["time"],
        data=data,
        data_json=data_json,
        metadata=Metadata(
            actor=document["actor"],
            project_id=document["project_id"],
            correlation_id=document["correlation_id"],
            causation_id=document["causation_id"],
            traceparent=document["traceparent"],
        ),
        schema_version=document["schema_version"],
        is_understood=is_understood,
    )


@dataclass(frozen=True, slots=True)
class EventPage:
    """Some events, in order.

    Args:
        is_last: nothing was committed behind them when they were read.
    """

    events: Sequence[Envelope]
    is_last: bool


class EventStore:
    """The store of one service.

    Args:
        client: a motor client.
        database_name: the service's own database.
        instance: this process's name, which it has from the last one that wrote under it; without one it is nobody's
            successor.
    """

    def __init__(self, client: Client, database_name: str, *, instance: str = "") -> None:
        self.client = client
        self.database: Database = client[database_name]
        self._sync_client = synchronous(client)
        self.sync_database = self._sync_client[database_name]
        self._events_majority: Collection = self.database.get_collection("events", read_concern=MAJORITY)
        self.head_cached: Head | None = None
        self.answered_at = time.monotonic()
        self.pipeline = Pipeline(self._sync_client, database_name)
        self.writer = uuid7()
        self._instance = instance
        self._transactions = Transactions(self.pipeline)
        # After a batch that nobody disturbed: what the next one is written on, if still nobody does.
        self._standing: _Standing | None = None
        # The head's count of batches after the last one of this writer. A failure may leave it old, which costs the
        # next batch a second flight.
        self._left_at: int | None = None
        self.may_hold_locks = False

    async def open(self, collections: Sequence[str], indexes: Mapping[str, Sequence[IndexModel]]) -> None:
        """Make sure that the head, the collections and all indexes are there; safe to run in several instances.

        Args:
            collections: logical names of the aggregates' and projections' collections.
            indexes: further indexes by logical or plain collection name.
        """
        await self._end_predecessor()
        await self.database["head"].update_one(
            {"_id": "head"},
            {"$setOnInsert": {"position": 0, "batches": 0, "store_id": uuid7(), "projections": {}}},
            upsert=True,
        )
        for name in collections:
            await self.database["head"].update_one(
                {"_id": "head", f"projections.{name}": {"$exists": False}}, {"$set": {f"projections.{name}": name}}
            )
        head = await self.head()
        await self.database["events"].create_indexes(
            [
                IndexModel([("stream", ASCENDING), ("version", ASCENDING)], unique=True),
                IndexModel([("position", ASCENDING)], unique=True),
                IndexModel([("topic", ASCENDING), ("position", ASCENDING)]),
            ]
        )
        await self.database["idempotency"].create_indexes(
            [IndexModel([("created_at", ASCENDING)], expireAfterSeconds=IDEMPOTENCY_SECONDS)]
        )
        for name in collections:
            await self.create_indexes(head.collections[name], indexes.get(name, ()))
        for name in indexes.keys() - set(collections):
            await self.database[name].create_indexes(list(indexes[name]))
        await self.database["passed_over"].create_indexes(
            [IndexModel([("topic", ASCENDING), ("position", ASCENDING), ("offset", ASCENDING)])]
        )
        # A transaction must not wait for an implicit creation.
        existing = set(await self.database.list_collection_names())
        for name in {"offsets", "secrets", "leases", "ids", "relay", "parked", "stops"} - existing:
            await self._create_collection(name)
        if not (await self.database[WAKE_UPS].options()).get("capped"):
            # An insert into a dropped collection creates it again, but not capped.
            await self.database.drop_collection(WAKE_UPS)
            await self._create_collection(WAKE_UPS, capped=True, size=WAKE_UPS_BYTES)
        # A cursor can't wait at the end of an empty collection.
        await self.database[WAKE_UPS].insert_one({"position": head.position, "writer": self.writer})

    async def _end_predecessor(self) -> None:
        """Abort the transaction that this instance's last process left open: it locks the head until it expires."""
        if not self._instance:
            return
        writers = self.database["writers"]
        last = await writers.find_one({"_id": self._instance})
        if last is not None:
            try:
                await self.client.admin.command({"killSessions": [{"id": last["session"]}]})
            except OperationFailure as error:
                log.warning("predecessor_not_ended", instance=self._instance, error=str(error)[:200])
        mine = {"_id": self._instance, "session": self._transactions.session_id}
        await writers.replace_one({"_id": self._instance}, mine, upsert=True)

    async def create_indexes(self, collection_name: str, further: Sequence[IndexModel]) -> None:
        """The indexes of a collection of aggregates or projections, live or shadow."""
        unique = IndexModel([("keys", ASCENDING)], unique=True, sparse=True)
        await self.database[collection_name].create_indexes([unique, *further])

    async def head(self) -> Head:
        """The head as it is now."""
        document = await self.database["head"].find_one({"_id": "head"})
        if document is None:
            raise RetryLater("the event store has no head yet")
        self.answered_at = time.monotonic()
        self.head_cached = head_of(document)
        return self.head_cached

    def live_collection(self, logical_name: str) -> str:
        """The collection that reads of ``logical_name`` go to, as last seen."""
        if self.head_cached is None:
            return logical_name
        return self.head_cached.collections.get(logical_name, logical_name)

    async def read_after(self, position: int, limit: int) -> EventPage:
        """Committed events above ``position`` in order; majority reads.

        At most ``limit``, and fewer where they are large: a page ends with the event that takes it to
        ``PAGE_BYTES_MAX``.
        """
        head = self.head_cached or await self.head()
        cursor = self._events_majority.find({"position": {"$gt": position}}).sort("position", ASCENDING).limit(limit)
        return await self._page(cursor, head, limit)

    async def version_at(self, stream: str, moment: datetime) -> int | None:
        """The version of a stream's last event up to that moment."""
        last = await self.database["events"].find_one(
            {"stream": stream, "time": {"$lte": moment}}, {"version": 1}, sort=[("version", DESCENDING)]
        )
        return None if last is None else int(last["version"])

    async def read_stream(self, stream: str, *, version_max: int | None = None) -> AsyncIterator[Envelope]:
        """One stream's events in order, up to a version; no more of them are held than come in one answer."""
        criteria: Document = {"stream": stream}
        if version_max is not None:
            criteria["version"] = {"$lte": version_max}
        head = self.head_cached or await self.head()
        cursor = self.database["events"].find(criteria).sort("version", ASCENDING)
        try:
            async for document in cursor:
                yield envelope_of(document, head.store_id)
        finally:
            await cursor.close()

    async def read_stream_before(self, stream: str, version: int, limit: int) -> EventPage:
        """One stream's events below a version, newest first; bounded as ``read_after`` is."""
        criteria: Document = {"stream": stream, "version": {"$lt": version}}
        head = self.head_cached or await self.head()
        cursor = self.database["events"].find(criteria).sort("version", DESCENDING).limit(limit)
        return await self._page(cursor, head, limit)

    async def _page(self, cursor: Cursor, head: Head, limit: int) -> EventPage:
        events: list[Envelope] = []
        size_bytes = 0
        async for document in cursor:
            events.append(envelope_of(document, head.store_id))
            size_bytes += len(document["data"])
            if size_bytes >= PAGE_BYTES_MAX or len(events) == limit:
                await cursor.close()
                return EventPage(events, is_last=False)
        return EventPage(events, is_last=True)

    async def _create_collection(self, name: str, **options: Any) -> None:
        try:
            await self.database.create_collection(name, check_exists=False, **options)
        except OperationFailure as error:
            if error.code != 48:  # NamespaceExists: another instance was faster.
                raise

    # What follows blocks; it runs on the command handler's own thread.

    def head_blocking(self) -> Head:
        document = self.sync_database["head"].find_one({"_id": "head"})
        if document is None:
            raise RetryLater("the event store has no head yet")
        self.head_cached = head_of(document)
        return self.head_cached

    def commit_blocking(self, batch: Batch) -> int:
        """Commit a batch and return the position before its first event; durable when it returns.

        The batch is run again after transient errors, and its commit is repeated while its result is unknown. Since a
        batch's event ids are fixed, running it twice fails on them, and a majority read tells that it had committed.

        Raises:
            DecisionOutdated: a version, a unique key or a collection name changed meanwhile.
            OffsetMoved: a consumer's offset is not the one that its step started from.
            OutcomeUnknown: the store did not say in time whether it committed.
            RetryLater: it certainly did not commit.
        """
        deadline = time.monotonic() + OUTCOME_SECONDS_MAX
        swap_ends_at = time.monotonic() + SWAP_SECONDS_MAX
        attempt = 0
        while True:
            try:
                return self._attempt(batch, deadline)
            except (DecisionOutdated, OffsetMoved):
                # An attempt whose result was lost may have committed: then it is what this one met.
                if batch.attempted and (position := self._position_if_committed(batch)) is not None:
                    return position
                raise
            except PyMongoError as error:
                duplicate = duplicate_key_of(error)
                if duplicate is not None:
                    if batch.attempted and (position := self._position_if_committed(batch)) is not None:
                        return position
                    raise _outdated(*duplicate) from None
                if not _may_run_again(error):
                    raise self._unknown_or_unavailable(batch) from error
                attempt += 1
                if time.monotonic() >= deadline:
                    raise self._unknown_or_unavailable(batch) from error
                if time.monotonic() >= swap_ends_at and _is_write_conflict(error):
                    self._end_swap()
                    swap_ends_at = deadline
                time.sleep(min(0.2, 0.001 * 2 ** min(attempt, 8)) * random.random())

    def _attempt(self, batch: Batch, deadline: float) -> int:
        standing = self._run_statements(batch)
        batch.attempted = True
        wake_up: Document = {"position": standing.head.position + len(batch.events), "writer": self.writer}
        announce = {"insert": WAKE_UPS, "documents": [wake_up]} if batch.events else None
        while True:
            try:
                self._transactions.commit(then=announce)
                break
            except PyMongoError as error:
                if not error.has_error_label(UNKNOWN_COMMIT) or time.monotonic() >= deadline:
                    self.may_hold_locks = True
                    raise
        undisturbed = self._left_at in (None, standing.head.batches)
        after = standing.after(batch)
        self._left_at = after.head.batches
        self._standing = after if undisturbed else None
        return standing.head.position

    def _run_statements(self, batch: Batch) -> _Standing:
        """Run all statements of a batch in a transaction that waits for its commit; gives what they were run on.

        A writer that nobody wrote beside since its last batch knows how the store stands, and sends everything in one
        flight, at whose beginning the head makes sure of it. Where it finds otherwise, or does not know, the head is
        raised first, whatever it is, and tells: an instance far away that always guessed would always guess too late.
        """
        standing, self._standing = self._standing, None
        if standing is not None and standing.serves(batch):
            with suppress(_HeadMoved), self._in_transaction():
                raising = [_guarded_raise(standing.head, len(batch.events)), *_reservations(batch)]
                guarded, *_ = self._run(batch, raising + _statements(batch, standing))
                if guarded["n"] != 1:
                    raise _HeadMoved
                return standing
        with self._in_transaction():
            change: Document = {"$inc": {"position": len(batch.events), "batches": 1}}
            if self.head_cached is None or not batch.kinds <= self.head_cached.kinds:
                change["$addToSet"] = {"kinds": {"$each": sorted(batch.kinds)}}
            raising = [{"findAndModify": "head", "query": {"_id": "head"}, "update": change}, *_reservations(batch)]
            standing = self._standing_of(batch, *self._run(batch, raising))
            if statements := _statements(batch, standing):
                self._run(batch, statements)
            return standing

    @contextmanager
    def _in_transaction(self) -> Iterator[None]:
        self._transactions.begin()
        self.may_hold_locks = False
        try:
            yield
        except ConnectionFailure:
            # The next transaction's beginning ends this one; where none comes, ``release_locks_blocking`` does.
            self.may_hold_locks = True
            raise
        except PyMongoError as error:
            # The server has aborted it, but for refusals that come before a statement is looked at.
            if not error.has_error_label(TRANSIENT):
                _abort(self._transactions)
            raise
        except BaseException:
            _abort(self._transactions)
            raise

    def release_locks_blocking(self) -> None:
        """End the transaction that a broken connection left open, which would keep other instances waiting."""
        try:
            self._transactions.abort()
        except ConnectionFailure:
            return
        except PyMongoError:
            # There is none that could be aborted.
            pass
        self.may_hold_locks = False

    def _run(self, batch: Batch, statements: list[Document]) -> list[Document]:
        """Run a flight of a batch's statements; the guards among them raise what they guard against."""
        try:
            return self._transactions.run(statements)
        except StatementRefused as refused:
            match statements[refused.statement].get("update"):
                case "head":
                    raise _HeadMoved from None
                case "offsets":
                    raise OffsetMoved(batch.offsets[refused.write].key) from None
            raise

    def _standing_of(self, batch: Batch, raised: Document, *reserved: Document) -> _Standing:
        if raised["value"] is None:
            raise RetryLater("the event store has no head yet")
        head = head_of(raised["value"])
        if head.collections != batch.collections:
            self.head_cached = head
            raise DecisionOutdated("the projections were swapped")
        if head.newer_types != batch.newer_types:
            self.head_cached = head
            raise DecisionOutdated("a newer version began to write events of its own")
        entering = {name: changes.entered for name, changes in batch.lists.items() if changes.entered}
        numbers = {
            name: int(reply["value"]["next"]) - entered
            for (name, entered), reply in zip(entering.items(), reserved, strict=True)
        }
        return _Standing(head, numbers)

    def swap_blocking(self, swaps: Mapping[str, str], last_step: Callable[[ClientSession, Head], None]) -> None:
        """Make other collections the live ones, in a transaction that raises the head like every batch.

        Args:
            swaps: the new actual name by logical name.
            last_step: runs inside the transaction while the head is held, so that nothing else is written
                meanwhile: applies what the shadow collections still lack. It may run more than once.

        Raises:
            SwapEnded: a batch had waited for too long and ended it; nothing was changed.
        """
        names = {f"projections.{logical}": actual for logical, actual in swaps.items()}

        def step(session: ClientSession) -> None:
            before = self.sync_database["head"].find_one_and_update(
                {"_id": "head"}, {"$inc": {"batches": 1}, "$set": names}, session=session
            )
            if before is None:
                raise RetryLater("the event store has no head yet")
            last_step(session, head_of(before))

        with self._sync_client.start_session() as session:
            self._writers.replace_one({"_id": SWAP}, {"session": session.session_id["id"]}, upsert=True)
            try:
                session.with_transaction(step, write_concern=DURABLE)
            except OperationFailure as error:
                if error.code == INTERRUPTED:
                    raise SwapEnded from error
                raise
            finally:
                self._writers.delete_one({"_id": SWAP})
        self.head_blocking()

    def _end_swap(self) -> None:
        """Abort a swap that keeps the head for too long: its process died or hangs; one that lives begins it anew."""
        try:
            swap = self._writers.find_one({"_id": SWAP})
            if swap is not None:
                self._sync_client.admin.command({"killSessions": [{"id": swap["session"]}]})
                log.warning("swap_ended", database=self.database.name)
        except PyMongoError as error:
            log.warning("swap_not_ended", database=self.database.name, error=str(error)[:200])

    @property
    def _writers(self) -> SyncCollection[Document]:
        return self.sync_database["writers"]

    def _position_if_committed(self, batch: Batch) -> int | None:
        if not batch.events:
            return None
        events = self.sync_database["events"].with_options(read_concern=MAJORITY)
        try:
            first = events.find_one({"_id": batch.events[0].id}, {"position": 1})
        except PyMongoError as error:
            raise self._unknown_or_unavailable(batch) from error
        return None if first is None else int(first["position"]) - 1

    def _unknown_or_unavailable(self, batch: Batch) -> RetryLater:
        if batch.attempted:
            return OutcomeUnknown(
                "the store did not say in time whether the change was made; repeat it with its Idempotency-Key",
                retry_after_seconds=1,
            )
        return RetryLater("the store can't be reached; the change was not made", retry_after_seconds=1)


def head_of(document: Mapping[str, Any]) -> Head:
    """The head in its stored document."""
    return Head(
        document["position"],
        document["batches"],
        document["store_id"],
        dict(document["projections"]),
        frozenset(document.get("kinds", ())),
    )


@lru_cache(maxsize=16)
def _newer_types(kinds: frozenset[str]) -> frozenset[str]:
    told = (kind.rsplit(".v", 1) for kind in kinds)
    return frozenset(event_type for event_type, version in told if not is_known(event_type, int(version)))


class _HeadMoved(Exception):
    """Somebody else wrote since this writer's last batch."""


def _guarded_raise(head: Head, events: int) -> Document:
    """Raises the head, if it is still this one."""
    known = {"batches": head.batches, "position": head.position, "store_id": {"$literal": head.store_id}}
    is_this_one = {"$and": [{"$eq": [f"${name}", value]} for name, value in known.items()]}
    position = _unless_moved(is_this_one, {"$add": ["$position", events]})
    change = {"position": position, "batches": {"$add": ["$batches", 1]}}
    return {"update": "head", "updates": [{"q": {"_id": "head"}, "u": [{"$set": change}]}]}


def _guarded_move(move: OffsetMove) -> Document:
    """Moves a consumer's offset, if it is still where its step began; there is none before the first."""
    begun_here = {"$eq": [{"$ifNull": ["$offset", 0]}, move.expected_offset]}
    change = {
        "offset": _unless_moved(begun_here, move.next_offset),
        "position": move.position,
        "store_id": {"$literal": move.store_id},
    }
    return {"q": {"_id": move.key}, "u": [{"$set": change}], "upsert": True}


def _unless_moved(condition: Document, value: Any) -> Document:
    """The value, or an error that refuses the statement; only a text of the document keeps it from being foreseen."""
    return {"$cond": [condition, value, {"$toInt": {"$concat": ["changed meanwhile: ", "$_id"]}}]}


def _reservations(batch: Batch) -> list[Document]:
    return [changes.reservation(batch.collections[name]) for name, changes in batch.lists.items() if changes.entered]


def _statements(batch: Batch, standing: _Standing) -> list[Document]:
    """What a batch writes besides the head and the numbers of lists."""
    collections, statements = batch.collections, list[Document]()
    if batch.offsets:
        statements.append({"update": "offsets", "updates": [_guarded_move(move) for move in batch.offsets]})
    if batch.events:
        documents = [document_of(envelope) for envelope in batch.events]
        for number, document in enumerate(documents, standing.head.position + 1):
            document["position"] = number
        statements.append({"insert": "events", "documents": documents})
    for name, changes in batch.lists.items():
        statements += changes.statements(collections[name], standing.numbers.get(name, 0))
    for name in batch.replacements.keys() | batch.removals.keys():
        writes: list[Write] = [replacement(document) for document in batch.replacements.get(name, ())]
        writes += [removal(identifier) for identifier in batch.removals.get(name, ())]
        statements += write_commands(collections[name], writes)
    # Inserted last, so that a unique key which a replacement frees can be taken by a new document.
    for name, documents in batch.inserts.items():
        statements.append({"insert": collections[name], "documents": documents})
    for collection, writes in _grouped(batch.side_writes).items():
        statements += write_commands(collection, writes)
    if batch.idempotency:
        statements.append({"insert": "idempotency", "documents": batch.idempotency})
    return statements


def _grouped(side_writes: Sequence[SideWrite]) -> dict[str, list[Write]]:
    grouped: dict[str, list[Write]] = {}
    for write in side_writes:
        operation = removal(write.id) if write.document is None else replacement({**write.document, "_id": write.id})
        grouped.setdefault(write.collection, []).append(operation)
    return grouped


def _may_run_again(error: PyMongoError) -> bool:
    return isinstance(error, ConnectionFailure) or any(map(error.has_error_label, (TRANSIENT, UNKNOWN_COMMIT)))


def _is_write_conflict(error: PyMongoError) -> bool:
    return isinstance(error, OperationFailure) and error.code == WRITE_CONFLICT


def _outdated(pattern: Mapping[str, Any], values: Mapping[str, Any]) -> DecisionOutdated:
    if "stream" in pattern:
        return DecisionOutdated("a stream moved on", streams=[values["stream"]])
    if "keys" in pattern:
        return DecisionOutdated("a unique key was taken", keys=[values["keys"]])
    return DecisionOutdated(f"a document appeared: {dict(pattern)}")


def _abort(transactions: Transactions) -> None:
    try:
        transactions.abort()
    except PyMongoError:
        # The next transaction's beginning ends it; the first error is the one to report.
        return


def canonical_document(document: Mapping[str, Any]) -> bytes:
    """A document's canonical JSON: what rebuilds hash and compare."""
    return orjson.dumps(document, option=orjson.OPT_SORT_KEYS | orjson.OPT_UTC_Z | orjson.OPT_NON_STR_KEYS, default=str)
