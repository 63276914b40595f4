"""A service's event store in its MongoDB database: its head and its events. Batches are written by its ``writer``."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

import structlog

from libs.core.envelope import Envelope
from libs.core.errors import RetryLater
from libs.eventsourcing.batch_writer import BatchWriter
from libs.eventsourcing.head import Head, HeadCache, head_of
from libs.eventsourcing.schema import create_collections, create_head, create_wake_ups
from libs.eventsourcing.stored_events import envelope_of
from libs.eventsourcing.writer_sessions import WriterSessions
from libs.mongodb.client import (
    ASCENDING,
    DESCENDING,
    MAJORITY,
    Client,
    Collection,
    Cursor,
    Database,
    Document,
    IndexModel,
    OperationFailure,
    SyncDatabase,
    synchronous,
)
from libs.mongodb.pipelined import PipelinedRoundTrips
from libs.mongodb.round_trips import RoundTrips

PAGE_BYTES_MAX = 4 * 1024 * 1024

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class EventPage:
    """Some events, in order.

    Args:
        is_last: no further event was committed when they were read.
    """

    events: Sequence[Envelope]
    is_last: bool


class EventStore:
    """The store of one service.

    Args:
        client: a motor client.
        database_name: the service's own database.
        instance: this process's name. A process with the name of an earlier one is its successor and ends the
            transaction that it left open; without a name it is nobody's successor.
        round_trips: makes the writer's access to the database.
    """

    def __init__(
        self,
        client: Client,
        database_name: str,
        *,
        instance: str = "",
        round_trips: Callable[[SyncDatabase[Document]], RoundTrips] = PipelinedRoundTrips,
    ) -> None:
        self.client = client
        self.database: Database = client[database_name]
        self.sync_database = synchronous(client)[database_name]
        self.answered_at = time.monotonic()
        self._instance = instance
        self._cache = HeadCache()
        self._events_majority: Collection = self.database.get_collection("events", read_concern=MAJORITY)
        self.writer = BatchWriter(round_trips(self.sync_database), self.sync_database, self._cache)

    async def open(self, collections: Sequence[str], indexes: Mapping[str, Sequence[IndexModel]]) -> None:
        """Create the head, the collections and all indexes, if missing; safe to run in several instances.

        Args:
            collections: logical names of the aggregates' and projections' collections.
            indexes: further indexes by logical or plain collection name.
        """
        if self._instance:
            await asyncio.to_thread(self._succeed)
        await create_head(self.database, collections)
        head = await self.head()
        await create_collections(self.database, {name: head.collections[name] for name in collections}, indexes)
        await create_wake_ups(self.database, head.position, self.writer.id)

    async def head(self) -> Head:
        """The head as it is now."""
        document = await self.database["head"].find_one({"_id": "head"})
        if document is None:
            raise RetryLater("the event store has no head yet")
        self.answered_at = time.monotonic()
        self._cache.head = head_of(document)
        return self._cache.head

    @property
    def head_cached(self) -> Head | None:
        """The head as this process last read it."""
        return self._cache.head

    def live_collection(self, logical_name: str) -> str:
        """The collection that a logical name stands for, as last read."""
        head = self.head_cached
        return logical_name if head is None else head.collections.get(logical_name, logical_name)

    async def read_after(self, position: int, limit: int) -> EventPage:
        """Events above ``position`` in order, as a majority of the replica set has them.

        At most ``limit``, and fewer if they are large: a page ends with the event that takes it to ``PAGE_BYTES_MAX``.
        """
        cursor = self._events_majority.find({"position": {"$gt": position}}).sort("position", ASCENDING).limit(limit)
        return await self._page(cursor, limit)

    async def read_stream_before(self, stream: str, version: int, limit: int) -> EventPage:
        """One stream's events below a version, newest first; bounded as ``read_after``."""
        criteria: Document = {"stream": stream, "version": {"$lt": version}}
        cursor = self.database["events"].find(criteria).sort("version", DESCENDING).limit(limit)
        return await self._page(cursor, limit)

    async def read_stream(self, stream: str, *, version_max: int | None = None) -> AsyncIterator[Envelope]:
        """One stream's events in order, up to a version. No more are held than come in one reply of the server."""
        criteria: Document = {"stream": stream}
        if version_max is not None:
            criteria["version"] = {"$lte": version_max}
        store_id = await self._store_id()
        cursor = self.database["events"].find(criteria).sort("version", ASCENDING)
        try:
            async for document in cursor:
                yield envelope_of(document, store_id)
        finally:
            await cursor.close()

    async def version_at(self, stream: str, moment: datetime) -> int | None:
        """The version of a stream's last event up to that moment."""
        last = await self.database["events"].find_one(
            {"stream": stream, "time": {"$lte": moment}}, {"version": 1}, sort=[("version", DESCENDING)]
        )
        return None if last is None else int(last["version"])

    async def _page(self, cursor: Cursor, limit: int) -> EventPage:
        store_id = await self._store_id()
        events: list[Envelope] = []
        size_bytes = 0
        async for document in cursor:
            events.append(envelope_of(document, store_id))
            size_bytes += len(document["data"])
            if size_bytes >= PAGE_BYTES_MAX or len(events) == limit:
                await cursor.close()
                return EventPage(events, is_last=False)
        return EventPage(events, is_last=True)

    async def _store_id(self) -> str:
        return (self.head_cached or await self.head()).store_id

    def _succeed(self) -> None:
        """End the transaction that this instance's previous process left open, and register this one's session."""
        sessions = WriterSessions(self.sync_database)
        try:
            sessions.kill(self._instance)
        except OperationFailure as error:
            log.warning("predecessor_not_ended", instance=self._instance, error=str(error)[:200])
        sessions.register(self._instance, self.writer.session_id)
