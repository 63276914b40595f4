"""Claims work and executes it, a bounded number at once. Events wake an idle worker; it also polls."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import structlog

from libs.contracts.internal import CLAIM_WORK, Claimed, ClaimWork, WorkClaim
from libs.core.clock import Clock
from libs.core.envelope import Event
from libs.core.errors import DataSyncError
from libs.event_log.port import EventLog
from libs.process.telemetry import WORK_ENDED, WORK_RUNNING
from services.worker.attempt import Attempt, InternalCalls
from services.worker.config import WorkerSettings

MESSAGES_MAX = 100
WAIT_SECONDS = 30.0

ClaimedT = TypeVar("ClaimedT", bound=Claimed)

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class WorkKind(Generic[ClaimedT]):
    """A kind of work that this worker executes.

    Args:
        claimed: what a claim of this kind carries.
        execute: does the work. It returns when the work is done, and raises what ends the attempt.
        queued: the event that announces new work of this kind.
    """

    claimed: type[ClaimedT]
    execute: Callable[[ClaimedT, Attempt], Awaitable[None]]
    queued: type[Event]


class Claiming:
    """The worker's loop.

    Args:
        kinds: by the name that claims have for them.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        calls: InternalCalls,
        clock: Clock,
        worker_id: str,
        kinds: Mapping[str, WorkKind[Any]],
    ) -> None:
        self._settings = settings
        self._calls = calls
        self._clock = clock
        self._request = ClaimWork(worker_id=worker_id, kinds=tuple(kinds))
        self._kinds = kinds
        self._wake = asyncio.Event()
        self._has_failed = False
        self._free = asyncio.Semaphore(settings.worker_runs_max)

    async def run(self) -> None:
        """Claim and execute until cancelled; work in progress is then given back."""
        async with asyncio.TaskGroup() as executing:
            while True:
                await self._free.acquire()
                self._wake.clear()
                claim = await self._claim()
                if claim.run is None:
                    self._free.release()
                    await self._wait()
                else:
                    executing.create_task(self._execute(claim.kind, claim.run))

    async def follow_events(self, event_log: EventLog, topic: str) -> None:
        """Wake up when an event of the topic announces new work."""
        announcing = tuple(kind.queued for kind in self._kinds.values())
        async with event_log.subscribe(topic, None) as subscription:
            while True:
                for message in await subscription.next_batch(MESSAGES_MAX, WAIT_SECONDS):
                    if message.envelope is not None and isinstance(message.envelope.data, announcing):
                        self._wake.set()

    @property
    def topics(self) -> Iterable[str]:
        """The topics whose events announce work."""
        return sorted({kind.queued.TOPIC for kind in self._kinds.values()})

    async def _claim(self) -> WorkClaim:
        try:
            claim = await self._calls.call(CLAIM_WORK, self._request)
        except DataSyncError as error:
            # A single failure is normal: the orchestrator may be starting at the same time.
            report = log.warning if self._has_failed else log.debug
            report("claim_failed", error=error.message)
            self._has_failed = True
            return WorkClaim()
        self._has_failed = False
        return claim

    async def _wait(self) -> None:
        try:
            async with asyncio.timeout(self._settings.worker_poll_seconds.value):
                await self._wake.wait()
        except TimeoutError:
            return

    async def _execute(self, name: str, fields: Mapping[str, Any]) -> None:
        outcome = "broken"
        try:
            with WORK_RUNNING.labels(name).track_inprogress():
                outcome = await self._attempt(name, fields)
        except asyncio.CancelledError:
            outcome = "given_back"
            raise
        except Exception:
            # The lease expires and the work is claimed again; other work is not affected.
            log.exception("execution_failed", kind=name, run_id=fields.get("run_id"))
        finally:
            WORK_ENDED.labels(name, outcome).inc()
            self._free.release()
            self._wake.set()

    async def _attempt(self, name: str, fields: Mapping[str, Any]) -> str:
        kind = self._kinds[name]
        claimed = kind.claimed.model_validate(fields, extra="ignore")
        attempt = Attempt(claimed, self._calls, self._clock, self._settings.worker_heartbeat_seconds)
        return await attempt.run(lambda: kind.execute(claimed, attempt))
