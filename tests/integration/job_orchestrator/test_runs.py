"""Runs as workers and people meet them: claimed, reported, ended, retried, taken over, cancelled, cleared."""

import asyncio
import io
import json
import re
import tarfile
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from libs.contracts.internal import CLAIM_WORK, ClaimedRun, ClaimWork, InternalCall, LogLine, StreamProgress, WorkClaim
from libs.contracts.runs import StreamResult
from libs.core.clock import ManualClock
from libs.core.envelope import Frozen
from libs.core.errors import Forbidden
from libs.process.telemetry import REGISTRY
from libs.testing.waiting import until
from libs.web.principals import PrincipalVerifier
from services.job_orchestrator.claims import LEASES
from services.job_orchestrator.measurements import Measurements
from services.job_orchestrator.run_records import LINES_PER_ATTEMPT_MAX
from tests.integration.job_orchestrator.orchestrator import (
    STREAMS,
    CatalogStandIn,
    Orchestrator,
    job_body,
    running_orchestrator,
    trusted_keys,
)

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
PROGRESS = StreamProgress(
    namespace="public", name="flights", state="running", rows_read=60, rows_written=50, bytes_read=600, rows_total=200
)
RESULT = StreamResult(
    namespace="public",
    name="flights",
    rows_read=200,
    rows_written=200,
    bytes_read=2000,
    seconds=1.5,
    verified=True,
    verification_json='{"rows":200}',
)


class ClaimBeforeKinds(Frozen):
    """What workers of the version before send."""

    worker_id: str


BEFORE_KINDS = InternalCall(CLAIM_WORK.service, CLAIM_WORK.path, ClaimBeforeKinds, WorkClaim, CLAIM_WORK.callers)


def lines(*messages: str) -> list[LogLine]:
    return [LogLine(time=NOON + timedelta(seconds=n), level="info", message=m) for n, m in enumerate(messages)]


async def synced(orchestrator: Orchestrator, name: str = "nightly") -> int:
    """A job whose run waits."""
    job_id = await orchestrator.create_job(name)
    assert (await orchestrator.post(f"/jobs/{job_id}/sync", {})).data["task_id"]
    return job_id


async def test_a_run_goes_from_the_call_to_its_counts(orchestrator: Orchestrator) -> None:
    job_id = await synced(orchestrator)
    [waiting] = await orchestrator.tasks(job_id)
    assert (waiting["status"], waiting["job_type"], waiting["runtime"]) == ("scheduled", "sync", 0)
    assert waiting["start_time"].endswith("Z")

    run = await orchestrator.claimed()
    assert (run.job_id, run.project_id, run.kind, run.cancel_requested) == (job_id, 123, "sync", False)
    assert json.loads(run.streams_config_json) == STREAMS
    assert await orchestrator.claim("w2") is None
    job = (await orchestrator.get(f"/jobs/{job_id}")).data
    assert (job["last_run_state"], job["last_run_type"]) == ("running", "sync")

    answer = await orchestrator.heartbeat(run, lines("begin"), streams=(PROGRESS,))
    assert answer.verdict == "continue"
    task = (await orchestrator.get(f"/jobs/{job_id}/tasks/{run.run_id}")).data
    assert (task["status"], task["progress"], task["attempts"], task["error"]) == ("running", 25, 1, None)
    assert task["streams"][0] == {
        "namespace": "public",
        "name": "flights",
        "state": "running",
        "rows_read": 60,
        "rows_written": 50,
        "bytes_read": 600,
        "rows_total": 200,
        "seconds": None,
        "verified": None,
        "verification": None,
        "error": None,
        "rows_skipped": 0,
        "rows_inserted": 0,
        "rows_updated": 0,
        "rows_deleted": 0,
        "values_changed": {},
        "columns_changed": [],
    }

    assert await orchestrator.finish(run, streams=(RESULT,), log_sequence=1, log_lines=lines("end")) == "recorded"
    task = (await orchestrator.get(f"/jobs/{job_id}/tasks/{run.run_id}")).data
    assert (task["status"], task["progress"], task["verified"]) == ("completed", 100, True)
    [listed] = await orchestrator.tasks(job_id)
    assert (listed["attempts"], listed["error"], listed["verified"]) == (1, None, True)
    assert task["streams"][0]["rows_written"] == 200
    assert task["streams"][0]["verification"] == {"rows": 200}
    job = (await orchestrator.get(f"/jobs/{job_id}")).data
    assert job["last_run_state"] == "completed"
    logs = (await orchestrator.get(f"/jobs/{job_id}/task/{run.run_id}/logs")).data["task_logs"]
    assert [line["message"] for line in logs] == ["begin", "end"]
    assert logs[0] == {"level": "info", "time": "2026-01-01T12:00:00.000Z", "message": "begin"}


