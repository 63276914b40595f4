"""One claimed run from its configuration to its end: moves the streams, reports, and stops when told to."""

import asyncio
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

import structlog

from libs.connectors import registry
from libs.connectors.comparison import DestinationChangesRows, EndsDiffer
from libs.connectors.protocol import (
    ConnectorUnavailable,
    DestinationRun,
    Fenced,
    RunContext,
    Snapshot,
    Table,
    Written,
)
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
from libs.contracts.runs import StreamResult, ValuesChanged
from libs.contracts.streams import parse_advanced_settings, parse_streams_config
from libs.core.clock import Clock
from libs.core.envelope import Frozen
from libs.core.errors import DataSyncError, FixRequest, RetryLater, first_error
from libs.core.json import dump_json
from services.worker.report import RunReport, StreamReport
from services.worker.selection import Wanted, entries_of, wanted_streams

RequestT = TypeVar("RequestT", bound=Frozen)
ResponseT = TypeVar("ResponseT", bound=Frozen)

SUCCEEDED = "Sync completed, wait 5 seconds cleanup in progress..."
FINISH_ATTEMPT_SECONDS_MAX = 120.0
FINISH_PAUSE_SECONDS = 1.0
STOPPING_SECONDS_MAX = 5.0
RESOLVE_SECONDS_MAX = 120.0
RESOLVE_PAUSE_SECONDS = 0.5
RESOLVE_PAUSE_SECONDS_MAX = 10.0
ERROR_CHARACTERS_MAX = 2_000
MESSAGE_CHARACTERS_MAX = 700
STREAMS_NAMED_MAX = 5

log = structlog.get_logger(__name__)


