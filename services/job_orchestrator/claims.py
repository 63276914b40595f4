"""The workers' side of runs: claims under increasing epochs, leases by the database's clock, reports, ends.

The lease only makes it unlikely that two workers execute the same run. The run's stream decides whose report is
accepted. The epoch increases across all runs of a job and with the clock, so that the destination can reject a worker
that was suspended past its lease.
"""

import contextlib
import random
from collections.abc import AsyncGenerator, Awaitable
from datetime import UTC, datetime, timedelta
from typing import Any

from libs.contracts.internal import (
    RUN_WORK,
    ClaimedRun,
    ClaimWork,
    FinishAnswer,
    FinishWork,
    Heartbeat,
    HeartbeatAnswer,
    WorkClaim,
)
from libs.contracts.jobs import RunOutcome
from libs.core.clock import Clock, duration_text
from libs.core.entity import Entity
from libs.core.envelope import Metadata
from libs.core.errors import Conflict, FixRequest, NewerVersion
from libs.eventsourcing.command_handler import CommandHandler
from libs.eventsourcing.documents import Documents
from libs.mongodb.client import Document, DuplicateKeyError, ReturnDocument
from libs.web.principals import PrincipalSigner
from services.job_orchestrator.config import JobOrchestratorSettings
from services.job_orchestrator.domain.job import JOB, JobState
from services.job_orchestrator.domain.run import (
    RUN,
    FinishRun,
    RecordStreams,
    RunState,
    ScheduleRetry,
    StartRun,
    retry_allowed,
)
from services.job_orchestrator.domain.streams import takes_over
from services.job_orchestrator.readable import UNREADABLE, Readable
from services.job_orchestrator.run_control import RunControl
from services.job_orchestrator.run_records import LogLevel, RunRecords

LEASES = "run_leases"
CANDIDATES_MAX = 1_000
CANDIDATES_AT_ONCE = 10
LEASE_SECONDS_MAX = 3600
BACKOFF_SECONDS_MAX = 300.0
GRANT_SECONDS = 180.0
EPOCHS_FROM = datetime(2026, 1, 1, tzinfo=UTC)
SECONDS_SO_FAR: Document = {"$toLong": {"$divide": [{"$subtract": ["$$NOW", EPOCHS_FROM]}, 1000]}}
"""The lower bound of new epochs. The epochs of a restored or new installation are above those that its destinations
remember, so they do not reject it."""


