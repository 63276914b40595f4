"""The kind of work ``run``: a job's run, from its configuration to the last of its streams."""

import asyncio
import time
from collections.abc import Sequence

import structlog

from libs.connectors import registry
from libs.connectors.protocol import Destination, DestinationRun, Fenced, RunContext, StreamName, StreamPlan
from libs.contracts.internal import RESOLVE_ENDPOINTS, ClaimedRun, EndpointsResolved, ResolveEndpoints
from libs.contracts.streams import AdvancedSettings, parse_advanced_settings, parse_streams_config
from libs.core.errors import FixRequest, RetryLater
from services.worker.attempt import Attempt, InternalCalls
from services.worker.moving import Moving
from services.worker.report import StreamReport
from services.worker.selection import Wanted, entries_of, wanted_streams
from services.worker.verifying import Verifying

# The last line of a successful run's log, word for word as OLake writes it: tools that drive its API wait for it.
SUCCEEDED = "Sync completed, wait 5 seconds cleanup in progress..."
RESOLVE_SECONDS_MAX = 120.0
RESOLVE_PAUSE_SECONDS = 0.5
RESOLVE_PAUSE_SECONDS_MAX = 10.0

log = structlog.get_logger(__name__)


class RunExecutor:
    """Executes claimed runs.

    Args:
        parquet_roots: the directories below which Parquet files may be written; anywhere if empty.
        stall_timeout_seconds: how long a stream may move nothing while it is being moved.
    """

    def __init__(
        self, calls: InternalCalls, *, parquet_roots: Sequence[str] = (), stall_timeout_seconds: float = 600.0
    ) -> None:
        self._calls = calls
        self._parquet_roots = parquet_roots
        self._stall_timeout_seconds = stall_timeout_seconds

    async def execute(self, run: ClaimedRun, attempt: Attempt) -> None:
        log.info("run_started", run_id=run.run_id, job_id=run.job_id, kind=run.kind)
        number = f"attempt {run.attempt} of {run.attempts_max}"
        what = "Clearing the destination of" if run.kind == "clear" else "Comparing" if run.verify else "Run of"
        attempt.report.log("info", f"{what} {_name_of(run)} started: {number}, epoch {run.epoch}")
        settings = parse_advanced_settings(run.advanced_settings_json)
        endpoints = await self._endpoints(run, attempt)
        wanted = await _wanted(run, settings, endpoints)
        attempt.report.streams = [StreamReport(item.plan) for item in wanted]
        async with self._destination(endpoints).open(_context(run, settings, attempt)) as opened:
            if run.kind == "clear":
                await _clear(attempt, opened)
            else:
                await self._sync(run, attempt, endpoints, settings, wanted, opened)

    async def _endpoints(self, run: ClaimedRun, attempt: Attempt) -> EndpointsResolved:
        """Ask catalog until it answers, since it may be starting. The grant outlasts this."""
        deadline = time.monotonic() + RESOLVE_SECONDS_MAX
        pause_seconds = RESOLVE_PAUSE_SECONDS
        while True:
            try:
                return await self._calls.call(RESOLVE_ENDPOINTS, ResolveEndpoints(grant=run.grant))
            except RetryLater as error:
                if time.monotonic() > deadline:
                    raise
                attempt.report.log("warning", f"{error.message}; retrying in {pause_seconds:g} s")
            await asyncio.sleep(pause_seconds)
            pause_seconds = min(RESOLVE_PAUSE_SECONDS_MAX, 2 * pause_seconds)

    def _destination(self, endpoints: EndpointsResolved) -> Destination:
        destination = endpoints.destination
        return registry.open_destination(destination.type, destination.config, parquet_roots=self._parquet_roots)

    async def _sync(
        self,
        run: ClaimedRun,
        attempt: Attempt,
        endpoints: EndpointsResolved,
        settings: AdvancedSettings,
        wanted: Sequence[Wanted],
        opened: DestinationRun,
    ) -> None:
        for stream, item in zip(attempt.report.streams, wanted, strict=True):
            if item.refusal is not None:
                attempt.fail(stream, item.refusal)
        source = registry.open_source(endpoints.source.type, endpoints.source.config)
        by_name = {item.plan.stream: item for item in wanted}
        if run.verify:
            verifying = Verifying(
                attempt,
                source,
                opened,
                by_name,
                repair=run.repair,
                stall_timeout_seconds=self._stall_timeout_seconds,
            )
            await verifying.verify()
            return
        moving = Moving(
            attempt,
            source,
            opened,
            by_name,
            resets=frozenset(StreamName(*name) for name in run.resets),
            concurrent_streams=settings.concurrent_streams or 1,
            stall_timeout_seconds=self._stall_timeout_seconds,
        )
        await moving.move(attempt.report.streams)
        if not attempt.failures:
            attempt.report.log("info", SUCCEEDED)


async def _wanted(run: ClaimedRun, settings: AdvancedSettings, endpoints: EndpointsResolved) -> list[Wanted]:
    config = parse_streams_config(run.streams_config_json)
    entries = config.streams
    if not entries:
        source = registry.open_source(endpoints.source.type, endpoints.source.config)
        entries = entries_of(await source.discover())
    can = registry.capabilities(endpoints.source.type, endpoints.destination.type)
    return wanted_streams(config, entries, settings, can)


def _context(run: ClaimedRun, settings: AdvancedSettings, attempt: Attempt) -> RunContext:
    takes_over = settings.take_over and run.living_job_ids is not None
    return RunContext(
        job_id=run.job_id,
        project_id=run.project_id,
        run_id=run.run_id,
        epoch=run.epoch,
        verify=settings.verify or run.verify,
        log=attempt.report.log,
        living_jobs=frozenset(run.living_job_ids or ()) if takes_over else None,
    )


def _name_of(run: ClaimedRun) -> str:
    return f"the job {run.job_name!r}" if run.job_name else f"job {run.job_id}"


def _and_target(plan: StreamPlan) -> str:
    """The stream, with its target if that has another name."""
    if (plan.stream.namespace, plan.stream.name) == (plan.target.namespace, plan.target.table):
        return str(plan.stream)
    return f"{plan.stream}: {plan.target}"


async def _clear(attempt: Attempt, opened: DestinationRun) -> None:
    for stream in attempt.report.streams:
        stream.state = "running"
        try:
            await opened.clear(stream.plan)
        except FixRequest as error:
            if isinstance(error, Fenced):
                raise
            attempt.fail(stream, error)
        else:
            stream.state = "completed"
            attempt.report.log("info", f"{_and_target(stream.plan)} was removed from the destination")
