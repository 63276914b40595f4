"""Messages that failed are parked, with every later one of their stream, until an operator has them retried.

The operator's command only marks them. The consumer with the topic's lease retries them between two batches, so a retry
and a new message of the same stream can't overtake each other.
"""

import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import datetime

import structlog

from libs.event_log.port import Message
from libs.eventsourcing.batch import SideWrite
from libs.eventsourcing.held_messages import IN_ORDER, HeldMessages, hold, message_of, release
from libs.mongodb.client import ASCENDING, Database, Document
from libs.process.telemetry import CONSUMER_PARKED

COLLECTION = "parked"
BEHIND_PARKED = "an earlier message of its stream is parked"
STREAMS_MAX = 100
WITHIN_SECONDS = 60.0

log = structlog.get_logger(__name__)


class TooMuchParked(Exception):
    """Too many streams fail within a minute: the messages are not the cause, and parking them all would hide it."""


@dataclass(frozen=True, slots=True)
class Failed:
    """A message that is to be parked, and why."""

    message: Message
    reason: str

    @property
    def is_behind_another(self) -> bool:
        return self.reason == BEHIND_PARKED


class Parking(HeldMessages):
    """The parked messages of one topic.

    Args:
        database: the consumer's own.
    """

    def __init__(self, database: Database, topic: str) -> None:
        super().__init__(database[COLLECTION], topic, CONSUMER_PARKED)
        self._service = database.name.removeprefix("datasync_")
        self._parked_at: deque[float] = deque(maxlen=STREAMS_MAX)

    def require_few(self, failed: Sequence[Failed]) -> None:
        """Raise ``TooMuchParked`` if these would be more than 100 streams within a minute."""
        first = [item for item in failed if not item.is_behind_another]
        since = time.monotonic() - WITHIN_SECONDS
        recently = sum(parked_at > since for parked_at in self._parked_at)
        if first and recently + len(first) > STREAMS_MAX:
            raise TooMuchParked(
                f"{self._topic}: {recently} streams were parked within {WITHIN_SECONDS:g} s, and the next one fails "
                f"too: {first[0].reason}"
            )

    def parked(self, failed: Sequence[Failed]) -> None:
        """These are parked now: the transaction that wrote them is durable."""
        self._note((item.message for item in failed), (item.message.stream for item in failed))
        for item in failed:
            if not item.is_behind_another:
                self._parked_at.append(time.monotonic())
                log.error(
                    "message_parked",
                    topic=self._topic,
                    stream=item.message.stream,
                    event_id=item.message.event_id,
                    event_type=item.message.event_type,
                    reason=item.reason,
                    repair=f"datasync parked {self._service} --retry",
                )

    def forgive(self) -> None:
        """The topic was repaired: earlier failures no longer count."""
        self._parked_at.clear()

    async def streams_to_retry(self) -> list[str]:
        """The streams that an operator wants retried."""
        if self.count == 0:
            return []
        requested = await self._collection.distinct("stream", {"topic": self._topic, "retry_requested": True})
        return [str(stream) for stream in requested]

    async def messages_of(self, stream: str) -> AsyncIterator[Message]:
        """The parked messages of a stream, in order."""
        async for document in self.documents(stream=stream):
            yield message_of(document)

    async def failed_again(self, failed: Failed) -> None:
        """The first message of its stream failed again; the others still wait behind it."""
        stream, identifier = failed.message.stream, failed.message.id
        await self._collection.update_many(
            {"topic": self._topic, "stream": stream}, {"$set": {"retry_requested": False}}
        )
        await self._collection.update_one(
            {"_id": identifier}, {"$set": {"reason": failed.reason}, "$inc": {"attempts": 1}}
        )
        log.error(
            "parked_message_failed_again", topic=self._topic, stream=stream, parked=identifier, reason=failed.reason
        )


def parking_write(failed: Failed, now: datetime) -> SideWrite:
    return hold(COLLECTION, failed.message, reason=failed.reason, attempts=1, parked_at=now, retry_requested=False)


def unparking_write(message: Message) -> SideWrite:
    return release(COLLECTION, message)


@dataclass(frozen=True, slots=True)
class ParkedMessage:
    """One parked message as an operator sees it."""

    id: str
    topic: str
    stream: str
    position: int
    event_type: str
    reason: str
    attempts: int
    parked_at: datetime
    retry_requested: bool


async def list_parked(database: Database) -> list[ParkedMessage]:
    """All parked messages of a service, in order within each stream."""
    order = [("topic", ASCENDING), ("stream", ASCENDING), *IN_ORDER]
    documents = await database[COLLECTION].find({}, {"value": 0, "headers": 0}).sort(order).to_list(None)
    return [
        ParkedMessage(
            id=document["_id"],
            topic=document["topic"],
            stream=document["stream"],
            position=document["position"],
            event_type=document["event_type"],
            reason=document["reason"],
            attempts=document["attempts"],
            parked_at=document["parked_at"],
            retry_requested=document["retry_requested"],
        )
        for document in documents
    ]


async def request_retry(database: Database, topic: str | None = None, stream: str | None = None) -> int:
    """Ask the running service to retry parked messages, in order; returns how many there are.

    Args:
        topic, stream: only these; all if absent.
    """
    criteria: Document = {}
    if topic is not None:
        criteria["topic"] = topic
    if stream is not None:
        criteria["stream"] = stream
    await database[COLLECTION].update_many(criteria, {"$set": {"retry_requested": True}})
    return int(await database[COLLECTION].count_documents(criteria))
