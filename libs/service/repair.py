"""Sets going again what stopped with an alarm: a topic's consumer, or the relay of a restored store."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from libs.core.ids import uuid7
from libs.event_log.port import EventLog, Message
from libs.eventsourcing.event_store import EventStore
from libs.eventsourcing.offsets import OFFSETS, Checkpoint, Checkpoints, of_topic, stored_checkpoints
from libs.eventsourcing.rebuild import GRACE_SECONDS, Rebuild, RebuildFailed, RebuildReport, TopicRepair
from libs.eventsourcing.rebuild.topic_reader import TopicReader
from libs.eventsourcing.stops import forget_stop, is_stopped
from libs.service.definition import AnyDefinition


@dataclass(frozen=True, slots=True)
class RepairReport:
    """What was done about a topic, in words for the operator; the rebuild if one was needed."""

    action: str
    rebuild: RebuildReport | None = None


async def repair_topic(
    definition: AnyDefinition,
    store: EventStore,
    event_log: EventLog,
    topic: str,
    *,
    grace_seconds: float = GRACE_SECONDS,
) -> RepairReport:
    """Set a stopped topic going again, whether the service runs or not; one that is not stopped is left as it is.

    If the log still holds what was handled, the topic is read again from its beginning: repetitions are known by their
    positions, so nothing is done twice. If the owner's store is another one, or has lost events, the projections are
    built from what it holds now and reading continues at the end of the topic; reactions to the events before that are
    not caused.

    Args:
        store, event_log: as the service opens them.
        grace_seconds: as in ``Rebuild.run``.

    Raises:
        RebuildFailed: the service does not follow the topic, or the rebuild gave up; nothing was changed.
    """
    if topic not in definition.topics:
        raise RebuildFailed(f"{definition.name} does not follow {topic}")
    stored = await stored_checkpoints(store, topic)
    found = await survey(event_log, topic)
    if not found.holds(stored):
        repairs = {topic: TopicRepair(stored, found.checkpoints())}
        rebuilt = await Rebuild.of(definition, store, event_log, repairs=repairs).run(grace_seconds=grace_seconds)
        report = RepairReport(
            "the projections were built from the owner's present store; reading continues at the end of the topic",
            rebuilt,
        )
    elif await is_stopped(store, topic):
        await store.database[OFFSETS].update_many(of_topic(topic), {"$set": {"offset": 0}})
        report = RepairReport("the topic is read again from its beginning; what was handled already is skipped")
    else:
        return RepairReport(f"there is nothing to repair: {definition.name} is not stopped at {topic}")
    await forget_stop(store, topic)
    return report


async def renew_identity(store: EventStore) -> None:
    """After a service's database was restored from a backup: from now on it is another store.

    Its events are published again, under the new id, and every follower stops with an alarm until it is repaired.
    """
    await store.database["head"].update_one({"_id": "head"}, {"$set": {"store_id": uuid7()}})


@dataclass(slots=True)
class TopicSurvey:
    """Which stores' events a topic holds."""

    _highest: dict[int, dict[str, int]] = field(default_factory=dict)
    _last_store: dict[int, str] = field(default_factory=dict)
    _next_offsets: Mapping[int, int] = field(default_factory=dict)

    def add(self, message: Message) -> None:
        positions = self._highest.setdefault(message.partition, {})
        positions[message.store_id] = max(message.position, positions.get(message.store_id, 0))
        if message.store_id:
            self._last_store[message.partition] = message.store_id

    def end_at(self, next_offsets: Mapping[int, int]) -> None:
        """The topic was read up to these offsets."""
        self._next_offsets = next_offsets

    def holds(self, checkpoints: Checkpoints) -> bool:
        """Whether each partition ends with events of the store that was followed, up to the one handled last."""
        return all(
            self._last_store.get(partition) == checkpoint.store_id
            and self._highest[partition][checkpoint.store_id] >= checkpoint.position
            for partition, checkpoint in checkpoints.items()
        )

    def checkpoints(self) -> dict[int, Checkpoint]:
        """The end of the topic, for the owner's present store; what other stores wrote does not count."""
        store_id = self._present_store()
        return {
            partition: Checkpoint(self._next_offsets[partition], positions.get(store_id, 0), store_id)
            for partition, positions in self._highest.items()
        }

    def _present_store(self) -> str:
        """The store that no other one follows in any partition.

        The times of events don't tell it: those that a restored store has lost are later than those that it has. Where
        two stores share no partition, the newer id is that of the newer store (UUIDv7).
        """
        last = set(self._last_store.values())
        followed = {
            store_id
            for partition, positions in self._highest.items()
            for store_id in positions
            if store_id != self._last_store.get(partition)
        }
        return max(last - followed or last, default="")


async def survey(event_log: EventLog, topic: str) -> TopicSurvey:
    """Read a topic from its beginning to its present end."""
    found = TopicSurvey()
    async with TopicReader(event_log, topic) as reader:
        async for batch in reader.batches(await reader.end_offsets()):
            for message in batch:
                found.add(message)
        found.end_at(reader.next_offsets)
    return found
