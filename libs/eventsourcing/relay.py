"""Publishes a service's committed events on the log: at least once, first occurrences in position order.

Only what follows directly on the last acknowledged position is ever published. So two relays at once (one that was
stopped past its lease and woke up) repeat each other, but neither can get an event ahead of an earlier one; the lease
merely saves the repetition.
"""

import asyncio
import random
from collections import deque
from collections.abc import Sequence
from contextlib import suppress

import structlog

from libs.core.envelope import Envelope
from libs.event_log.port import EventLog
from libs.eventsourcing.command_handler import CommandHandler
from libs.eventsourcing.event_store import EventStore
from libs.eventsourcing.stops import RELAY, forget_stop, note_stop
from libs.mongodb.client import ConnectionFailure, PyMongoError, WriteConcern, in_short
from libs.mongodb.wake_ups import HeadWatcher
from libs.process.telemetry import RELAY_LAG_EVENTS, RELAY_STOPPED

PUBLISHED_TOGETHER_MAX = 500
READ_TOGETHER_MAX = 100
HANDED_OVER_MAX = 4_096
HANDED_OVER_BYTES_MAX = 32 * 1024 * 1024
STORE_POSITION_SECONDS = 0.1
POLL_SECONDS = 1.0
STOPPED_POLL_SECONDS = 2.0
BACKOFF_SECONDS_MAX = 5.0

log = structlog.get_logger(__name__)


class StoreBehindLog(Exception):
    """The log holds events of this store that the store does not: it was restored from an older backup."""


