"""The change feed: a project's events in the order of their positions, without a gap.

Positions are those of the service's whole store, whose every batch raises them in its own transaction, so nothing can
appear behind a reader. Others' events are passed over after they were read; the cursor is the last position that was
examined, not the last that was shown, and so a quiet project's reader does not start over.
"""

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from libs.contracts.records import RecordEvent
from libs.core.envelope import Envelope, UnknownEvent
from libs.core.errors import FieldError, InvalidInput, NewerVersion
from libs.eventsourcing.event_store import EventStore
from libs.mongodb.wake_ups import HeadWatcher
from libs.process.health import Health
from services.record_sync.tail import Tail

EXAMINED_TOGETHER = 500
EXAMINED_MAX = 10_000
ANSWER_BYTES_MAX = 4 * 1024 * 1024
CATCHING_UP_MAX = 4
STOP_NOTICED_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Interest:
    """A filter of changes; None matches any."""

    project_id: int
    developer_id: str | None = None
    resource_type: str | None = None

    def covers(self, envelope: Envelope) -> bool:
        event = envelope.data
        return (
            envelope.metadata.project_id == self.project_id
            and isinstance(event, RecordEvent)
            and self.developer_id in (None, event.developer_id)
            and self.resource_type in (None, event.resource_type)
        )


@dataclass(frozen=True, slots=True)
class Changes:
    """Some changes.

    Args:
        cursor: the last position that was examined.
        is_all: nothing was committed after the cursor when it was read.
    """

    events: Sequence[Envelope]
    cursor: int
    is_all: bool


class Feed:
    """Reads events as they are committed: the newest from the shared tail, older ones from the store.

    Args:
        store: the service's opened store.
        watcher: watches its head.
        health: readers are let go when the service stops.
    """

    def __init__(self, store: EventStore, watcher: HeadWatcher, health: Health) -> None:
        self._store = store
        self._tail = Tail(store, watcher)
        self._health = health
        self._catching_up = asyncio.Semaphore(CATCHING_UP_MAX)

    @property
    def is_closing(self) -> bool:
        return self._health.stopping

    async def latest(self) -> int:
        """The position of the last committed event."""
        return (await self._store.head()).position

    async def require_known(self, position: int) -> None:
        """Raises ``InvalidInput`` for a position that does not exist yet, as after a restored backup."""
        head = self._store.head_cached
        if (head is None or position > head.position) and position > await self.latest():
            message = "is a position that this store has not reached"
            raise InvalidInput(f"after: {message}", errors=[FieldError("after", message, "unknown_position")])

    async def changes(self, after: int, interest: Interest, limit: int) -> Changes:
        """What happened after a position, as far as it can be examined in one go; ends at ``ANSWER_BYTES_MAX``."""
        selection = _Selection(after, interest, limit)
        async with self._catching_up:
            while selection.cursor - after < EXAMINED_MAX:
                page = await self._store.read_after(selection.cursor, EXAMINED_TOGETHER)
                if selection.is_full_after(page.events):
                    break
                if page.is_last:
                    return selection.changes(is_all=True)
        return selection.changes(is_all=False)

    async def await_changes(self, after: int, interest: Interest, limit: int, timeout_seconds: float) -> Changes:
        """The same, but waits for changes if there are none; empty after the timeout, or if the service stops."""
        if timeout_seconds <= 0:
            return await self.changes(after, interest, limit)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_seconds
        with self._tail.following():
            while True:
                moved = self._tail.sign()
                changes = await self._newest(after, interest, limit)
                left_seconds = deadline - loop.time()
                if changes.events or left_seconds <= 0 or self.is_closing:
                    return changes
                after = changes.cursor
                if changes.is_all:
                    await self._tail.wait(moved, min(left_seconds, STOP_NOTICED_SECONDS))

    @contextlib.contextmanager
    def following(self) -> Iterator[None]:
        """Keep the tail running between the requests of one reader."""
        with self._tail.following():
            yield

    async def _newest(self, after: int, interest: Interest, limit: int) -> Changes:
        events = self._tail.events_after(after)
        if events is None:
            return await self.changes(after, interest, limit)
        selection = _Selection(after, interest, limit)
        return selection.changes(is_all=not selection.is_full_after(events))


class _Selection:
    """Picks the events of interest, up to a number and to ``ANSWER_BYTES_MAX``."""

    def __init__(self, after: int, interest: Interest, limit: int) -> None:
        self.cursor = after
        self._interest = interest
        self._limit = limit
        self._found: list[Envelope] = []
        self._size_bytes = 0

    def is_full_after(self, events: Sequence[Envelope]) -> bool:
        """Examine events; returns whether the selection is full, the rest being unexamined.

        Raises:
            NewerVersion: the next event of the project is of a type that this version does not know.
        """
        for envelope in events:
            if isinstance(envelope.data, UnknownEvent) and envelope.metadata.project_id == self._interest.project_id:
                # Only a newer version can show it. If it were skipped, the reader would never see it.
                if not self._found:
                    raise NewerVersion("a newer version of the service tells what comes next", retry_after_seconds=1)
                return True
            self.cursor = envelope.position
            if self._interest.covers(envelope):
                self._found.append(envelope)
                self._size_bytes += len(envelope.data_json)
                if len(self._found) == self._limit or self._size_bytes >= ANSWER_BYTES_MAX:
                    return True
        return False

    def changes(self, *, is_all: bool) -> Changes:
        return Changes(self._found, self.cursor, is_all)
