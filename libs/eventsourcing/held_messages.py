"""Messages that a consumer keeps in its own database instead of handling them; the messages of a stream stay in order.

There are two kinds, each in a collection of its own: those that failed (``parking``) and those that only a newer
version understands (``passed_over``). A message is written in the transaction that moves the offset past it, and
removed in the transaction that handles it. While one of a stream is held, the later ones of the stream wait behind it.
"""

from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any

from prometheus_client import Gauge

from libs.event_log.cloudevents import decode_message
from libs.event_log.port import Message
from libs.eventsourcing.batch import SideWrite
from libs.mongodb.client import ASCENDING, Collection, Document

IN_ORDER = [("position", ASCENDING), ("offset", ASCENDING)]
READ_TOGETHER = 4
"""A message may have a megabyte."""


class HeldMessages:
    """The messages of one kind and topic that are held.

    Args:
        collection: in the consumer's own database.
        gauge: shows how many there are.
        blocking: selects the messages behind which the later ones of their stream wait; all by default.
    """

    def __init__(
        self, collection: Collection, topic: str, gauge: Gauge, blocking: Mapping[str, Any] | None = None
    ) -> None:
        self._collection = collection
        self._topic = topic
        self._gauge = gauge
        self._blocking = blocking or {}
        self._streams: set[str] = set()
        self.count = 0
        self.size_bytes = 0

    async def load(self) -> None:
        """Read which messages are held."""
        self._streams = set(await self._collection.distinct("stream", {"topic": self._topic, **self._blocking}))
        size = {"_id": None, "count": {"$sum": 1}, "bytes": {"$sum": {"$binarySize": "$value"}}}
        sizes = await self._collection.aggregate([{"$match": {"topic": self._topic}}, {"$group": size}]).to_list(None)
        self.count, self.size_bytes = (sizes[0]["count"], sizes[0]["bytes"]) if sizes else (0, 0)
        self._gauge.labels(self._topic).set(self.count)

    def holds(self, stream: str) -> bool:
        """Whether the next message of the stream has to wait behind one that is held."""
        return stream in self._streams

    async def documents(self, **criteria: Any) -> AsyncIterator[Document]:
        """The held messages with their fields, in the order in which they came."""
        found = self._collection.find({"topic": self._topic, **criteria}).sort(IN_ORDER).batch_size(READ_TOGETHER)
        async for document in found:
            yield document

    def _note(self, messages: Iterable[Message], blocked_streams: Iterable[str]) -> None:
        """These are held now: the transaction that wrote them is durable."""
        for message in messages:
            self.count += 1
            self.size_bytes += len(message.raw)
        self._streams.update(blocked_streams)
        self._gauge.labels(self._topic).set(self.count)


def hold(collection: str, message: Message, **fields: Any) -> SideWrite:
    """The write that holds a message."""
    document = {
        "topic": message.topic,
        "partition": message.partition,
        "offset": message.offset,
        "position": message.position,
        "store_id": message.store_id,
        "stream": message.stream,
        "event_id": message.event_id,
        "event_type": message.event_type,
        "headers": dict(message.headers),
        "value": message.raw,
        **fields,
    }
    return SideWrite(collection, message.id, document)


def release(collection: str, message: Message) -> SideWrite:
    """The write that removes a message."""
    return SideWrite(collection, message.id, None)


def message_of(document: Mapping[str, Any]) -> Message:
    """The message in a document, decoded by this version, which may understand more than the one that wrote it."""
    return decode_message(
        document["topic"], document["partition"], document["offset"], document["headers"], bytes(document["value"])
    )
