"""The life of a run: claimed under growing epochs, ended once."""

from datetime import timedelta
from typing import Any

import pytest

from libs.contracts.runs import (
    RunCancelRequested,
    RunFinished,
    RunQueued,
    RunRetryScheduled,
    RunStarted,
    RunStreamsRecorded,
    StreamResult,
)
from libs.core.errors import Conflict, NotFound
from libs.testing.given import MOMENT, given
from services.job_orchestrator.domain.run import (
    RUN,
    CancelWaiting,
    FinishRun,
    QueueRun,
    RecordStreams,
    RequestCancel,
    ScheduleRetry,
    StartRun,
    retry_allowed,
)

QUEUED = RunQueued(job_id=7, kind="sync", trigger="manual")
STARTED = RunStarted(worker_id="w1", epoch=3)
STREAM = StreamResult(namespace="public", name="a", rows_read=2, rows_written=2, bytes_read=10, seconds=0.5)
LATER = MOMENT + timedelta(minutes=1)


def finish(epoch: int, outcome: Any = "completed", **more: Any) -> FinishRun:
    return FinishRun(epoch=epoch, outcome=outcome, **more)


def test_a_run_is_queued_claimed_and_finished() -> None:
    queued = given(RUN).when(QueueRun(job_id=7, kind="sync", trigger="manual")).then(QUEUED)
    running = queued.when(StartRun(worker_id="w1", epoch=3)).then(STARTED)
    done = running.when(finish(3, streams=(STREAM,))).then(RunFinished(epoch=3, outcome="completed", streams=(STREAM,)))
    assert done.state is not None
    assert (done.state.status, done.state.attempts, done.state.streams) == ("completed", 1, (STREAM,))


def test_a_takeover_needs_a_higher_epoch_and_fences_the_lower() -> None:
    running = given(RUN, QUEUED, STARTED)
    running.when(StartRun(worker_id="w2", epoch=3)).then_refused(Conflict, code="fenced")
    taken = running.when(StartRun(worker_id="w2", epoch=5)).then(RunStarted(worker_id="w2", epoch=5))
    taken.when(finish(3)).then_refused(Conflict, code="fenced")
    taken.when(ScheduleRetry(epoch=3, error="x", not_before=LATER)).then_refused(Conflict, code="fenced")
    assert taken.state is not None
    assert taken.state.attempts == 2


def test_a_run_ends_once() -> None:
    done = given(RUN, QUEUED, STARTED, RunFinished(epoch=3, outcome="completed"))
    done.when(finish(3)).then_refused(Conflict, code="fenced")
    done.when(StartRun(worker_id="w2", epoch=9)).then_refused(Conflict, code="run_changed")
    done.when(RequestCancel()).then_refused(Conflict, code="run_changed")
    done.when(CancelWaiting()).then_refused(Conflict, code="run_changed")


def test_a_retry_waits_and_remembers_why() -> None:
    waiting = given(RUN, QUEUED, STARTED).when(ScheduleRetry(epoch=3, error="lost it", not_before=LATER)).after
    assert waiting.state is not None
    assert (waiting.state.status, waiting.state.waiting_since, waiting.state.error) == ("queued", LATER, "lost it")
    waiting.when(finish(3)).then_refused(Conflict, code="fenced")
    waiting.when(StartRun(worker_id="w2", epoch=4)).then(RunStarted(worker_id="w2", epoch=4))


def test_results_ahead_of_the_end_are_recorded_once_and_add_up_with_those_of_the_end() -> None:
    more = STREAM.model_copy(update={"name": "b"})
    running = given(RUN, QUEUED, STARTED)
    running.when(RecordStreams(epoch=2, streams=(STREAM,))).then_refused(Conflict, code="fenced")
    recorded = running.when(RecordStreams(epoch=3, streams=(STREAM,))).then(
        RunStreamsRecorded(epoch=3, streams=(STREAM,))
    )
    recorded.when(RecordStreams(epoch=3, streams=(STREAM,))).then()
    done = recorded.when(finish(3, streams=(more,))).after
    assert done.state is not None
    assert done.state.streams == (STREAM, more)


def test_another_attempt_starts_without_the_results_of_the_one_before() -> None:
    recorded = given(RUN, QUEUED, STARTED, RunStreamsRecorded(epoch=3, streams=(STREAM,)))
    taken = recorded.when(StartRun(worker_id="w2", epoch=4)).after
    waiting = recorded.when(ScheduleRetry(epoch=3, error="x", not_before=LATER)).after
    assert taken.state is not None
    assert waiting.state is not None
    assert taken.state.streams == waiting.state.streams == ()


def test_a_waiting_run_is_cancelled_at_once() -> None:
    given(RUN, QUEUED).when(CancelWaiting()).then(RunFinished(epoch=0, outcome="cancelled"))
    given(RUN, QUEUED).when(RequestCancel()).then_refused(Conflict, code="run_changed")


def test_a_running_run_is_asked_to_stop_once() -> None:
    running = given(RUN, QUEUED, STARTED)
    running.when(CancelWaiting()).then_refused(Conflict, code="run_changed")
    asked = running.when(RequestCancel()).then(RunCancelRequested())
    asked.when(RequestCancel()).then()
    asked.when(ScheduleRetry(epoch=3, error="x", not_before=LATER)).then_refused(Conflict, code="run_changed")
    asked.when(finish(3, "cancelled")).then(RunFinished(epoch=3, outcome="cancelled"))


def test_an_error_is_cut_to_a_readable_length() -> None:
    done = given(RUN, QUEUED, STARTED).when(finish(3, "failed", error="x" * 10_000))
    assert done.state.error is not None
    assert len(done.state.error) == 4_000


@pytest.mark.parametrize("command", [StartRun(worker_id="w", epoch=1), finish(1), RequestCancel(), CancelWaiting()])
def test_a_run_that_never_was_is_not_found(command: Any) -> None:
    given(RUN).when(command).then_refused(NotFound)


def test_a_run_that_was_given_back_goes_on_with_its_attempt() -> None:
    given_back = ScheduleRetry(epoch=3, error="stopped", not_before=LATER, same_attempt=True)
    waiting = given(RUN, QUEUED, STARTED).when(given_back)
    waiting.then(RunRetryScheduled(epoch=3, error="stopped", not_before=LATER, same_attempt=True))
    again = waiting.after.when(StartRun(worker_id="w2", epoch=4)).then(RunStarted(worker_id="w2", epoch=4))
    assert again.state is not None
    assert again.state.attempts == 1


def test_a_run_whose_worker_could_not_report_goes_on_with_its_attempt() -> None:
    start = StartRun(worker_id="w2", epoch=4, same_attempt=True)
    again = given(RUN, QUEUED, STARTED).when(start).then(RunStarted(worker_id="w2", epoch=4, same_attempt=True))
    assert again.state is not None
    assert again.state.attempts == 1


def test_retries_are_counted_after_the_first_attempt() -> None:
    once = given(RUN, QUEUED, STARTED).state
    twice = given(RUN, QUEUED, STARTED, RunRetryScheduled(epoch=3, error="x", not_before=LATER), STARTED).state
    assert once is not None
    assert twice is not None
    assert retry_allowed(once, retries_max=1)
    assert not retry_allowed(once, retries_max=0)
    assert not retry_allowed(twice, retries_max=1)
    assert not retry_allowed(once.model_copy(update={"cancel_requested": True}), retries_max=1)
