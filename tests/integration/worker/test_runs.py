"""Runs from claim to end: the worker with the real orchestrator, the real catalog, and a real PostgreSQL."""

import asyncio
import re

import pytest
import structlog

from libs.connectors.protocol import StreamName, StreamPlan, Target, Written
from libs.contracts.internal import FINISH_WORK, HEARTBEAT, RESOLVE_ENDPOINTS
from libs.core.clock import SystemClock
from libs.core.json import JsonObject
from libs.testing.waiting import until
from services.worker.attempt import Attempt
from services.worker.report import StreamReport
from services.worker.run import SUCCEEDED
from tests.integration.connectors.moving import Lake, Server
from tests.integration.worker.installation import Installation, with_streams_config

THREE = """
CREATE TABLE a AS SELECT n AS id FROM generate_series(1, 100) n;
CREATE TABLE b (id int PRIMARY KEY, note text); INSERT INTO b SELECT n, 'x' FROM generate_series(1, 50) n;
CREATE TABLE c (id int);
"""
SLOW = "CREATE VIEW slow AS SELECT 1 AS id, pg_sleep(60)::text AS nap"
STALLING = """
CREATE VIEW slow AS SELECT n AS id, repeat('x', 10000) AS note, CASE WHEN n > 50 THEN pg_sleep(60)::text END AS nap
FROM generate_series(1, 60) n
"""
BAD = """
CREATE VIEW ab AS SELECT 1 / (n - 1) AS id FROM generate_series(1, 3) n;
CREATE TABLE ba (id int); INSERT INTO ba VALUES (1);
"""


def catalog(*names: str) -> list[JsonObject]:
    return [{"stream": {"name": name, "namespace": "public"}} for name in names]


def selecting(*names: str) -> dict[str, list[JsonObject]]:
    return {"public": [{"stream_name": name} for name in names]}


async def test_a_run_moves_every_stream_and_reports_it(
    installation: Installation, source: Server, destination: Server
) -> None:
    await source.execute(THREE)
    job = await installation.job(source.config, destination)
    assert await job.execute() == "completed"
    task = await job.task()
    assert (task.status, task.error) == ("completed", "")
    assert [
        (name, item["rows_read"], item["rows_written"], item["verified"]) for name, item in task.streams.items()
    ] == [("a", 100, 100, True), ("b", 50, 50, True), ("c", 0, 0, True)]
    for item in task.streams.values():
        assert item["verification"]["source"] == item["verification"]["destination"]
    assert set(task.states.values()) == {"completed"}
    assert task.messages[-1] == SUCCEEDED == "Sync completed, wait 5 seconds cleanup in progress..."
    assert await destination.tables() == ["public.a", "public.b", "public.c"]
    assert not any(source.config["password"] in message for message in task.messages)


async def test_only_selected_streams_and_columns_move(installation: Installation, source: Server, lake: Lake) -> None:
    await source.execute(THREE)
    stream = {"name": "b", "namespace": "public", "sync_mode": "full_refresh", "destination_database": "demo:public"}
    config = {
        "selected_streams": {"public": [{"stream_name": "b", "selected_columns": {"columns": ["note"]}}]},
        "streams": [{"stream": stream}, *catalog("a")],
    }
    job = await installation.job(source.config, {"type": "PARQUET", "writer": {"local_path": str(lake.path)}}, config)
    assert await job.execute() == "completed"
    assert lake.rows("demo_public/b") == [{"note": "x"}] * 50
    assert lake.files("public/a") == []


async def test_values_changed_by_a_policy_are_counted_in_the_result_and_the_log(
    installation: Installation, source: Server, lake: Lake
) -> None:
    await source.execute("CREATE TABLE t AS SELECT 1 AS id, unnest('{infinity,2024-01-01,-infinity}'::date[]) AS born")
    selected = {"public": [{"stream_name": "t", "value_policies": {"born": "null"}}]}
    job = await installation.job(source.config, lake, {"selected_streams": selected, "streams": catalog("t")})
    assert await job.execute() == "completed"
    task = await job.task()
    assert (task.streams["t"]["verified"], task.streams["t"]["values_changed"]) == (True, {"born": 2})
    (line,) = [message for message in task.messages if " rows in " in message]
    assert line.endswith(", source and destination are equal except for 2 values that a policy changed (born: 2)")


