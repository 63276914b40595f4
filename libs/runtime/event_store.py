"""A service's event store in MongoDB: the ``head`` document, the ``events`` collection, and the batch that raises both.

Every batch first raises ``head`` in its transaction, which serialises the writers of one service: positions have no
gaps, and whoever reads them in order can't skip an event that commits late.
"""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import orjson

from libs.contracts.registry import decode
from libs.core.envelope import Envelope, Metadata
from libs.core.errors import OutcomeUnknown, RetryLater
from libs.core.ids import uuid7
from libs.runtime.list_changes import ListChanges
from libs.runtime.mongo import (
    ASCENDING,
    DURABLE,
    MAJORITY,
    Client,
    ClientSession,
    Collection,
    Database,
    DeleteOne,
    Document,
    IndexModel,
    OperationFailure,
    PyMongoError,
    ReplaceOne,
    UpdateOne,
    duplicate_key_of,
    synchronous,
)

OUTCOME_SECONDS_MAX = 10.0
IDEMPOTENCY_SECONDS = 24 * 3600


@dataclass(frozen=True, slots=True)
class Head:
    """The store's head.

    Args:
        position: of the last committed event.
        store_id: made with the database; a restored or other one differs.
        collections: the live collection's name of each aggregate and projection, by its logical name.
    """

    position: int
    store_id: str
    collections: Mapping[str, str]


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
        inserts, replacements, removals: documents by logical collection name.
        lists: what changes in counted lists, by the logical collection name of their counts.
    """

    collections: Mapping[str, str]
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
    return Envelope(
        id=document["_id"],
        stream=document["stream"],
        version=document["version"],
        position=document["position"],
        store_id=store_id,
        time=document["time"],
        data=decode(document["type"], document["schema_version"], data_json),
        data_json=data_json,
        metadata=Metadata(
            actor=document["actor"],
            project_id=document["project_id"],
            correlation_id=document["correlation_id"],
            causation_id=document["causation_id"],
            traceparent=document["traceparent"],
        ),
        schema_version=document["schema_version"],
    )


class EventStore:
    """The store of one service.

    Args:
        client: a motor client.
        database_name: the service's own database.
    """

    def __init__(self, client: Client, database_name: str) -> None:
        self.client = client
        self.database: Database = client[database_name]
        self._sync_client = synchronous(client)
        self.sync_database = self._sync_client[database_name]
        self._events_majority: Collection = self.database.get_collection("events", read_concern=MAJORITY)
        self.head_cached: Head | None = None

    async def open(self, collections: Sequence[str], indexes: Mapping[str, Sequence[IndexModel]]) -> None:
        """Make sure that the head, the collections and all indexes are there; safe to run in several instances.

        Args:
            collections: logical names of the aggregates' and projections' collections.
            indexes: further indexes by logical or plain collection name.
        """
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
        # A transaction must not wait for an implicit creation.
        existing = set(await self.database.list_collection_names())
        for name in {"offsets", "secrets", "leases", "ids", "relay", "parked"} - existing:
            await self._create_collection(name)

    async def create_indexes(self, collection_name: str, further: Sequence[IndexModel]) -> None:
        """The indexes of a collection of aggregates or projections, live or shadow."""
        unique = IndexModel([("keys", ASCENDING)], unique=True, sparse=True)
        await self.database[collection_name].create_indexes([unique, *further])

    async def head(self) -> Head:
        """The head as it is now."""
        document = await self.database["head"].find_one({"_id": "head"})
        if document is None:
            raise RetryLater("the event store has no head yet")
        self.head_cached = _head_of(document)
        return self.head_cached

    def live_collection(self, logical_name: str) -> str:
        """The collection that reads of ``logical_name`` go to, as last seen."""
        if self.head_cached is None:
            return logical_name
        return self.head_cached.collections.get(logical_name, logical_name)

    async def read_after(self, position: int, limit: int, topics: Sequence[str] | None = None) -> list[Envelope]:
        """Committed events above ``position`` in order, at most ``limit``; majority reads."""
        criteria: Document = {"position": {"$gt": position}}
        if topics is not None:
            criteria["topic"] = {"$in": list(topics)}
        head = self.head_cached or await self.head()
        cursor = self._events_majority.find(criteria).sort("position", ASCENDING).limit(limit)
        return [envelope_of(document, head.store_id) async for document in cursor]

    async def read_stream(
        self, stream: str, *, version_max: int | None = None, until: datetime | None = None
    ) -> list[Envelope]:
        """One stream's events in order, up to a version or a moment."""
        criteria: Document = {"stream": stream}
        if version_max is not None:
            criteria["version"] = {"$lte": version_max}
        if until is not None:
            criteria["time"] = {"$lte": until}
        head = self.head_cached or await self.head()
        cursor = self.database["events"].find(criteria).sort("version", ASCENDING)
        return [envelope_of(document, head.store_id) async for document in cursor]

    async def _create_collection(self, name: str) -> None:
        try:
            await self.database.create_collection(name, check_exists=False)
        except OperationFailure as error:
            if error.code != 48:  # NamespaceExists: another instance was faster.
                raise

    # What follows blocks; it runs on the command handler's own thread.

    def head_blocking(self) -> Head:
        document = self.sync_database["head"].find_one({"_id": "head"})
        if document is None:
            raise RetryLater("the event store has no head yet")
        self.head_cached = _head_of(document)
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
                time.sleep(min(0.2, 0.001 * 2 ** min(attempt, 8)) * random.random())

    def _attempt(self, batch: Batch, deadline: float) -> int:
        with self._sync_client.start_session() as session:
            session.start_transaction(read_concern=None, write_concern=DURABLE)
            try:
                position = self._write(batch, session)
            except BaseException:
                _abort(session)
                raise
            batch.attempted = True
            while True:
                try:
                    session.commit_transaction()
                    return position
                except PyMongoError as error:
                    if not error.has_error_label("UnknownTransactionCommitResult") or time.monotonic() >= deadline:
                        raise

    def swap_blocking(self, swaps: Mapping[str, str], last_step: Callable[[ClientSession, Head], None]) -> None:
        """Make other collections the live ones, in a transaction that raises the head like every batch.

        Args:
            swaps: the new actual name by logical name.
            last_step: runs inside the transaction while the head is held, so that nothing else is written
                meanwhile: applies what the shadow collections still lack. It may run more than once.
        """
        names = {f"projections.{logical}": actual for logical, actual in swaps.items()}

        def step(session: ClientSession) -> None:
            before = self.sync_database["head"].find_one_and_update(
                {"_id": "head"}, {"$inc": {"batches": 1}, "$set": names}, session=session
            )
            if before is None:
                raise RetryLater("the event store has no head yet")
            last_step(session, _head_of(before))

        with self._sync_client.start_session() as session:
            session.with_transaction(step, write_concern=DURABLE)
        self.head_blocking()

    def _write(self, batch: Batch, session: ClientSession) -> int:
        database = self.sync_database
        change: Document = {"$inc": {"position": len(batch.events), "batches": 1}}
        before = database["head"].find_one_and_update({"_id": "head"}, change, session=session)
        if before is None:
            raise RetryLater("the event store has no head yet")
        head = _head_of(before)
        if head.collections != batch.collections:
            self.head_cached = head
            raise DecisionOutdated("the projections were swapped")
        self._move_offsets(batch.offsets, session)
        if batch.events:
            documents = [document_of(envelope) for envelope in batch.events]
            for number, document in enumerate(documents, head.position + 1):
                document["position"] = number
            database["events"].insert_many(documents, session=session)
        for name, changes in batch.lists.items():
            changes.write(database[head.collections[name]], session)
        for name in batch.replacements.keys() | batch.removals.keys():
            writes: list[ReplaceOne[Document] | DeleteOne] = [
                ReplaceOne({"_id": document["_id"]}, document, upsert=True)
                for document in batch.replacements.get(name, ())
            ]
            writes += [DeleteOne({"_id": identifier}) for identifier in batch.removals.get(name, ())]
            database[head.collections[name]].bulk_write(writes, session=session)
        # Inserted last, so that a unique key which a replacement frees can be taken by a new document.
        for name, documents in batch.inserts.items():
            database[head.collections[name]].insert_many(documents, session=session)
        for collection, writes in _grouped(batch.side_writes).items():
            database[collection].bulk_write(writes, session=session)
        if batch.idempotency:
            database["idempotency"].insert_many(batch.idempotency, session=session)
        return head.position

    def _move_offsets(self, moves: Sequence[OffsetMove], session: ClientSession) -> None:
        """Move consumers' offsets, all in one round trip; raises ``OffsetMoved`` naming the first that is elsewhere."""
        offsets = self.sync_database["offsets"]
        known: list[OffsetMove] = []
        for move in moves:
            if move.expected_offset == 0 and offsets.find_one({"_id": move.key}, session=session) is None:
                offsets.insert_one({"_id": move.key, **_offset_fields(move)}, session=session)
            else:
                known.append(move)
        if not known:
            return
        writes = [
            UpdateOne({"_id": move.key, "offset": move.expected_offset}, {"$set": _offset_fields(move)})
            for move in known
        ]
        if offsets.bulk_write(writes, session=session).matched_count != len(known):
            self._raise_offset_moved(known, session)

    def _raise_offset_moved(self, moves: Sequence[OffsetMove], session: ClientSession) -> None:
        """Find which of the moves did not match; those that did read as moved within this transaction."""
        found = self.sync_database["offsets"].find({"_id": {"$in": [move.key for move in moves]}}, session=session)
        current = {document["_id"]: document["offset"] for document in found}
        culprit = next((move for move in moves if current.get(move.key) != move.next_offset), moves[0])
        raise OffsetMoved(culprit.key)

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