@pytest.mark.parametrize(
    ("verdicts", "verified"),
    [((True, True), True), ((True, None), None), ((True, None, False), False), ((None,), None)],
)
async def test_a_run_is_verified_where_each_stream_is_and_not_where_one_differs(
    orchestrator: Orchestrator, verdicts: tuple[bool | None, ...], verified: bool | None
) -> None:
    await synced(orchestrator)
    run = await orchestrator.claimed()
    streams = tuple(RESULT.model_copy(update={"name": str(n), "verified": one}) for n, one in enumerate(verdicts))
    progress = [PROGRESS.model_copy(update={"name": str(n), "state": "failed"}) for n, _ in enumerate(verdicts)]
    outcome = "failed" if False in verdicts else "completed"
    await orchestrator.finish(run, outcome, streams=streams, progress=progress, error="both ends differ")
    task = (await orchestrator.get(f"/jobs/{run.job_id}/tasks/{run.run_id}")).data
    assert task["verified"] is verified
    states = [stream["state"] for stream in task["streams"]]
    assert states == ["failed" if one is False else "completed" for one in verdicts]


async def test_a_failed_run_is_not_verified_though_streams_of_it_were(orchestrator: Orchestrator) -> None:
    await synced(orchestrator)
    run = await orchestrator.claimed()
    await orchestrator.finish(run, "failed", streams=(RESULT,), error="public.b: it broke")
    task = (await orchestrator.get(f"/jobs/{run.job_id}/tasks/{run.run_id}")).data
    assert (task["status"], task["verified"], task["streams"][0]["verified"]) == ("failed", None, True)


async def test_the_log_of_a_permanent_failure_ends_with_why_it_is_not_tried_again(orchestrator: Orchestrator) -> None:
    await synced(orchestrator)
    run = await orchestrator.claimed()
    await orchestrator.finish(run, "failed", error="no such table", log_lines=lines("no such table"))
    logs = (await orchestrator.get(f"/jobs/{run.job_id}/task/{run.run_id}/logs")).data["task_logs"]
    assert (logs[-1]["level"], logs[-1]["message"]) == (
        "error",
        f"Failed in attempt 1 of {run.attempts_max}; a retry would fail as well, so the run is not retried",
    )


async def test_the_grant_names_the_run_and_its_ends_for_a_short_time(orchestrator: Orchestrator) -> None:
    await synced(orchestrator)
    run = await orchestrator.claimed()
    verifier = PrincipalVerifier("catalog", trusted_keys())
    granted = {"run_id": run.run_id, "project_id": 123, "source_id": 1, "destination_id": 2}
    assert verifier.verify_grant(run.grant, "job_orchestrator") == granted


async def test_a_worker_gets_the_kinds_of_work_that_it_names_and_runs_if_it_names_none(
    orchestrator: Orchestrator,
) -> None:
    """Workers of the version before send no kinds and read ``run`` from the answer."""
    await synced(orchestrator)
    other = ClaimWork(worker_id="w1", kinds=("preview",))
    assert (await orchestrator.as_worker(CLAIM_WORK, other)).run is None
    claim = await orchestrator.as_worker(BEFORE_KINDS, ClaimBeforeKinds(worker_id="w1"))
    assert (claim.kind, ClaimedRun.model_validate(claim.run).kind) == ("run", "sync")


