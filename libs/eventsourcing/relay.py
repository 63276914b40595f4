"""Publishes a service's committed events on the log: at least once, their first occurrences in the order of positions.

A relay publishes only the events that directly follow its last acknowledged position. So if two relays run at once, for
example because one was suspended past the end of its lease, they publish events twice but never out of order.
"""

import asyncio
from collections import deque
from collections.abc import Sequence
from contextlib import suppress

import structlog

from libs.core.envelope import Envelope
from libs.event_log.port import EventLog
from libs.eventsourcing.backoff import Backoff
from libs.eventsourcing.command_handler import CommandHandler
from libs.eventsourcing.event_store import EventStore
from libs.eventsourcing.stops import RELAY, forget_stop, note_stop
from libs.mongodb.client import PyMongoError, WriteConcern
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
    """The log has events of this store that the store no longer has: it was restored from an older backup."""


class Relay:
    """The relay of one service.

    Args:
        store: the service's store.
        event_log: the log to publish on.
        commands: hands over the events that this process commits, so that they need not be read.
    """

    def __init__(self, store: EventStore, event_log: EventLog, commands: CommandHandler) -> None:
        self._store = store
        self._event_log = event_log
        # If a stored position is lost, some events are published again.
        self._positions = store.database.get_collection("relay", write_concern=WriteConcern(w=1))
        self._handed_over = _HandedOver()
        self._leading = False
        self._wake = asyncio.Event()
        self._backoff = Backoff("relay_waits", BACKOFF_SECONDS_MAX)
        self._position = 0
        self._position_stored = 0
        self._position_stored_at = 0.0
        self._read_at = 0.0
        self._checked_store_id = ""
        self._stopped_because: str | None = None
        commands.on_commit(self._hand_over)

    async def run(self) -> None:
        """Publish until cancelled; run by one instance at a time, under a lease."""
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
            self._handed_over.clear()
            watcher.close()
            RELAY_LAG_EVENTS.set(0)

    async def reason_to_be_stopped(self) -> str | None:
        """Why the relay is stopped and what to do about it; None if it is not."""
        return self._stopped_because

    async def stored_position(self) -> int:
        """The position up to which the log has acknowledged this store's events."""
        document = await self._positions.find_one({"_id": "relay", "store_id": (await self._store.head()).store_id})
        return 0 if document is None else int(document["position"])

    async def _check_the_log_is_not_ahead(self) -> None:
        """Otherwise new events would have positions that consumers have handled, and be taken for repetitions."""
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
                elif self._handed_over.is_empty:
                    RELAY_LAG_EVENTS.set(0)
                    await watcher.wait(self._wake, min(POLL_SECONDS, pause_seconds))
        finally:
            await self._store_position_if_possible()

    async def _next(self, watcher: HeadWatcher) -> Sequence[Envelope]:
        """The events that directly follow the position: handed over, or else read from the store."""
        if events := self._handed_over.following(self._position, self._checked_store_id):
            return events
        now = asyncio.get_running_loop().time()
        moved = not self._handed_over.is_empty or watcher.has_moved_past(self._store.database.name, self._position)
        if not moved and now - self._read_at < POLL_SECONDS:
            return ()
        page = await self._store.read_after(self._position, READ_TOGETHER_MAX)
        self._read_at = now if page.is_last else 0.0
        return page.events

    async def _publish(self, envelopes: Sequence[Envelope]) -> None:
        if envelopes[0].store_id != self._checked_store_id:
            raise ConnectionError("the store's id has changed; begin again")
        assert envelopes[0].position == self._position + 1, "a relay never publishes past a gap"
        by_topic: dict[str, list[Envelope]] = {}
        for envelope in envelopes:
            by_topic.setdefault(envelope.data.TOPIC, []).append(envelope)
        for topic, wanted in by_topic.items():
            await self._event_log.publish(topic, wanted)
        self._position = envelopes[-1].position
        self._backoff.reset()
        RELAY_LAG_EVENTS.set(max(0, self._handed_over.last_position - self._position))
        if self._seconds_until_stored() <= 0:
            await self._store_position()

    def _seconds_until_stored(self) -> float:
        """How soon to store the position: not after every event, which would cost a second write per commit."""
        if self._position == self._position_stored:
            return POLL_SECONDS
        return self._position_stored_at + STORE_POSITION_SECONDS - asyncio.get_running_loop().time()

    async def _store_position(self) -> None:
        store_id, position = self._checked_store_id, self._position
        # The position of another store is replaced; that of this one never decreases.
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
        self._handed_over.clear()
        with suppress(PyMongoError):
            RELAY_LAG_EVENTS.set((await self._store.head()).position - self._position)
        await self._backoff.wait(error, position=self._position)

    def _hand_over(self, envelopes: Sequence[Envelope]) -> None:
        if self._leading:
            self._handed_over.add(envelopes)
            self._wake.set()


class _HandedOver:
    """Events that this process committed and the relay has not published yet.

    If too many wait, all of them are dropped: they are read from the store instead.
    """

    def __init__(self) -> None:
        self._events: deque[Envelope] = deque()
        self._size_bytes = 0

    @property
    def is_empty(self) -> bool:
        return not self._events

    @property
    def last_position(self) -> int:
        """The position of the last event, 0 if there is none."""
        return self._events[-1].position if self._events else 0

    def add(self, events: Sequence[Envelope]) -> None:
        self._events.extend(events)
        self._size_bytes += sum(len(event.data_json) for event in events)
        if len(self._events) > HANDED_OVER_MAX or self._size_bytes > HANDED_OVER_BYTES_MAX:
            self.clear()

    def following(self, position: int, store_id: str) -> list[Envelope]:
        """Take the events that directly follow a position; those up to it, or of another store, are dropped."""
        while self._events and (self._events[0].position <= position or self._events[0].store_id != store_id):
            self._take()
        found: list[Envelope] = []
        while self._events and len(found) < PUBLISHED_TOGETHER_MAX and self._events[0].position == position + 1:
            found.append(self._take())
            position += 1
        return found

    def clear(self) -> None:
        self._events.clear()
        self._size_bytes = 0

    def _take(self) -> Envelope:
        event = self._events.popleft()
        self._size_bytes -= len(event.data_json)
        return event
