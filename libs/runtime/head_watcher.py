"""Wakes readers when a store's head moves, by the bell that each batch rings: a tailing cursor a store.

The bell only shortens the wait; every reader polls as well, so that nothing depends on it. A change stream would tell
the same, but for each of them the server looks through everything that is written.
"""

import asyncio
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import structlog

from libs.core.errors import RetryLater
from libs.runtime.event_store import BELL, EventStore
from libs.runtime.mongo import (
    Client,
    ConnectionFailure,
    CursorType,
    Document,
    InvalidOperation,
    PyMongoError,
    in_short,
    synchronous,
)

AWAIT_MS = 500
POLL_SECONDS = 0.25
POLL_SECONDS_WHILE_WATCHING = 1.0
RETRY_SECONDS = 0.5
FRESH_SECONDS = 1.0

log = structlog.get_logger(__name__)


async def keep_head_fresh(store: EventStore) -> None:
    """Notice within a second that a rebuild swapped collections, or that the store does not answer."""
    is_away = False
    while True:
        try:
            await store.head()
            if is_away:
                log.info("head_read_again", database=store.database.name)
            is_away = False
        except (PyMongoError, RetryLater) as error:
            if not is_away:
                log.warning("head_not_read", database=store.database.name, error=in_short(error))
            is_away = True
        await asyncio.sleep(FRESH_SECONDS)


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
        self._bells = {name: _Bell(name) for name in databases}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = threading.Event()

    @contextmanager
    def listen(self, database: str) -> Iterator[asyncio.Event]:
        """An event that is set whenever the database's head may have moved; clear it before reading."""
        event = asyncio.Event()
        self._bells[database].listeners.add(event)
        self._watch_from_now_on(self._bells[database])
        try:
            yield event
        finally:
            self._bells[database].listeners.discard(event)

    def has_moved_past(self, database: str, position: int) -> bool:
        """False when no batch was heard of that leaves the head above ``position``; True while nobody watches."""
        bell = self._bells[database]
        return not bell.is_heard or bell.position > position

    async def wait(self, event: asyncio.Event, timeout_seconds: float) -> None:
        """Wait until ``event`` is set, the poll is due or the time is over."""
        is_heard = all(bell.is_heard for bell in self._bells.values() if event in bell.listeners)
        poll_seconds = POLL_SECONDS_WHILE_WATCHING if is_heard else POLL_SECONDS
        try:
            async with asyncio.timeout(min(timeout_seconds, poll_seconds)):
                await event.wait()
        except TimeoutError:
            return

    def close(self) -> None:
        """Let the threads end; they do within the time of one request."""
        self._stop.set()

    def _watch_from_now_on(self, bell: "_Bell") -> None:
        """Nobody may ever listen to some of them, such as those of services that are not there."""
        self._loop = asyncio.get_running_loop()
        if not bell.is_watched:
            bell.is_watched = True
            threading.Thread(target=self._run, args=(bell,), name=f"watching {bell.database}", daemon=True).start()

    def _run(self, bell: "_Bell") -> None:
        failures = 0
        while not self._stop.is_set():
            try:
                self._watch(bell)
            except InvalidOperation:
                # The client is closed: the process is on its way out.
                return
            except PyMongoError as error:
                failures = 0 if bell.is_heard else failures + 1
                if failures <= 1 and not self._stop.is_set():
                    # A store that is away is told of where its head is read.
                    report = log.debug if isinstance(error, ConnectionFailure) else log.warning
                    report("head_watch_failed", database=bell.database, error=in_short(error))
            finally:
                bell.is_heard = False
            self._stop.wait(RETRY_SECONDS)

    def _watch(self, bell: "_Bell") -> None:
        """Follow the bell until its cursor ends: it does where there is no bell yet, and where it was overrun."""
        database = self._client[bell.database]
        head = database["head"].find_one({"_id": "head"}, {"position": 1})
        position = 0 if head is None else int(head["position"])
        wanted: Document = {"position": {"$gt": position}}
        if self._but_of is not None:
            wanted["writer"] = {"$ne": self._but_of}
        cursor = database[BELL].find(wanted, cursor_type=CursorType.TAILABLE_AWAIT).max_await_time_ms(AWAIT_MS)
        with cursor:
            self._notify(bell, position)
            while cursor.alive and not self._stop.is_set():
                rung = next(cursor, None)
                bell.is_heard = cursor.alive
                if rung is not None:
                    self._notify(bell, rung["position"])

    def _notify(self, bell: "_Bell", position: int) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(bell.ring, position)
        except RuntimeError:
            # The loop is closed: nobody listens any more.
            self._stop.set()


class _Bell:
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

    def ring(self, position: int) -> None:
        self.position = max(self.position, position)
        for event in self.listeners:
            event.set()
