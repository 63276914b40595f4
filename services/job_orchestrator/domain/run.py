"""A run: one execution of a job, claimed by workers under growing epochs until one of them finishes it.

The run's stream is the judge of epochs: what a worker reports counts only under the epoch of the last claim.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Literal, assert_never

from libs.contracts.jobs import RunKind, RunOutcome, RunTrigger
from libs.contracts.runs import (
    RunCancelRequested,
    RunEvent,
    RunFinished,
    RunQueued,
    RunRetryScheduled,
    RunStarted,
    StreamResult,
)
from libs.core.decider import Aggregate
from libs.core.envelope import Envelope, Frozen
from libs.core.errors import Conflict, NotFound

RunStatus = Literal["queued", "running", "completed", "failed", "cancelled"]
ERROR_LENGTH_MAX = 4_000


class RunState(Frozen):
    """A run as it is now.

    Args:
        streams_config_json: the streams to clear; None means the job's own catalog.
        epoch: of the last claim, 0 before the first.
        attempts: how often it was begun; what goes on after a worker was stopped is the same attempt.
        waiting_since: from when a queued run may be claimed.
        started_at: the first claim.
        error: why the last attempt failed.
    """

    project_id: int
    job_id: int
    kind: RunKind
    trigger: RunTrigger
    queued_at: datetime
    waiting_since: datetime
    status: RunStatus = "queued"
    scheduled_for: datetime | None = None
    streams_config_json: str | None = None
    epoch: int = 0
    attempts: int = 0
    worker_id: str | None = None
    cancel_requested: bool = False
    started_at: datetime | None = None
    finished_at: datetime | None = None
    error: str | None = None
    streams: tuple[StreamResult, ...] = ()

    @property
    def is_active(self) -> bool:
        return self.status in ("queued", "running")


class QueueRun(Frozen):
    job_id: int
    kind: RunKind
    trigger: RunTrigger
    scheduled_for: datetime | None = None
    streams_config_json: str | None = None


class StartRun(Frozen):
    """A worker claims it, first or after another one's lease ran out."""

    worker_id: str
    epoch: int
    same_attempt: bool = False


class ScheduleRetry(Frozen):
    epoch: int
    error: str
    not_before: datetime
    same_attempt: bool = False


class FinishRun(Frozen):
    epoch: int
    outcome: RunOutcome
    error: str | None = None
    streams: tuple[StreamResult, ...] = ()


class RequestCancel(Frozen):
    """Ask the worker that has it to stop."""


class CancelWaiting(Frozen):
    """End a run that no worker has."""


RunCommand = QueueRun | StartRun | ScheduleRetry | FinishRun | RequestCancel | CancelWaiting


def decide(state: RunState | None, command: RunCommand) -> Sequence[RunEvent]:
    """Raises ``Conflict``: code ``fenced`` for a report under an old epoch, ``run_changed`` for a state moved on."""
    if isinstance(command, QueueRun):
        if state is not None:
            raise Conflict("the run exists already", code="already_exists")
        return [RunQueued(**command.model_dump())]
    if state is None:
        raise NotFound("there is no such run")
    match command:
        case StartRun(epoch=epoch):
            if not state.is_active:
                raise Conflict(f"the run is {state.status}", code="run_changed")
            if epoch <= state.epoch:
                raise Conflict(f"epoch {epoch} is not above {state.epoch}", code="fenced")
            return [RunStarted(**command.model_dump())]
        case ScheduleRetry(error=error):
            _check_epoch(state, command.epoch)
            if state.cancel_requested:
                raise Conflict("the run is being cancelled", code="run_changed")
            return [RunRetryScheduled(**{**command.model_dump(), "error": error[:ERROR_LENGTH_MAX]})]
        case FinishRun():
            _check_epoch(state, command.epoch)
            error_text = command.error[:ERROR_LENGTH_MAX] if command.error else None
            return [RunFinished(**{**command.model_dump(), "error": error_text})]
        case RequestCancel():
            if state.status != "running":
                raise Conflict(f"the run is {state.status}", code="run_changed")
            return [] if state.cancel_requested else [RunCancelRequested()]
        case CancelWaiting():
            if state.status != "queued":
                raise Conflict(f"the run is {state.status}", code="run_changed")
            return [RunFinished(epoch=state.epoch, outcome="cancelled")]
        case _:
            assert_never(command)


def _check_epoch(state: RunState, epoch: int) -> None:
    if state.status != "running" or epoch != state.epoch:
        raise Conflict("another worker has the run, or it has ended", code="fenced")


def evolve(state: RunState | None, envelope: Envelope) -> RunState:
    now, event = envelope.time, envelope.data
    if isinstance(event, RunQueued):
        return RunState(
            project_id=envelope.metadata.project_id or 0, queued_at=now, waiting_since=now, **event.model_dump()
        )
    assert state is not None, "a run's stream begins with run_queued"
    match event:
        case RunStarted(worker_id=worker_id, epoch=epoch, same_attempt=same_attempt):
            changes: dict[str, object] = {
                "status": "running",
                "worker_id": worker_id,
                "epoch": epoch,
                "attempts": state.attempts + (not same_attempt),
                "started_at": state.started_at or now,
            }
        case RunRetryScheduled(error=error, not_before=not_before, same_attempt=same_attempt):
            changes = {
                "status": "queued",
                "worker_id": None,
                "error": error,
                "waiting_since": not_before,
                "attempts": state.attempts - same_attempt,
            }
        case RunCancelRequested():
            changes = {"cancel_requested": True}
        case RunFinished(outcome=outcome, error=error, streams=streams):
            changes = {
                "status": outcome,
                "worker_id": None,
                "error": error,
                "streams": streams,
                "finished_at": now,
            }
        case _:
            raise ValueError(f"{event.TYPE} is not an event of a run")
    return state.model_copy(update=changes)


def retry_allowed(state: RunState, *, retries_max: int) -> bool:
    """Whether a failed attempt may be followed by another; the first attempt is not a retry."""
    return not state.cancel_requested and state.attempts <= retries_max


RUN = Aggregate(
    name="run",
    collection="runs",
    state=RunState,
    decide=decide,
    evolve=evolve,
    conflict_message="the run exists already",
    conflict_field="id",
)
