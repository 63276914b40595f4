"""The write path: concurrent requests are decided together and committed in one transaction per batch.

One batch is processed at a time. Meanwhile the next one gathers, without any artificial delay. A batch is loaded,
decided and committed on a thread of its own, which costs one hop to the thread and one back whatever the number of
round trips. A caller gets its reply only when its batch is durable.
"""

import asyncio
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import structlog

from libs.core.clock import Clock
from libs.core.decider import Act, Aggregate, ExpectedVersion
from libs.core.entity import Entity
from libs.core.envelope import Envelope, Frozen, Metadata
from libs.core.errors import FixRequest, RetryLater
from libs.core.idempotency import IdempotencyKey
from libs.core.sizes import text_bytes
from libs.eventsourcing.batch import SideWrite
from libs.eventsourcing.batch_processor import BatchProcessor, Processed
from libs.eventsourcing.entities import fold_entity
from libs.eventsourcing.event_store import EventStore
from libs.eventsourcing.requests import CommandRequest, ConsumerStep, Outcome, QueuedRequest
from libs.mongodb.client import Document
from libs.process.telemetry import BATCH_COMMANDS, COMMANDS, COMMANDS_WAITING, COMMIT_SECONDS

REQUESTS_MAX = 400
"""In one batch."""
WAITING_MAX = 4_096
WAITING_BYTES_MAX = 64 * 1024 * 1024
RELEASE_SECONDS = 1.0

log = structlog.get_logger(__name__)

State = TypeVar("State", bound=Frozen)


class CommandHandler:
    """Executes commands against the service's store.

    Args:
        store: an opened event store.
        clock: gives every event its time.
        aggregates: all aggregates of the service: replays need to know them by name.
    """

    def __init__(self, store: EventStore, clock: Clock, aggregates: Iterable[Aggregate[Any]]) -> None:
        self._store = store
        self._aggregates = {aggregate.name: aggregate for aggregate in aggregates}
        self._queue = _Queue()
        self._thread = _Thread(store, clock)
        self._listeners: list[Callable[[Sequence[Envelope]], None]] = []
        self._task: asyncio.Task[None] | None = None
        self._stopping = False

    def on_commit(self, listener: Callable[[Sequence[Envelope]], None]) -> None:
        """Call ``listener`` on the event loop with the events of each batch that this process committed, in order."""
        self._listeners.append(listener)

    def start(self) -> None:
        """Begin to take commands."""
        self._thread.start()
        self._task = asyncio.get_running_loop().create_task(self._run(), name="write-path")
        self._task.add_done_callback(_crash_if_failed)

    async def close(self) -> None:
        """Finish the requests that wait, then stop; later requests are refused with ``RetryLater``."""
        self._stopping = True
        self._queue.arrived.set()
        if self._task is not None:
            await self._task
            self._thread.stop()

    @property
    def waiting(self) -> int:
        """How many requests wait for a batch."""
        return len(self._queue)

    async def handle(
        self,
        aggregate: Aggregate[State],
        entity_id: int | str,
        command: Any,
        metadata: Metadata,
        *,
        expected_version: ExpectedVersion = None,
        side_writes: Sequence[SideWrite] = (),
        idempotency: IdempotencyKey | None = None,
    ) -> Entity[State]:
        """Execute one command and return the entity as it is after it."""
        act = Act(aggregate, entity_id, command, expected_version)
        outcome = await self.execute(CommandRequest([act], metadata, side_writes, idempotency))
        entity = outcome.entities[0]
        assert entity is not None
        return entity

    async def execute(self, request: CommandRequest) -> Outcome:
        """Execute a request; durable when it returns.

        Raises:
            FixRequest: a refusal: by ``decide``, a taken unique key (``Conflict``), a stale ``expected_version``
                (``PreconditionFailed``), an event over its size (``TooLarge``), a reused Idempotency-Key.
            RetryLater: the queue is full, or the store can't be reached; nothing was done.
            OutcomeUnknown: the store did not say in time whether it was done.
        """
        acts = [(act, request.metadata) for act in request.acts]
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        queued = QueuedRequest(acts, (), None, request.side_writes, request.idempotency, future)
        self._enqueue(queued)
        outcome = await future
        return outcome if queued.replay is None else await self._replayed(queued.replay)

    async def consume(self, step: ConsumerStep) -> Outcome:
        """Write a consumer's step; raises ``OffsetMoved`` if another instance was faster."""
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._enqueue(QueuedRequest(step.acts, step.projections, step.offset, step.side_writes, None, future))
        return await future

    def _enqueue(self, request: QueuedRequest) -> None:
        if self._stopping:
            raise RetryLater("the service is shutting down", retry_after_seconds=1)
        request.size_bytes = sum(text_bytes(act.command) for act, _ in request.acts)
        self._queue.add(request)

    async def _run(self) -> None:
        """Process one batch after the other until the handler is closed and nothing waits."""
        loop = asyncio.get_running_loop()
        while not (self._stopping and not self._queue):
            await self._queue.arrived.wait()
            self._queue.arrived.clear()
            while self._queue:
                batch = self._queue.gather()
                begun_at = loop.time()
                processed = await self._thread.process(batch)
                self._queue.put_back(processed.later)
                _measure(batch, loop.time() - begun_at, len(self._queue))
                if processed.events:
                    self._announce(processed.events)
                for request in batch:
                    _reply(request)

    def _announce(self, committed: Sequence[Envelope]) -> None:
        for listener in self._listeners:
            listener(committed)

    async def _replayed(self, record: Document) -> Outcome:
        """The reply to an earlier request, made from the entities at the versions that it left."""
        entities: list[Entity[Any] | None] = []
        for item in record["entities"]:
            aggregate = self._aggregates[item["aggregate"]]
            envelopes = self._store.read_stream(aggregate.stream(item["id"]), version_max=item["version"])
            entities.append(await fold_entity(aggregate, item["id"], item["version"], envelopes))
        return Outcome(entities, replayed=True)