async def test_progress_of_the_streams_that_changed_is_merged_and_a_new_attempt_starts_afresh(
    orchestrator: Orchestrator,
) -> None:
    job_id = await synced(orchestrator)
    run = await orchestrator.claimed()

    async def states() -> dict[str, str]:
        task = (await orchestrator.get(f"/jobs/{job_id}/tasks/{run.run_id}")).data
        return {stream["name"]: stream["state"] for stream in task["streams"]}

    a, b = (PROGRESS.model_copy(update={"name": name}) for name in "ab")
    await orchestrator.heartbeat(run, streams=(a, b))
    await orchestrator.heartbeat(run, streams=(b.model_copy(update={"state": "completed"}),))
    assert await states() == {"a": "running", "b": "completed"}
    await orchestrator.finish(run, "failed", given_back=True, progress=(a.model_copy(update={"state": "failed"}),))
    assert await states() == {"a": "failed", "b": "completed"}
    await orchestrator.heartbeat(await orchestrator.claimed(), streams=(a,))
    assert await states() == {"a": "running"}


async def test_only_workers_may_claim(orchestrator: Orchestrator) -> None:
    with pytest.raises(Forbidden):
        await orchestrator.catalog_client.call(CLAIM_WORK, ClaimWork(worker_id="catalog"))


async def test_a_second_sync_is_refused_while_the_first_is_active(orchestrator: Orchestrator) -> None:
    job_id = await synced(orchestrator)
    for path in ("sync", "clear-destination"):
        assert (await orchestrator.post(f"/jobs/{job_id}/{path}")).status == 409, path
    run = await orchestrator.claimed()
    assert (await orchestrator.post(f"/jobs/{job_id}/sync")).status == 409
    await orchestrator.finish(run)
    assert (await orchestrator.post(f"/jobs/{job_id}/sync")).status == 200
    assert len(await orchestrator.tasks(job_id)) == 2


async def test_of_many_syncs_at_once_one_starts(orchestrator: Orchestrator) -> None:
    job_id = await orchestrator.create_job()
    answers = await asyncio.gather(*(orchestrator.post(f"/jobs/{job_id}/sync") for _ in range(20)))
    assert sorted(answer.status for answer in answers) == [200] + [409] * 19
    assert len(await orchestrator.tasks(job_id)) == 1


async def test_runs_are_handed_out_oldest_first_and_each_to_one_worker(orchestrator: Orchestrator) -> None:
    jobs = [await synced(orchestrator, name) for name in "abcdef"]
    first = await orchestrator.claimed()
    assert first.job_id == jobs[0]
    claims = await asyncio.gather(*(orchestrator.claim(f"w{n}") for n in range(8)))
    handed = sorted(run.job_id for run in claims if run is not None)
    while (run := await orchestrator.claim()) is not None:
        handed.append(run.job_id)
    assert sorted(handed) == jobs[1:]


async def test_a_silent_workers_run_is_taken_over_and_the_worker_is_fenced(
    impatient_orchestrator: Orchestrator,
) -> None:
    orchestrator = impatient_orchestrator
    job_id = await synced(orchestrator)
    lost = await orchestrator.claimed("w1")
    taken = []

    async def handed_out() -> bool:
        taken.extend([run for run in [await orchestrator.claim("w2")] if run is not None])
        return bool(taken)

    await until(handed_out)
    assert taken[0].run_id == lost.run_id
    assert taken[0].epoch > lost.epoch
    assert (await orchestrator.heartbeat(lost, lines("ghost"))).verdict == "fenced"
    assert await orchestrator.finish(lost, log_lines=lines("ghost")) == "fenced"
    assert (await orchestrator.heartbeat(taken[0])).verdict == "continue"
    assert await orchestrator.finish(taken[0]) == "recorded"
    logs = (await orchestrator.get(f"/jobs/{job_id}/task/{lost.run_id}/logs")).data["task_logs"]
    assert [line["message"] for line in logs] == [
        "The worker w1 was lost: it stopped reporting, and its lease expired; the worker w2 continues the run"
    ]


async def test_a_worker_that_reports_keeps_its_run_past_the_lease(
    mongod: str, database_prefix: str, catalog: tuple[CatalogStandIn, str]
) -> None:
    async with running_orchestrator(mongod, database_prefix, catalog[1], run_lease_seconds=1.5) as orchestrator:
        await synced(orchestrator)
        run = await orchestrator.claimed()
        leases = orchestrator.context.documents.plain(LEASES)
        first = await leases.find_one({"_id": run.job_id})
        assert first is not None

        async def is_past_the_first_lease() -> bool:
            assert (await orchestrator.heartbeat(run)).verdict == "continue"
            assert await orchestrator.claim("w2") is None
            is_over = {"_id": run.job_id, "$expr": {"$lt": [first["expires_at"], "$$NOW"]}}
            return await leases.find_one(is_over) is not None

        await until(is_past_the_first_lease)


