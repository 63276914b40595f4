"""The embedded log: the event stores of the topics' owners are the log, so nothing is copied and no relay runs.

A topic has one partition, 0. An event's offset is its position in the owner's store, which may own several topics, so
the offsets of a topic have gaps.
"""

from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any

from libs.contracts.topics import OWNERS, owner_of
from libs.core.envelope import Envelope, Metadata
from libs.event_log.cloudevents import decode_message, headers_of
from libs.event_log.port import LogIdentity, Message, OffsetOutOfRange
from libs.mongodb.client import ASCENDING, MAJORITY, Client, Cursor, Document, PyMongoError
from libs.mongodb.wake_ups import HeadWatcher

PARTITION = 0
BATCH_BYTES_MAX = 4 * 1024 * 1024


class EmbeddedEventLog:
    """The log of an installation without Kafka.

    Args:
        client: of the server with the owners' databases.
        database_prefix: precedes the names of the databases.
        topics: those that may be followed.
    """

    needs_relay = False

    def __init__(self, client: Client, database_prefix: str, topics: Collection[str] = tuple(OWNERS)) -> None:
        self._client = client
        self._prefix = database_prefix
        self._watcher = HeadWatcher(client, sorted({database_prefix + owner_of(topic) for topic in topics}))

    async def publish(self, topic: str, envelopes: Sequence[Envelope]) -> None:
        """Do nothing: an event is published by its commit."""

    async def last_position(self, topic: str, store_id: str) -> int:
        """The position of the topic's last event."""
        database = self._client[self._prefix + owner_of(topic)]
        try:
            head = await database["head"].find_one({"_id": "head", "store_id": store_id})
            last = await database["events"].find_one({"topic": topic}, {"position": 1}, sort=[("position", -1)])
        except PyMongoError as error:
            raise ConnectionError(f"the store of {topic} does not answer: {type(error).__name__}") from error
        return 0 if head is None or last is None else int(last["position"])

    @asynccontextmanager
    async def subscribe(self, topic: str, offsets: Mapping[int, int] | None) -> AsyncIterator["EmbeddedSubscription"]:
        """Read the owner's store from an offset, or from its end if ``offsets`` is None."""
        database = self._prefix + owner_of(topic)
        with self._watcher.listen(database) as changed:
            subscription = EmbeddedSubscription(self._client, database, topic, self._watcher, changed)
            if offsets is None:
                subscription.next_offset = (await subscription.head())[0] + 1
            else:
                subscription.next_offset = offsets.get(PARTITION, 0)
            yield subscription

    async def identity(self) -> LogIdentity:
        return LogIdentity(kind="embedded")

    async def close(self) -> None:
        """Stop watching; the client is not closed."""
        self._watcher.close()


class EmbeddedSubscription:
    """A reader of one topic in its owner's store."""

    def __init__(self, client: Client, database: str, topic: str, watcher: HeadWatcher, changed: Any) -> None:
        self._head = client[database].get_collection("head", read_concern=MAJORITY)
        self._events = client[database].get_collection("events", read_concern=MAJORITY)
        self._topic = topic
        self._watcher = watcher
        self._changed = changed
        self._drained = False
        self.next_offset = 0

    async def next_batch(self, messages_max: int, timeout_seconds: float) -> Sequence[Message]:
        """The next events of the topic; if there are none, waits until the head changes."""
        if self._drained and not self._changed.is_set():
            if timeout_seconds <= 0:
                return []
            await self._watcher.wait(self._changed, timeout_seconds)
        self._changed.clear()
        return await self._read(messages_max)

    async def end_offsets(self) -> Mapping[int, int]:
        """The offset after the topic's last event."""
        try:
            last = await self._events.find_one(
                {"topic": self._topic}, {"position": 1}, sort=[("position", -1)], max_time_ms=5_000
            )
        except PyMongoError as error:
            raise ConnectionError(f"the store of {self._topic} does not answer: {type(error).__name__}") from error
        return {PARTITION: 0 if last is None else int(last["position"]) + 1}

    async def report_progress(self, next_offsets: Mapping[int, int]) -> None:
        """Do nothing: there is no monitoring tool to tell."""

    async def head(self) -> tuple[int, str]:
        """The position of the store's last event, and the store's id; 0 and empty if there is no store yet."""
        try:
            document = await self._head.find_one({"_id": "head"})
        except PyMongoError as error:
            raise ConnectionError(f"the store of {self._topic} does not answer: {type(error).__name__}") from error
        return (0, "") if document is None else (int(document["position"]), str(document["store_id"]))

    async def _read(self, messages_max: int) -> list[Message]:
        position, store_id = await self.head()
        if self.next_offset > position + 1:
            raise OffsetOutOfRange(
                f"{self._topic}: the next offset is {self.next_offset}, but its store ends at position {position}"
            )
        self._drained = self.next_offset > position
        if self._drained:
            return []
        criteria = {"topic": self._topic, "position": {"$gte": self.next_offset, "$lte": position}}
        try:
            cursor = self._events.find(criteria).sort("position", ASCENDING).limit(messages_max)
            documents, is_cut = await _bounded(cursor)
        except PyMongoError as error:
            raise ConnectionError(f"the store of {self._topic} does not answer: {type(error).__name__}") from error
        messages = [_message(self._topic, store_id, document) for document in documents]
        # Unless a limit was reached, the topic has no further events below the head.
        self._drained = not is_cut and len(messages) < messages_max
        self.next_offset = position + 1 if self._drained else messages[-1].offset + 1
        return messages


async def _bounded(cursor: Cursor) -> tuple[list[Document], bool]:
    """The first documents, up to ``BATCH_BYTES_MAX``, and whether there may be more."""
    documents: list[Document] = []
    size_bytes = 0
    async for document in cursor:
        documents.append(document)
        size_bytes += len(document["data"])
        if size_bytes >= BATCH_BYTES_MAX:
            await cursor.close()
            return documents, True
    return documents, False


def _message(topic: str, store_id: str, document: Document) -> Message:
    time: datetime = document["time"]
    headers = headers_of(
        topic=topic,
        event_id=document["_id"],
        event_type=document["type"],
        schema_version=document["schema_version"],
        stream=document["stream"],
        version=document["version"],
        position=document["position"],
        store_id=store_id,
        time=time,
        metadata=Metadata.stored(document),
    )
    raw: bytes = document["data"].encode()
    return decode_message(topic, PARTITION, int(document["position"]), headers, raw)
