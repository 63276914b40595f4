"""Starts, cancels and ends runs. Each is one atomic change of the run's stream and, if concerned, of the job's."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Literal

from libs.contracts.jobs import RunKind, RunOutcome, RunTrigger, StreamNamed
from libs.contracts.streams import StreamKey, parse_streams_config
from libs.core.clock import Clock
from libs.core.decider import Act, ExpectedVersion
from libs.core.entity import Entity
from libs.core.envelope import Metadata
from libs.core.errors import Conflict, NotFound
from libs.core.idempotency import IdempotencyKey
from libs.core.ids import uuid7
from libs.eventsourcing.command_handler import CommandHandler
from libs.eventsourcing.documents import Documents
from libs.eventsourcing.requests import CommandRequest
from libs.process.telemetry import RUNS_FINISHED
from services.job_orchestrator.domain.job import JOB, DeleteJob, EndRun, JobState, RequestRun
from services.job_orchestrator.domain.run import (
    RUN,
    CancelWaiting,
    FinishRun,
    QueueRun,
    RecordStreams,
    RequestCancel,
    RunState,
    ScheduleRetry,
)
from services.job_orchestrator.stream_states import forget_states, states_reported

ATTEMPTS_MAX = 5

CancelledRun = Literal["cancelled", "being cancelled"] | None
"""What happened to a job's active run: it ended at once, or its worker has to stop first. None if there was none."""