async def test_epochs_grow_over_all_runs_of_a_job(orchestrator: Orchestrator) -> None:
    job_id = await orchestrator.create_job()
    epochs = []
    for _ in range(3):
        await orchestrator.post(f"/jobs/{job_id}/sync")
        run = await orchestrator.claimed()
        epochs.append(run.epoch)
        await orchestrator.finish(run, "failed", error="no")
    assert epochs == sorted(set(epochs))


async def test_epochs_of_a_new_installation_are_not_below_those_of_the_one_before(
    mongod: str, database_prefix: str, catalog: tuple[CatalogStandIn, str]
) -> None:
    """A destination outlives the store that its epochs came from, and refuses lower ones."""
    epochs = []
    for installation in ("lost", "new"):
        async with running_orchestrator(mongod, f"{database_prefix}{installation}_", catalog[1]) as orchestrator:
            await synced(orchestrator)
            epochs.append((await orchestrator.claimed()).epoch)
    lost, new = epochs
    assert new >= lost > 1


async def test_the_same_end_reported_twice_is_recorded_once(orchestrator: Orchestrator) -> None:
    job_id = await synced(orchestrator)
    run = await orchestrator.claimed()
    for _ in range(2):
        assert await orchestrator.finish(run, log_lines=lines("a", "b")) == "recorded"
    assert await orchestrator.finish(run, "failed", error="x") == "fenced"
    logs = (await orchestrator.get(f"/jobs/{job_id}/task/{run.run_id}/logs")).data["task_logs"]
    assert len(logs) == 2


async def test_a_retryable_failure_is_tried_again_and_then_fails(
    mongod: str, database_prefix: str, catalog: tuple[CatalogStandIn, str]
) -> None:
    async with running_orchestrator(
        mongod, database_prefix, catalog[1], max_retries=2, retry_backoff_seconds=0.01
    ) as orchestrator:
        job_id = await synced(orchestrator)
        for attempt in (1, 2, 3):
            claimed: list[str] = []

            async def handed_out(claimed: list[str] = claimed) -> bool:
                run = await orchestrator.claim()
                if run is not None:
                    claimed.append(await orchestrator.finish(run, "failed", error="the network broke", retryable=True))
                return bool(claimed)

            await until(handed_out)
            assert claimed == ["recorded"]
            [waiting] = await orchestrator.tasks(job_id)
            assert waiting["status"] == ("scheduled" if attempt < 3 else "failed")
            assert (waiting["attempts"], waiting["error"], waiting["verified"]) == (attempt, "the network broke", None)
        [task] = await orchestrator.tasks(job_id)
        logs = (await orchestrator.get(f"/jobs/{job_id}/task/{task['id']}/logs")).data["task_logs"]
        first, second, last = [line["message"] for line in logs]
        assert re.fullmatch(r"Failed in attempt 1 of 3; retrying in [\d.]+ s", first)
        assert re.fullmatch(r"Failed in attempt 2 of 3; retrying in [\d.]+ s", second)
        assert last == "Failed in attempt 3 of 3; no attempt is left"
        detail = (await orchestrator.get(f"/jobs/{job_id}/tasks/{task['id']}")).data
        assert (detail["attempts"], detail["error"]) == (3, "the network broke")
        assert (await orchestrator.get(f"/jobs/{job_id}")).data["last_run_state"] == "failed"


async def test_a_retry_is_not_handed_out_before_its_time(
    mongod: str, database_prefix: str, catalog: tuple[CatalogStandIn, str]
) -> None:
    async with running_orchestrator(mongod, database_prefix, catalog[1], retry_backoff_seconds=3600) as orchestrator:
        job_id = await synced(orchestrator)
        run = await orchestrator.claimed()
        await orchestrator.finish(run, "failed", error="x", retryable=True)
        assert await orchestrator.claim() is None
        assert (await orchestrator.get(f"/jobs/{job_id}")).data["last_run_state"] == "scheduled"