def _head_of(document: Document) -> Head:
    return Head(document["position"], document["store_id"], dict(document["projections"]))


def _offset_fields(move: OffsetMove) -> Document:
    return {"offset": move.next_offset, "position": move.position, "store_id": move.store_id}


def _grouped(side_writes: Sequence[SideWrite]) -> dict[str, list[Any]]:
    grouped: dict[str, list[Any]] = {}
    for write in side_writes:
        operation: ReplaceOne[Document] | DeleteOne = (
            DeleteOne({"_id": write.id})
            if write.document is None
            else ReplaceOne({"_id": write.id}, {**write.document, "_id": write.id}, upsert=True)
        )
        grouped.setdefault(write.collection, []).append(operation)
    return grouped


def _may_run_again(error: PyMongoError) -> bool:
    return error.has_error_label("TransientTransactionError") or error.has_error_label("UnknownTransactionCommitResult")


def _outdated(pattern: Mapping[str, Any], values: Mapping[str, Any]) -> DecisionOutdated:
    if "stream" in pattern:
        return DecisionOutdated("a stream moved on", streams=[values["stream"]])
    if "keys" in pattern:
        return DecisionOutdated("a unique key was taken", keys=[values["keys"]])
    return DecisionOutdated(f"a document appeared: {dict(pattern)}")


def _abort(session: ClientSession) -> None:
    if session.in_transaction:
        try:
            session.abort_transaction()
        except PyMongoError:
            # The server ends an abandoned transaction by itself; the first error is the one to report.
            return


def canonical_document(document: Mapping[str, Any]) -> bytes:
    """A document's canonical JSON: what rebuilds hash and compare."""
    return orjson.dumps(document, option=orjson.OPT_SORT_KEYS | orjson.OPT_UTC_Z | orjson.OPT_NON_STR_KEYS, default=str)