async def test_a_difference_is_in_the_failed_runs_result_and_log(
    final_installation: Installation, source: Server, lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    await source.execute("CREATE TABLE t (id int PRIMARY KEY, born date); INSERT INTO t VALUES (7, '2024-01-01')")
    job = await final_installation.job(source.config, lake)
    monkeypatch.setattr("libs.connectors.postgres.binary._EPOCH_DAYS", 10_958)
    with structlog.testing.capture_logs() as written:
        assert await job.execute() == "failed"
    task = await job.task()
    (ended,) = [line for line in written if line["event"] == "run_ended"]
    assert (ended["log_level"], ended["outcome"], ended["error"]) == ("warning", "failed", task.error)
    result = task.streams["t"]
    assert (result["verified"], result["rows_written"]) == (False, 0)
    assert result["verification"]["examples"] == {"missing": [], "extra": [], "different": [["7"]]}
    assert "different: (id = 7)" in task.error
    assert lake.files("public/t") == []


async def test_a_stream_that_cannot_be_compared_is_not_reported_as_equal(
    installation: Installation, source: Server, destination: Server
) -> None:
    await source.execute("CREATE VIEW v AS SELECT random() AS value")
    job = await installation.job(source.config, destination)
    assert await job.execute() == "completed"
    task = await job.task()
    assert task.streams["v"]["verified"] is None
    assert not any("equal" in message for message in task.messages)
    (warning,) = [message for message in task.messages if "source and destination cannot be compared" in message]
    assert "random()" in warning


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {"selected_streams": selecting("nope")},
            "the source has no table public.nope, or the role may not read it",
        ),
        (
            {"selected_streams": selecting("nope"), "streams": catalog("a")},
            "public.nope: streams_config.selected_streams.public[0].stream_name: is not one of",
        ),
        ({"streams": catalog("gone")}, "no table public.gone"),
        (
            {"streams": [{"stream": {"name": "a", "namespace": "public", "sync_mode": "cdc"}}]},
            "stream.sync_mode: cdc is not supported",
        ),
        ({"selected_streams": {"public": [{"stream_name": "a", "filter": "id >"}]}}, "public[0].filter: a value"),
        ({"selected_streams": {"public": [{"stream_name": "a", "chunk_column": "id"}]}}, "public[0].chunk_column: "),
        ({"selected_streams": {"public": [{"stream_name": "a", "disabled": True}]}}, "no stream is selected"),
        ({"selected_streams": []}, "streams_config.selected_streams"),
    ],
)
async def test_what_can_not_be_done_fails_without_a_retry_by_name(
    installation: Installation, source: Server, destination: Server, config: JsonObject, words: str
) -> None:
    """Most of these catalogs are refused when a job is created, but an earlier version may have accepted them."""
    await source.execute(THREE)
    job = await installation.job(source.config, destination)
    await job.begin()
    assert await job.execute(with_streams_config(await job.claim(), config)) == "failed"
    task = await job.task()
    assert task.status == "failed"
    assert words in task.error
    assert [line["level"] for line in task.log[-2:]] == ["error", "error"]
    assert await destination.tables() == []


@pytest.mark.parametrize("kind", ["postgres", "parquet"])
async def test_failing_streams_do_not_stop_the_others_and_the_run_fails_naming_each(
    installation: Installation, source: Server, destination: Server, lake: Lake, kind: str
) -> None:
    await source.execute(THREE + BAD)
    names = ("a", "ab", "b", "ba", "c", "gone")
    selected = selecting(*names)
    selected["public"][3]["chunk_column"] = "id"
    job = await installation.job(source.config, destination if kind == "postgres" else lake)
    await job.begin()
    config = {"selected_streams": selected, "streams": catalog(*names)}
    assert await job.execute(with_streams_config(await job.claim(), config)) == "failed"
    task = await job.task()
    ends = ("completed", "failed", "completed", "failed", "completed", "failed")
    assert task.states == dict(zip(names, ends, strict=True))
    assert [name for name, item in task.streams.items() if item["verified"]] == ["a", "b", "c"]
    assert task.error.startswith("3 failures in 6 streams: ")
    for words in (
        "public.ab",
        "division by zero",
        "public.ba: ",
        "choosing the chunk column is not supported",
        "public.gone",
    ):
        assert words in task.error
    assert task.status == "failed"
    assert {name for name, item in task.streams.items() if item["error"]} == {"ab", "ba", "gone"}
    assert len([line for line in task.log if line["level"] == "error"]) == 3 + len(["the attempt's last line"])


