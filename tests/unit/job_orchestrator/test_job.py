"""What a job admits, and when it is due."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given as generated
from hypothesis import strategies as st

from libs.contracts.jobs import (
    JobActivated,
    JobCreated,
    JobDeactivated,
    JobDeleted,
    JobRunEnded,
    JobRunRequested,
    JobUpdated,
)
from libs.core.envelope import Event
from libs.core.errors import Conflict, FixRequest, NotFound
from libs.testing.given import MOMENT, envelope, given
from services.job_orchestrator.domain.job import (
    JOB,
    CreateJob,
    Definition,
    DeleteJob,
    EndRun,
    JobState,
    RequestRun,
    SetActivation,
    UpdateJob,
    tick_due,
)

DEFINITION = Definition(
    name="nightly",
    source_id=1,
    destination_id=2,
    frequency="*/15 * * * *",
    streams_config_json="{}",
)
CREATED = JobCreated(**DEFINITION.model_dump())
TICK = MOMENT + timedelta(minutes=15)


def requested(run_id: str = "r1", **changes: Any) -> JobRunRequested:
    return JobRunRequested(**{"run_id": run_id, "kind": "sync", "trigger": "manual"} | changes)


def manual(run_id: str = "r1", kind: Any = "sync") -> RequestRun:
    return RequestRun(run_id=run_id, kind=kind, trigger="manual")


def by_tick(tick: datetime | None, run_id: str = "r1") -> RequestRun:
    return RequestRun(run_id=run_id, kind="sync", trigger="schedule", scheduled_for=tick)


def fold(*events: tuple[datetime, Event]) -> JobState:
    """The state after events at their times."""
    state: JobState | None = None
    for time, event in events:
        state = JOB.evolve(state, envelope(event, stream="job-1", time=time))
    assert state is not None
    return state


def test_a_job_is_created_within_its_reservation() -> None:
    create = CreateJob(definition=DEFINITION, now=MOMENT, reserved_until=MOMENT + timedelta(seconds=30))
    created = given(JOB).when(create).then(CREATED)
    assert created.state is not None
    assert created.state.project_id == 123
    assert JOB.unique_keys(created.state) == ("123/nightly",)
    created.when(create).then_refused(Conflict, code="already_exists")


def test_a_reservation_that_ran_out_makes_no_job() -> None:
    create = CreateJob(definition=DEFINITION, now=MOMENT, reserved_until=MOMENT)
    given(JOB).when(create).then_refused(Conflict, code="reservation_expired")


@pytest.mark.parametrize(
    "command",
    [
        UpdateJob(definition=DEFINITION),
        SetActivation(activate=True),
        DeleteJob(active_run_id=None),
        manual(),
        EndRun(run_id="r1", outcome="completed"),
    ],
)
def test_a_job_that_never_was_is_not_found(command: Any) -> None:
    given(JOB).when(command).then_refused(NotFound)


def test_a_deleted_job_admits_nothing_and_frees_its_name() -> None:
    deleted = given(JOB, CREATED, JobDeleted())
    for command in (UpdateJob(definition=DEFINITION), SetActivation(activate=False), manual(), by_tick(TICK)):
        deleted.when(command).then_refused(NotFound)
    assert deleted.state is not None
    assert JOB.unique_keys(deleted.state) == ()
    assert deleted.state.next_tick is None


def test_only_a_change_is_an_event() -> None:
    job = given(JOB, CREATED)
    job.when(UpdateJob(definition=DEFINITION)).then()
    job.when(SetActivation(activate=True)).then()
    job.when(SetActivation(activate=False)).then(JobDeactivated())


def test_a_second_run_is_refused_while_one_is_active() -> None:
    running = given(JOB, CREATED).when(manual("r1")).then(requested("r1"))
    running.when(manual("r2")).then_refused(Conflict, code="run_active")
    running.when(by_tick(TICK, "r2")).then_refused(Conflict, code="run_active")
    ended = running.when(EndRun(run_id="r1", outcome="failed")).then(JobRunEnded(run_id="r1", outcome="failed"))
    ended.when(manual("r2")).then(requested("r2"))


def test_the_end_of_another_run_ends_nothing() -> None:
    given(JOB, CREATED, requested("r1")).when(EndRun(run_id="r0", outcome="completed")).then()


def test_a_paused_job_runs_by_hand_but_not_by_schedule() -> None:
    paused = given(JOB, CREATED, JobDeactivated())
    assert paused.state is not None
    assert paused.state.next_tick is None
    paused.when(by_tick(TICK)).then_refused(Conflict, code="paused")
    paused.when(manual()).then(requested())


def test_a_tick_counts_once() -> None:
    first = given(JOB, CREATED).when(by_tick(TICK)).then(requested(trigger="schedule", scheduled_for=TICK))
    ended = first.when(EndRun(run_id="r1", outcome="completed")).after
    ended.when(by_tick(TICK, "r2")).then_refused(Conflict, code="tick_done")
    ended.when(by_tick(TICK - timedelta(minutes=15), "r2")).then_refused(Conflict, code="tick_done")
    ended.when(by_tick(None, "r2")).then_refused(Conflict, code="tick_done")


def test_a_job_is_deleted_with_the_run_that_was_seen_active() -> None:
    running = given(JOB, CREATED, requested("r1"))
    running.when(DeleteJob(active_run_id=None)).then_refused(Conflict, code="run_changed")
    deleted = running.when(DeleteJob(active_run_id="r1")).then(JobDeleted(source_id=1, destination_id=2))
    deleted.when(EndRun(run_id="r1", outcome="cancelled")).then(JobRunEnded(run_id="r1", outcome="cancelled"))


def test_streams_to_clear_come_before_the_next_sync() -> None:
    update = UpdateJob(definition=DEFINITION, clear_streams_config_json='{"a":1}')
    wanted = given(JOB, CREATED).when(update).after
    assert wanted.state is not None
    assert wanted.state.is_clearing
    assert wanted.state.next_tick is None
    wanted.when(manual()).then_refused(Conflict, code="clear_waiting")
    wanted.when(update).then_refused(Conflict, code="clearing")
    clearing = wanted.when(manual("r1", "clear")).then(requested("r1", kind="clear"))
    assert clearing.state is not None
    assert clearing.state.is_clearing
    done = clearing.when(EndRun(run_id="r1", outcome="completed")).after
    assert done.state is not None
    assert not done.state.is_clearing
    done.when(manual("r2")).then(requested("r2"))


def test_missed_ticks_are_made_up_for_by_one_run() -> None:
    state = fold((MOMENT, CREATED))
    assert state.next_tick == TICK
    assert tick_due(state, TICK - timedelta(milliseconds=1)) is None
    assert tick_due(state, TICK) == TICK
    assert tick_due(state, MOMENT + timedelta(hours=3, minutes=20)) == MOMENT + timedelta(hours=3, minutes=15)


def test_ticks_that_pass_while_a_run_is_active_are_passed_over() -> None:
    state = fold(
        (MOMENT, CREATED),
        (TICK, requested(trigger="schedule", scheduled_for=TICK)),
        (TICK + timedelta(minutes=40), JobRunEnded(run_id="r1", outcome="completed")),
    )
    assert state.next_tick == TICK + timedelta(minutes=45)


def test_a_resumed_job_does_not_make_up_for_its_pause() -> None:
    resumed_at = MOMENT + timedelta(hours=5, minutes=1)
    state = fold((MOMENT, CREATED), (MOMENT, JobDeactivated()), (resumed_at, JobActivated()))
    assert state.next_tick == MOMENT + timedelta(hours=5, minutes=15)


def test_another_frequency_counts_from_its_change() -> None:
    hourly = DEFINITION.model_copy(update={"frequency": "0 * * * *"})
    changed_at = MOMENT + timedelta(minutes=50)
    assert fold((MOMENT, CREATED), (changed_at, JobUpdated(**hourly.model_dump()))).next_tick == datetime(
        2026, 1, 1, 1, tzinfo=UTC
    )
    renamed = DEFINITION.model_copy(update={"name": "other"})
    assert fold((MOMENT, CREATED), (changed_at, JobUpdated(**renamed.model_dump()))).next_tick == TICK


def test_a_manual_job_waits_for_no_tick() -> None:
    assert fold((MOMENT, CREATED.model_copy(update={"frequency": ""}))).next_tick is None


COMMANDS = st.one_of(
    st.builds(by_tick, st.integers(-2, 40).map(lambda n: MOMENT + timedelta(minutes=15 * n)), st.uuids().map(str)),
    st.builds(manual, st.uuids().map(str), st.sampled_from(["sync", "clear"])),
    st.builds(SetActivation, activate=st.booleans()),
    st.just("end the active run"),
    st.just("end another run"),
)


@generated(st.lists(st.tuples(COMMANDS, st.integers(0, 30)), max_size=60))
def test_any_interleaving_gives_one_active_run_and_each_tick_once(steps: list[tuple[Any, int]]) -> None:
    state, now = fold((MOMENT, CREATED)), MOMENT
    active: set[str] = set()
    ticks: list[datetime] = []
    for command, minutes in steps:
        now += timedelta(minutes=minutes)
        if command == "end the active run":
            command = EndRun(run_id=state.active_run_id or "none", outcome="completed")
        elif command == "end another run":
            command = EndRun(run_id="another", outcome="completed")
        try:
            events = JOB.decide(state, command)
        except FixRequest:
            continue
        for event in events:
            state = JOB.evolve(state, envelope(event, stream="job-1", time=now))
            match event:
                case JobRunRequested(run_id=run_id, scheduled_for=tick):
                    active.add(run_id)
                    ticks += [tick] if tick is not None else []
                case JobRunEnded(run_id=run_id):
                    active.remove(run_id)
        assert len(active) <= 1
        assert active == ({state.active_run_id} if state.active_run_id else set())
        assert state.next_tick is None or state.next_tick > state.scheduled_until
    assert ticks == sorted(set(ticks))
