"""A job: which streams go from a source to a destination, when, and which run of it is active.

The job's stream admits runs: at most one is active, and each tick of the schedule starts at most one.
"""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import assert_never

from libs.contracts.jobs import (
    JobActivated,
    JobCreated,
    JobDeactivated,
    JobDefined,
    JobDeleted,
    JobEvent,
    JobRunEnded,
    JobRunRequested,
    JobStreamsReset,
    JobUpdated,
    RunKind,
    RunOutcome,
    RunTrigger,
    StreamNamed,
)
from libs.core.decider import Aggregate
from libs.core.envelope import Envelope, Frozen
from libs.core.errors import Conflict, NotFound
from libs.core.schedule import latest_tick, next_tick

CLOCKS_DIFFER_MAX = timedelta(minutes=1)
TICK_LATE_MAX = timedelta(minutes=1)


class Definition(Frozen):
    """What a job does; the fields of ``JobCreated`` and ``JobUpdated``."""

    name: str
    source_id: int
    destination_id: int
    frequency: str
    streams_config_json: str
    advanced_settings_json: str = "null"
    activate: bool = True


class LastRun(Frozen):
    """The newest run; ``outcome`` is None while it is active."""

    run_id: str
    kind: RunKind
    requested_at: datetime
    ended_at: datetime | None = None
    outcome: RunOutcome | None = None


class JobState(Frozen):
    """A job's current state.

    Args:
        active_run_id: the run that is queued or running.
        clear_wanted_json: the catalog of streams that have to be cleared before the next sync, after a change.
        scheduled_until: ticks up to here have started a run, or were skipped because the job could not run.
        last_scheduled_for: the last tick that started a run.
        next_tick: the next tick, None while the job does not wait for one.
        resets: the streams of which the next run reads all rows again.
    """

    project_id: int
    definition: Definition
    created_at: datetime
    created_by: str
    updated_at: datetime
    updated_by: str
    scheduled_until: datetime
    deleted: bool = False
    active_run_id: str | None = None
    clear_wanted_json: str | None = None
    last_scheduled_for: datetime | None = None
    last_run: LastRun | None = None
    next_tick: datetime | None = None
    resets: tuple[StreamNamed, ...] = ()

    @property
    def is_clearing(self) -> bool:
        """Whether streams of the job are being cleared, or will be."""
        active_kind = self.last_run.kind if self.active_run_id is not None and self.last_run is not None else None
        return self.clear_wanted_json is not None or active_kind == "clear"


class CreateJob(Frozen):
    """``reserved_until``: when the reservation of the endpoints expires."""

    definition: Definition
    now: datetime
    reserved_until: datetime


class UpdateJob(Frozen):
    """``clear_streams_config_json``: the catalog of streams to clear before the next sync, None for none."""

    definition: Definition
    clear_streams_config_json: str | None = None


class SetActivation(Frozen):
    activate: bool


class DeleteJob(Frozen):
    """``active_run_id``: the run that is cancelled with it; refused if another one is active."""

    active_run_id: str | None


class RequestRun(Frozen):
    """``scheduled_for``, ``now``: the tick and the current time, for scheduled runs only."""

    run_id: str
    kind: RunKind
    trigger: RunTrigger
    scheduled_for: datetime | None = None
    now: datetime | None = None


class EndRun(Frozen):
    """``moved``: the streams that the run has moved."""

    run_id: str
    outcome: RunOutcome
    moved: tuple[StreamNamed, ...] = ()


class ResetStreams(Frozen):
    """Read all rows of these streams again; refused while a run is active, which may have read the state already."""

    streams: tuple[StreamNamed, ...]


JobCommand = CreateJob | UpdateJob | SetActivation | DeleteJob | RequestRun | EndRun | ResetStreams


