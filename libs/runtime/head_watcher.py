"""Wakes readers when a store's head moves: one change stream for all stores that a process follows.

The stream only shortens the wait; every reader polls as well, so that nothing depends on it.
"""

import asyncio
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import structlog

from libs.runtime.event_store import EventStore
from libs.runtime.mongo import Client, Document, InvalidOperation, PyMongoError, synchronous

AWAIT_MS = 500
POLL_SECONDS = 0.25
POLL_SECONDS_WHILE_WATCHING = 1.0
RETRY_SECONDS = 0.5
FRESH_SECONDS = 1.0

_UPDATED = "updateDescription.updatedFields"
_FIELDS: Document = {"$project": {"ns": 1, "position": f"${_UPDATED}.position"}}

log = structlog.get_logger(__name__)


async def keep_head_fresh(store: EventStore) -> None:
    """Notice within a second that a rebuild made other collections the live ones, also where nothing is written."""
    while True:
        await store.head()
        await asyncio.sleep(FRESH_SECONDS)


class HeadWatcher:
    """Watches the ``head`` collections of some databases on a thread of its own.

    Args:
        client: a motor client; its connections are shared.
        databases: the names of the databases to watch.
        but_of: a store's ``writer``, whose own batches wake nobody: for those who are told of them otherwise.
    """

    def __init__(self, client: Client, databases: Sequence[str], *, but_of: str | None = None) -> None:
        self._client = synchronous(client)
        self._databases = sorted(databases)
        self._but_of = but_of
        self._listeners: dict[str, set[asyncio.Event]] = {name: set() for name in self._databases}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._watching = False
        self._positions: dict[str, int] = {}

    @contextmanager
    def listen(self, database: str) -> Iterator[asyncio.Event]:
        """An event that is set whenever the database's head may have moved; clear it before reading."""
        if self._thread is None:
            self._start()
        event = asyncio.Event()
        self._listeners[database].add(event)
        try:
            yield event
        finally:
            self._listeners[database].discard(event)

    def has_moved_past(self, database: str, position: int) -> bool:
        """False when no change that was seen leaves the head above ``position``; True while nobody watches."""
        return not self._watching or self._positions.get(database, 0) > position

    async def wait(self, event: asyncio.Event, timeout_seconds: float) -> None:
        """Wait until ``event`` is set, the poll is due or the time is over."""
        poll_seconds = POLL_SECONDS_WHILE_WATCHING if self._watching else POLL_SECONDS
        try:
            async with asyncio.timeout(min(timeout_seconds, poll_seconds)):
                await event.wait()
        except TimeoutError:
            return

    def close(self) -> None:
        """Let the thread end; it does within the time of one request."""
        self._stop.set()

    def _start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="head-watcher", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        failures = 0
        while not self._stop.is_set():
            try:
                self._watch()
            except InvalidOperation:
                # The client is closed: the process is on its way out.
                return
            except PyMongoError as error:
                failures = 0 if self._watching else failures + 1
                if failures <= 1 and not self._stop.is_set():
                    log.warning("head_watch_failed", error=type(error).__name__)
            finally:
                self._watching = False
                self._positions.clear()
            self._stop.wait(RETRY_SECONDS)

    def _watch(self) -> None:
        # The list stands in the first stage, so that the server drops everything else while it scans its oplog.
        wanted: Document = {"ns.coll": "head", "ns.db": {"$in": self._databases}}
        if self._but_of is not None:
            wanted[f"{_UPDATED}.writer"] = {"$not": {"$regex": f"^{self._but_of}/"}}
        pipeline: list[Document] = [{"$match": wanted}, _FIELDS]
        with self._client.watch(pipeline, max_await_time_ms=AWAIT_MS) as changes:
            while not self._stop.is_set():
                change = changes.try_next()
                self._watching = True
                if change is not None:
                    self._notify(change["ns"]["db"], change.get("position"))

    def _notify(self, database: str, position: int | None) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(self._set, database, position)
        except RuntimeError:
            # The loop is closed: nobody listens any more.
            self._stop.set()

    def _set(self, database: str, position: int | None) -> None:
        if position is not None:
            self._positions[database] = position
        for event in self._listeners.get(database, ()):
            event.set()