class Relay:
    """The publisher of one service.

    Args:
        store: the service's store, the truth.
        event_log: where to.
        commands: hands over what this process commits, which saves reading it.
    """

    def __init__(self, store: EventStore, event_log: EventLog, commands: CommandHandler) -> None:
        self._store = store
        self._event_log = event_log
        # A lost position only means that some events are published again.
        self._positions = store.database.get_collection("relay", write_concern=WriteConcern(w=1))
        self._handed: deque[Envelope] = deque()
        self._handed_bytes = 0
        self._leading = False
        self._wake = asyncio.Event()
        self._failures = 0
        self._position = 0
        self._position_stored = 0
        self._position_stored_at = 0.0
        self._read_at = 0.0
        self._checked_store_id = ""
        self._stopped_because: str | None = None
        commands.on_commit(self._hand_over)

    async def run(self) -> None:
        """Publish until cancelled; one instance at a time, under the service's lease."""
        watcher = HeadWatcher(self._store.client, [self._store.database.name], ignored_writer=self._store.writer.id)
        try:
            with watcher.listen(self._store.database.name) as self._wake:
                while True:
                    try:
                        await self._check_the_log_is_not_ahead()
                        await self._publish_from_stored_position(watcher)
                    except StoreBehindLog as error:
                        await self._wait_for_repair(error)
                    except (OSError, PyMongoError) as error:
                        await self._back_off(error)
        finally:
            self._leading = False
            self._forget_handed()
            watcher.close()
            RELAY_LAG_EVENTS.set(0)

    async def reason_to_be_stopped(self) -> str | None:
        """Why it waits for an operator, None if it does not."""
        return self._stopped_because

    async def stored_position(self) -> int:
        """The position up to which everything of this store is acknowledged."""
        document = await self._positions.find_one({"_id": "relay", "store_id": (await self._store.head()).store_id})
        return 0 if document is None else int(document["position"])

    async def _check_the_log_is_not_ahead(self) -> None:
        """Followers would pass over new events under positions that they have seen: never publish such."""
        store_id = (await self._store.head()).store_id
        if store_id == self._checked_store_id:
            return
        topics = await self._store.database["events"].distinct("topic")
        published = [await self._event_log.last_position(topic, store_id) for topic in topics]
        head = await self._store.head()
        if max(published, default=0) > head.position:
            raise StoreBehindLog(f"the log holds position {max(published)}, but the store ends at {head.position}")
        await forget_stop(self._store, RELAY)
        self._checked_store_id = store_id

    async def _wait_for_repair(self, error: StoreBehindLog) -> None:
        repair = f"datasync restored {self._service}"
        log.error("relay_stopped", reason=str(error), repair=repair)
        await note_stop(self._store, RELAY, str(error))
        self._stopped_because = f"stopped: {error}; if it was restored from a backup, say so with `{repair}`"
        RELAY_STOPPED.set(1)
        try:
            before = (await self._store.head()).store_id
            while (await self._store.head()).store_id == before:  # noqa: ASYNC110 - another process changes it
                await asyncio.sleep(STOPPED_POLL_SECONDS)
        finally:
            self._stopped_because = None
            RELAY_STOPPED.set(0)

    @property
    def _service(self) -> str:
        return self._store.database.name.removeprefix("datasync_")

    async def _publish_from_stored_position(self, watcher: HeadWatcher) -> None:
        self._position = self._position_stored = await self.stored_position()
        self._leading = True
        self._read_at = 0.0
        try:
            while True:
                self._wake.clear()
                if envelopes := await self._next(watcher):
                    await self._publish(envelopes)
                elif (pause_seconds := self._seconds_until_stored()) <= 0:
                    await self._store_position()
                elif not self._handed:
                    RELAY_LAG_EVENTS.set(0)
                    await watcher.wait(self._wake, min(POLL_SECONDS, pause_seconds))
        finally:
            await self._store_position_if_possible()

    async def _next(self, watcher: HeadWatcher) -> Sequence[Envelope]:
        """The events that follow directly on the position: handed over, or else read from the store."""
        while self._handed and (
            self._handed[0].position <= self._position or self._handed[0].store_id != self._checked_store_id
        ):
            self._take_handed()
        if self._handed and self._handed[0].position == self._position + 1:
            return self._contiguous_handed()
        now = asyncio.get_running_loop().time()
        moved = self._handed or watcher.has_moved_past(self._store.database.name, self._position)
        if not moved and now - self._read_at < POLL_SECONDS:
            return ()
        page = await self._store.read_after(self._position, READ_TOGETHER_MAX)
        self._read_at = now if page.is_last else 0.0
        return page.events

    def _contiguous_handed(self) -> Sequence[Envelope]:
        envelopes: list[Envelope] = []
        position = self._position
        while self._handed and len(envelopes) < PUBLISHED_TOGETHER_MAX and self._handed[0].position == position + 1:
            envelopes.append(self._take_handed())
            position += 1
        return envelopes

    async def _publish(self, envelopes: Sequence[Envelope]) -> None:
        if envelopes[0].store_id != self._checked_store_id:
            raise ConnectionError("the store got another identity; begin again")
        assert envelopes[0].position == self._position + 1, "a relay never publishes past a gap"
        by_topic: dict[str, list[Envelope]] = {}
        for envelope in envelopes:
            by_topic.setdefault(envelope.data.TOPIC, []).append(envelope)
        for topic, wanted in by_topic.items():
            await self._event_log.publish(topic, wanted)
        self._position = envelopes[-1].position
        self._failures = 0
        RELAY_LAG_EVENTS.set((self._handed[-1].position if self._handed else self._position) - self._position)
        if self._seconds_until_stored() <= 0:
            await self._store_position()

    def _seconds_until_stored(self) -> float:
        """When the position is due to be stored: not with every event, which would cost each commit a second write."""
        if self._position == self._position_stored:
            return POLL_SECONDS
        return self._position_stored_at + STORE_POSITION_SECONDS - asyncio.get_running_loop().time()

    async def _store_position(self) -> None:
        store_id, position = self._checked_store_id, self._position
        # The position of another store means nothing; the position of this one never falls.
        known = {"$cond": [{"$eq": ["$store_id", store_id]}, "$position", 0]}
        change = [{"$set": {"position": {"$max": [known, position]}, "store_id": store_id}}]
        await self._positions.update_one({"_id": "relay"}, change, upsert=True)
        self._position_stored = self._position
        self._position_stored_at = asyncio.get_running_loop().time()

    async def _store_position_if_possible(self) -> None:
        if self._position > self._position_stored:
            with suppress(PyMongoError):
                await self._store_position()

    async def _back_off(self, error: Exception) -> None:
        self._leading = False
        self._forget_handed()
        self._failures += 1
        delay_seconds = min(BACKOFF_SECONDS_MAX, 0.05 * 2.0 ** min(self._failures, 8)) * (0.5 + random.random() / 2)
        report = log.debug if isinstance(error, ConnectionFailure) and self._failures > 1 else log.warning
        report("relay_waits", position=self._position, error=in_short(error))
        with suppress(PyMongoError):
            RELAY_LAG_EVENTS.set((await self._store.head()).position - self._position)
        await asyncio.sleep(delay_seconds)

    def _hand_over(self, envelopes: Sequence[Envelope]) -> None:
        """Takes what a batch of this process committed; past the bound everything is read from the store instead."""
        if not self._leading:
            return
        self._handed.extend(envelopes)
        self._handed_bytes += sum(len(envelope.data_json) for envelope in envelopes)
        if len(self._handed) > HANDED_OVER_MAX or self._handed_bytes > HANDED_OVER_BYTES_MAX:
            self._forget_handed()
        self._wake.set()

    def _take_handed(self) -> Envelope:
        envelope = self._handed.popleft()
        self._handed_bytes -= len(envelope.data_json)
        return envelope

    def _forget_handed(self) -> None:
        self._handed.clear()
        self._handed_bytes = 0
