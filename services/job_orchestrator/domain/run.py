"""A run: one execution of a job. Workers claim it under increasing epochs until one of them finishes it.

A worker's report is accepted only under the epoch of the last claim.
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
    RunStreamsRecorded,
    StreamResult,
)
from libs.core.decider import Aggregate
from libs.core.envelope import Envelope, Event, Frozen
from libs.core.errors import Conflict, NotFound

RunStatus = Literal["queued", "running", "completed", "failed", "cancelled"]
ERROR_LENGTH_MAX = 4_000


class RunState(Frozen):
    """A run's current state.

    Args:
        streams_config_json: the streams to clear; None for the job's own catalog.
        verify, repair: as in ``RunQueued``.
        epoch: of the last claim, 0 before the first.
        attempts: how many were started. What continues after a worker was stopped is the same attempt.
        waiting_since: a queued run may be claimed from then on.
        started_at: when it was first claimed.
        error: why the last attempt failed.
        streams: the results that the last attempt has reported.
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
    verify: bool = False
    repair: bool = False
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
    verify: bool = False
    repair: bool = False


class StartRun(Frozen):
    """A worker claims the run, for the first time or after another worker's lease expired."""

    worker_id: str
    epoch: int
    same_attempt: bool = False


class ScheduleRetry(Frozen):
    epoch: int
    error: str
    not_before: datetime
    same_attempt: bool = False


class RecordStreams(Frozen):
    """Record results ahead of the run's end; those that are known already are ignored."""

    epoch: int
    streams: tuple[StreamResult, ...]


class FinishRun(Frozen):
    epoch: int
    outcome: RunOutcome
    error: str | None = None
    streams: tuple[StreamResult, ...] = ()


class RequestCancel(Frozen):
    """Ask the run's worker to stop."""


class CancelWaiting(Frozen):
    """End a run that is waiting for a worker."""


RunCommand = QueueRun | StartRun | ScheduleRetry | RecordStreams | FinishRun | RequestCancel | CancelWaiting


def decide(state: RunState | None, command: RunCommand) -> Sequence[RunEvent]:
    """Raises ``Conflict``: ``fenced`` for a report under another epoch, ``run_changed`` if the state does not fit."""
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
        case RecordStreams(streams=streams):
            _check_epoch(state, command.epoch)
            known = {(stream.namespace, stream.name) for stream in state.streams}
            new = tuple(stream for stream in streams if (stream.namespace, stream.name) not in known)
            return [RunStreamsRecorded(epoch=command.epoch, streams=new)] if new else []
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
        raise Conflict("another worker has the run, or the run has ended", code="fenced")


def evolve(state: RunState | None, envelope: Envelope) -> RunState:
    event = envelope.data
    if isinstance(event, RunQueued):
        return RunState(
            project_id=envelope.metadata.project_id or 0,
            queued_at=envelope.time,
            waiting_since=envelope.time,
            **event.model_dump(),
        )
    assert state is not None, "a run's stream begins with run_queued"
    return state.model_copy(update=_changes(state, event, envelope.time))


def _changes(state: RunState, event: Event, now: datetime) -> dict[str, object]:
    match event:
        case RunStarted():
            return {
                "status": "running",
                "worker_id": event.worker_id,
                "epoch": event.epoch,
                "attempts": state.attempts + (not event.same_attempt),
                "started_at": state.started_at or now,
                "streams": (),
            }
        case RunRetryScheduled():
            return {
                "status": "queued",
                "worker_id": None,
                "error": event.error,
                "waiting_since": event.not_before,
                "attempts": state.attempts - event.same_attempt,
                "streams": (),
            }
        case RunCancelRequested():
            return {"cancel_requested": True}
        case RunStreamsRecorded():
            return {"streams": (*state.streams, *event.streams)}
        case RunFinished():
            return {
                "status": event.outcome,
                "worker_id": None,
                "error": event.error,
                "streams": (*state.streams, *event.streams),
                "finished_at": now,
            }
        case _:
            raise ValueError(f"{event.TYPE} is not an event of a run")


def retry_allowed(state: RunState, *, retries_max: int) -> bool:
    """Whether a failed attempt may be retried; the first attempt is not a retry."""
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