async def test_a_table_that_the_role_may_not_read_is_reported_like_one_that_does_not_exist(
    installation: Installation, source: Server, destination: Server
) -> None:
    await source.execute("CREATE TABLE a AS SELECT 1 AS id; CREATE TABLE closed (id int)")
    async with source.limited_role() as reader:
        await source.execute(f"GRANT SELECT ON a TO {reader['username']}")
        config = {"selected_streams": selecting("closed"), "streams": []}
        job = await installation.job(source.config | reader, destination, config)
        assert await job.execute() == "failed"
    assert (await job.task()).error == (
        "public.closed: the source has no table public.closed, or the role may not read it"
    )


async def test_streams_that_fail_for_the_same_reason_are_reported_together(
    installation: Installation, source: Server, destination: Server
) -> None:
    names = [f"t{n}" for n in range(12)]
    await source.execute(";".join(f"CREATE TABLE {name} AS SELECT 1 AS id" for name in names))
    await destination.execute(";".join(f"CREATE TABLE {name} (other int)" for name in names))
    job = await installation.job(source.config, destination)
    assert await job.execute() == "failed"
    error = (await job.task()).error
    assert error.startswith("12 failures in 12 streams: ")
    assert error.count("has no column") == 1
    assert error.endswith("and 6 more)")
    assert len(error) < 500


async def test_a_retry_moves_the_streams_that_are_missing(
    prompt_installation: Installation, source: Server, destination: Server
) -> None:
    await source.execute(THREE + BAD)
    await source.execute(SLOW.replace("slow", "aa_slow"))
    job = await prompt_installation.job(source.config, destination)
    assert await job.execute(stall_timeout_seconds=0.5) == "failed"
    failed = await job.task()
    assert failed.status == "scheduled"
    assert "public.aa_slow: nothing has moved for 0.5 s" in failed.error
    completed = [name for name, state in failed.states.items() if state == "completed"]
    assert completed == ["a", "b", "ba", "c"]
    await source.execute("DROP VIEW aa_slow; CREATE TABLE aa_slow AS SELECT 1 AS id; DROP VIEW ab")
    await source.execute("CREATE TABLE ab AS SELECT 1 AS id")
    again = await job.claim()
    assert await job.execute(again) == "completed"
    task = await job.task()
    assert any(f"started: attempt 2 of 4, epoch {again.epoch}" in message for message in task.messages)
    kept = {message.split(":")[0] for message in task.messages if "already committed" in message}
    assert kept == {f"public.{name}" for name in completed}