async def test_a_failure_that_is_not_worth_a_retry_ends_the_run(orchestrator: Orchestrator) -> None:
    job_id = await synced(orchestrator)
    await orchestrator.finish(await orchestrator.claimed(), "failed", error="column type refused")
    [task] = await orchestrator.tasks(job_id)
    assert task["status"] == "failed"


async def test_a_run_that_keeps_losing_its_worker_fails(
    mongod: str, database_prefix: str, catalog: tuple[CatalogStandIn, str]
) -> None:
    async with running_orchestrator(
        mongod, database_prefix, catalog[1], max_retries=1, run_lease_seconds=0.5
    ) as orchestrator:
        job_id = await synced(orchestrator)
        await orchestrator.claimed("w1")

        async def failed() -> bool:
            await orchestrator.claim("w2")
            [task] = await orchestrator.tasks(job_id)
            return str(task["status"]) == "failed"

        await until(failed)
        detail = (await orchestrator.get(f"/jobs/{job_id}/tasks/{(await orchestrator.tasks(job_id))[0]['id']}")).data
        assert "stopped reporting" in detail["error"]
        assert detail["attempts"] == 2
        logs = (await orchestrator.get(f"/jobs/{job_id}/task/{detail['id']}/logs")).data["task_logs"]
        taken, given_up = [line["message"] for line in logs]
        assert taken.startswith("The worker w1 was lost")
        assert given_up.startswith("The worker w2 was lost")
        assert given_up.endswith("in attempt 2 of 2; no attempt is left")


async def test_workers_that_are_stopped_one_after_the_other_spend_no_attempt(orchestrator: Orchestrator) -> None:
    job_id = await synced(orchestrator)
    for number in range(6):
        run = await orchestrator.claimed(f"w{number}")
        assert (run.attempt, run.attempts_max) == (1, 4)
        given_back = await orchestrator.finish(run, "failed", error="stopped", retryable=True, given_back=True)
        assert given_back == "recorded"
        assert (await orchestrator.tasks(job_id))[0]["status"] == "scheduled"
    assert await orchestrator.finish(await orchestrator.claimed()) == "recorded"
    [task] = await orchestrator.tasks(job_id)
    assert (task["status"], task["attempts"], task["error"]) == ("completed", 1, None)


async def test_a_cancelled_run_that_was_given_back_ends_cancelled(orchestrator: Orchestrator) -> None:
    job_id = await synced(orchestrator)
    run = await orchestrator.claimed()
    await orchestrator.post(f"/jobs/{job_id}/cancel")
    await orchestrator.finish(run, "failed", error="stopped", retryable=True, given_back=True)
    assert (await orchestrator.tasks(job_id))[0]["status"] == "canceled"
    assert await orchestrator.claim() is None


async def test_a_worker_that_was_stopped_while_no_orchestrator_listened_spends_no_attempt(
    mongod: str, database_prefix: str, catalog: tuple[CatalogStandIn, str]
) -> None:
    async def restarted(claims: int) -> None:
        async with running_orchestrator(
            mongod, database_prefix, catalog[1], max_retries=0, run_lease_seconds=0.5
        ) as orchestrator:
            if claims == 0:
                await synced(orchestrator)
            found = []

            async def handed_out() -> bool:
                found.extend([run for run in [await orchestrator.claim(f"w{claims}")] if run is not None])
                return bool(found)

            await until(handed_out)
            assert found[0].attempt == 1

    for claims in range(3):
        await restarted(claims)


async def test_a_job_that_takes_over_hears_which_jobs_there_are(orchestrator: Orchestrator) -> None:
    deleted, other = await orchestrator.create_job("a"), await orchestrator.create_job("b")
    taking = await orchestrator.create_job("c", advanced_settings={"take_over": True})
    await orchestrator.request("DELETE", f"/jobs/{deleted}")
    for job_id in (other, taking):
        await orchestrator.post(f"/jobs/{job_id}/sync")
    first, second = await orchestrator.claimed(), await orchestrator.claimed()
    assert (first.job_id, first.living_job_ids) == (other, None)
    assert (second.job_id, set(second.living_job_ids or ())) == (taking, {other, taking})


