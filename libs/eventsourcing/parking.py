"""Messages that can't be handled wait here, with every later one of their stream, for an operator.

A message is parked in the transaction that moves the consumer's offset past it. The operator's command only marks what
is to be tried again; the consumer that holds the topic's lease does it, between two batches, so that a retry and a
newly parked message of the same stream can't pass each other.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import structlog

from libs.event_log.cloudevents import decode_message
from libs.event_log.port import Message
from libs.eventsourcing.batch import SideWrite
from libs.mongodb.client import ASCENDING, Collection, Database, Document
from libs.process.telemetry import CONSUMER_PARKED

COLLECTION = "parked"
STREAM_IS_PARKED = "an earlier message of its stream is parked"

log = structlog.get_logger(__name__)


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


class Parking:
    """The parked messages of one topic, as its consumer keeps them.

    Args:
        database: the consumer's own.
    """

    def __init__(self, database: Database, topic: str) -> None:
        self._collection: Collection = database[COLLECTION]
        self._topic = topic
        self._streams: set[str] = set()
        self._count = 0

    async def load(self) -> None:
        """Find out which streams are parked."""
        self._streams = set(await self._collection.distinct("stream", {"topic": self._topic}))
        self._count = await self._collection.count_documents({"topic": self._topic})
        CONSUMER_PARKED.labels(self._topic).set(self._count)

    @property
    def is_empty(self) -> bool:
        return not self._streams

    def holds(self, stream: str) -> bool:
        """Whether the stream's messages have to wait behind a parked one."""
        return stream in self._streams

    def parked(self, messages: Sequence[Message]) -> None:
        """These are parked now; the transaction that did it is durable."""
        self._streams.update(message.stream for message in messages)
        self._count += len(messages)
        CONSUMER_PARKED.labels(self._topic).set(self._count)

    async def streams_to_retry(self) -> list[str]:
        """The streams that an operator wants tried again."""
        wanted = await self._collection.distinct("stream", {"topic": self._topic, "retry_requested": True})
        return [str(stream) for stream in wanted]

    async def messages_of(self, stream: str) -> AsyncIterator[tuple[str, Message]]:
        """The parked messages of a stream with their ids here, in the order that they came in, one at a time."""
        order = {"position": ASCENDING, "offset": ASCENDING}
        cursor = self._collection.find({"topic": self._topic, "stream": stream}, order)
        for identifier in [document["_id"] async for document in cursor.sort(list(order.items()))]:
            document = await self._collection.find_one({"_id": identifier})
            if document is not None:
                yield identifier, message_of(document)

    async def failed_again(self, identifier: str, stream: str, reason: str) -> None:
        """The first parked message of the stream still can't be handled; the others go on waiting."""
        await self._collection.update_many(
            {"topic": self._topic, "stream": stream}, {"$set": {"retry_requested": False}}
        )
        await self._collection.update_one({"_id": identifier}, {"$set": {"reason": reason}, "$inc": {"attempts": 1}})
        log.error("parked_message_failed_again", topic=self._topic, stream=stream, parked=identifier, reason=reason)

    async def released(self) -> None:
        """A stream was handled to its end."""
        await self.load()


def parking_write(message: Message, reason: str, now: datetime) -> SideWrite:
    """The write that parks a message."""
    document = {
        **document_of(message),
        "reason": reason,
        "attempts": 1,
        "parked_at": now,
        "retry_requested": False,
    }
    return SideWrite(COLLECTION, message.id, document)


def unparking_write(identifier: str) -> SideWrite:
    """The write that takes a message out, in the transaction that handles it."""
    return SideWrite(COLLECTION, identifier, None)


async def list_parked(database: Database) -> list[ParkedMessage]:
    """All parked messages of a service, in order within each stream."""
    order = [("topic", ASCENDING), ("stream", ASCENDING), ("position", ASCENDING), ("offset", ASCENDING)]
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
    """Ask the running service to try parked messages again, in order; returns how many are waiting for it.

    Args:
        topic, stream: only these; all when absent.
    """
    criteria: Document = {}
    if topic is not None:
        criteria["topic"] = topic
    if stream is not None:
        criteria["stream"] = stream
    await database[COLLECTION].update_many(criteria, {"$set": {"retry_requested": True}})
    return int(await database[COLLECTION].count_documents(criteria))


def document_of(message: Message) -> Document:
    """A message as it is put aside."""
    return {
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
    }


def message_of(document: Mapping[str, Any]) -> Message:
    """A message that was put aside, read anew."""
    return decode_message(
        document["topic"], document["partition"], document["offset"], document["headers"], bytes(document["value"])
    )