class RunControl:
    """Commands to a job and its run together.

    Args:
        on_change: called after a run was started, was cancelled or has ended, for the scheduler.
    """

    def __init__(
        self, documents: Documents, commands: CommandHandler, clock: Clock, on_change: Callable[[], None]
    ) -> None:
        self._documents = documents
        self._commands = commands
        self._clock = clock
        self.changed = on_change

    async def begin(
        self,
        job_id: int,
        kind: RunKind,
        trigger: RunTrigger,
        metadata: Metadata,
        *,
        scheduled_for: datetime | None = None,
        now: datetime | None = None,
        streams_config_json: str | None = None,
        verify: bool = False,
        repair: bool = False,
        expected_version: ExpectedVersion = None,
        idempotency: IdempotencyKey | None = None,
    ) -> str:
        """Queue a run and return its id. Raises ``Conflict`` if the job cannot run now."""
        run_id = uuid7()
        request = RequestRun(run_id=run_id, kind=kind, trigger=trigger, scheduled_for=scheduled_for, now=now)
        queue = QueueRun(
            job_id=job_id,
            kind=kind,
            trigger=trigger,
            scheduled_for=scheduled_for,
            streams_config_json=streams_config_json,
            verify=verify,
            repair=repair,
        )
        acts = [Act(JOB, job_id, request, expected_version), Act(RUN, run_id, queue)]
        outcome = await self._commands.execute(CommandRequest(acts, metadata, idempotency=idempotency))
        self.changed()
        run = outcome.entities[1]
        assert run is not None
        return str(run.id)

    async def cancel(
        self, job: Entity[JobState], metadata: Metadata, *, idempotency: IdempotencyKey | None = None
    ) -> bool:
        """Cancel the job's active run. Returns True if that ended it, False if its worker has to stop first.

        Raises:
            Conflict: no run is active.
        """
        if await key_was_used(self._documents, idempotency):
            replayed = await self._commands.execute(CommandRequest([], metadata, idempotency=idempotency))
            return any(run is not None and run.state.status == "cancelled" for run in replayed.entities[:1])
        for _ in range(ATTEMPTS_MAX):
            run = await self._active_run(job)
            if run is None:
                raise Conflict("the job has no active run", code="no_active_run")
            acts = _cancelling(job, run)
            if await self._unless_changed(CommandRequest(acts, metadata, idempotency=idempotency)):
                return run.state.status == "queued"
            job = await self._documents.require(JOB, job.id, job.state.project_id)
        raise Conflict("the run keeps changing; try again", code="contention")

    async def delete(
        self,
        job: Entity[JobState],
        metadata: Metadata,
        *,
        expected_version: ExpectedVersion,
    ) -> CancelledRun:
        """Delete a job and cancel its active run, atomically. Returns what happened to that run."""
        for _ in range(ATTEMPTS_MAX):
            run = await self._active_run(job)
            left_active = job.state.active_run_id if run is not None and run.state.status == "running" else None
            delete = Act(JOB, job.id, DeleteJob(active_run_id=left_active))
            acts = _cancelling(job, run) if run is not None else []
            # Only the first act on the job's stream can be checked against the version that the caller read.
            acts = _expecting([*acts, delete], job, expected_version)
            if await self._unless_changed(CommandRequest(acts, metadata)):
                if run is None:
                    return None
                return "being cancelled" if run.state.status == "running" else "cancelled"
            job = await self._documents.require(JOB, job.id, job.state.project_id)
        raise Conflict("the job's runs keep changing; try again", code="contention")

    async def finish(self, run_id: str, run: RunState, command: FinishRun, metadata: Metadata) -> None:
        """End a run, and record that in its job. Raises ``Conflict`` (``fenced``) under another epoch."""
        results = (*run.streams, *command.streams) if command.epoch == run.epoch else command.streams
        moved = tuple(
            StreamNamed(namespace=result.namespace, name=result.name)
            for result in results
            if result.verified is not False
        )
        end = EndRun(run_id=run_id, outcome=command.outcome, moved=moved if run.kind == "sync" else ())
        acts = [Act(RUN, run_id, command), Act(JOB, run.job_id, end)]
        states = states_reported(run.job_id, run_id, command.streams, self._clock.now())
        await self._commands.execute(CommandRequest(acts, metadata, states))
        if run.kind == "clear" and command.outcome == "completed":
            await forget_states(self._documents, run.job_id, _cleared(run))
        RUNS_FINISHED.labels(command.outcome).inc()
        self.changed()

    async def retry(self, run_id: str, command: ScheduleRetry, metadata: Metadata) -> None:
        """Queue the run for its next attempt."""
        await self._commands.handle(RUN, run_id, command, metadata)

    async def record_streams(self, run: Entity[RunState], command: RecordStreams, metadata: Metadata) -> None:
        """Record results ahead of the run's end. Raises ``Conflict`` (``fenced``) under another epoch."""
        states = states_reported(run.state.job_id, str(run.id), command.streams, self._clock.now())
        await self._commands.execute(CommandRequest([Act(RUN, run.id, command)], metadata, states))

    async def _active_run(self, job: Entity[JobState]) -> Entity[RunState] | None:
        if job.state.active_run_id is None:
            return None
        run = await self._documents.get(RUN, job.state.active_run_id)
        if run is None:
            raise NotFound(f"run {job.state.active_run_id} does not exist")
        return run

    async def _unless_changed(self, request: CommandRequest) -> bool:
        """Returns False if the run changed between being read and the decision."""
        try:
            await self._commands.execute(request)
        except Conflict as refusal:
            if refusal.code != "run_changed":
                raise
            return False
        if any(isinstance(act.command, CancelWaiting) for act in request.acts):
            RUNS_FINISHED.labels("cancelled").inc()
        self.changed()
        return True


async def key_was_used(documents: Documents, idempotency: IdempotencyKey | None) -> bool:
    """Whether the request was executed before, so that it is answered from its key."""
    if idempotency is None:
        return False
    return await documents.plain("idempotency").find_one({"_id": idempotency.id}, {"_id": 1}) is not None


def _cleared(run: RunState) -> list[StreamKey] | None:
    """The streams that a run of the kind ``clear`` removed; None for all of the job's."""
    if run.streams_config_json is None:
        return None
    return [item.key for item in parse_streams_config(run.streams_config_json).selections]


def _cancelling(job: Entity[JobState], run: Entity[RunState]) -> list[Act]:
    if run.state.status == "running":
        return [Act(RUN, run.id, RequestCancel())]
    outcome: RunOutcome = "cancelled"
    return [Act(RUN, run.id, CancelWaiting()), Act(JOB, job.id, EndRun(run_id=str(run.id), outcome=outcome))]


def _expecting(acts: Sequence[Act], job: Entity[JobState], expected_version: ExpectedVersion) -> list[Act]:
    first = next(index for index, act in enumerate(acts) if act.aggregate is JOB)
    return [replace(act, expected_version=expected_version) if at == first else act for at, act in enumerate(acts)]