async def test_a_waiting_run_is_cancelled_at_once(orchestrator: Orchestrator) -> None:
    job_id = await synced(orchestrator)
    answer = await orchestrator.get(f"/jobs/{job_id}/cancel")
    assert answer.data["message"] == answer.body["message"] == "job nightly: the run is cancelled"
    assert (await orchestrator.tasks(job_id))[0]["status"] == "canceled"
    assert await orchestrator.claim() is None
    assert (await orchestrator.post(f"/jobs/{job_id}/cancel")).status == 409


async def test_a_running_run_is_cancelled_through_its_worker(orchestrator: Orchestrator) -> None:
    job_id = await synced(orchestrator)
    run = await orchestrator.claimed()
    for _ in range(2):
        answer = await orchestrator.post(f"/jobs/{job_id}/cancel")
        assert answer.data["message"] == "job nightly: the run is being cancelled"
    assert (await orchestrator.heartbeat(run)).verdict == "cancel"
    assert await orchestrator.finish(run, "cancelled") == "recorded"
    assert (await orchestrator.tasks(job_id))[0]["status"] == "canceled"


async def test_a_cancelled_run_that_lost_its_worker_is_handed_out_to_be_ended(
    impatient_orchestrator: Orchestrator,
) -> None:
    orchestrator = impatient_orchestrator
    job_id = await synced(orchestrator)
    await orchestrator.claimed("w1")
    await orchestrator.post(f"/jobs/{job_id}/cancel")
    found = []

    async def handed_out() -> bool:
        found.extend([run for run in [await orchestrator.claim("w2")] if run is not None])
        return bool(found)

    await until(handed_out)
    assert found[0].cancel_requested


async def test_a_cancelled_run_is_not_retried(orchestrator: Orchestrator) -> None:
    job_id = await synced(orchestrator)
    run = await orchestrator.claimed()
    await orchestrator.post(f"/jobs/{job_id}/cancel")
    assert await orchestrator.finish(run, "failed", error="stopped", retryable=True) == "recorded"
    assert (await orchestrator.tasks(job_id))[0]["status"] == "canceled"


async def test_deleting_a_job_cancels_its_run(orchestrator: Orchestrator) -> None:
    waiting, running = await synced(orchestrator, "a"), await synced(orchestrator, "b")
    run = await orchestrator.claimed()
    assert run.job_id == waiting
    for job_id in (waiting, running):
        assert (await orchestrator.request("DELETE", f"/jobs/{job_id}")).status == 200
    assert await orchestrator.claim() is None
    assert (await orchestrator.heartbeat(run)).verdict == "cancel"
    assert await orchestrator.finish(run, "cancelled") == "recorded"


async def test_clearing_is_a_run_of_its_own_kind(orchestrator: Orchestrator) -> None:
    job_id = await orchestrator.create_job()
    assert (await orchestrator.get(f"/jobs/{job_id}/clear-destination")).data == {"running": False}
    assert (await orchestrator.post(f"/jobs/{job_id}/clear-destination")).data["message"]
    assert (await orchestrator.get(f"/jobs/{job_id}/clear-destination")).data == {"running": True}
    assert (await orchestrator.put(f"/jobs/{job_id}", job_body("other"))).status == 409
    run = await orchestrator.claimed()
    assert (run.kind, json.loads(run.streams_config_json)) == ("clear", STREAMS)
    await orchestrator.finish(run)
    [task] = await orchestrator.tasks(job_id)
    assert (task["job_type"], task["status"]) == ("clear", "completed")
    assert (await orchestrator.get(f"/jobs/{job_id}/clear-destination")).data == {"running": False}


async def test_changed_streams_are_cleared_after_the_running_sync_was_cancelled(orchestrator: Orchestrator) -> None:
    job_id = await synced(orchestrator)
    run = await orchestrator.claimed()
    clear = {"selected_streams": {"public": [{"stream_name": "flights"}]}, "streams": []}
    body = job_body(difference_streams=json.dumps(clear))
    assert (await orchestrator.put(f"/jobs/{job_id}", body)).status == 200
    assert (await orchestrator.heartbeat(run)).verdict == "cancel"
    await orchestrator.finish(run, "cancelled")

    async def clearing() -> bool:
        return len(await orchestrator.tasks(job_id)) == 2

    await until(clearing)
    assert (await orchestrator.post(f"/jobs/{job_id}/sync")).status == 409
    clearing_run = await orchestrator.claimed()
    assert (clearing_run.kind, json.loads(clearing_run.streams_config_json)) == ("clear", clear)
    await orchestrator.finish(clearing_run)
    assert (await orchestrator.post(f"/jobs/{job_id}/sync")).status == 200