def decide(state: JobState | None, command: JobCommand) -> Sequence[JobEvent]:
    """Raises ``NotFound`` if the job does not exist, ``Conflict`` if its state does not allow the command."""
    if isinstance(command, CreateJob):
        return _create(state, command)
    if state is None:
        raise NotFound("there is no such job")
    if isinstance(command, EndRun):
        # The last run of a deleted job may still end.
        done = tuple(stream for stream in state.resets if stream in command.moved)
        ended = JobRunEnded(run_id=command.run_id, outcome=command.outcome, streams_reset=done)
        return [ended] if state.active_run_id == command.run_id else []
    if state.deleted:
        raise NotFound("there is no such job")
    match command:
        case UpdateJob():
            return _update(state, command)
        case SetActivation(activate=activate):
            if activate == state.definition.activate:
                return []
            return [JobActivated() if activate else JobDeactivated()]
        case DeleteJob(active_run_id=run_id):
            if run_id != state.active_run_id:
                raise Conflict("a run of the job has started or ended in the meantime", code="run_changed")
            used = state.definition
            return [JobDeleted(source_id=used.source_id, destination_id=used.destination_id)]
        case RequestRun():
            return _request_run(state, command)
        case ResetStreams(streams=streams):
            if state.active_run_id is not None:
                raise Conflict("the job has an active run; wait for its end or cancel it", code="run_active")
            new = tuple(stream for stream in streams if stream not in state.resets)
            return [JobStreamsReset(streams=new)] if new else []
        case _:
            assert_never(command)


def _create(state: JobState | None, command: CreateJob) -> Sequence[JobEvent]:
    if state is not None:
        raise Conflict("the job exists already", code="already_exists")
    if command.now >= command.reserved_until:
        raise Conflict(
            "the reservation of source and destination has expired; send the request again", code="reservation_expired"
        )
    return [JobCreated(**command.definition.model_dump())]


def _update(state: JobState, command: UpdateJob) -> Sequence[JobEvent]:
    if state.is_clearing:
        raise Conflict("streams of the job are being cleared; change it when that has ended", code="clearing")
    before, after = state.definition, command.definition
    if after == before and command.clear_streams_config_json is None:
        return []
    return [
        JobUpdated(
            **after.model_dump(),
            clear_streams_config_json=command.clear_streams_config_json,
            previous_source_id=before.source_id if before.source_id != after.source_id else None,
            previous_destination_id=before.destination_id if before.destination_id != after.destination_id else None,
        )
    ]


def _request_run(state: JobState, command: RequestRun) -> Sequence[JobEvent]:
    if state.active_run_id is not None:
        raise Conflict("the job has an active run; wait for its end or cancel it", code="run_active")
    if command.kind == "sync" and state.clear_wanted_json is not None:
        raise Conflict("streams of the job have to be cleared first", code="clear_waiting")
    if command.trigger == "schedule":
        _check_tick(state, command.scheduled_for, command.now)
    return [JobRunRequested(**command.model_dump(exclude={"now"}))]


def _check_tick(state: JobState, tick: datetime | None, now: datetime | None) -> None:
    if not state.definition.activate:
        raise Conflict("the job is paused", code="paused")
    if tick is None or not _is_new(state, tick, now):
        raise Conflict("the tick has already started a run or was skipped", code="tick_done")


def evolve(state: JobState | None, envelope: Envelope) -> JobState:
    """Apply one event, and determine the tick that the scheduler waits for."""
    changed = _fold(state, envelope)
    return changed.model_copy(update={"next_tick": _next_tick(changed)})


def _fold(state: JobState | None, envelope: Envelope) -> JobState:
    now, actor, event = envelope.time, envelope.metadata.actor, envelope.data
    if isinstance(event, JobCreated):
        return JobState(
            project_id=envelope.metadata.project_id or 0,
            definition=_definition(event),
            created_at=now,
            created_by=actor,
            updated_at=now,
            updated_by=actor,
            scheduled_until=now,
        )
    assert state is not None, "a job's stream begins with job_created"
    touched = {"updated_at": now, "updated_by": actor}
    match event:
        case JobUpdated():
            changes = _updated(state, event, now)
        case JobActivated():
            definition = state.definition.model_copy(update={"activate": True})
            changes = {**touched, "definition": definition, "scheduled_until": max(state.scheduled_until, now)}
        case JobDeactivated():
            changes = {**touched, "definition": state.definition.model_copy(update={"activate": False})}
        case JobDeleted():
            changes = {**touched, "deleted": True, "clear_wanted_json": None}
        case JobStreamsReset():
            changes = {"resets": (*state.resets, *event.streams)}
        case JobRunRequested():
            changes = _run_requested(state, event, now)
        case JobRunEnded():
            changes = _run_ended(state, event, now)
        case _:
            raise ValueError(f"{event.TYPE} is not an event of a job")
    if isinstance(event, JobUpdated):
        changes |= touched
    return state.model_copy(update=changes)