class InternalCalls(Protocol):
    """How other services are called."""

    async def call(self, call: InternalCall[RequestT, ResponseT], request: RequestT) -> ResponseT: ...


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a stream or the attempt failed.

    Args:
        retryable: another attempt may do better.
        stream: the stream that failed, None for the attempt.
    """

    message: str
    retryable: bool
    stream: StreamReport | None = None

    @property
    def cause(self) -> str:
        """The message without the names of its stream, equal for streams that failed for the same reason."""
        if self.stream is None:
            return self.message
        plan = self.stream.plan
        dotted = "|".join(re.escape(str(name)) for name in (plan.stream, plan.target))
        single = "|".join(re.escape(name) for name in (plan.stream.name, plan.target.table))
        text = re.sub(rf"(?<![\w.])({dotted})(?!\w)", "…", self.message).removeprefix("…: ")
        return re.sub(rf"(?<=['\"])({single})(?=['\"])|(?<=\btable )({single})(?!\w)", "…", text)


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
        self._grant = run.grant
        self._time_limit: asyncio.Timeout | None = None
        self._failures: list[Failure] = []
        self._error = ""
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
            await _stopped(reporting)
            outcome = await self._end(working)
        except asyncio.CancelledError:
            await _stopped(working, reporting)
            await self._give_back()
            raise
        if outcome == "failed":
            self._log.warning("run_ended", outcome=outcome, error=self._error[:MESSAGE_CHARACTERS_MAX])
        else:
            self._log.info("run_ended", outcome=outcome)
        return outcome

    async def _work(self) -> None:
        if self._verdict != "continue":
            return
        run = self._run
        attempt = f"attempt {run.attempt} of {run.attempts_max}"
        self._report.log("info", f"Run {run.run_id} of job {run.job_id} started: {attempt}, epoch {run.epoch}")
        settings = parse_advanced_settings(run.advanced_settings_json)
        endpoints = await self._endpoints()
        wanted = await self._wanted(endpoints)
        self._report.streams = [StreamReport(item.plan) for item in wanted]
        takes_over = settings.take_over and run.living_job_ids is not None
        context = RunContext(
            job_id=run.job_id,
            project_id=run.project_id,
            run_id=run.run_id,
            epoch=run.epoch,
            verify=settings.verify,
            log=self._report.log,
            living_jobs=frozenset(run.living_job_ids or ()) if takes_over else None,
        )
        destination = registry.open_destination(
            endpoints.destination.type, endpoints.destination.config, parquet_roots=self._parquet_roots
        )
        async with destination.open(context) as opened:
            if run.kind == "clear":
                await self._clear(opened)
            else:
                for stream, item in zip(self._report.streams, wanted, strict=True):
                    if item.refusal is not None:
                        self._fail(stream, item.refusal)
                await self._sync(endpoints, opened)
        self._done = True

    async def _endpoints(self) -> EndpointsResolved:
        """Ask catalog until it answers: if it is just starting, the run should not fail."""
        deadline = time.monotonic() + RESOLVE_SECONDS_MAX
        pause_seconds = RESOLVE_PAUSE_SECONDS
        while True:
            try:
                return await self._calls.call(RESOLVE_ENDPOINTS, ResolveEndpoints(grant=self._grant))
            except RetryLater as error:
                if time.monotonic() > deadline:
                    raise
                self._report.log("warning", f"{error.message}; asking again in {pause_seconds:g} s")
            await asyncio.sleep(pause_seconds)
            pause_seconds = min(RESOLVE_PAUSE_SECONDS_MAX, 2 * pause_seconds)

    async def _wanted(self, endpoints: EndpointsResolved) -> list[Wanted]:
        config = parse_streams_config(self._run.streams_config_json)
        entries = config.streams
        if not entries:
            source = registry.open_source(endpoints.source.type, endpoints.source.config)
            entries = entries_of(await source.discover())
        return wanted_streams(config, entries)

    async def _sync(self, endpoints: EndpointsResolved, opened: DestinationRun) -> None:
        waiting = []
        for stream in self._report.streams:
            if stream.state == "failed":
                continue
            committed = await opened.committed(stream.plan)
            if committed is None:
                waiting.append(stream)
            else:
                self._report.log("info", f"{stream.plan.stream}: {committed.rows} rows are in place already")
                self._completed(stream, committed, 0.0)
        source = registry.open_source(endpoints.source.type, endpoints.source.config)
        while waiting:
            async with source.snapshot() as snapshot:
                waiting = await self._move_from(snapshot, waiting, opened)

    async def _move_from(
        self, snapshot: Snapshot, waiting: Sequence[StreamReport], opened: DestinationRun
    ) -> list[StreamReport]:
        """Move the streams; returns those that are left if a failure ended the snapshot."""
        ready: list[tuple[StreamReport, Table]] = []
        for place, stream in enumerate(waiting):
            try:
                ready.append((stream, await self._prepare(stream, snapshot, opened)))
            except Exception as error:  # noqa: BLE001 - every kind of failure is the stream's
                await self._fail_alone(stream, error, opened)
                if not await snapshot.is_usable():
                    return [*(one for one, _ in ready), *waiting[place + 1 :]]
        for place, (stream, table) in enumerate(ready):
            try:
                await self._move(stream, table, opened)
            except Exception as error:  # noqa: BLE001
                await self._fail_alone(stream, error, opened)
                if not await snapshot.is_usable():
                    return [one for one, _ in ready[place + 1 :]]
        return []

    async def _prepare(self, stream: StreamReport, snapshot: Snapshot, opened: DestinationRun) -> Table:
        table = await snapshot.table(stream.plan)
        for warning in table.warnings:
            self._report.log("warning", warning)
        await opened.prepare(table)
        stream.rows_total = table.rows_estimated
        return table

    async def _move(self, stream: StreamReport, table: Table, opened: DestinationRun) -> None:
        about = "" if table.rows_estimated is None else f", about {table.rows_estimated} rows"
        self._report.log("info", f"{stream.plan.stream}: reading{about}")
        stream.begin()
        started_at = time.monotonic()
        self._time_limit = asyncio.timeout(None)
        try:
            async with self._time_limit:
                written = await opened.write(table, stream)
        except TimeoutError:
            if self._time_limit.expired():
                raise self._stall(stream) from None
            raise
        except (EndsDiffer, DestinationChangesRows) as error:
            differing = Written(0, False, error.document)
            self._report.results.append(_result(stream, differing, time.monotonic() - started_at))
            raise
        finally:
            self._time_limit = None
            stream.loaded()
        seconds = time.monotonic() - started_at
        self._report.log("info", f"{stream.plan.stream}: {written.rows} rows in {seconds:.2f} s{outcome_of(written)}")
        if written.verification is not None and written.verified is None:
            reason = written.verification.get("reason")
            self._report.log("warning", f"{stream.plan.stream}: both ends can't be compared: {reason}")
        self._completed(stream, written, seconds)

    async def _fail_alone(self, stream: StreamReport, error: Exception, opened: DestinationRun) -> None:
        """Record that a stream failed, so that the others go on; raises if the whole attempt has to end.

        Where the connection broke, the destination is asked: it may be away for all of them, or have the commit.
        """
        cause = first_error(error)
        if isinstance(cause, Fenced):
            raise cause
        if isinstance(cause, RetryLater):
            committed = await opened.committed(stream.plan)
            if committed is not None:
                self._report.log("warning", f"{_named(stream, cause.message)}; it was committed all the same")
                return self._completed(stream, committed, 0.0)
        self._fail(stream, cause)
        return None

    def _fail(self, stream: StreamReport, cause: BaseException) -> None:
        failure = self._failure_of(cause)
        message = _named(stream, failure.message)
        stream.state = "failed"
        stream.error = failure.message[:MESSAGE_CHARACTERS_MAX]
        self._failures.append(Failure(message, failure.retryable, stream))
        self._report.log("error", message)

    def _completed(self, stream: StreamReport, written: Written, seconds: float) -> None:
        stream.state = "completed"
        stream.rows_read = stream.rows_written = stream.rows_total = written.rows
        self._report.results.append(_result(stream, written, seconds))

    async def _clear(self, opened: DestinationRun) -> None:
        for stream in self._report.streams:
            stream.state = "running"
            try:
                await opened.clear(stream.plan)
            except FixRequest as error:
                if isinstance(error, Fenced):
                    raise
                self._fail(stream, error)
                continue
            stream.state = "completed"
            self._report.log("info", f"{stream.plan.stream}: {stream.plan.target} was cleared from the destination")

    async def _keep_reporting(self, working: "asyncio.Task[None]") -> None:
        """Report until cancelled; a verdict other than continue ends the work at once, a stall the stream's."""
        while True:
            try:
                await self._heartbeat()
            except DataSyncError as error:
                self._log.warning("heartbeat_failed", error=error.message)
            except Exception:  # noqa: BLE001
                # A report that can't be made must not look like a worker that is gone.
                self._log.exception("heartbeat_failed_unexpectedly")
            if self._verdict != "continue":
                working.cancel()
                return
            self._end_stalled_stream()
            await asyncio.sleep(self._heartbeat_seconds)

    def _end_stalled_stream(self) -> None:
        limit = self._time_limit
        stalled = any(stream.still_seconds() >= self._stall_timeout_seconds for stream in self._report.streams)
        if stalled and limit is not None and limit.when() is None:
            limit.reschedule(asyncio.get_running_loop().time())

    def _stall(self, stream: StreamReport) -> ConnectorUnavailable:
        """The error of a stream that has not moved for too long."""
        last = f"the {stream.moved_last} moved last" if stream.moved_last else "the source has sent nothing yet"
        return ConnectorUnavailable(
            f"{stream.plan.stream}: nothing has moved for {self._stall_timeout_seconds:g} s; {last} "
            f"({stream.bytes_read} bytes read)",
            code="stalled",
        )

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
        self._grant = answer.grant or self._grant
        if self._verdict == "continue":
            self._verdict = answer.verdict

    async def _end(self, working: "asyncio.Task[None]") -> RunOutcome | Literal["fenced"]:
        error = None if working.cancelled() else working.exception()
        if self._verdict == "fenced":
            self._log.warning("run_fenced")
            return "fenced"
        if self._verdict == "cancel" and not self._done:
            self._report.log("warning", "The run was cancelled")
            return await self._finish("cancelled")
        if error is None and not self._failures:
            if self._run.kind == "sync":
                self._report.log("info", SUCCEEDED)
            return await self._finish("completed")
        return await self._failed(error)

    async def _failed(self, error: BaseException | None) -> RunOutcome | Literal["fenced"]:
        """Report the failures of all streams and the error that ended the attempt, if there is one."""
        failures = list(self._failures)
        if error is not None:
            ending = self._failure_of(first_error(error))
            self._report.log("error", ending.message)
            failures.append(ending)
        message = self._error = failures_text(failures, len(self._report.streams))
        return await self._finish("failed", message, retryable=any(failure.retryable for failure in failures))

    def _failure_of(self, cause: BaseException) -> "Failure":
        if isinstance(cause, DataSyncError):
            # Fenced by the destination alone: the run is still ours, and its end has to be told.
            return Failure(cause.message, isinstance(cause, RetryLater))
        self._log.error("run_failed_unexpectedly", exc_info=cause)
        return Failure(f"internal error: {type(cause).__name__}", True)

    async def _give_back(self) -> None:
        """The worker stops: the run waits for another, and streams that were committed stay committed."""
        if self._verdict == "fenced":
            return
        self._report.log("warning", "The worker was stopped; the run will be continued")
        try:
            async with asyncio.timeout(STOPPING_SECONDS_MAX):
                await self._finish("failed", "the worker was stopped", retryable=True, given_back=True)
        except TimeoutError:
            self._log.warning("run_not_given_back")

    async def _finish(
        self, outcome: RunOutcome, error: str | None = None, *, retryable: bool = False, given_back: bool = False
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
                        given_back=given_back,
                        streams=self._report.bounded_results(),
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


def _result(stream: StreamReport, written: Written, seconds: float) -> StreamResult:
    return StreamResult(
        namespace=stream.plan.stream.namespace,
        name=stream.plan.stream.name,
        rows_read=stream.rows_read,
        rows_written=written.rows,
        bytes_read=stream.bytes_read,
        seconds=round(seconds, 3),
        verified=written.verified,
        verification_json=None if written.verification is None else dump_json(written.verification),
        values_changed=tuple(ValuesChanged(column=name, values=n) for name, n in written.values_changed.items()),
    )


def outcome_of(written: Written) -> str:
    """What the run's log adds to the number of rows: what was compared, and what a policy changed."""
    if not written.values_changed:
        return ", both ends compared and equal" if written.verified else ""
    by_column = ", ".join(f"{column}: {values}" for column, values in written.values_changed.items())
    changed = f"{sum(written.values_changed.values())} values that a policy changed ({by_column})"
    return f", both ends compared, equal but for {changed}" if written.verified else f", with {changed}"


async def _stopped(*tasks: "asyncio.Task[None]") -> None:
    """Cancel and wait in bounded time; what still runs then can't commit under an older epoch."""
    for task in tasks:
        task.cancel()
    done, _ = await asyncio.wait(tasks, timeout=STOPPING_SECONDS_MAX)
    for task in done:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.info("stopped_with_an_error", error=repr(error))


def _named(stream: StreamReport, message: str) -> str:
    """The message, prefixed with the stream's name unless it has it."""
    name = str(stream.plan.stream)
    return message if name in message else f"{name}: {message}"


def failures_text(failures: Sequence[Failure], streams: int) -> str:
    """All failures in one text, equal causes once; if it gets too long, as many as fit and the number of the others."""
    groups: dict[str, list[Failure]] = {}
    for failure in failures:
        groups.setdefault(failure.cause, []).append(failure)
    texts = [_group_text(group) for group in groups.values()]
    if len(failures) == 1:
        return failures[0].message[:ERROR_CHARACTERS_MAX]
    text = f"{len(failures)} failures in {streams} streams: "
    left = len(failures)
    for part, group in zip(texts, groups.values(), strict=True):
        rest = f" (and {left} more, see the log)"
        if len(text) + len(part) + len(rest) > ERROR_CHARACTERS_MAX:
            return text.removesuffix("; ") + rest
        text += f"{part}; "
        left -= len(group)
    return text.removesuffix("; ")


def _group_text(group: Sequence[Failure]) -> str:
    """The first failure, and the streams that failed likewise."""
    text = group[0].message[:MESSAGE_CHARACTERS_MAX]
    others = [str(failure.stream.plan.stream) for failure in group[1:] if failure.stream is not None]
    if not others:
        return text
    more = len(others) - STREAMS_NAMED_MAX
    named = ", ".join(others[:STREAMS_NAMED_MAX]) + (f" and {more} more" if more > 0 else "")
    return f"{text} (the same: {named})"
