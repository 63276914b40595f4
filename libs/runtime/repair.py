"""What an operator does to a service from the command line: rebuild, retry what is parked, repair a stopped topic."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from libs.runtime.consumer import Place, stored_places
from libs.runtime.event_log import open_event_log
from libs.runtime.event_log.port import EventLog, Message
from libs.runtime.event_store import EventStore
from libs.runtime.mongo import connect
from libs.runtime.parking import ParkedMessage, list_parked, request_retry
from libs.runtime.rebuild import GRACE_SECONDS, Rebuild, RebuildFailed, RebuildReport
from libs.runtime.service import ServiceDefinition
from libs.runtime.settings import ServiceSettings

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


class Operations:
    """An operator's commands on one service, which may be running or not.

    Args:
        definition: the service's.
        store, event_log: opened as the service opens them.
    """

    def __init__(self, definition: ServiceDefinition[Any], store: EventStore, event_log: EventLog) -> None:
        self._definition = definition
        self._store = store
        self._event_log = event_log

    async def rebuild(self, *, swap: bool = True, grace_seconds: float = GRACE_SECONDS) -> RebuildReport:
        """Rebuild every document and compare; raises ``RebuildFailed``."""
        return await self._rebuild().run(swap=swap, grace_seconds=grace_seconds)

    async def parked(self) -> list[ParkedMessage]:
        """What waits for an operator."""
        return await list_parked(self._store.database)

    async def retry_parked(self, topic: str | None = None, stream: str | None = None) -> int:
        """Have the running service try parked messages again; returns how many."""
        return await request_retry(self._store.database, topic, stream)

    async def repair(self, topic: str, *, grace_seconds: float = GRACE_SECONDS) -> RepairReport:
        """Set a stopped topic going again.

        Where the log still holds what was handled, reading begins again at its beginning: repeats are known by their
        positions, so nothing is done twice. Where the owner's store is another one, or has lost events, the projections
        are built from what it has now and reading goes on at the end; reactions to events on the way are not made up.

        Raises:
            RebuildFailed: the service does not follow the topic, or the rebuild gave up; nothing was changed.
        """
        if topic not in self._definition.topics:
            raise RebuildFailed(f"{self._definition.name} does not follow {topic}")
        places = await stored_places(self._store, topic)
        surveyed = await self._survey(topic)
        if _holds_what_was_handled(places, surveyed):
            await self._store.database["offsets"].update_many(
                {"_id": {"$in": [f"{topic}/{partition}" for partition in places]}}, {"$set": {"offset": 0}}
            )
            return RepairReport("the topic is read again from its beginning; what was handled is passed over")
        report = await self._rebuild(topic).run(grace_seconds=grace_seconds)
        return RepairReport("the projections were built from the owner's present store; reading goes on", report)

    def _rebuild(self, *repaired_topics: str) -> Rebuild:
        return Rebuild(
            self._store,
            self._event_log,
            aggregates=self._definition.aggregates,
            projections=self._definition.projections,
            indexes=self._definition.indexes,
            repaired_topics=repaired_topics,
        )

    async def _survey(self, topic: str) -> dict[int, _Surveyed]:
        latest: dict[int, str] = {}
        highest: dict[int, dict[str, int]] = {}
        async with self._event_log.subscribe(topic, {}) as subscription:
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


@asynccontextmanager
async def operations(definition: ServiceDefinition[Any], settings: ServiceSettings) -> AsyncIterator[Operations]:
    """The operator's commands on a service, over connections of their own."""
    client = connect(settings.mongodb_url, f"datasync {definition.name}")
    try:
        store = EventStore(client, settings.database_prefix + definition.name)
        await store.open(definition.collections, definition.indexes)
        event_log = await open_event_log(settings, client, definition.name)
        try:
            yield Operations(definition, store, event_log)
        finally:
            await event_log.close()
    finally:
        client.close()


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