class _Queue:
    """The requests that wait for a batch, in order, bounded by number and by memory."""

    def __init__(self) -> None:
        self._waiting: deque[QueuedRequest] = deque()
        self._size_bytes = 0
        self.arrived = asyncio.Event()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, request: QueuedRequest) -> None:
        is_over = self._size_bytes + request.size_bytes > WAITING_BYTES_MAX and self._waiting
        if len(self._waiting) >= WAITING_MAX or is_over:
            raise RetryLater("too many changes are waiting", code="overloaded", retry_after_seconds=1)
        self._waiting.append(request)
        self._size_bytes += request.size_bytes
        self.arrived.set()

    def put_back(self, requests: Sequence[QueuedRequest]) -> None:
        """Put requests of the last batch in front again."""
        self._waiting.extendleft(reversed(requests))
        self._size_bytes += sum(request.size_bytes for request in requests)

    def gather(self) -> list[QueuedRequest]:
        """The next batch."""
        if self._waiting[0].alone:
            return [self._next()]
        batch: list[QueuedRequest] = []
        while self._waiting and len(batch) < REQUESTS_MAX and not self._waiting[0].alone:
            request = self._next()
            if not request.future.cancelled():
                batch.append(request)
        return batch

    def _next(self) -> QueuedRequest:
        request = self._waiting.popleft()
        self._size_bytes -= request.size_bytes
        return request


class _Thread:
    """Processes batches on a thread of its own. An executor's futures would cost more than deciding a lone command."""

    def __init__(self, store: EventStore, clock: Clock) -> None:
        self._writer = store.writer
        self._processor = BatchProcessor(store, clock)
        self._batches: SimpleQueue[tuple[list[QueuedRequest], asyncio.Future[Processed]] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, args=(loop,), name="write-path", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._batches.put(None)
        if self._thread is not None:
            self._thread.join()

    def process(self, batch: list[QueuedRequest]) -> "asyncio.Future[Processed]":
        processed: asyncio.Future[Processed] = asyncio.get_running_loop().create_future()
        self._batches.put((batch, processed))
        return processed

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        while True:
            try:
                taken = self._batches.get(timeout=RELEASE_SECONDS if self._writer.may_hold_locks else None)
            except Empty:
                self._writer.release_locks()
                continue
            if taken is None:
                return
            batch, processed = taken
            result: Processed | BaseException
            try:
                result = self._processor.process(batch)
            except BaseException as error:  # noqa: BLE001 - the event loop raises it, which ends the process
                result = error
            loop.call_soon_threadsafe(_settle, processed, result)


def _settle(processed: "asyncio.Future[Processed]", result: Processed | BaseException) -> None:
    if processed.done():
        return
    if isinstance(result, BaseException):
        processed.set_exception(result)
    else:
        processed.set_result(result)


def _crash_if_failed(task: "asyncio.Task[None]") -> None:
    """End the process: without a write path every caller would wait for ever, and a new process recovers by itself."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.critical("write_path_died", exc_info=error)
        os._exit(70)


def _reply(request: QueuedRequest) -> None:
    if request.result is None or request.future.done():
        return
    if isinstance(request.result, BaseException):
        request.future.set_exception(request.result)
    else:
        request.future.set_result(request.result)


_ENDED = {outcome: COMMANDS.labels(outcome) for outcome in ("committed", "refused", "failed")}


def _measure(batch: Sequence[QueuedRequest], seconds: float, waiting: int) -> None:
    ended = dict.fromkeys(_ENDED, 0)
    for request in batch:
        if request.result is not None:
            ended[_outcome(request)] += 1
    for outcome, number in ended.items():
        if number:
            _ENDED[outcome].inc(number)
    BATCH_COMMANDS.observe(ended["committed"])
    COMMIT_SECONDS.observe(seconds)
    COMMANDS_WAITING.set(waiting)


def _outcome(request: QueuedRequest) -> str:
    match request.result:
        case FixRequest():
            return "refused"
        case BaseException():
            return "failed"
        case _:
            return "committed"
