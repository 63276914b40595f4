"""Messages that only a newer version of the service understands are passed over, and kept until that version runs.

The projections take what follows. A stream's reactions happen in order, so while one is owed, the later reactions of
the stream wait behind it. After the upgrade the consumer catches up (``consumer/catch_up.py``).
"""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from libs.core.envelope import UnknownEvent
from libs.event_log.port import Message
from libs.eventsourcing.batch import SideWrite
from libs.eventsourcing.held_messages import HeldMessages, hold, message_of, release
from libs.mongodb.client import Database
from libs.process.telemetry import CONSUMER_PASSED_OVER

COLLECTION = "passed_over"
REMOVED_TOGETHER = 10_000
MESSAGES_MAX = 100_000
SIZE_BYTES_MAX = 256 * 1024 * 1024


class TooMuchPassedOver(Exception):
    """So many messages were passed over that the topic has to wait for the newer version."""


@dataclass(frozen=True, slots=True)
class PassedOverMessage:
    """One message that was passed over.

    Args:
        owes_reactions: False if its reactions happened, and only its projections are incomplete.
    """

    message: Message
    owes_reactions: bool

    @property
    def is_understood(self) -> bool:
        """Whether this version understands all of it."""
        return self.message.envelope is not None and self.message.envelope.is_understood


class PassedOver(HeldMessages):
    """The messages of one topic that were passed over; only those that owe reactions hold up their stream.

    Args:
        database: the consumer's own.
    """

    def __init__(self, database: Database, topic: str) -> None:
        super().__init__(database[COLLECTION], topic, CONSUMER_PASSED_OVER, {"owes_reactions": True})

    def require_room(self, items: Sequence[PassedOverMessage]) -> None:
        """Raise ``TooMuchPassedOver`` if these would exceed the bound."""
        if not items:
            return
        size_bytes = self.size_bytes + sum(len(item.message.raw) for item in items)
        if self.count + len(items) > MESSAGES_MAX or size_bytes > SIZE_BYTES_MAX:
            raise TooMuchPassedOver(
                f"{self._topic}: {self.count} messages of {self.size_bytes} bytes wait for a newer version of the "
                f"service, and there is no room for {items[0].message.event_type} {items[0].message.event_id}"
            )

    def passed_over(self, items: Sequence[PassedOverMessage]) -> None:
        """These were passed over: the transaction that wrote them is durable."""
        self._note((item.message for item in items), (item.message.stream for item in items if item.owes_reactions))

    async def messages(self) -> AsyncIterator[PassedOverMessage]:
        """All of them, in the order in which they came."""
        async for document in self.documents():
            yield PassedOverMessage(message_of(document), document["owes_reactions"])

    async def remove(self, identifiers: Sequence[str]) -> None:
        """These are handled completely."""
        for start in range(0, len(identifiers), REMOVED_TOGETHER):
            together = identifiers[start : start + REMOVED_TOGETHER]
            await self._collection.delete_many({"_id": {"$in": list(together)}})


def passing_over_write(item: PassedOverMessage) -> SideWrite:
    return hold(COLLECTION, item.message, owes_reactions=item.owes_reactions)


def forgetting_write(message: Message) -> SideWrite:
    return release(COLLECTION, message)


def is_unknown(message: Message) -> bool:
    """Whether this version understands nothing of it."""
    return message.envelope is not None and isinstance(message.envelope.data, UnknownEvent)
