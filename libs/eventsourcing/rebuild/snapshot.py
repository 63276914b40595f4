"""What a service has handled at one moment: the state that the rebuilt documents have to reach."""

from collections.abc import Mapping
from dataclasses import dataclass

from libs.eventsourcing.event_store import EventStore
from libs.eventsourcing.head import Head, head_of
from libs.eventsourcing.offsets import OFFSETS, Checkpoint, Checkpoints, checkpoint_in, partition_of, topic_of
from libs.eventsourcing.parking import COLLECTION as PARKED
from libs.eventsourcing.passed_over import COLLECTION as PASSED_OVER
from libs.eventsourcing.rebuild.report import RebuildFailed
from libs.mongodb.client import MAJORITY, ClientSession


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a service has handled at one moment.

    Args:
        head: of its own events.
        checkpoints: of the topics that it follows.
        parked, passed_over: ids of the messages that are not handled although their offset is below the checkpoint.
    """

    head: Head
    checkpoints: Mapping[str, Checkpoints]
    parked: frozenset[str]
    passed_over: frozenset[str]


def read_snapshot(store: EventStore, session: ClientSession | None = None) -> Snapshot:
    """Read what a service has handled; its parts are of one moment only if they are read in a session."""
    database = store.sync_database
    if session is None:
        database = database.with_options(read_concern=MAJORITY)
    head = database["head"].find_one({"_id": "head"}, session=session)
    if head is None:
        raise RebuildFailed("the service has no store yet")
    checkpoints: dict[str, dict[int, Checkpoint]] = {}
    for document in database[OFFSETS].find({}, session=session):
        checkpoints.setdefault(topic_of(document), {})[partition_of(document)] = checkpoint_in(document)
    parked, passed_over = (
        frozenset(document["_id"] for document in database[name].find({}, {"_id": 1}, session=session))
        for name in (PARKED, PASSED_OVER)
    )
    return Snapshot(head_of(head), checkpoints, parked, passed_over)
