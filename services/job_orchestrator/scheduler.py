"""Starts what is due: ticks of schedules, and the clearing of streams after a job was changed.

It runs under a lease, but does not depend on it: the job's stream admits each tick at most once.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta

import structlog

from libs.core.clock import Clock
from libs.core.entity import Entity
from libs.core.envelope import Metadata
from libs.core.errors import FixRequest, NewerVersion
from libs.eventsourcing.documents import Documents
from libs.mongodb.client import ASCENDING, Document
from services.job_orchestrator.domain.job import CLOCKS_DIFFER_MAX, JOB, JobState, tick_due
from services.job_orchestrator.readable import UNREADABLE, Readable
from services.job_orchestrator.run_control import RunControl

DUE_MAX = 100
PAUSE_SECONDS_MAX = 1.0
"""The maximum delay until a change by another instance is seen."""

log = structlog.get_logger(__name__)


class Scheduler:
    """Looks for due jobs when the next one is due, after a change, and every second."""

    def __init__(self, documents: Documents, control: RunControl, clock: Clock, changed: asyncio.Event) -> None:
        self._documents = documents
        self._control = control
        self._clock = clock
        self._changed = changed
        self._readable = Readable(JOB)

    async def run(self) -> None:
        """Start what is due, until cancelled."""
        while True:
            self._changed.clear()
            pause_seconds = await self.round()
            try:
                async with asyncio.timeout(pause_seconds):
                    await self._changed.wait()
            except TimeoutError:
                continue

    async def round(self) -> float:
        """Start what is due now, at most ``DUE_MAX`` jobs of each kind. Returns the seconds until the next is due."""
        now = self._clock.now()
        due = await self._found({"state.next_tick": {"$lte": now}}, "state.next_tick")
        set_back = await self._found(
            {"state.scheduled_until": {"$gt": now + CLOCKS_DIFFER_MAX}, "state.next_tick": {"$type": "date"}},
            "state.scheduled_until",
            lambda state: tick_due(state, now) is not None,
        )
        to_clear = await self._found(
            {"state.clear_wanted_json": {"$type": "string"}, "state.active_run_id": None}, "_id"
        )
        async with asyncio.TaskGroup() as group:
            for job in (*due, *set_back):
                group.create_task(self._alone(job, self._tick))
            for job in to_clear:
                group.create_task(self._alone(job, self._clear))
        return 0.0 if DUE_MAX in (len(due), len(to_clear)) else await self._pause_seconds(now)

    async def _found(
        self, criteria: Document, order: str, wanted: Callable[[JobState], bool] = lambda state: True
    ) -> list[Entity[JobState]]:
        """The first ``DUE_MAX`` readable jobs that satisfy ``wanted``."""
        jobs = self._documents.collection(JOB.collection).find(criteria).sort(order, ASCENDING).batch_size(DUE_MAX)
        found: list[Entity[JobState]] = []
        async with contextlib.aclosing(self._readable.entities(jobs)) as readable:
            async for job in readable:
                try:
                    if wanted(job.state):
                        found.append(job)
                except UNREADABLE as error:
                    self._readable.report(job.id, error)
                if len(found) == DUE_MAX:
                    break
        return found

    async def _alone(self, job: Entity[JobState], work: Callable[[Entity[JobState]], Awaitable[None]]) -> None:
        """Handle one job; an unreadable job does not stop the others."""
        try:
            await work(job)
        except UNREADABLE as error:
            self._readable.report(job.id, error)

    async def _tick(self, job: Entity[JobState]) -> None:
        now = self._clock.now()
        tick = tick_due(job.state, now)
        if tick is None:
            return
        try:
            run_id = await self._control.begin(
                int(job.id), "sync", "schedule", _metadata(job), scheduled_for=tick, now=now
            )
        except (FixRequest, NewerVersion) as refusal:
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
        except (FixRequest, NewerVersion) as refusal:
            log.info("clear_refused", job_id=job.id, code=refusal.code)

    async def _pause_seconds(self, now: datetime) -> float:
        # Jobs that are due and can't be started wait for the next round.
        coming = {"state.next_tick": {"$gt": now}}
        jobs = self._documents.collection(JOB.collection)
        following = await jobs.find_one(coming, {"state.next_tick": 1}, sort=[("state.next_tick", ASCENDING)])
        if following is None:
            return PAUSE_SECONDS_MAX
        until_due: timedelta = following["state"]["next_tick"] - self._clock.now()
        return max(0.0, min(PAUSE_SECONDS_MAX, until_due / timedelta(seconds=1)))


def _metadata(job: Entity[JobState]) -> Metadata:
    return Metadata(project_id=job.state.project_id)