async def test_a_stream_whose_failure_ends_the_snapshot_does_not_stop_the_others(
    installation: Installation, source: Server, destination: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("libs.connectors.postgres.relations.LOCK_TIMEOUT_SECONDS", 0.1)
    await source.execute(THREE)
    job = await installation.job(source.config, destination, {"streams": catalog("a", "b", "c")})
    async with source.connection.transaction():
        await source.execute("LOCK TABLE b IN ACCESS EXCLUSIVE MODE")
        assert await job.execute() == "failed"
    task = await job.task()
    assert task.states == {"a": "completed", "b": "failed", "c": "completed"}
    assert "public.b" in task.error


async def test_a_role_that_sees_no_table_fails_the_run(
    installation: Installation, source: Server, destination: Server
) -> None:
    await source.execute("CREATE SCHEMA hidden; CREATE TABLE hidden.t AS SELECT 1 AS id")
    job = await installation.job(source.config | {"schemas": ["public"]}, destination)
    assert await job.execute() == "failed"
    task = await job.task()
    assert "the source shows no stream" in task.error
    assert "USAGE" in task.error
    assert task.status == "failed"


async def test_a_run_waits_for_a_catalog_that_is_starting(
    installation: Installation, source: Server, destination: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.worker.run.RESOLVE_PAUSE_SECONDS", 0.1)
    await source.execute(THREE)
    job = await installation.job(source.config, destination)
    job.line.lose(RESOLVE_ENDPOINTS, 3)
    assert await job.execute() == "completed"
    messages = (await job.task()).messages
    assert len([message for message in messages if "catalog can't be reached; retrying" in message]) == 3


async def test_a_catalog_that_stays_away_fails_the_attempt(
    installation: Installation, source: Server, destination: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.worker.run.RESOLVE_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr("services.worker.run.RESOLVE_SECONDS_MAX", 0.05)
    job = await installation.job(source.config, destination)
    job.line.lose(RESOLVE_ENDPOINTS)
    assert await job.execute() == "failed"
    assert (await job.task()).status == "scheduled"


async def test_a_deleted_jobs_table_is_taken_over_by_a_job_that_is_allowed_to(
    installation: Installation, source: Server, destination: Server
) -> None:
    await source.execute("CREATE TABLE t AS SELECT 1 AS id")
    former, plain, taking = [
        await installation.job(source.config, destination, take_over=take_over) for take_over in (False, False, True)
    ]
    assert await former.execute() == "completed"
    assert await taking.execute() == "failed"
    await former.orchestrator.request("DELETE", f"/jobs/{former.id}")
    assert await plain.execute() == "failed"
    for refused in (plain, taking):
        assert f"is written by job {former.id}" in (await refused.task()).error
    assert await taking.execute() == "completed"


async def test_a_run_outside_the_parquet_roots_is_refused_before_it_touches_anything(
    installation: Installation, source: Server, lake: Lake
) -> None:
    await source.execute(THREE)
    job = await installation.job(source.config, lake)
    assert await job.execute(parquet_roots=("/nowhere",)) == "failed"
    task = await job.task()
    assert f"local_path {lake.path} is not below" in task.error
    assert task.status == "failed"
    assert not lake.path.exists()


async def test_a_source_that_cannot_be_reached_is_retried(
    installation: Installation, source: Server, destination: Server
) -> None:
    job = await installation.job(source.config | {"host": "nowhere.invalid"}, destination)
    assert await job.execute() == "failed"
    assert (await job.task()).status == "scheduled"


@pytest.mark.parametrize(
    ("view", "words"), [(SLOW, "the source has sent nothing yet"), (STALLING, "the (source|destination) moved last")]
)
async def test_a_stream_that_stalls_fails_the_attempt_by_name(
    installation: Installation, source: Server, destination: Server, view: str, words: str
) -> None:
    await source.execute(view)
    job = await installation.job(source.config, destination)
    assert await job.execute(stall_timeout_seconds=0.5) == "failed"
    task = await job.task()
    assert re.search(rf"^public\.slow: nothing has moved for 0\.5 s; {words} ", task.error)
    assert task.status == "scheduled"
    assert await destination.tables() == []


async def test_a_cancelled_run_stops_and_does_not_change_the_destination(
    installation: Installation, source: Server, destination: Server
) -> None:
    await source.execute(SLOW)
    job = await installation.job(source.config, destination)
    executing = asyncio.create_task(job.execute())
    await job.logs("public.slow: reading")
    await job.begin("cancel")
    assert await executing == "cancelled"
    assert (await job.task()).status == "canceled"
    assert await destination.tables() == []


async def test_a_run_that_was_cancelled_before_it_was_claimed_moves_nothing(
    impatient_installation: Installation, source: Server, destination: Server
) -> None:
    await source.execute(THREE)
    job = await impatient_installation.job(source.config, destination)
    await job.begin()
    await job.claim("lost")
    await job.begin("cancel")
    run = await job.claim()
    assert run.cancel_requested
    assert await job.execute(run) == "cancelled"
    assert await destination.tables() == []


async def test_a_fenced_run_stops_and_leaves_the_run_to_the_next_worker(
    impatient_installation: Installation, source: Server, destination: Server
) -> None:
    await source.execute(SLOW)
    job = await impatient_installation.job(source.config, destination)
    executing = asyncio.create_task(job.execute())
    await job.logs("public.slow: reading")
    job.line.lose(HEARTBEAT)
    taken = await job.claim("worker-2")
    job.line.lose(HEARTBEAT, 0)
    assert await executing == "fenced"
    assert await job.orchestrator.finish(taken) == "recorded"


async def test_a_worker_that_was_suspended_past_its_lease_commits_nothing(
    impatient_installation: Installation, source: Server, destination: Server
) -> None:
    """Even if no heartbeat tells it: the destination rejects its epoch, and so does the report of the end."""
    await source.execute("CREATE TABLE t AS SELECT 1 AS id")
    job = await impatient_installation.job(source.config, destination)
    await job.begin()
    suspended = await job.claim()
    assert await job.execute(await job.claim("worker-2")) == "completed"
    job.line.lose(HEARTBEAT)
    assert await job.execute(suspended) == "fenced"


async def test_a_run_that_only_the_destination_fences_ends_as_failed(
    installation: Installation, source: Server, destination: Server
) -> None:
    """As after the orchestrator was restored from a backup: nobody else would end the run."""
    await source.execute("CREATE TABLE t AS SELECT 1 AS id")
    job = await installation.job(source.config, destination)
    assert await job.execute() == "completed"
    await destination.execute("UPDATE _datasync._datasync_state SET epoch = epoch + 1000000")
    await job.begin()
    run = await job.claim()
    assert await job.execute(run) == "failed"
    task = await job.task()
    assert task.status == "failed"
    assert f"job {job.id} may not write under epoch {run.epoch}" in task.error


async def test_a_run_that_was_given_back_continues_after_the_committed_streams(
    installation: Installation, source: Server, destination: Server
) -> None:
    await source.execute(THREE + SLOW.replace("slow", "z_slow"))
    job = await installation.job(source.config, destination)
    executing = asyncio.create_task(job.execute())
    await job.logs("public.z_slow: reading")
    executing.cancel()
    await asyncio.wait({executing})
    assert (await job.task()).status == "scheduled"
    first = await destination.value("SELECT 'a'::regclass::oid")
    await source.execute("DROP VIEW z_slow; CREATE TABLE z_slow AS SELECT 1 AS id, 'x' AS nap; DELETE FROM a")
    run = await job.claim()
    assert run.attempt == 1
    assert await job.execute(run) == "completed"
    task = await job.task()
    assert "public.a: 100 rows are already committed" in task.messages
    assert await destination.value("SELECT 'a'::regclass::oid") == first
    assert {name: item["rows_written"] for name, item in task.streams.items()} == {
        "a": 100,
        "b": 50,
        "c": 0,
        "z_slow": 1,
    }


async def test_progress_is_reported_while_a_stream_is_read(
    installation: Installation, source: Server, lake: Lake
) -> None:
    await source.execute(
        "CREATE TABLE big AS SELECT n AS id, pg_sleep(0)::text FROM generate_series(1, 200000) n; ANALYZE"
    )
    job = await installation.job(source.config, lake)
    assert await job.execute(heartbeat_seconds=0.01) == "completed"
    seen = [item for report in job.line.heartbeats for item in report.streams]
    assert any(item.state == "running" and item.rows_total == 200_000 for item in seen)
    assert (await job.task()).streams["big"]["bytes_read"] > 0


async def test_the_end_is_reported_until_it_is_recorded(
    installation: Installation, source: Server, destination: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.worker.attempt.FINISH_PAUSE_SECONDS", 0.01)
    await source.execute(THREE)
    job = await installation.job(source.config, destination)
    job.line.lose(FINISH_WORK, 3)
    assert await job.execute() == "completed"
    assert (await job.task()).status == "completed"


async def test_a_run_of_five_thousand_streams_is_reported_whole(
    installation: Installation, source: Server, destination: Server
) -> None:
    job = await installation.job(source.config, destination)
    await job.begin()
    run = await job.claim()
    names = [f"a table with quite a long name, as some generators like to make them {n}" for n in range(5_000)]
    attempt = Attempt(run, job.line, SystemClock(), 0.05)

    async def move_nothing() -> None:
        for number, name in enumerate(names):
            stream = StreamReport(StreamPlan(StreamName("public", name), Target("public", name)))
            stream.complete(number)
            attempt.report.streams.append(stream)
            attempt.report.results.append(stream.result(Written(number, verified=True), 0.5))

    assert await attempt.run(move_nothing) == "completed"
    task = await job.task()
    assert task.status == "completed"
    assert task.detail["verified"] is True
    assert {name: item["rows_written"] for name, item in task.streams.items()} == {
        name: number for number, name in enumerate(names)
    }
    assert set(task.states.values()) == {"completed"}
    assert {item["seconds"] for item in task.streams.values()} == {0.5}


async def test_a_clear_run_removes_the_tables(installation: Installation, source: Server, destination: Server) -> None:
    await source.execute(THREE)
    job = await installation.job(source.config, destination)
    await job.execute()
    await job.begin("clear-destination")
    assert await job.execute(await job.claim()) == "completed"
    assert await destination.tables() == []


async def test_waiting_runs_are_claimed_and_the_rest_given_back_at_shutdown(
    installation: Installation, source: Server, destination: Server
) -> None:
    await source.execute(THREE)
    jobs = [await installation.job(source.config, destination, {"streams": catalog(name)}) for name in "abc"]
    for job in jobs:
        await job.begin()
    claiming = asyncio.create_task(installation.claiming().run())

    async def all_completed() -> bool:
        return {(await job.task()).status for job in jobs} == {"completed"}

    await until(all_completed)
    await source.execute(SLOW)
    slow = await installation.job(source.config, destination, {"streams": catalog("slow")})
    await slow.begin()
    await slow.logs("public.slow: reading")
    claiming.cancel()
    await asyncio.wait({claiming}, timeout=10)
    task = await slow.task()
    assert (task.status, task.detail["attempts"]) == ("scheduled", 0)
    assert "The worker was stopped; the run will be continued" in task.messages
