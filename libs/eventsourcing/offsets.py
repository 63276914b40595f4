"""How far a service has handled the topics that it follows; kept in its own database, one document per partition."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from libs.eventsourcing.event_store import EventStore
from libs.mongodb.client import Document

OFFSETS = "offsets"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """How far one partition is handled.

    Args:
        offset: the next one to read; 0 is the beginning of the partition, wherever that is.
        position: the highest position that was handled; a message with the same or a lower one is a repetition.
        store_id: the store that the partition's events come from; empty as long as none was handled.
    """

    offset: int = 0
    position: int = 0
    store_id: str = ""


Checkpoints = Mapping[int, Checkpoint]
"""The checkpoints of one topic, by partition."""


async def stored_checkpoints(store: EventStore, topic: str) -> dict[int, Checkpoint]:
    """The checkpoints of a topic as they are stored now."""
    cursor = store.database[OFFSETS].find(of_topic(topic))
    return {partition_of(document): checkpoint_in(document) async for document in cursor}


def store_id_of(checkpoints: Checkpoints) -> str:
    """The store that a topic's handled events come from; empty as long as none was handled."""
    return next((checkpoint.store_id for checkpoint in checkpoints.values() if checkpoint.store_id), "")


def of_topic(topic: str) -> Document:
    """The criteria that select the documents of a topic; "0" is the character after "/"."""
    return {"_id": {"$gte": f"{topic}/", "$lt": f"{topic}0"}}


def topic_of(document: Mapping[str, Any]) -> str:
    return str(document["_id"].rsplit("/", 1)[0])


def partition_of(document: Mapping[str, Any]) -> int:
    return int(document["_id"].rsplit("/", 1)[1])


def checkpoint_in(document: Mapping[str, Any]) -> Checkpoint:
    return Checkpoint(document["offset"], document["position"], document["store_id"])


def document_of(topic: str, partition: int, checkpoint: Checkpoint) -> Document:
    return {"_id": f"{topic}/{partition}", **asdict(checkpoint)}