async def test_no_difference_clears_nothing(orchestrator: Orchestrator) -> None:
    job_id = await synced(orchestrator)
    nothings: list[Any] = ["{}", "", None, {}, {"selected_streams": {"public": []}}]
    for nothing in nothings:
        assert (await orchestrator.put(f"/jobs/{job_id}", job_body(difference_streams=nothing))).status == 200
    assert (await orchestrator.get(f"/jobs/{job_id}/clear-destination")).data == {"running": False}
    assert (await orchestrator.tasks(job_id))[0]["status"] == "scheduled"


async def test_logs_are_paged_in_both_directions(orchestrator: Orchestrator) -> None:
    job_id = await synced(orchestrator)
    run = await orchestrator.claimed()
    messages = [f"line {n}" for n in range(25)]
    for _ in range(2):
        await orchestrator.heartbeat(run, lines(*messages[:20]), log_sequence=0)
    await orchestrator.heartbeat(run, lines(*messages[15:]), log_sequence=15)
    [task] = await orchestrator.tasks(job_id)
    path, body = f"/jobs/{job_id}/tasks/any/logs", {"file_path": task["file_path"]}

    page = (await orchestrator.post(f"{path}?cursor=-1&limit=10&direction=older", body)).data
    newest_cursor = page["newer_cursor"]
    assert [line["message"] for line in page["logs"]] == messages[15:]
    assert (page["has_more_older"], page["has_more_newer"]) == (True, False)
    older = (await orchestrator.post(f"{path}?cursor={page['older_cursor']}&limit=10&direction=older", body)).data
    assert [line["message"] for line in older["logs"]] == messages[5:15]
    assert (older["has_more_older"], older["has_more_newer"]) == (True, True)
    oldest = (await orchestrator.post(f"{path}?cursor={older['older_cursor']}&limit=10&direction=older", body)).data
    assert [line["message"] for line in oldest["logs"]] == messages[:5]
    assert oldest["has_more_older"] is False
    newer = (await orchestrator.post(f"{path}?cursor={oldest['newer_cursor']}&limit=10&direction=newer", body)).data
    assert [line["message"] for line in newer["logs"]] == messages[5:15]
    assert (newer["has_more_older"], newer["has_more_newer"]) == (True, True)

    nothing = (await orchestrator.post(f"{path}?cursor={newest_cursor}&direction=newer", body)).data
    assert (nothing["logs"], nothing["newer_cursor"], nothing["has_more_newer"]) == ([], newest_cursor, False)
    await orchestrator.heartbeat(run, lines("more"), log_sequence=25)
    more = (await orchestrator.post(f"{path}?cursor={newest_cursor}&direction=newer", body)).data
    assert [line["message"] for line in more["logs"]] == ["more"]
    assert newest_cursor < 2**53


async def test_a_repeated_key_gives_the_same_run_and_the_same_cancellation(orchestrator: Orchestrator) -> None:
    job_id = await orchestrator.create_job()
    begun = [await orchestrator.post(f"/jobs/{job_id}/sync", {}, headers={"Idempotency-Key": "a"}) for _ in range(2)]
    assert begun[0].data["task_id"] == begun[1].data["task_id"]
    assert len(await orchestrator.tasks(job_id)) == 1
    ended = [await orchestrator.post(f"/jobs/{job_id}/cancel", headers={"Idempotency-Key": "b"}) for _ in range(2)]
    assert ended[0].data == ended[1].data == {"message": "job nightly: the run is cancelled"}


async def test_an_endless_log_keeps_its_beginning_and_its_last_lines(orchestrator: Orchestrator) -> None:
    job_id = await synced(orchestrator)
    run = await orchestrator.claimed()
    await orchestrator.heartbeat(run, lines("first"))
    await orchestrator.heartbeat(run, lines("too many"), log_sequence=LINES_PER_ATTEMPT_MAX)
    for _ in range(2):
        assert await orchestrator.finish(run, log_sequence=2**40, log_lines=lines("near", "the end")) == "recorded"
    logs = (await orchestrator.get(f"/jobs/{job_id}/task/{run.run_id}/logs")).data["task_logs"]
    assert [line["message"] for line in logs] == ["first", "near", "the end"]