class Claims:
    """Hands out runs and takes reports.

    After a start, running workers have the duration of one lease to report before others may claim their runs.
    """

    def __init__(
        self,
        documents: Documents,
        commands: CommandHandler,
        control: RunControl,
        records: RunRecords,
        principals: PrincipalSigner,
        clock: Clock,
        settings: JobOrchestratorSettings,
    ) -> None:
        self._documents = documents
        self._commands = commands
        self._control = control
        self._records = records
        self._principals = principals
        self._clock = clock
        self._settings = settings
        self._takeovers_from = clock.now() + timedelta(seconds=settings.run_lease_seconds)
        self._leases = documents.plain(LEASES)
        self._readable = Readable(RUN)

    async def claim(self, request: ClaimWork) -> WorkClaim:
        """Claim work for a worker: the run that has waited longest, but those that lost their worker first."""
        if RUN_WORK not in request.kinds:
            return WorkClaim()
        for candidates in (self._lost(), self._waiting()):
            async with contextlib.aclosing(candidates) as runs:
                async for run in runs:
                    claimed = await self._try_claim(run, request.worker_id)
                    if claimed is not None:
                        return WorkClaim(kind=RUN_WORK, run=claimed.model_dump())
        return WorkClaim()

    async def heartbeat(self, report: Heartbeat) -> HeartbeatAnswer:
        """Renew the lease and store the report. ``fenced`` if the run has another epoch or has ended."""
        run = await self._documents.get(RUN, report.run_id)
        if run is None or run.state.status != "running" or run.state.epoch != report.epoch:
            return HeartbeatAnswer(verdict="fenced")
        if not await self._renew(run.state.job_id, report.run_id, report.epoch):
            return HeartbeatAnswer(verdict="fenced")
        await self._records.save_progress(report.run_id, report.epoch, report.streams)
        await self._records.add_lines(report.run_id, report.epoch, report.log_sequence, report.log_lines)
        if report.results:
            command = RecordStreams(epoch=report.epoch, streams=report.results)
            if not await _unless_fenced(self._control.record_streams(run, command, _metadata(run))):
                return HeartbeatAnswer(verdict="fenced")
        return HeartbeatAnswer(verdict="cancel" if run.state.cancel_requested else "continue")

    async def finish(self, report: FinishWork) -> FinishAnswer:
        """Record an attempt's end: the run ends, or it is retried."""
        run = await self._documents.get(RUN, report.run_id)
        if run is None or run.state.epoch != report.epoch:
            return FinishAnswer(verdict="fenced")
        if run.state.status != "running":
            # The worker repeats the report if its answer was lost.
            repeated = run.state.status in (report.outcome, "queued")
            return FinishAnswer(verdict="recorded" if repeated else "fenced")
        await self._records.save_progress(report.run_id, report.epoch, report.progress)
        await self._records.add_lines(report.run_id, report.epoch, report.log_sequence, report.log_lines, last=True)
        if not await _unless_fenced(self._end(run, report)):
            return FinishAnswer(verdict="fenced")
        await self._release(run.state.job_id, report.run_id, report.epoch)
        return FinishAnswer(verdict="recorded")

    async def _end(self, run: Entity[RunState], report: FinishWork) -> None:
        metadata = _metadata(run)
        retryable = report.outcome == "failed" and (report.retryable or report.given_back)
        cancelled = run.state.cancel_requested
        if retryable and not cancelled and (report.given_back or self._retry_allowed(run.state)):
            try:
                return await self._retry(run, report)
            except Conflict as refusal:
                if refusal.code != "run_changed":
                    raise
                # The run was cancelled after it had been read.
                cancelled = True
        outcome: RunOutcome = "cancelled" if retryable and cancelled else report.outcome
        finish = FinishRun(epoch=report.epoch, outcome=outcome, error=report.error, streams=report.streams)
        await self._control.finish(str(run.id), run.state, finish, metadata)
        if outcome == "failed":
            why = "no attempt is left" if retryable else "a retry would fail as well, so the run is not retried"
            await self._close_attempt(run, "error", f"Failed in {self._attempt(run.state)}; {why}")
        return None

    async def _retry(self, run: Entity[RunState], report: FinishWork) -> None:
        error = report.error or "the attempt failed"
        pause_seconds = 0.0 if report.given_back else self._backoff_seconds(run.state.attempts)
        command = ScheduleRetry(
            epoch=report.epoch,
            error=error,
            not_before=self._clock.now() + timedelta(seconds=pause_seconds),
            same_attempt=report.given_back,
        )
        await self._control.retry(str(run.id), command, _metadata(run))
        if not report.given_back:
            # The worker's own lines tell the error.
            message = f"Failed in {self._attempt(run.state)}; retrying in {duration_text(pause_seconds)}"
            await self._close_attempt(run, "warning", message)

    async def _close_attempt(self, run: Entity[RunState], level: LogLevel, message: str) -> None:
        await self._records.close_attempt(str(run.id), run.state.epoch, level, message)

    def _attempt(self, run: RunState) -> str:
        return f"attempt {run.attempts} of {self._settings.max_retries.value + 1}"

    def _retry_allowed(self, run: RunState) -> bool:
        return retry_allowed(run, retries_max=self._settings.max_retries.value)

    def _backoff_seconds(self, attempts: int) -> float:
        """The pause, with jitter in its upper half, so that runs that failed together are not retried together."""
        growth = {"exponential": 2 ** (attempts - 1), "linear": attempts, "constant": 1}[
            self._settings.sync_backoff.value
        ]
        pause_seconds: float = min(BACKOFF_SECONDS_MAX, self._settings.retry_backoff_seconds.value * growth)
        return pause_seconds * random.uniform(0.5, 1.0)

    async def _waiting(self) -> AsyncGenerator[Entity[RunState], None]:
        now = self._clock.now()
        # No pause is that long, so the clock was set back.
        never = now + timedelta(seconds=2 * BACKOFF_SECONDS_MAX)
        since = {"$or": [{"state.waiting_since": {"$lte": now}}, {"state.waiting_since": {"$gt": never}}]}
        cursor = self._documents.collection(RUN.collection).find({"state.status": "queued", **since})
        cursor = cursor.sort([("state.waiting_since", 1), ("_id", 1)]).limit(CANDIDATES_MAX)
        async for run in self._readable.entities(cursor.batch_size(CANDIDATES_AT_ONCE)):
            yield run

    async def _lost(self) -> AsyncGenerator[Entity[RunState], None]:
        """Running runs whose lease has expired."""
        if self._clock.now() < self._takeovers_from:
            return
        pipeline: list[Document] = [
            {"$match": {"state.status": "running"}},
            {"$lookup": {"from": LEASES, "localField": "state.job_id", "foreignField": "_id", "as": "lease"}},
            {"$match": {"$expr": _is_over({"$max": "$lease.expires_at"})}},
            {"$sort": {"state.started_at": 1}},
            {"$limit": CANDIDATES_MAX},
        ]
        cursor = self._documents.collection(RUN.collection).aggregate(pipeline, batchSize=CANDIDATES_AT_ONCE)
        async for run in self._readable.entities(cursor):
            yield run

    async def _try_claim(self, run: Entity[RunState], worker_id: str) -> ClaimedRun | None:
        try:
            takes_over((await self._job(run)).state.definition.advanced_settings_json)
        except UNREADABLE as error:
            # It cannot be handed out. Left among the candidates, it would be claimed again and again.
            self._readable.report(run.id, error)
            return None
        lost = run.state.status == "running"
        same_attempt = lost and not await self._could_report(run)
        if lost and not same_attempt and run.state.attempts > self._settings.max_retries.value:
            await self._give_up(run)
            return None
        epoch = await self._take_lease(run)
        if epoch is None:
            return None
        start = StartRun(worker_id=worker_id, epoch=epoch, same_attempt=same_attempt)
        try:
            claimed = await self._commands.handle(RUN, run.id, start, _metadata(run))
        except (FixRequest, NewerVersion):
            await self._release(run.state.job_id, str(run.id), epoch)
            return None
        if lost:
            message = f"{_lost_worker(run.state)}; the worker {worker_id} continues the run"
            await self._close_attempt(run, "warning", message)
        return await self._claimed(claimed)

    async def _could_report(self, run: Entity[RunState]) -> bool:
        """Whether the worker could have reported that it was stopped.

        Not if its lease was last renewed before this instance started, since no instance may have been running.
        """
        lease = await self._leases.find_one({"_id": run.state.job_id})
        return lease is None or bool(lease["expires_at"] >= self._takeovers_from)

    async def _claimed(self, run: Entity[RunState]) -> ClaimedRun:
        job = await self._job(run)
        return ClaimedRun(
            run_id=str(run.id),
            job_id=run.state.job_id,
            project_id=run.state.project_id,
            kind=run.state.kind,
            epoch=run.state.epoch,
            lease_seconds=self._settings.run_lease_seconds,
            grant=self._grant(run, job),
            streams_config_json=run.state.streams_config_json or job.state.definition.streams_config_json,
            advanced_settings_json=job.state.definition.advanced_settings_json,
            cancel_requested=run.state.cancel_requested,
            attempt=run.state.attempts,
            attempts_max=self._settings.max_retries.value + 1,
            living_job_ids=await self._living_jobs(job),
            job_name=job.state.definition.name,
            verify=run.state.verify,
            repair=run.state.repair,
            resets=tuple((stream.namespace, stream.name) for stream in job.state.resets),
        )

    async def _living_jobs(self, job: Entity[JobState]) -> tuple[int, ...] | None:
        if not takes_over(job.state.definition.advanced_settings_json):
            return None
        living = {"project_id": job.state.project_id, "state.deleted": False}
        cursor = self._documents.collection(JOB.collection).find(living, {"_id": 1})
        return tuple([int(document["_id"]) async for document in cursor])

    async def _give_up(self, run: Entity[RunState]) -> None:
        """End a run that lost its worker in its last attempt."""
        error = f"the worker {run.state.worker_id} stopped reporting in {self._attempt(run.state)}"
        outcome: RunOutcome = "cancelled" if run.state.cancel_requested else "failed"
        finish = FinishRun(epoch=run.state.epoch, outcome=outcome, error=error)
        if not await _unless_fenced(self._control.finish(str(run.id), run.state, finish, _metadata(run))):
            return
        message = f"{_lost_worker(run.state)} in {self._attempt(run.state)}; no attempt is left"
        await self._close_attempt(run, "error", message)

    async def _job(self, run: Entity[RunState]) -> Entity[JobState]:
        job = await self._documents.get(JOB, run.state.job_id)
        assert job is not None, "jobs are marked as deleted, never removed"
        return job

    def _grant(self, run: Entity[RunState], job: Entity[JobState]) -> str:
        """Allows the worker to read this run's endpoints from catalog, and nothing else."""
        return self._principals.sign_grant(
            {
                "run_id": str(run.id),
                "project_id": run.state.project_id,
                "source_id": job.state.definition.source_id,
                "destination_id": job.state.definition.destination_id,
            },
            ttl_seconds=GRANT_SECONDS,
        )

    async def _take_lease(self, run: Entity[RunState]) -> int | None:
        """Take the job's lease for this run under the next epoch; None if somebody holds it."""
        criteria: Document = {"_id": run.state.job_id, "$expr": _is_over("$expires_at")}
        # An upsert must not contain $expr, so a job's first claim inserts a lease that has expired.
        unclaimed = {"epoch": 0, "run_id": "", "expires_at": datetime.fromtimestamp(0, UTC)}
        with contextlib.suppress(DuplicateKeyError):
            await self._leases.update_one({"_id": run.state.job_id}, {"$setOnInsert": unclaimed}, upsert=True)
        epoch = {"$add": [{"$max": ["$epoch", run.state.epoch, SECONDS_SO_FAR]}, 1]}
        change = [{"$set": {"epoch": epoch, "run_id": str(run.id), "expires_at": self._expiry()}}]
        taken = await self._leases.find_one_and_update(criteria, change, return_document=ReturnDocument.AFTER)
        return int(taken["epoch"]) if taken else None

    async def _renew(self, job_id: int, run_id: str, epoch: int) -> bool:
        criteria = {"_id": job_id, "run_id": run_id, "epoch": epoch}
        result = await self._leases.update_one(criteria, [{"$set": {"expires_at": self._expiry()}}])
        return bool(result.matched_count)

    async def _release(self, job_id: int, run_id: str, epoch: int) -> None:
        criteria = {"_id": job_id, "run_id": run_id, "epoch": epoch}
        await self._leases.update_one(criteria, [{"$set": {"expires_at": "$$NOW"}}])

    def _expiry(self) -> Document:
        return {"$add": ["$$NOW", int(self._settings.run_lease_seconds * 1000)]}


def _is_over(expires_at: Any) -> Document:
    """Whether a lease has expired, or expires so late that the clock must have been set back."""
    never = {"$add": ["$$NOW", LEASE_SECONDS_MAX * 1000]}
    return {"$or": [{"$lte": [expires_at, "$$NOW"]}, {"$gt": [expires_at, never]}]}


def _lost_worker(run: RunState) -> str:
    return f"The worker {run.worker_id} was lost: it stopped reporting, and its lease expired"


async def _unless_fenced(change: Awaitable[None]) -> bool:
    """Returns False if the change was rejected because another worker has the run, or it has ended."""
    try:
        await change
    except Conflict as refusal:
        if refusal.code != "fenced":
            raise
        return False
    return True


def _metadata(run: Entity[RunState]) -> Metadata:
    return Metadata(project_id=run.state.project_id, correlation_id=str(run.id))
