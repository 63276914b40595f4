"""Sets going again what stopped with an alarm: a topic's consumer, or the relay of a restored store."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from libs.core.ids import uuid7
from libs.event_log.port import EventLog, Message
from libs.eventsourcing.consumer import Place, stored_places
from libs.eventsourcing.event_store import EventStore
from libs.eventsourcing.rebuild import GRACE_SECONDS, Rebuild, RebuildFailed, RebuildReport
from libs.eventsourcing.stops import forget_stop, is_stopped
from libs.service.running import ServiceDefinition

MESSAGES_TOGETHER = 1_000
QUIET_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class RepairReport:
    """What was done about a topic, in words for the operator; the rebuild where one was needed."""

    action: str
    rebuild: RebuildReport | None = None


@dataclass(frozen=True, slots=True)
class _Surveyed:
    """What a partition holds: the store that wrote last, and the highest position of each store."""

    latest_store: str
    highest: Mapping[str, int]


async def repair_topic(
    definition: ServiceDefinition[Any],
    store: EventStore,
    event_log: EventLog,
    topic: str,
    *,
    grace_seconds: float = GRACE_SECONDS,
) -> RepairReport:
    """Set a stopped topic going again, while the service runs or not; one that is not stopped is left as it is.

    Where the log still holds what was handled, reading begins again at its beginning: repeats are known by their
    positions, so nothing is done twice. Where the owner's store is another one, or has lost events, the projections
    are built from what it has now and reading goes on at the end; reactions to events on the way are not made up.

    Args:
        store, event_log: as the service opens them.
        grace_seconds: as in ``Rebuild.run``.

    Raises:
        RebuildFailed: the service does not follow the topic, or the rebuild gave up; nothing was changed.
    """
    if topic not in definition.topics:
        raise RebuildFailed(f"{definition.name} does not follow {topic}")
    places = await stored_places(store, topic)
    holds_what_was_handled = _holds_what_was_handled(places, await _survey(event_log, topic))
    if holds_what_was_handled and not await is_stopped(store, topic):
        return RepairReport(f"there is nothing to repair: {definition.name} is not stopped at {topic}")
    report = await _repaired(definition, store, event_log, topic, places, holds_what_was_handled, grace_seconds)
    await forget_stop(store, topic)
    return report


async def _repaired(
    definition: ServiceDefinition[Any],
    store: EventStore,
    event_log: EventLog,
    topic: str,
    places: Mapping[int, Place],
    holds_what_was_handled: bool,
    grace_seconds: float,
) -> RepairReport:
    if holds_what_was_handled:
        keys = [f"{topic}/{partition}" for partition in places]
        await store.database["offsets"].update_many({"_id": {"$in": keys}}, {"$set": {"offset": 0}})
        return RepairReport("the topic is read again from its beginning; what was handled is passed over")
    rebuild = Rebuild(
        store,
        event_log,
        aggregates=definition.aggregates,
        projections=definition.projections,
        indexes=definition.indexes,
        repaired_topics=[topic],
    )
    report = await rebuild.run(grace_seconds=grace_seconds)
    return RepairReport("the projections were built from the owner's present store; reading goes on", report)


async def renew_identity(store: EventStore) -> None:
    """After a service's database was restored from a backup: from now on it is another store.

    Its events are published anew, under the new id, and every follower stops with an alarm until it is repaired.
    """
    await store.database["head"].update_one({"_id": "head"}, {"$set": {"store_id": uuid7()}})


async def _survey(event_log: EventLog, topic: str) -> dict[int, _Surveyed]:
    latest: dict[int, str] = {}
    highest: dict[int, dict[str, int]] = {}
    async with event_log.subscribe(topic, {}) as subscription:
        ends = await subscription.end_offsets()
        read: dict[int, int] = {}
        while any(read.get(partition, 0) < end for partition, end in ends.items()):
            batch = await subscription.next_batch(MESSAGES_TOGETHER, QUIET_SECONDS)
            if not batch:
                # What is missing has expired.
                break
            for message in batch:
                _note(message, latest, highest)
                read[message.partition] = message.offset + 1
    return {partition: _Surveyed(latest[partition], highest[partition]) for partition in latest}


def _note(message: Message, latest: dict[int, str], highest: dict[int, dict[str, int]]) -> None:
    if not message.store_id:
        return
    latest[message.partition] = message.store_id
    positions = highest.setdefault(message.partition, {})
    positions[message.store_id] = max(message.position, positions.get(message.store_id, 0))


def _holds_what_was_handled(places: Mapping[int, Place], surveyed: Mapping[int, _Surveyed]) -> bool:
    for partition, place in places.items():
        found = surveyed.get(partition)
        if found is None or found.latest_store != place.store_id:
            return False
        if found.highest.get(place.store_id, 0) < place.position:
            return False
    return True
