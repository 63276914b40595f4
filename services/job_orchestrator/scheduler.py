"""Starts what is due: ticks of schedules, and the clearing that a changed job asked for.

It runs under a lease, but nothing depends on that: a tick is decided on the job's stream, where it counts once.
"""

import asyncio
from datetime import timedelta

import structlog

from libs.core.clock import Clock
from libs.core.envelope import Metadata
from libs.core.errors import FixRequest
from libs.runtime.command_handler import Entity
from libs.runtime.documents import Documents
from services.job_orchestrator.domain.job import JOB, JobState, tick_due
from services.job_orchestrator.run_control import RunControl

DUE_MAX = 100
PAUSE_SECONDS_MAX = 1.0
"""How late another instance's change is seen at worst."""

log = structlog.get_logger(__name__)


class Scheduler:
    """Looks for due jobs when the next one is due, when told of a change, and every second."""

    def __init__(self, documents: Documents, control: RunControl, clock: Clock, changed: asyncio.Event) -> None:
        self._documents = documents
        self._control = control
        self._clock = clock
        self._changed = changed

    async def run(self) -> None:
        """Start what becomes due, until cancelled."""
        while True:
            self._changed.clear()
            pause_seconds = await self.round()
            try:
                async with asyncio.timeout(pause_seconds):
                    await self._changed.wait()
            except TimeoutError:
                continue

    async def round(self) -> float:
        """Start everything that is due now, at most ``DUE_MAX`` jobs of each kind; returns seconds until the next."""
        now = self._clock.now()
        due = await self._documents.find(
            JOB, {"state.next_tick": {"$lte": now}}, sort=[("state.next_tick", 1)], limit=DUE_MAX
        )
        to_clear = await self._documents.find(
            JOB,
            {"state.clear_wanted_json": {"$type": "string"}, "state.active_run_id": None},
            sort=[("_id", 1)],
            limit=DUE_MAX,
        )
        async with asyncio.TaskGroup() as group:
            for job in due:
                group.create_task(self._tick(job))
            for job in to_clear:
                group.create_task(self._clear(job))
        return 0.0 if len(due) == DUE_MAX or len(to_clear) == DUE_MAX else await self._pause_seconds()

    async def _tick(self, job: Entity[JobState]) -> None:
        tick = tick_due(job.state, self._clock.now())
        if tick is None:
            return
        try:
            run_id = await self._control.begin(int(job.id), "sync", "schedule", _metadata(job), scheduled_for=tick)
        except FixRequest as refusal:
            log.info("tick_refused", job_id=job.id, tick=tick.isoformat(), code=refusal.code)
            return
        log.info("tick_started", job_id=job.id, tick=tick.isoformat(), run_id=run_id)

    async def _clear(self, job: Entity[JobState]) -> None:
        try:
            await self._control.begin(
                int(job.id),
                "clear",
                "manual",
                _metadata(job),
                streams_config_json=job.state.clear_wanted_json,
                expected_version=job.version,
            )
        except FixRequest as refusal:
            log.info("clear_refused", job_id=job.id, code=refusal.code)

    async def _pause_seconds(self) -> float:
        next_jobs = await self._documents.find(
            JOB, {"state.next_tick": {"$type": "date"}}, sort=[("state.next_tick", 1)], limit=1
        )
        if not next_jobs or next_jobs[0].state.next_tick is None:
            return PAUSE_SECONDS_MAX
        until_due = next_jobs[0].state.next_tick - self._clock.now()
        return max(0.0, min(PAUSE_SECONDS_MAX, until_due / timedelta(seconds=1)))


def _metadata(job: Entity[JobState]) -> Metadata:
    return Metadata(project_id=job.state.project_id)