def _definition(event: JobDefined) -> Definition:
    return Definition(**{field: getattr(event, field) for field in Definition.model_fields})


def _updated(state: JobState, event: JobUpdated, now: datetime) -> dict[str, object]:
    definition, before = _definition(event), state.definition
    changes: dict[str, object] = {"definition": definition}
    if (definition.frequency, definition.activate) != (before.frequency, before.activate):
        changes["scheduled_until"] = max(state.scheduled_until, now)
    if event.clear_streams_config_json is not None:
        changes["clear_wanted_json"] = event.clear_streams_config_json
    return changes


def _run_requested(state: JobState, event: JobRunRequested, now: datetime) -> dict[str, object]:
    changes: dict[str, object] = {
        "active_run_id": event.run_id,
        "last_run": LastRun(run_id=event.run_id, kind=event.kind, requested_at=now),
    }
    if event.kind == "clear":
        changes["clear_wanted_json"] = None
    if event.scheduled_for is not None:
        changes |= {"last_scheduled_for": event.scheduled_for, "scheduled_until": event.scheduled_for}
    return changes


def _run_ended(state: JobState, event: JobRunEnded, now: datetime) -> dict[str, object]:
    last_run = state.last_run
    if last_run is not None:
        last_run = last_run.model_copy(update={"ended_at": now, "outcome": event.outcome})
    # Ticks during the run are skipped, like Temporal's overlap policy "skip".
    return {
        "active_run_id": None,
        "last_run": last_run,
        "scheduled_until": max(state.scheduled_until, now),
        "resets": tuple(stream for stream in state.resets if stream not in event.streams_reset),
    }


def _next_tick(state: JobState) -> datetime | None:
    waits = not state.deleted and state.active_run_id is None and state.clear_wanted_json is None
    if not (waits and state.definition.activate and state.definition.frequency):
        return None
    return next_tick(state.definition.frequency, state.scheduled_until)


def _is_new(state: JobState, tick: datetime, now: datetime | None) -> bool:
    """Whether a tick has neither started a run nor been skipped, apart from ticks before the clock was set back."""
    if now is None or not clock_was_set_back(state, now):
        return tick > state.scheduled_until
    last = state.last_scheduled_for
    return last is None or last > now or tick > last


def clock_was_set_back(state: JobState, now: datetime) -> bool:
    """Whether handled ticks are in the future by more than instances' clocks may differ."""
    return state.scheduled_until > now + CLOCKS_DIFFER_MAX


def tick_due(state: JobState, now: datetime) -> datetime | None:
    """The tick that is due, None for none. Of several missed ticks only the latest starts a run."""
    if state.next_tick is None:
        return None
    if clock_was_set_back(state, now):
        return _tick_of_this_minute(state, now)
    if state.next_tick > now:
        return None
    latest = latest_tick(state.definition.frequency, now)
    return max(latest, state.next_tick) if latest is not None else state.next_tick


def _tick_of_this_minute(state: JobState, now: datetime) -> datetime | None:
    """After the clock was set back only a tick of this minute is due, since older ones may have started runs before."""
    tick = latest_tick(state.definition.frequency, now)
    if tick is None or now - tick > TICK_LATE_MAX or not _is_new(state, tick, now):
        return None
    return tick


def unique_keys(state: JobState) -> Sequence[str]:
    return () if state.deleted else (f"{state.project_id}/{state.definition.name}",)


JOB = Aggregate(
    name="job",
    collection="jobs",
    state=JobState,
    decide=decide,
    evolve=evolve,
    unique_keys=unique_keys,
    id_type=int,
    conflict_message="a job of this name exists in the project",
)
