"""One claimed run from its configuration to its end: moves the streams, reports, and stops when told to."""

import asyncio
import time
from collections.abc import Sequence
from typing import Literal, Protocol, TypeVar

import structlog

from libs.connectors import registry
from libs.connectors.protocol import ConnectorUnavailable, DestinationRun, RunContext, StreamPlan, Table, Written
from libs.contracts.internal import (
    FINISH_RUN,
    HEARTBEAT,
    RESOLVE_ENDPOINTS,
    ClaimedRun,
    EndpointsResolved,
    FinishRun,
    Heartbeat,
    InternalCall,
    ResolveEndpoints,
)
from libs.contracts.jobs import RunOutcome
from libs.contracts.runs import StreamResult
from libs.core.clock import Clock
from libs.core.envelope import Frozen
from libs.core.errors import DataSyncError, RetryLater
from libs.core.json import dump_json
from services.worker.report import RunReport, StreamReport
from services.worker.selection import entries_of, parse_advanced_settings, parse_streams_config, plans_of

RequestT = TypeVar("RequestT", bound=Frozen)
ResponseT = TypeVar("ResponseT", bound=Frozen)

SUCCEEDED = "Sync completed, wait 5 seconds cleanup in progress..."
FINISH_ATTEMPT_SECONDS_MAX = 120.0
FINISH_PAUSE_SECONDS = 1.0
STOPPING_SECONDS_MAX = 5.0
ERROR_CHARACTERS_MAX = 2_000

log = structlog.get_logger(__name__)


class InternalCalls(Protocol):
    """How other services are called."""

    async def call(self, call: InternalCall[RequestT, ResponseT], request: RequestT) -> ResponseT: ...


