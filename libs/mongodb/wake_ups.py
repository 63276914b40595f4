"""Wakes readers when a store's head moves: each batch inserts a document into a small capped collection they tail.

Wake-ups only shorten the wait. Every reader also polls, so nothing depends on them. A change stream would report the
same, but each one makes the server scan everything that is written to its oplog.
"""

import asyncio
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import structlog

from libs.mongodb.client import (
    Client,
    CursorType,
    Document,
    InvalidOperation,
    PyMongoError,
    SyncDatabase,
    in_short,
    is_passing,
    synchronous,
)

WAKE_UPS = "wake_ups"
"""The capped collection with a document for each batch."""

AWAIT_MS = 500
POLL_SECONDS = 0.25
POLL_SECONDS_WHILE_WATCHING = 1.0
RETRY_SECONDS = 0.5

log = structlog.get_logger(__name__)


class HeadWatcher:
    """Wakes listeners when the heads of databases move.

    Args:
        client: a motor client; its connections are shared.
        databases: the names of the databases that may be listened to.
        ignored_writer: the id of a writer whose batches wake nobody, because the listeners learn of them otherwise.
    """

    def __init__(self, client: Client, databases: Sequence[str], *, ignored_writer: str | None = None) -> None:
        self._stop = threading.Event()
        self._watches = {name: _Watch(synchronous(client)[name], ignored_writer, self._stop) for name in databases}

    @contextmanager
    def listen(self, database: str) -> Iterator[asyncio.Event]:
        """An event that is set when the database's head may have moved; clear it before reading."""
        event = asyncio.Event()
        watch = self._watches[database]
        watch.listeners.add(event)
        watch.start()
        try:
            yield event
        finally:
            watch.listeners.discard(event)

    def has_moved_past(self, database: str, position: int) -> bool:
        """Whether the head may be above ``position``; True also while the database can't be watched."""
        watch = self._watches[database]
        return not watch.is_live or watch.position > position

    async def wait(self, event: asyncio.Event, timeout_seconds: float) -> None:
        """Wait until ``event`` is set, the next poll is due or the time is over."""
        is_live = all(watch.is_live for watch in self._watches.values() if event in watch.listeners)
        poll_seconds = POLL_SECONDS_WHILE_WATCHING if is_live else POLL_SECONDS
        try:
            async with asyncio.timeout(min(timeout_seconds, poll_seconds)):
                await event.wait()
        except TimeoutError:
            return

    def close(self) -> None:
        """Stop the threads; they end within the time of one request."""
        self._stop.set()


class _Watch:
    """Follows one database's wake-ups, on a thread of its own from the first listener on.

    Args:
        stop: ends the thread.
    """

    def __init__(self, database: SyncDatabase[Document], ignored_writer: str | None, stop: threading.Event) -> None:
        self._database = database
        self._ignored_writer = ignored_writer
        self._stop = stop
        self._loop: asyncio.AbstractEventLoop | None = None
        self.listeners: set[asyncio.Event] = set()
        self.is_live = False
        """Whether the next wake-up will be received."""
        self.position = 0
        """The highest that was announced; the batch that announced it may not have been committed."""

    def start(self) -> None:
        has_started = self._loop is not None
        self._loop = asyncio.get_running_loop()
        if not has_started:
            threading.Thread(target=self._run, name=f"wake-ups {self._database.name}", daemon=True).start()

    def _run(self) -> None:
        failures = 0
        while not self._stop.is_set():
            try:
                self._follow()
            except InvalidOperation:
                # The client is closed, because the process is ending.
                return
            except PyMongoError as error:
                failures = 0 if self.is_live else failures + 1
                if failures <= 1 and not self._stop.is_set():
                    # An unreachable store is reported by what reads its head.
                    report = log.debug if is_passing(error) else log.warning
                    report("head_watch_failed", database=self._database.name, error=in_short(error))
            finally:
                self.is_live = False
            self._stop.wait(RETRY_SECONDS)

    def _follow(self) -> None:
        """Follow the wake-ups until the cursor is closed: the collection is missing, or has overwritten its place."""
        head = self._database["head"].find_one({"_id": "head"}, {"position": 1})
        position = 0 if head is None else int(head["position"])
        criteria: Document = {"position": {"$gt": position}}
        if self._ignored_writer is not None:
            criteria["writer"] = {"$ne": self._ignored_writer}
        wake_ups = self._database[WAKE_UPS].find(criteria, cursor_type=CursorType.TAILABLE_AWAIT)
        with wake_ups.max_await_time_ms(AWAIT_MS) as cursor:
            self._announce(position)
            while cursor.alive and not self._stop.is_set():
                wake_up = next(cursor, None)
                self.is_live = cursor.alive
                if wake_up is not None:
                    self._announce(wake_up["position"])

    def _announce(self, position: int) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(self._wake, position)
        except RuntimeError:
            # The event loop is closed, so there is no listener.
            self._stop.set()

    def _wake(self, position: int) -> None:
        self.position = max(self.position, position)
        for event in self.listeners:
            event.set()
