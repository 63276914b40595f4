"""The newest events in memory: one reader of the store serves all listeners.

The reader runs while somebody follows. It keeps a window of the latest events, bounded in bytes; whoever is further
behind reads the store.
"""

import asyncio
import contextlib
import contextvars
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from operator import attrgetter

import structlog

from libs.core.envelope import Envelope
from libs.core.errors import RetryLater
from libs.eventsourcing.event_store import EventStore
from libs.mongodb.client import PyMongoError
from libs.mongodb.wake_ups import HeadWatcher

WINDOW_BYTES_MAX = 16 * 1024 * 1024
READ_TOGETHER_MAX = 500
WAIT_SECONDS_MAX = 60.0
RETRY_SECONDS = 0.5

log = structlog.get_logger(__name__)


class Tail:
    """The end of one store's events.

    Args:
        store: the service's opened store.
        watcher: watches its head.
    """

    def __init__(self, store: EventStore, watcher: HeadWatcher) -> None:
        self._store = store
        self._watcher = watcher
        self._followers = 0
        self._reading: asyncio.Task[None] | None = None
        self._events: list[Envelope] = []
        self._size_bytes = 0
        self._begins_after: int | None = None
        self._failure: RetryLater | None = None
        self._moved = asyncio.Event()

    @contextlib.contextmanager
    def following(self) -> Iterator[None]:
        """Read the tail while there is at least one follower."""
        self._followers += 1
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self._read(), name="tail", context=contextvars.Context())
        try:
            yield
        finally:
            self._followers -= 1
            if not self._followers:
                reading, self._reading = self._reading, None
                if reading is not None:
                    reading.cancel()
                self._forget()

    def sign(self) -> asyncio.Event:
        """The event that is set when the tail next moves; get it before looking at the events."""
        return self._moved

    async def wait(self, sign: asyncio.Event, timeout_seconds: float) -> None:
        """Wait until the tail has moved or the time is over.

        Raises:
            RetryLater: the store can't be read.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_seconds):
                await sign.wait()
        if self._failure is not None:
            raise self._failure

    def events_after(self, position: int) -> Sequence[Envelope] | None:
        """The events above a position that are in the window, None if the window starts later."""
        if self._begins_after is None or position < self._begins_after:
            return None
        return self._events[bisect_right(self._events, position, key=attrgetter("position")) :]

    def wake(self) -> None:
        """Have every follower look again."""
        self._moved.set()
        self._moved = asyncio.Event()

    async def _read(self) -> None:
        with self._watcher.listen(self._store.database.name) as rung:
            position: int | None = None
            while True:
                rung.clear()
                try:
                    if position is None:
                        position = (await self._store.head()).position
                        self._begins_after = position
                        self.wake()
                    page = await self._store.read_after(position, READ_TOGETHER_MAX)
                except Exception as error:  # noqa: BLE001 - whoever waits is told, and then it is tried again
                    await self._tell(error)
                    continue
                self._failure = None
                if page.events:
                    position = page.events[-1].position
                    self._keep(page.events)
                    self.wake()
                if page.is_last:
                    await self._watcher.wait(rung, WAIT_SECONDS_MAX)

    async def _tell(self, error: Exception) -> None:
        is_passing = isinstance(error, PyMongoError | RetryLater)
        log.warning("tail_waits", error=type(error).__name__, exc_info=None if is_passing else error)
        self._failure = RetryLater("the store can't be read at the moment", retry_after_seconds=1)
        self.wake()
        await asyncio.sleep(RETRY_SECONDS)

    def _keep(self, events: Sequence[Envelope]) -> None:
        self._events.extend(events)
        self._size_bytes += sum(len(event.data_json) for event in events)
        dropped = 0
        while self._size_bytes > WINDOW_BYTES_MAX:
            self._size_bytes -= len(self._events[dropped].data_json)
            dropped += 1
        if dropped:
            self._begins_after = self._events[dropped - 1].position
            del self._events[:dropped]

    def _forget(self) -> None:
        self._events = []
        self._size_bytes = 0
        self._begins_after = None
        self._failure = None
