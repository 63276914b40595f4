"""The composition root's tools: from a service's definition to a running process that stops cleanly.

Resources are opened in one order and closed in the reverse: store, write path, event log, the service's own, HTTP,
then relay and consumers. On SIGTERM and SIGINT the service turns not ready, finishes what is in flight, gives up its
leases and closes.
"""

import asyncio
import contextlib
import gc
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

import structlog
import uvloop
from aiohttp import web

from libs.contracts.internal import CALLS
from libs.contracts.services import SERVICES, names_forwarded_to
from libs.core.clock import Clock, SystemClock
from libs.core.decider import Aggregate, Projection, Reaction
from libs.core.errors import RetryLater
from libs.event_log import open_event_log
from libs.event_log.port import EventLog
from libs.eventsourcing.command_handler import CommandHandler
from libs.eventsourcing.consumer import Consumer
from libs.eventsourcing.documents import Documents
from libs.eventsourcing.event_store import EventStore
from libs.eventsourcing.log_identity import remember
from libs.eventsourcing.rebuild import Rebuild, RebuildFailed
from libs.eventsourcing.relay import Relay
from libs.mongodb.client import Client, ConnectionFailure, IndexModel, PyMongoError, connect, in_short
from libs.mongodb.leases import Leases
from libs.mongodb.sequences import Sequences
from libs.process.health import Health
from libs.process.kept_settings import keep_settings
from libs.process.listeners import BACKLOG, inherited
from libs.process.logs import configure_logs
from libs.process.settings import EXIT_BAD_SETTINGS, ServiceSettings, load_settings, settings_without_effect
from libs.process.telemetry import configure_telemetry
from libs.web.internal import InternalClient
from libs.web.principals import GATEWAY, PrincipalSigner, PrincipalVerifier
from libs.web.server import ServiceRunner
from libs.web.shell import create_app

SettingsT = TypeVar("SettingsT", bound=ServiceSettings)

BACKOFF_SECONDS_MAX = 10.0
FAILURES_MAX = 3
OPEN_REFUSALS_MAX = 5
STORE_SILENCE_SECONDS_MAX = 3.0
FRESH_SECONDS = 1.0
GARBAGE_LOOKED_FOR_AFTER = 20_000
SWITCH_INTERVAL_SECONDS = 0.0005

log = structlog.get_logger(__name__)


class CannotListen(Exception):
    """The address is in use or does not belong to this machine."""


