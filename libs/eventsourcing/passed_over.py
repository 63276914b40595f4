"""Messages that only a newer version of this service understands, kept until it runs.

What follows them is projected all the same, but a stream's reactions are caused in order: while one is owed, the later
ones of that stream wait with it. After the upgrade the consumer causes them all and has the projections folded anew
from the log, before it reads on.
"""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from libs.core.envelope import UnknownEvent
from libs.event_log.port import Message
from libs.eventsourcing.batch import SideWrite
from libs.eventsourcing.parking import document_of, message_of
from libs.mongodb.client import ASCENDING, Collection, Database
from libs.process.telemetry import CONSUMER_PASSED_OVER

COLLECTION = "passed_over"
FORGOTTEN_TOGETHER = 10_000
MESSAGES_MAX = 100_000
SIZE_BYTES_MAX = 256 * 1024 * 1024


class TooMuchPassedOver(Exception):
    """So many messages were passed over that the topic has to wait for the newer version."""


@dataclass(frozen=True, slots=True)
class PassedOverMessage:
    """One message that was passed over.

    Args:
        owes_reactions: False where it was handled as far as it was understood, or has been since.
    """

    message: Message
    owes_reactions: bool

    @property
    def is_understood(self) -> bool:
        return self.message.envelope is not None and self.message.envelope.is_understood

    @property
    def size_bytes(self) -> int:
        return len(self.message.raw)


class PassedOver:
    """The messages of one topic that its consumer passed over.

    Args:
        database: the consumer's own.
    """

    def __init__(self, database: Database, topic: str) -> None:
        self._collection: Collection = database[COLLECTION]
        self._topic = topic
        self._streams: set[str] = set()
        self._count = 0
        self._size_bytes = 0

    async def load(self) -> None:
        """Find out what waits."""
        of_topic = {"topic": self._topic}
        self._streams = set(await self._collection.distinct("stream", {**of_topic, "owes_reactions": True}))
        size = {"_id": None, "count": {"$sum": 1}, "bytes": {"$sum": {"$binarySize": "$value"}}}
        sizes = await self._collection.aggregate([{"$match": of_topic}, {"$group": size}]).to_list(None)
        self._counted(*((sizes[0]["count"], sizes[0]["bytes"]) if sizes else (0, 0)))

    def holds(self, stream: str) -> bool:
        """Whether the stream's reactions have to wait for one that was passed over."""
        return stream in self._streams

    def require_room(self, items: Sequence[PassedOverMessage]) -> None:
        """Raises ``TooMuchPassedOver`` if these would exceed the bound."""
        if not items:
            return
        count, size_bytes = self._count + len(items), self._size_bytes + sum(item.size_bytes for item in items)
        if count > MESSAGES_MAX or size_bytes > SIZE_BYTES_MAX:
            raise TooMuchPassedOver(
                f"{self._topic}: {self._count} messages of {self._size_bytes} bytes wait for a newer version of the "
                f"service, and no more are put aside: {items[0].message.event_type} {items[0].message.event_id}"
            )

    async def messages(self) -> AsyncIterator[PassedOverMessage]:
        """All of them, in the order that they came in."""
        cursor = self._collection.find({"topic": self._topic})
        async for document in cursor.sort([("position", ASCENDING), ("offset", ASCENDING)]):
            yield PassedOverMessage(message_of(document), document["owes_reactions"])

    def added(self, items: Sequence[PassedOverMessage]) -> None:
        """The transaction that wrote them is durable."""
        if items:
            self._streams.update(item.message.stream for item in items if item.owes_reactions)
            self._counted(self._count + len(items), self._size_bytes + sum(item.size_bytes for item in items))

    async def forget(self, identifiers: Sequence[str]) -> None:
        """These are handled wholly."""
        for start in range(0, len(identifiers), FORGOTTEN_TOGETHER):
            together = identifiers[start : start + FORGOTTEN_TOGETHER]
            await self._collection.delete_many({"_id": {"$in": list(together)}})

    def _counted(self, count: int, size_bytes: int) -> None:
        self._count, self._size_bytes = count, size_bytes
        CONSUMER_PASSED_OVER.labels(self._topic).set(count)


def passing_over_write(item: PassedOverMessage) -> SideWrite:
    """The write that remembers a message, in the transaction that moves the offset past it."""
    document = {**document_of(item.message), "owes_reactions": item.owes_reactions}
    return SideWrite(COLLECTION, item.message.id, document)


def forgetting_write(message: Message) -> SideWrite:
    return SideWrite(COLLECTION, message.id, None)


def is_unknown(message: Message) -> bool:
    """Whether nothing of the message is understood."""
    return message.envelope is not None and isinstance(message.envelope.data, UnknownEvent)