class RunExecution:
    """Executes one claimed run.

    Args:
        heartbeat_seconds: the pause between two reports; never more than a third of the lease.
        parquet_roots: the directories below which Parquet files may be written; anywhere when empty.
        stall_timeout_seconds: how long a stream that is being moved may move nothing.
    """

    def __init__(
        self,
        run: ClaimedRun,
        calls: InternalCalls,
        clock: Clock,
        *,
        heartbeat_seconds: float,
        parquet_roots: Sequence[str] = (),
        stall_timeout_seconds: float = 600.0,
    ) -> None:
        self._run = run
        self._calls = calls
        self._heartbeat_seconds = min(heartbeat_seconds, run.lease_seconds / 3)
        self._parquet_roots = parquet_roots
        self._stall_timeout_seconds = stall_timeout_seconds
        self._stalled: ConnectorUnavailable | None = None
        self._report = RunReport(clock)
        self._verdict: Literal["continue", "cancel", "fenced"] = "cancel" if run.cancel_requested else "continue"
        self._done = False
        self._log = log.bind(run_id=run.run_id, job_id=run.job_id, epoch=run.epoch)

    async def execute(self) -> RunOutcome | Literal["fenced"]:
        """Run to the end and report it; when this is cancelled the run is given back to be tried again."""
        self._log.info("run_claimed", kind=self._run.kind)
        working = asyncio.create_task(self._work())
        reporting = asyncio.create_task(self._keep_reporting(working))
        try:
            await asyncio.wait({working})
        except asyncio.CancelledError:
            await _stopped(working, reporting)
            await self._give_back()
            raise
        await _stopped(reporting)
        outcome = await self._end(working)
        self._log.info("run_ended", outcome=outcome)
        return outcome

    async def _work(self) -> None:
        if self._verdict != "continue":
            return
        run = self._run
        self._report.log("info", f"Run {run.run_id} of job {run.job_id} started (attempt under epoch {run.epoch})")
        endpoints = await self._calls.call(RESOLVE_ENDPOINTS, ResolveEndpoints(grant=run.grant))
        context = RunContext(
            job_id=run.job_id,
            project_id=run.project_id,
            run_id=run.run_id,
            epoch=run.epoch,
            verify=parse_advanced_settings(run.advanced_settings_json).verify,
            log=self._report.log,
        )
        plans = await self._plans(endpoints)
        self._report.streams = [StreamReport(plan) for plan in plans]
        destination = registry.open_destination(
            endpoints.destination.type, endpoints.destination.config, parquet_roots=self._parquet_roots
        )
        async with destination.open(context) as opened:
            if run.kind == "clear":
                await self._clear(opened)
            else:
                await self._sync(endpoints, opened)
        self._done = True

    async def _plans(self, endpoints: EndpointsResolved) -> list[StreamPlan]:
        config = parse_streams_config(self._run.streams_config_json)
        entries = config.streams or []
        if not entries:
            source = registry.open_source(endpoints.source.type, endpoints.source.config)
            entries = entries_of(await source.discover())
        return plans_of(config, entries)

    async def _sync(self, endpoints: EndpointsResolved, opened: DestinationRun) -> None:
        waiting = []
        for stream in self._report.streams:
            committed = await opened.committed(stream.plan)
            if committed is None:
                waiting.append(stream)
            else:
                self._report.log("info", f"{stream.plan.stream}: {committed.rows} rows are in place already")
                self._completed(stream, committed, 0.0)
        if not waiting:
            return
        source = registry.open_source(endpoints.source.type, endpoints.source.config)
        async with source.snapshot() as snapshot:
            tables = []
            for stream in waiting:
                table = await snapshot.table(stream.plan)
                await opened.prepare(table)
                stream.rows_total = table.rows_estimated
                tables.append(table)
            for stream, table in zip(waiting, tables, strict=True):
                await self._move(stream, table, opened)

    async def _move(self, stream: StreamReport, table: Table, opened: DestinationRun) -> None:
        about = "" if table.rows_estimated is None else f", about {table.rows_estimated} rows"
        self._report.log("info", f"{stream.plan.stream}: reading{about}")
        stream.begin()
        started_at = time.monotonic()
        try:
            written = await opened.write(table, stream)
        except BaseException:
            stream.state = "failed"
            raise
        finally:
            stream.loaded()
        seconds = time.monotonic() - started_at
        verified = ", both ends compared and equal" if written.verified else ""
        self._report.log("info", f"{stream.plan.stream}: {written.rows} rows in {seconds:.2f} s{verified}")
        self._completed(stream, written, seconds)

    def _completed(self, stream: StreamReport, written: Written, seconds: float) -> None:
        stream.state = "completed"
        stream.rows_read = stream.rows_written = stream.rows_total = written.rows
        self._report.results.append(
            StreamResult(
                namespace=stream.plan.stream.namespace,
                name=stream.plan.stream.name,
                rows_read=written.rows,
                rows_written=written.rows,
                bytes_read=stream.bytes_read,
                seconds=round(seconds, 3),
                verified=written.verified,
                verification_json=None if written.verification is None else dump_json(written.verification),
            )
        )

    async def _clear(self, opened: DestinationRun) -> None:
        for stream in self._report.streams:
            stream.state = "running"
            await opened.clear(stream.plan)
            stream.state = "completed"
            self._report.log("info", f"{stream.plan.stream}: {stream.plan.target} was cleared from the destination")

    async def _keep_reporting(self, working: "asyncio.Task[None]") -> None:
        """Report until cancelled; a verdict other than continue ends the work at once."""
        while True:
            try:
                await self._heartbeat()
            except DataSyncError as error:
                self._log.warning("heartbeat_failed", error=error.message)
            except Exception:  # noqa: BLE001
                # A report that can't be made must not look like a worker that is gone.
                self._log.exception("heartbeat_failed_unexpectedly")
            self._stalled = self._stalled or self._stall()
            if self._verdict != "continue" or self._stalled is not None:
                working.cancel()
                return
            await asyncio.sleep(self._heartbeat_seconds)

    def _stall(self) -> ConnectorUnavailable | None:
        """What to end the attempt with when a stream has not moved for too long."""
        for stream in self._report.streams:
            if stream.still_seconds() < self._stall_timeout_seconds:
                continue
            last = f"the {stream.moved_last} moved last" if stream.moved_last else "the source has sent nothing yet"
            return ConnectorUnavailable(
                f"{stream.plan.stream}: nothing has moved for {self._stall_timeout_seconds:g} s; {last} "
                f"({stream.bytes_read} bytes read)",
                code="stalled",
            )
        return None

    async def _heartbeat(self) -> None:
        first, lines = self._report.portion()
        answer = await self._calls.call(
            HEARTBEAT,
            Heartbeat(
                run_id=self._run.run_id,
                epoch=self._run.epoch,
                streams=self._report.progress(),
                log_sequence=first,
                log_lines=lines,
            ),
        )
        self._report.acknowledge(first, len(lines))
        if self._verdict == "continue":
            self._verdict = answer.verdict

    async def _end(self, working: "asyncio.Task[None]") -> RunOutcome | Literal["fenced"]:
        error = None if working.cancelled() else _cause(working.exception())
        if self._verdict == "fenced":
            self._log.warning("run_fenced")
            return "fenced"
        if self._verdict == "cancel" and not self._done:
            self._report.log("warning", "The run was cancelled")
            return await self._finish("cancelled")
        if self._stalled is not None and not self._done:
            return await self._failed(self._stalled)
        if error is None:
            if self._run.kind == "sync":
                self._report.log("info", SUCCEEDED)
            return await self._finish("completed")
        return await self._failed(error)

    async def _failed(self, error: BaseException) -> RunOutcome | Literal["fenced"]:
        if isinstance(error, DataSyncError):
            # Fenced by the destination alone: the run is still ours, and its end has to be told.
            message, retryable = error.message, isinstance(error, RetryLater)
        else:
            message, retryable = f"internal error: {type(error).__name__}", True
            self._log.error("run_failed_unexpectedly", exc_info=error)
        self._report.log("error", message)
        return await self._finish("failed", message[:ERROR_CHARACTERS_MAX], retryable=retryable)

    async def _give_back(self) -> None:
        """The worker stops: the run waits for another, and streams that were committed stay committed."""
        self._report.log("warning", "The worker was stopped; the run will be continued")
        try:
            async with asyncio.timeout(STOPPING_SECONDS_MAX):
                await self._finish("failed", "the worker was stopped", retryable=True)
        except TimeoutError:
            self._log.warning("run_not_given_back")

    async def _finish(
        self, outcome: RunOutcome, error: str | None = None, *, retryable: bool = False
    ) -> RunOutcome | Literal["fenced"]:
        """Report the end until it is recorded; when that can't be done the lease runs out and another worker asks."""
        deadline = time.monotonic() + FINISH_ATTEMPT_SECONDS_MAX
        while True:
            try:
                await self._flush_lines()
                if self._verdict == "fenced":
                    return "fenced"
                first, lines = self._report.portion()
                answer = await self._calls.call(
                    FINISH_RUN,
                    FinishRun(
                        run_id=self._run.run_id,
                        epoch=self._run.epoch,
                        outcome=outcome,
                        error=error,
                        retryable=retryable,
                        streams=tuple(self._report.results),
                        progress=self._report.progress(),
                        log_sequence=first,
                        log_lines=lines,
                    ),
                )
                return outcome if answer.verdict == "recorded" else "fenced"
            except RetryLater as failure:
                self._log.warning("finish_failed", error=failure.message)
                if time.monotonic() > deadline:
                    return "fenced"
                await asyncio.sleep(FINISH_PAUSE_SECONDS)

    async def _flush_lines(self) -> None:
        """Send what one report does not take, so that the last one carries the end."""
        while self._report.more_than_a_portion and self._verdict != "fenced":
            first, lines = self._report.portion()
            answer = await self._calls.call(
                HEARTBEAT,
                Heartbeat(run_id=self._run.run_id, epoch=self._run.epoch, log_sequence=first, log_lines=lines),
            )
            self._report.acknowledge(first, len(lines))
            if answer.verdict == "fenced":
                self._verdict = "fenced"


async def _stopped(*tasks: "asyncio.Task[None]") -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


def _cause(error: BaseException | None) -> BaseException | None:
    """The first error of a group of parallel tasks."""
    causes: Sequence[BaseException] = (error,) if error is not None else ()
    while causes and isinstance(causes[0], BaseExceptionGroup):
        causes = causes[0].exceptions
    return causes[0] if causes else None