class BackgroundTasks:
    """Long-running work of a service: restarted with backoff when it raises, cancelled at shutdown."""

    def __init__(self) -> None:
        self._tasks: list[asyncio.Task[None]] = []
        self._failing: dict[str, str] = {}
        self._closing = False

    def start(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        """Run ``work`` now and again until shutdown; it is awaited anew 50 ms to 10 s after it raised."""
        self._tasks.append(asyncio.create_task(self._supervise(name, work), name=name))

    async def close(self) -> None:
        """Cancel everything, the newest first, and wait for it."""
        self._closing = True
        for task in reversed(self._tasks):
            task.cancel()
            await asyncio.wait({task})
        self._tasks.clear()

    async def problem(self) -> str | None:
        """Which of them keep failing, if any."""
        return "; ".join(f"{name} keeps failing: {error}" for name, error in self._failing.items()) or None

    async def _supervise(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        delay_seconds, failures = 0.05, 0
        loop = asyncio.get_running_loop()
        while True:
            recovering = loop.call_later(BACKOFF_SECONDS_MAX, self._failing.pop, name, None)
            started_at = loop.time()
            try:
                await work()
                return
            except Exception as error:  # noqa: BLE001
                failures = 1 if loop.time() - started_at > BACKOFF_SECONDS_MAX else failures + 1
                _report_failure(name, error, failures)
                # A store that does not answer is reported by its own check.
                if failures >= FAILURES_MAX and not isinstance(error, PyMongoError):
                    self._failing[name] = repr(error)[:200]
            finally:
                recovering.cancel()
            if self._closing:
                # It raised while it was being cancelled, and must not start again.
                return
            delay_seconds = 0.05 if failures == 1 else min(BACKOFF_SECONDS_MAX, delay_seconds * 2)
            await asyncio.sleep(delay_seconds)


def _report_failure(task: str, error: Exception, failures: int) -> None:
    if isinstance(error, ConnectionFailure | ConnectionError):
        # That a server is away is no fault of the code, and a trace of each attempt would bury those that are.
        report = log.warning if failures == 1 else log.debug
        report("background_task_failed", task=task, error=in_short(error))
    else:
        log.warning("background_task_failed", task=task, error=repr(error), exc_info=error)


@dataclass
class ServiceContext(Generic[SettingsT]):
    """What a service is given to work with; the store's parts are absent where it has none."""

    settings: SettingsT
    clock: Clock
    health: Health
    tasks: BackgroundTasks
    principals: PrincipalSigner
    verifier: PrincipalVerifier
    internal: InternalClient
    event_log: EventLog
    _store: EventStore | None = None
    _commands: CommandHandler | None = None
    _documents: Documents | None = None
    _sequences: Sequences | None = None
    _leases: Leases | None = None

    @property
    def store(self) -> EventStore:
        assert self._store is not None
        return self._store

    @property
    def commands(self) -> CommandHandler:
        assert self._commands is not None
        return self._commands

    @property
    def documents(self) -> Documents:
        assert self._documents is not None
        return self._documents

    @property
    def sequences(self) -> Sequences:
        assert self._sequences is not None
        return self._sequences

    @property
    def leases(self) -> Leases:
        assert self._leases is not None
        return self._leases


Start = Callable[[ServiceContext[SettingsT]], AbstractAsyncContextManager[Sequence[web.AbstractRouteDef]]]


@dataclass(frozen=True)
class ServiceDefinition(Generic[SettingsT]):
    """What makes a service.

    Args:
        aggregates: the entities that it owns.
        projections: the documents that it keeps about other services' entities.
        reactions: how foreign events become its own commands.
        indexes: further indexes by logical collection name.
        start: opens what the service needs besides, yields its routes, closes in reverse.
        uses_store: False for services without state of their own.
    """

    name: str
    settings: type[SettingsT]
    start: Start[SettingsT]
    aggregates: tuple[Aggregate[Any], ...] = ()
    projections: tuple[Projection, ...] = ()
    reactions: tuple[Reaction, ...] = ()
    indexes: Mapping[str, Sequence[IndexModel]] = field(default_factory=dict)
    uses_store: bool = True

    @property
    def collections(self) -> tuple[str, ...]:
        """The logical names of all event-sourced collections."""
        names = [aggregate.collection for aggregate in self.aggregates]
        names += [aggregate.listing.collection for aggregate in self.aggregates if aggregate.listing is not None]
        return tuple(names + [projection.collection for projection in self.projections])

    @property
    def topics(self) -> tuple[str, ...]:
        """The topics that the service follows."""
        followed = [item.topic for item in self.projections] + [item.topic for item in self.reactions]
        return tuple(dict.fromkeys(followed))


@dataclass(frozen=True)
class RunningService(Generic[SettingsT]):
    """A started service: where it listens, and its inside."""

    base_url: str
    context: ServiceContext[SettingsT]
    app: web.Application


@asynccontextmanager
async def running_service(
    definition: ServiceDefinition[SettingsT], settings: SettingsT, *, clock: Clock | None = None
) -> AsyncIterator[RunningService[SettingsT]]:
    """Run a service in this process until the block ends; port 0 takes a free one."""
    async with AsyncExitStack() as stack:
        client = connect(
            settings.mongodb_url,
            definition.name,
            pool_min=settings.database_pool_min,
            pool_max=settings.database_pool_max,
        )
        stack.callback(client.close)
        context = await _open_context(definition, settings, client, clock or SystemClock(), stack)
        routes = await stack.enter_async_context(definition.start(context))
        app = create_app(definition.name, routes, context.verifier, health=context.health, settings=settings)
        port = await _serve(app, settings, stack)
        _follow_events(definition, context)
        stack.push_async_callback(context.tasks.close)
        stack.callback(context.health.stop)
        log.info("service_started", service=definition.name, port=port)
        if settings.public:
            for name, reason in settings_without_effect(settings).items():
                log.warning("setting_without_effect", setting=name, reason=reason)
        yield RunningService(f"http://{settings.host}:{port}", context, app)
        context.health.stop()
        log.info("service_stopping", service=definition.name)


async def _open_context(
    definition: ServiceDefinition[SettingsT],
    settings: SettingsT,
    client: Client,
    clock: Clock,
    stack: AsyncExitStack,
) -> ServiceContext[SettingsT]:
    signer = PrincipalSigner(definition.name, settings.signing_key)
    internal = InternalClient(settings, signer)
    stack.push_async_callback(internal.close)
    event_log = await open_event_log(settings, client, definition.name)
    stack.push_async_callback(event_log.close)
    context = ServiceContext(
        settings=settings,
        clock=clock,
        health=Health(),
        tasks=BackgroundTasks(),
        principals=signer,
        verifier=PrincipalVerifier(definition.name, settings.trusted_keys),
        internal=internal,
        event_log=event_log,
    )
    context.health.add("background tasks", context.tasks.problem)
    for name, problem in _missing_keys(definition.name, settings).items():
        context.health.add(name, partial(_as_check, problem))
        if problem is not None:
            log.warning("key_missing", service=definition.name, setting=name.upper(), reason=problem)
    if definition.uses_store:
        await _open_store(definition, context, client, stack)
    return context


def _missing_keys(service: str, settings: ServiceSettings) -> dict[str, str | None]:
    """The missing keys: without its own, a service's calls are refused; without its callers', it refuses theirs."""
    missing: dict[str, str | None] = {}
    called = sorted({call.service for call in CALLS if service in call.callers})
    if called:
        lacks_key = settings.signing_key is None
        missing["signing_key"] = (
            f"SIGNING_KEY is not set, so {service} can't call {', '.join(called)}" if lacks_key else None
        )
    callers = {caller for call in CALLS if call.service == service for caller in call.callers}
    if service in names_forwarded_to(SERVICES):
        callers.add(GATEWAY)
    if callers:
        unknown = ", ".join(sorted(callers - settings.trusted_keys.keys()))
        missing["trusted_keys"] = f"TRUSTED_KEYS has no key of {unknown}, whose calls are refused" if unknown else None
    return missing


async def _as_check(problem: str | None) -> str | None:
    return problem


async def _open_store(
    definition: ServiceDefinition[SettingsT],
    context: ServiceContext[SettingsT],
    client: Client,
    stack: AsyncExitStack,
) -> None:
    settings = context.settings
    store = EventStore(client, settings.database_prefix + definition.name, instance=settings.instance)
    await _opened_when_reachable(store, definition)
    context._store = store
    context._commands = CommandHandler(store, context.clock, definition.aggregates)
    context._documents = Documents(store)
    context._sequences = Sequences(store.database["ids"])
    context._leases = Leases(store.database["leases"], holder=settings.instance)
    context._commands.start()
    stack.push_async_callback(context._commands.close)
    context.health.add("store", lambda: _store_answers(store))


async def _opened_when_reachable(store: EventStore, definition: ServiceDefinition[Any]) -> None:
    """Wait for a store that is away; what a store that is there refuses several times is raised."""
    delay_seconds, refusals = 0.1, 0
    while True:
        try:
            await store.open(definition.collections, definition.indexes)
            return
        except PyMongoError as error:
            refusals += not isinstance(error, ConnectionFailure)
            if refusals >= OPEN_REFUSALS_MAX:
                raise
            log.warning("store_unavailable", service=definition.name, error=in_short(error))
        await asyncio.sleep(delay_seconds)
        delay_seconds = min(5.0, delay_seconds * 2)


async def _store_answers(store: EventStore) -> str | None:
    """Known from the reads of every second, so that the check answers at once even if the store does not."""
    silence_seconds = time.monotonic() - store.answered_at
    if silence_seconds < STORE_SILENCE_SECONDS_MAX:
        return None
    return f"the store has not answered for {silence_seconds:.0f} s"


async def _serve(app: web.Application, settings: ServiceSettings, stack: AsyncExitStack) -> int:
    runner = ServiceRunner(app, shutdown_timeout_seconds=settings.shutdown_timeout_seconds)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    try:
        sites: list[web.BaseSite] = [
            web.SockSite(runner, listening, backlog=BACKLOG) for listening in inherited(settings.inherited_sockets)
        ]
        for site in sites or [web.TCPSite(runner, settings.host, settings.port, reuse_address=True, backlog=BACKLOG)]:
            await site.start()
    except OSError as error:
        raise CannotListen(f"can't listen on {settings.host}, port {settings.port}: {error.strerror}") from error
    return int(runner.addresses[0][1])


def _follow_events(definition: ServiceDefinition[SettingsT], context: ServiceContext[SettingsT]) -> None:
    if not definition.uses_store:
        return
    context.tasks.start("head", lambda: keep_head_fresh(context.store))
    # Held by one of the instances, whatever else they do: it tells the operator's commands that the service runs.
    context.tasks.start("presence", _under_lease(context.leases, "presence", _until_cancelled))
    context.tasks.start("log identity", lambda: remember(context.store, context.event_log))
    if context.event_log.needs_relay and definition.aggregates:
        relay = Relay(context.store, context.event_log, context.commands)
        context.health.add("relay", relay.reason_to_be_stopped)
        context.tasks.start("relay", lambda: context.leases.run_while_leader("relay", relay.run))
    refold = _refolding(definition, context) if definition.projections else None
    for topic in definition.topics:
        consumer = Consumer(
            topic=topic,
            event_log=context.event_log,
            store=context.store,
            commands=context.commands,
            health=context.health,
            projections=[item for item in definition.projections if item.topic == topic],
            reactions=[item for item in definition.reactions if item.topic == topic],
            refold=refold,
        )
        name = f"consumer/{topic}"
        context.tasks.start(name, _under_lease(context.leases, name, consumer.run))


def _refolding(
    definition: ServiceDefinition[SettingsT], context: ServiceContext[SettingsT]
) -> Callable[[], Awaitable[bool]]:
    """Folds the projections again after an upgrade: they lack what the earlier version did not understand."""

    async def refold() -> bool:
        anew = Rebuild(context.store, context.event_log, projections=definition.projections, indexes=definition.indexes)
        try:
            await anew.run()
        except RebuildFailed as error:
            log.error("projections_not_refolded", reason=str(error), repair=f"datasync rebuild {definition.name}")
            return False
        return True

    return refold


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


async def _until_cancelled() -> None:
    await asyncio.get_running_loop().create_future()


def _under_lease(leases: Leases, name: str, work: Callable[[], Awaitable[None]]) -> Callable[[], Awaitable[None]]:
    return lambda: leases.run_while_leader(name, work)


def tune_interpreter() -> None:
    """What every process that takes commands sets before it does."""
    # The write path's thread needs the interpreter for microseconds at a time; 5 ms waits would rule its latency.
    sys.setswitchinterval(SWITCH_INTERVAL_SECONDS)
    # Commands leave no cycles; to look for some after every 700 objects takes much of a busy process's time.
    gc.set_threshold(GARBAGE_LOOKED_FOR_AFTER)


def run_service(definition: ServiceDefinition[SettingsT]) -> None:
    """Run a service as a process until SIGTERM or SIGINT; exits 2 on bad settings, 1 where it can't listen."""
    settings = load_settings(definition.settings)
    configure_logs(definition.name, settings)
    configure_telemetry(definition.name, settings)
    tune_interpreter()
    if settings.data_dir is not None:
        try:
            keep_settings(definition.name, settings, settings.data_dir)
        except OSError as error:
            sys.stderr.write(f"datasync: bad settings\n  DATA_DIR: can't be written to: {error.strerror}\n")
            raise SystemExit(EXIT_BAD_SETTINGS) from None
    try:
        with contextlib.suppress(KeyboardInterrupt):
            uvloop.run(_run_until_stopped(definition, settings))
    except CannotListen as error:
        sys.stderr.write(f"datasync: {error} (set HOST and PORT)\n")
        raise SystemExit(1) from None


async def _run_until_stopped(definition: ServiceDefinition[SettingsT], settings: SettingsT) -> None:
    stop, started = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    running = asyncio.create_task(_running_until(definition, settings, started, stop))
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not running.done() and not started.is_set():
        running.cancel()
    limit_seconds = settings.shutdown_timeout_seconds + 5
    done, _ = await asyncio.wait({running}, timeout=limit_seconds)
    if not done:
        log.error("shutdown_too_slow", limit_seconds=limit_seconds)
        os._exit(1)
    if not running.cancelled():
        running.result()


async def _running_until(
    definition: ServiceDefinition[SettingsT], settings: SettingsT, started: asyncio.Event, stop: asyncio.Event
) -> None:
    async with running_service(definition, settings):
        # What lives as long as the process is not looked at again: full collections took tens of milliseconds.
        gc.collect()
        gc.freeze()
        started.set()
        await stop.wait()