async def test_a_restarted_orchestrator_lets_living_workers_report_first(
    mongod: str, database_prefix: str, catalog: tuple[CatalogStandIn, str]
) -> None:
    async with running_orchestrator(mongod, database_prefix, catalog[1], run_lease_seconds=1.5) as before:
        await synced(before)
        run = await before.claimed("w1")
        await before.context.documents.plain(LEASES).update_one({}, [{"$set": {"expires_at": "$$NOW"}}])
    clock = ManualClock()
    async with running_orchestrator(
        mongod, database_prefix, catalog[1], clock=clock, run_lease_seconds=1.5
    ) as restarted:
        assert await restarted.claim("w2") is None
        assert (await restarted.heartbeat(run)).verdict == "continue"
        clock.advance(2)
        assert await restarted.claim("w2") is None


async def test_an_empty_log_has_its_cursors(orchestrator: Orchestrator) -> None:
    job_id = await synced(orchestrator)
    [task] = await orchestrator.tasks(job_id)
    page = (await orchestrator.post(f"/jobs/{job_id}/tasks/any/logs?cursor=-1", {"file_path": task["file_path"]})).data
    assert page == {
        "logs": [],
        "older_cursor": 0,
        "newer_cursor": 0,
        "has_more_older": False,
        "has_more_newer": False,
    }


async def test_a_log_is_of_its_job_alone(orchestrator: Orchestrator) -> None:
    mine, other = await synced(orchestrator, "a"), await synced(orchestrator, "b")
    [task] = await orchestrator.tasks(other)
    body = {"file_path": task["file_path"]}
    assert (await orchestrator.post(f"/jobs/{mine}/tasks/any/logs", body)).status == 404
    forged = {"file_path": f"jobs/{mine}/runs/{task['id']}"}
    assert (await orchestrator.post(f"/jobs/{mine}/tasks/any/logs", forged)).status == 404
    assert (await orchestrator.get(f"/jobs/{mine}/tasks/{task['id']}")).status == 404
    assert (await orchestrator.get(f"/jobs/{mine}/logs/download?file_path={task['file_path']}")).status == 404


async def test_a_log_is_downloaded_whole_or_by_range(orchestrator: Orchestrator) -> None:
    job_id = await synced(orchestrator)
    run = await orchestrator.claimed()
    await orchestrator.finish(run, log_lines=lines("one", "two"))
    [task] = await orchestrator.tasks(job_id)
    path = f"/jobs/{job_id}/logs/download?file_path={task['file_path']}"
    whole = await orchestrator.get(path)
    content = whole.body["raw"]
    assert whole.status == 200
    assert whole.headers["Content-Disposition"].startswith("attachment")
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        [member] = archive.getmembers()
        extracted = archive.extractfile(member)
        assert extracted is not None
        assert extracted.read().decode().splitlines() == [
            "2026-01-01T12:00:00.000Z INFO    one",
            "2026-01-01T12:00:01.000Z INFO    two",
        ]
    first = await orchestrator.get(path, headers={"Range": "bytes=0-0"})
    rest = await orchestrator.get(path, headers={"Range": "bytes=1-"})
    assert (first.status, rest.status) == (206, 206)
    assert first.headers["Content-Range"] == f"bytes 0-0/{len(content)}"
    assert first.body["raw"] + rest.body["raw"] == content
    beyond = await orchestrator.get(path, headers={"Range": f"bytes={len(content)}-"})
    assert beyond.status == 416


async def test_what_waits_is_measured(orchestrator: Orchestrator) -> None:
    await synced(orchestrator, "a")
    await synced(orchestrator, "b")
    await orchestrator.claimed()
    await Measurements(orchestrator.context.documents, orchestrator.context.clock).measure()
    assert REGISTRY.get_sample_value("datasync_runs_waiting") == 1
    assert REGISTRY.get_sample_value("datasync_runs_active") == 2
    oldest_wait_seconds = REGISTRY.get_sample_value("datasync_runs_oldest_wait_seconds")
    assert oldest_wait_seconds is not None
    assert oldest_wait_seconds >= 0
