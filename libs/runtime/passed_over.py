"""Messages that only a newer version of this service understands, kept until it runs.

They don't hold up their stream as parked ones do: what follows them is handled. After the upgrade the consumer causes
the reactions that they owe, in order, and has the projections folded anew from the log, all before it reads on.
"""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from libs.core.envelope import UnknownEvent
from libs.runtime.event_log.port import Message
from libs.runtime.event_store import SideWrite
from libs.runtime.mongo import ASCENDING, Collection, Database
from libs.runtime.parking import document_of, message_of
from libs.runtime.telemetry import CONSUMER_PASSED_OVER

COLLECTION = "passed_over"
FORGOTTEN_TOGETHER = 10_000


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


class PassedOver:
    """The messages of one topic that its consumer passed over.

    Args:
        database: the consumer's own.
    """

    def __init__(self, database: Database, topic: str) -> None:
        self._collection: Collection = database[COLLECTION]
        self._topic = topic
        self.count = 0

    async def messages(self) -> AsyncIterator[PassedOverMessage]:
        """All of them, in the order that they came in."""
        self._counted(await self._collection.count_documents({"topic": self._topic}))
        cursor = self._collection.find({"topic": self._topic})
        async for document in cursor.sort([("position", ASCENDING), ("offset", ASCENDING)]):
            yield PassedOverMessage(message_of(document), document["owes_reactions"])

    def added(self, number: int) -> None:
        """The transaction that wrote so many is durable."""
        if number:
            self._counted(self.count + number)

    async def forget(self, identifiers: Sequence[str]) -> None:
        """These are handled wholly."""
        for start in range(0, len(identifiers), FORGOTTEN_TOGETHER):
            together = identifiers[start : start + FORGOTTEN_TOGETHER]
            await self._collection.delete_many({"_id": {"$in": list(together)}})
        self._counted(await self._collection.count_documents({"topic": self._topic}))

    def _counted(self, count: int) -> None:
        self.count = count
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
