"""Wakes readers when a store's head moves: each batch adds a line to a small capped collection, which they tail.

Wake-ups only shorten the wait: every reader also polls, so nothing depends on them. A change stream would report the
same, but each one makes the server scan everything that is written to its oplog.
"""

import asyncio
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import structlog

from libs.mongodb.client import (
    Client,
    ConnectionFailure,
    CursorType,
    Document,
    InvalidOperation,
    PyMongoError,
    in_short,
    synchronous,
)

WAKE_UPS = "wake_ups"
"""The collection that a store's batches announce themselves in: small, capped, and tailed by whoever follows."""

AWAIT_MS = 500
POLL_SECONDS = 0.25
POLL_SECONDS_WHILE_WATCHING = 1.0
RETRY_SECONDS = 0.5

log = structlog.get_logger(__name__)


class HeadWatcher:
    """Watches the heads of some databases, each that somebody listens to on a thread of its own.

    Args:
        client: a motor client; its connections are shared.
        databases: the names of the databases to watch.
        but_of: a store's ``writer``, whose own batches wake nobody: for those who are told of them otherwise.
    """

    def __init__(self, client: Client, databases: Sequence[str], *, but_of: str | None = None) -> None:
        self._client = synchronous(client)
        self._but_of = but_of
        self._watched = {name: _Watched(name) for name in databases}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = threading.Event()

    @contextmanager
    def listen(self, database: str) -> Iterator[asyncio.Event]:
        """An event that is set whenever the database's head may have moved; clear it before reading."""
        event = asyncio.Event()
        self._watched[database].listeners.add(event)
        self._watch_from_now_on(self._watched[database])
        try:
            yield event
        finally:
            self._watched[database].listeners.discard(event)

    def has_moved_past(self, database: str, position: int) -> bool:
        """False when no batch was heard of that leaves the head above ``position``; True while nobody watches."""
        watched = self._watched[database]
        return not watched.is_heard or watched.position > position

    async def wait(self, event: asyncio.Event, timeout_seconds: float) -> None:
        """Wait until ``event`` is set, the poll is due or the time is over."""
        is_heard = all(watched.is_heard for watched in self._watched.values() if event in watched.listeners)
        poll_seconds = POLL_SECONDS_WHILE_WATCHING if is_heard else POLL_SECONDS
        try:
            async with asyncio.timeout(min(timeout_seconds, poll_seconds)):
                await event.wait()
        except TimeoutError:
            return

    def close(self) -> None:
        """Let the threads end; they do within the time of one request."""
        self._stop.set()

    def _watch_from_now_on(self, watched: "_Watched") -> None:
        """Nobody may ever listen to some of them, such as those of services that are not there."""
        self._loop = asyncio.get_running_loop()
        if not watched.is_watched:
            watched.is_watched = True
            threading.Thread(
                target=self._run, args=(watched,), name=f"wake-ups {watched.database}", daemon=True
            ).start()

    def _run(self, watched: "_Watched") -> None:
        failures = 0
        while not self._stop.is_set():
            try:
                self._watch(watched)
            except InvalidOperation:
                # The client is closed: the process is on its way out.
                return
            except PyMongoError as error:
                failures = 0 if watched.is_heard else failures + 1
                if failures <= 1 and not self._stop.is_set():
                    # A store that is away is told of where its head is read.
                    report = log.debug if isinstance(error, ConnectionFailure) else log.warning
                    report("head_watch_failed", database=watched.database, error=in_short(error))
            finally:
                watched.is_heard = False
            self._stop.wait(RETRY_SECONDS)

    def _watch(self, watched: "_Watched") -> None:
        """Follow the wake-ups until the cursor ends: the collection is missing, or has overrun it."""
        database = self._client[watched.database]
        head = database["head"].find_one({"_id": "head"}, {"position": 1})
        position = 0 if head is None else int(head["position"])
        wanted: Document = {"position": {"$gt": position}}
        if self._but_of is not None:
            wanted["writer"] = {"$ne": self._but_of}
        cursor = database[WAKE_UPS].find(wanted, cursor_type=CursorType.TAILABLE_AWAIT).max_await_time_ms(AWAIT_MS)
        with cursor:
            self._notify(watched, position)
            while cursor.alive and not self._stop.is_set():
                wake_up = next(cursor, None)
                watched.is_heard = cursor.alive
                if wake_up is not None:
                    self._notify(watched, wake_up["position"])

    def _notify(self, watched: "_Watched", position: int) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(watched.wake, position)
        except RuntimeError:
            # The loop is closed: nobody listens any more.
            self._stop.set()


class _Watched:
    """What is known of one database.

    Args:
        position: of the head, as last heard; it may have been announced by a batch that did not commit in the end.
        is_heard: whether the next batch would be heard of.
        is_watched: whether a thread follows it.
    """

    def __init__(self, database: str) -> None:
        self.database = database
        self.position = 0
        self.is_heard = False
        self.is_watched = False
        self.listeners: set[asyncio.Event] = set()

    def wake(self, position: int) -> None:
        self.position = max(self.position, position)
        for event in self.listeners:
            event.set()
