"""Asks for runs and executes them, a bounded number at once; events wake it, a poll makes sure."""

import asyncio

import structlog

from libs.contracts.internal import CLAIM_RUN, ClaimedRun, ClaimRun
from libs.contracts.runs import TOPIC, RunQueued
from libs.core.clock import Clock
from libs.core.errors import DataSyncError
from libs.event_log.port import EventLog
from services.worker.config import WorkerSettings
from services.worker.execution import InternalCalls, RunExecution

MESSAGES_MAX = 100
WAIT_SECONDS = 30.0

log = structlog.get_logger(__name__)


class Claiming:
    """The worker's loop."""

    def __init__(self, settings: WorkerSettings, calls: InternalCalls, clock: Clock, worker_id: str) -> None:
        self._settings = settings
        self._calls = calls
        self._clock = clock
        self._worker_id = worker_id
        self._wake = asyncio.Event()
        self._has_failed = False
        self._free = asyncio.Semaphore(settings.worker_runs_max)

    async def run(self) -> None:
        """Claim and execute until cancelled; the runs under way are then given back."""
        async with asyncio.TaskGroup() as running:
            while True:
                await self._free.acquire()
                self._wake.clear()
                claimed = await self._claim()
                if claimed is None:
                    self._free.release()
                    await self._wait()
                    continue
                running.create_task(self._execute(claimed))

    async def follow_events(self, event_log: EventLog) -> None:
        """Wake up for every run that is queued from now on."""
        async with event_log.subscribe(TOPIC, None) as subscription:
            while True:
                for message in await subscription.next_batch(MESSAGES_MAX, WAIT_SECONDS):
                    if message.envelope is not None and isinstance(message.envelope.data, RunQueued):
                        self._wake.set()

    async def _claim(self) -> ClaimedRun | None:
        try:
            answer = await self._calls.call(CLAIM_RUN, ClaimRun(worker_id=self._worker_id))
        except DataSyncError as error:
            # The orchestrator may be starting as well: once is no news.
            report = log.warning if self._has_failed else log.debug
            report("claim_failed", error=error.message)
            self._has_failed = True
            return None
        self._has_failed = False
        return answer.run

    async def _wait(self) -> None:
        try:
            async with asyncio.timeout(self._settings.worker_poll_seconds.value):
                await self._wake.wait()
        except TimeoutError:
            return

    async def _execute(self, claimed: ClaimedRun) -> None:
        execution = RunExecution(
            claimed,
            self._calls,
            self._clock,
            heartbeat_seconds=self._settings.worker_heartbeat_seconds,
            parquet_roots=self._settings.parquet_roots,
            stall_timeout_seconds=self._settings.stall_timeout_seconds,
        )
        try:
            await execution.execute()
        except Exception:
            # The run's lease runs out and it is claimed again; the runs beside it go on.
            log.exception("run_execution_failed", run_id=claimed.run_id)
        finally:
            self._free.release()
            self._wake.set()
