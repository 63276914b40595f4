"""The life of claimed work of any kind: it keeps its lease, reports, and ends once or is given back."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Literal, Protocol, TypeVar

import structlog

from libs.contracts.internal import FINISH_WORK, HEARTBEAT, Claimed, FinishWork, Heartbeat, InternalCall
from libs.contracts.jobs import RunOutcome
from libs.core.clock import Clock
from libs.core.envelope import Frozen
from libs.core.errors import DataSyncError, RetryLater, first_error
from services.worker.failures import MESSAGE_CHARACTERS_MAX, Failure, failures_text, named
from services.worker.report import Portion, Report, StreamReport

RequestT = TypeVar("RequestT", bound=Frozen)
ResponseT = TypeVar("ResponseT", bound=Frozen)

Outcome = RunOutcome | Literal["fenced"]

FIRST_PAUSE_SECONDS = 0.5
FINISH_SECONDS_MAX = 120.0
FINISH_PAUSE_SECONDS = 1.0
STOPPING_SECONDS_MAX = 5.0

log = structlog.get_logger(__name__)


class InternalCalls(Protocol):
    """Makes calls to other services."""

    async def call(self, call: InternalCall[RequestT, ResponseT], request: RequestT) -> ResponseT: ...


class Attempt:
    """One attempt at claimed work. It fails if the work raises, or if any of its streams failed.

    Args:
        heartbeat_seconds: the pause between heartbeats, reduced to a third of the lease if that is shorter.

    Attributes:
        report: what the work reports about itself.
        failures: the streams that failed.
    """

    def __init__(self, claimed: Claimed, calls: InternalCalls, clock: Clock, heartbeat_seconds: float) -> None:
        self.report = Report(clock)
        self.failures: list[Failure] = []
        self._claimed = claimed
        self._calls = calls
        self._heartbeat_seconds = min(heartbeat_seconds, claimed.lease_seconds / 3)
        self._verdict: Literal["continue", "cancel", "fenced"] = "cancel" if claimed.cancel_requested else "continue"
        self._log = log.bind(run_id=claimed.run_id, epoch=claimed.epoch)

    async def run(self, work: Callable[[], Awaitable[None]]) -> Outcome:
        """Do the work and report its end. If this is cancelled, the work is given back for another worker."""
        self._log.info("run_claimed")
        working = asyncio.create_task(self._unless_cancelled(work))
        reporting = asyncio.create_task(self._keep_reporting(working))
        try:
            await asyncio.wait({working})
            await _stop(reporting)
            return await self._end(working)
        except asyncio.CancelledError:
            await _stop(working, reporting)
            await self._give_back()
            raise

    def fail(self, stream: StreamReport, cause: BaseException) -> None:
        """Record that a stream failed; the others go on."""
        failure = self._failure_of(cause)
        message = named(stream, failure.message)
        stream.fail(failure.message[:MESSAGE_CHARACTERS_MAX])
        self.failures.append(Failure(message, failure.retryable, stream))
        self.report.log("error", message)

    async def _unless_cancelled(self, work: Callable[[], Awaitable[None]]) -> None:
        if self._verdict == "cancel":
            raise asyncio.CancelledError
        await work()

    async def _keep_reporting(self, working: "asyncio.Task[None]") -> None:
        """Send heartbeats until cancelled; any verdict but ``continue`` cancels the work.

        The first ones follow each other closely, so that the progress of a short run is seen, too.
        """
        pause_seconds = FIRST_PAUSE_SECONDS
        while True:
            try:
                await self._heartbeat(self.report.portion())
            except DataSyncError as error:
                self._log.warning("heartbeat_failed", error=error.message)
            except Exception:  # noqa: BLE001
                # A bug in a report must not look like a lost worker.
                self._log.exception("heartbeat_failed_unexpectedly")
            if self._verdict != "continue":
                working.cancel()
                return
            await asyncio.sleep(min(pause_seconds, self._heartbeat_seconds))
            pause_seconds *= 2

    async def _heartbeat(self, portion: Portion) -> None:
        answer = await self._calls.call(
            HEARTBEAT,
            Heartbeat(
                run_id=self._claimed.run_id,
                epoch=self._claimed.epoch,
                streams=portion.progress,
                results=portion.results,
                log_sequence=portion.first_line,
                log_lines=portion.lines,
            ),
        )
        self.report.acknowledge(portion)
        if self._verdict == "continue" or answer.verdict == "fenced":
            self._verdict = answer.verdict

    async def _end(self, working: "asyncio.Task[None]") -> Outcome:
        """Report how the work ended. Cancelling comes too late for work that is already done."""
        error = None if working.cancelled() else working.exception()
        is_done = not working.cancelled() and error is None
        if self._verdict == "fenced":
            self._log.warning("run_fenced")
            return "fenced"
        if self._verdict == "cancel" and not is_done:
            self.report.log("warning", "The run was cancelled")
            return self._ended(await self._finish("cancelled"))
        if error is None and not self.failures:
            return self._ended(await self._finish("completed"))
        if error is not None:
            failure = self._failure_of(first_error(error))
            self.report.log("error", failure.message)
            self.failures.append(failure)
        text = failures_text(self.failures, len(self.report.streams))
        retryable = any(failure.retryable for failure in self.failures)
        return self._ended(await self._finish("failed", text, retryable=retryable), text)

    def _ended(self, outcome: Outcome, error: str = "") -> Outcome:
        if outcome == "failed":
            self._log.warning("run_ended", outcome=outcome, error=error[:MESSAGE_CHARACTERS_MAX])
        else:
            self._log.info("run_ended", outcome=outcome)
        return outcome

    def _failure_of(self, cause: BaseException) -> Failure:
        if isinstance(cause, DataSyncError):
            # Also if the destination fenced it: the work is still this worker's, which has to report its end.
            return Failure(cause.message, isinstance(cause, RetryLater))
        self._log.error("run_failed_unexpectedly", exc_info=cause)
        return Failure(f"internal error: {type(cause).__name__}", True)

    async def _give_back(self) -> None:
        """Let another worker continue; committed streams stay committed."""
        if self._verdict == "fenced":
            return
        self.report.log("warning", "The worker was stopped; the run will be continued")
        try:
            async with asyncio.timeout(STOPPING_SECONDS_MAX):
                await self._finish("failed", "the worker was stopped", retryable=True, given_back=True)
        except TimeoutError:
            self._log.warning("run_not_given_back")

    async def _finish(
        self, outcome: RunOutcome, error: str | None = None, *, retryable: bool = False, given_back: bool = False
    ) -> Outcome:
        """Report the end until it is recorded. If that takes too long, the lease expires and the work is claimed again.

        What does not fit into the final report is sent ahead of it in heartbeats.
        """
        self.report.conclude(with_results=not given_back)
        deadline = time.monotonic() + FINISH_SECONDS_MAX
        while self._verdict != "fenced":
            portion = self.report.portion()
            try:
                if portion.has_more:
                    await self._heartbeat(portion)
                    continue
                end = FinishWork(
                    run_id=self._claimed.run_id,
                    epoch=self._claimed.epoch,
                    outcome=outcome,
                    error=error,
                    retryable=retryable,
                    given_back=given_back,
                    streams=portion.results,
                    progress=portion.progress,
                    log_sequence=portion.first_line,
                    log_lines=portion.lines,
                )
                answer = await self._calls.call(FINISH_WORK, end)
            except RetryLater as failure:
                self._log.warning("finish_failed", error=failure.message)
                if time.monotonic() > deadline:
                    return "fenced"
                await asyncio.sleep(FINISH_PAUSE_SECONDS)
            else:
                return outcome if answer.verdict == "recorded" else "fenced"
        return "fenced"


async def _stop(*tasks: "asyncio.Task[None]") -> None:
    """Cancel and wait, but not forever: what still runs afterwards is fenced by the next claim's epoch."""
    for task in tasks:
        task.cancel()
    done, _ = await asyncio.wait(tasks, timeout=STOPPING_SECONDS_MAX)
    for task in done:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.info("stopped_with_an_error", error=repr(error))
