"""Runs a service, as a process or within one: opens in order, serves, and stops cleanly.

On SIGTERM and SIGINT the service turns not ready, serves on for ``SHUTDOWN_DELAY_SECONDS``, finishes the requests in
flight, releases its leases and closes what it opened in the reverse order.
"""

import asyncio
import contextlib
import gc
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Generic

import structlog
import uvloop
from aiohttp import web

from libs.core.clock import Clock, SystemClock
from libs.process.health import Health
from libs.process.kept_settings import keep_settings
from libs.process.listeners import BACKLOG, inherited
from libs.process.logs import configure_logs
from libs.process.settings import EXIT_BAD_SETTINGS, ServiceSettings, load_settings, settings_without_effect
from libs.process.telemetry import configure_telemetry
from libs.service.definition import AnyDefinition, ServiceContext, ServiceDefinition, SettingsT
from libs.service.opening import open_context
from libs.service.store_tasks import start_store_tasks
from libs.web.server import ServiceRunner
from libs.web.shell import create_app

COLLECT_AFTER_ALLOCATIONS = 20_000
SWITCH_INTERVAL_SECONDS = 0.0005

log = structlog.get_logger(__name__)


class CannotListen(Exception):
    """The address is in use or does not belong to this machine."""


@dataclass(frozen=True)
class RunningService(Generic[SettingsT]):
    """A started service: where it listens, and what it works with."""

    base_url: str
    context: ServiceContext[SettingsT]
    app: web.Application


@asynccontextmanager
async def running_service(
    definition: ServiceDefinition[SettingsT], settings: SettingsT, *, clock: Clock | None = None
) -> AsyncIterator[RunningService[SettingsT]]:
    """Run a service in this process until the block ends; with port 0 the system chooses a free one."""
    async with AsyncExitStack() as stack:
        context = await open_context(definition, settings, clock or SystemClock(), stack)
        routes = await stack.enter_async_context(definition.start(context))
        app = create_app(definition.name, routes, context.verifier, health=context.health, settings=settings)
        port = await _listen(app, settings, context.health, stack)
        if definition.uses_store:
            start_store_tasks(definition, context)
        stack.push_async_callback(context.tasks.close)
        stack.callback(context.health.stop)
        _report_start(definition, settings, port)
        yield RunningService(f"http://{settings.host}:{port}", context, app)
        log.info("service_stopping", service=definition.name)
        context.health.drain()
        await asyncio.sleep(settings.shutdown_delay_seconds)
        context.health.stop()


async def _listen(app: web.Application, settings: ServiceSettings, health: Health, stack: AsyncExitStack) -> int:
    """Serve on the inherited sockets, or else on the address of the settings; returns the port."""
    runner = ServiceRunner(
        app,
        is_draining=lambda: health.draining,
        shutdown_timeout_seconds=settings.shutdown_timeout_seconds,
    )
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


def _report_start(definition: AnyDefinition, settings: ServiceSettings, port: int) -> None:
    log.info("service_started", service=definition.name, port=port)
    if settings.public:
        for name, reason in settings_without_effect(settings).items():
            log.warning("setting_without_effect", setting=name, reason=reason)


def run_service(definition: ServiceDefinition[SettingsT]) -> None:
    """Run a service as a process until SIGTERM or SIGINT; exits 2 on bad settings, 1 if it can't listen."""
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


def tune_interpreter() -> None:
    """Settings of the interpreter for a process that handles commands."""
    # The write path's thread needs the interpreter for microseconds at a time; the default of 5 ms would determine
    # its latency.
    sys.setswitchinterval(SWITCH_INTERVAL_SECONDS)
    # Commands leave no cycles; a collection after every 700 allocations takes much of a busy process's time.
    gc.set_threshold(COLLECT_AFTER_ALLOCATIONS)


async def _run_until_stopped(definition: ServiceDefinition[SettingsT], settings: SettingsT) -> None:
    stop, started = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    running = asyncio.create_task(_run_until(stop, started, definition, settings))
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not running.done() and not started.is_set():
        running.cancel()
    limit_seconds = settings.shutdown_delay_seconds + settings.shutdown_timeout_seconds + 5
    done, _ = await asyncio.wait({running}, timeout=limit_seconds)
    if not done:
        log.error("shutdown_too_slow", limit_seconds=limit_seconds)
        os._exit(1)
    if not running.cancelled():
        running.result()


async def _run_until(
    stop: asyncio.Event, started: asyncio.Event, definition: ServiceDefinition[SettingsT], settings: SettingsT
) -> None:
    async with running_service(definition, settings):
        # Objects that live as long as the process are not scanned again: full collections took tens of milliseconds.
        gc.collect()
        gc.freeze()
        started.set()
        await stop.wait()
