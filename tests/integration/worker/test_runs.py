"""A claimed run: what it moves, what it reports, and when it stops."""

import asyncio
import json
import re
from typing import Any

import pytest
import structlog

from libs.contracts.internal import RUN_WORK, ClaimedRun
from libs.contracts.runs import RunQueued
from libs.core.clock import SystemClock
from libs.process.live import Live
from services.worker.claiming import Claiming, WorkKind
from services.worker.config import WorkerSettings
from services.worker.run import SUCCEEDED, RunExecutor
from tests.integration.connectors.moving import Lake, Server
from tests.integration.worker.orchestra import Orchestra

THREE = """
CREATE TABLE a AS SELECT n AS id FROM generate_series(1, 100) n;
CREATE TABLE b (id int PRIMARY KEY, note text); INSERT INTO b SELECT n, 'x' FROM generate_series(1, 50) n;
CREATE TABLE c (id int);
"""
SLOW = "CREATE VIEW slow AS SELECT 1 AS id, pg_sleep(60)::text AS nap"


def to_postgres(source: Server, destination: Server) -> Orchestra:
    return Orchestra(source.config, "postgres", destination.config)


async def test_a_run_moves_every_stream_and_reports_it(source: Server, destination: Server) -> None:
    await source.execute(THREE)
    orchestra = to_postgres(source, destination)
    assert await orchestra.execute() == "completed"
    (end,) = orchestra.finished
    assert (end.outcome, end.error) == ("completed", None)
    assert [(item.name, item.rows_read, item.rows_written, item.verified) for item in end.streams] == [
        ("a", 100, 100, True),
        ("b", 50, 50, True),
        ("c", 0, 0, True),
    ]
    for item in end.streams:
        verification = json.loads(item.verification_json or "{}")
        assert verification["source"] == verification["destination"]
    assert {item.state for item in end.progress} == {"completed"}
    assert orchestra.messages[-1] == SUCCEEDED == "Sync completed, wait 5 seconds cleanup in progress..."
    assert await destination.tables() == ["public.a", "public.b", "public.c"]
    assert not any(source.config["password"] in message for message in orchestra.messages)


async def test_only_selected_streams_and_columns_move(source: Server, lake: Lake) -> None:
    await source.execute(THREE)
    orchestra = Orchestra(source.config, "parquet", {"type": "PARQUET", "writer": {"local_path": str(lake.path)}})
    stream = {"name": "b", "namespace": "public", "sync_mode": "full_refresh", "destination_database": "demo:public"}
    config = {
        "selected_streams": {"public": [{"stream_name": "b", "selected_columns": {"columns": ["note"]}}]},
        "streams": [{"stream": stream}, {"stream": {"name": "a", "namespace": "public"}}],
    }
    run = orchestra.run(streams_config_json=json.dumps(config))
    assert await orchestra.execute(run) == "completed"
    assert lake.rows("demo_public/b") == [{"note": "x"}] * 50
    assert lake.files("public/a") == []


async def test_what_a_policy_changed_is_counted_in_the_result_and_the_log(source: Server, lake: Lake) -> None:
    await source.execute("CREATE TABLE t AS SELECT 1 AS id, unnest('{infinity,2024-01-01,-infinity}'::date[]) AS born")
    orchestra = Orchestra(source.config, "parquet", {"type": "PARQUET", "writer": {"local_path": str(lake.path)}})
    selected = {"stream_name": "t", "value_policies": {"born": "null"}}
    config = {
        "selected_streams": {"public": [selected]},
        "streams": [{"stream": {"name": "t", "namespace": "public"}}],
    }
    run = orchestra.run(streams_config_json=json.dumps(config))
    assert await orchestra.execute(run) == "completed"
    (result,) = orchestra.finished[0].streams
    assert (result.verified, [(item.column, item.values) for item in result.values_changed]) == (True, [("born", 2)])
    (line,) = [message for message in orchestra.messages if " rows in " in message]
    assert line.endswith(", source and destination are equal except for 2 values that a policy changed (born: 2)")


async def test_ends_that_differ_are_told_in_the_failed_runs_result_and_log(
    source: Server, lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    await source.execute("CREATE TABLE t (id int PRIMARY KEY, born date); INSERT INTO t VALUES (7, '2024-01-01')")
    orchestra = Orchestra(source.config, "parquet", {"type": "PARQUET", "writer": {"local_path": str(lake.path)}})
    monkeypatch.setattr("libs.connectors.postgres.binary._EPOCH_DAYS", 10_958)
    with structlog.testing.capture_logs() as written:
        assert await orchestra.execute() == "failed"
    (ended,) = [line for line in written if line["event"] == "run_ended"]
    assert (ended["log_level"], ended["outcome"]) == ("warning", "failed")
    assert ended["error"] == orchestra.finished[0].error
    (end,) = orchestra.finished
    (result,) = end.streams
    document = json.loads(result.verification_json or "{}")
    assert (result.verified, result.rows_written) == (False, 0)
    assert document["examples"] == {"missing": [], "extra": [], "different": [["7"]]}
    assert "different: (id = 7)" in (end.error or "")
    assert lake.files("public/t") == []


async def test_a_stream_that_can_not_be_compared_is_warned_of_and_not_called_equal(
    source: Server, destination: Server
) -> None:
    await source.execute("CREATE VIEW v AS SELECT random() AS value")
    orchestra = Orchestra(source.config, "postgres", destination.config)
    assert await orchestra.execute() == "completed"
    assert orchestra.finished[0].streams[0].verified is None
    assert not any("equal" in message for message in orchestra.messages)
    assert any(
        "source and destination cannot be compared" in message and "random()" in message
        for message in orchestra.messages
    )


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {"selected_streams": {"public": [{"stream_name": "nope"}]}},
            "the source has no table public.nope, or the role may not read it",
        ),
        (
            {
                "selected_streams": {"public": [{"stream_name": "nope"}]},
                "streams": [{"stream": {"name": "a", "namespace": "public"}}],
            },
            "public.nope: streams_config.selected_streams.public[0].stream_name: is not one of",
        ),
        ({"streams": [{"stream": {"name": "gone", "namespace": "public"}}]}, "no table public.gone"),
        (
            {"streams": [{"stream": {"name": "a", "namespace": "public", "sync_mode": "cdc"}}]},
            "stream.sync_mode: cdc is not supported",
        ),
        ({"selected_streams": {"public": [{"stream_name": "a", "filter": "id > 1"}]}}, "public[0].filter: a filter"),
        ({"selected_streams": {"public": [{"stream_name": "a", "append_mode": True}]}}, "public[0].append_mode: "),
        ({"selected_streams": {"public": [{"stream_name": "a", "disabled": True}]}}, "no stream is selected"),
        ({"selected_streams": []}, "streams_config.selected_streams"),
    ],
)
async def test_what_can_not_be_done_fails_once_and_for_all_by_name(
    source: Server, destination: Server, config: dict[str, Any], words: str
) -> None:
    await source.execute(THREE)
    orchestra = to_postgres(source, destination)
    assert await orchestra.execute(orchestra.run(streams_config_json=json.dumps(config))) == "failed"
    (end,) = orchestra.finished
    assert words in (end.error or "")
    assert end.retryable is False
    assert orchestra.log[max(orchestra.log)].level == "error"
    assert await destination.tables() == []


BAD = """
CREATE VIEW ab AS SELECT 1 / (n - 1) AS id FROM generate_series(1, 3) n;
CREATE TABLE ba (id int); INSERT INTO ba VALUES (1);
"""


@pytest.mark.parametrize("kind", ["postgres", "parquet"])
async def test_bad_streams_do_not_keep_the_others_from_being_moved_and_the_run_fails_naming_each(
    source: Server, destination: Server, lake: Lake, kind: str
) -> None:
    await source.execute(THREE + BAD)
    to: dict[str, Any] = destination.config if kind == "postgres" else {"local_path": str(lake.path)}
    orchestra = Orchestra(source.config, kind, to)
    selected = [{"stream_name": name} for name in ("a", "ab", "b", "ba", "c", "gone")]
    selected[3]["filter"] = "id > 1"
    names = ("a", "ab", "b", "ba", "c", "gone")
    streams = [{"stream": {"name": name, "namespace": "public"}} for name in names]
    config = json.dumps({"selected_streams": {"public": selected}, "streams": streams})
    assert await orchestra.execute(orchestra.run(streams_config_json=config)) == "failed"
    (end,) = orchestra.finished
    assert [item.name for item in end.streams] == ["a", "b", "c"]
    assert {item.name: item.state for item in end.progress} == dict(
        zip(names, ("completed", "failed", "completed", "failed", "completed", "failed"), strict=True)
    )
    assert (end.error or "").startswith("3 failures in 6 streams: ")
    for words in ("public.ab", "division by zero", "public.ba: ", "a filter is not supported", "public.gone"):
        assert words in (end.error or "")
    assert end.retryable is False
    assert {item.name for item in end.progress if item.error} == {"ab", "ba", "gone"}
    errors = [line.message for line in orchestra.log.values() if line.level == "error"]
    assert len(errors) == 3


async def test_a_table_that_the_role_may_not_read_is_told_as_one_that_may_not_be_there(
    source: Server, destination: Server
) -> None:
    await source.execute("CREATE TABLE a AS SELECT 1 AS id; CREATE TABLE closed (id int)")
    async with source.limited_role() as reader:
        await source.execute(f"GRANT SELECT ON a TO {reader['username']}")
        orchestra = to_postgres(source, destination)
        orchestra.source = source.config | reader
        config = json.dumps({"selected_streams": {"public": [{"stream_name": "closed"}]}, "streams": []})
        assert await orchestra.execute(orchestra.run(streams_config_json=config)) == "failed"
    assert orchestra.finished[0].error == (
        "public.closed: the source has no table public.closed, or the role may not read it"
    )


async def test_streams_that_fail_for_one_reason_are_told_of_once(source: Server, destination: Server) -> None:
    names = [f"t{n}" for n in range(12)]
    await source.execute(";".join(f"CREATE TABLE {name} AS SELECT 1 AS id" for name in names))
    await destination.execute(";".join(f"CREATE TABLE {name} (other int)" for name in names))
    orchestra = to_postgres(source, destination)
    assert await orchestra.execute() == "failed"
    error = orchestra.finished[0].error or ""
    assert error.startswith("12 failures in 12 streams: ")
    assert error.count("lacks the column") == 1
    assert error.endswith("and 6 more)")
    assert len(error) < 500


async def test_a_failed_stream_that_may_do_better_has_the_run_tried_again_for_what_is_missing(
    source: Server, destination: Server
) -> None:
    await source.execute(THREE + BAD)
    await source.execute(SLOW.replace("slow", "aa_slow"))
    orchestra = to_postgres(source, destination)
    async with asyncio.timeout(10):
        assert await orchestra.execute(stall_timeout_seconds=0.5) == "failed"
    (end,) = orchestra.finished
    assert [item.name for item in end.streams] == ["a", "b", "ba", "c"]
    assert "public.aa_slow: nothing has moved for 0.5 s" in (end.error or "")
    assert end.retryable is True
    await source.execute("DROP VIEW aa_slow; CREATE TABLE aa_slow AS SELECT 1 AS id; DROP VIEW ab")
    await source.execute("CREATE TABLE ab AS SELECT 1 AS id")
    again = to_postgres(source, destination)
    assert await again.execute(again.run(epoch=2, attempt=2, attempts_max=4)) == "completed"
    assert "started: attempt 2 of 4, epoch 2" in again.messages[0]
    in_place = {message.split(":")[0] for message in again.messages if "already committed" in message}
    assert in_place == {"public.a", "public.b", "public.ba", "public.c"}


async def test_a_stream_that_takes_the_snapshot_with_it_does_not_take_the_others(
    source: Server, destination: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("libs.connectors.postgres.source.LOCK_TIMEOUT_SECONDS", 0.1)
    await source.execute(THREE)
    async with source.connection.transaction():
        await source.execute("LOCK TABLE b IN ACCESS EXCLUSIVE MODE")
        orchestra = to_postgres(source, destination)
        config = {"streams": [{"stream": {"name": name, "namespace": "public"}} for name in ("a", "b", "c")]}
        assert await orchestra.execute(orchestra.run(streams_config_json=json.dumps(config))) == "failed"
    (end,) = orchestra.finished
    assert [item.name for item in end.streams] == ["a", "c"]
    assert "public.b" in (end.error or "")


async def test_a_role_that_sees_no_table_fails_the_run(source: Server, destination: Server) -> None:
    await source.execute("CREATE SCHEMA hidden; CREATE TABLE hidden.t AS SELECT 1 AS id")
    orchestra = to_postgres(source, destination)
    orchestra.source = source.config | {"schemas": ["public"]}
    assert await orchestra.execute() == "failed"
    (end,) = orchestra.finished
    assert "the source shows no stream" in (end.error or "")
    assert "USAGE" in (end.error or "")
    assert end.retryable is False


async def test_a_run_waits_for_a_catalog_that_is_starting(
    source: Server, destination: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.worker.run.RESOLVE_PAUSE_SECONDS", 0.1)
    await source.execute(THREE)
    orchestra = to_postgres(source, destination)
    orchestra.away = 3
    assert await orchestra.execute(heartbeat_seconds=0.02) == "completed"
    assert len([message for message in orchestra.messages if "catalog can't be reached; retrying" in message]) == 3


async def test_a_catalog_that_stays_away_fails_the_attempt(
    source: Server, destination: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.worker.run.RESOLVE_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr("services.worker.run.RESOLVE_SECONDS_MAX", 0.05)
    orchestra = to_postgres(source, destination)
    orchestra.away = 1_000
    assert await orchestra.execute() == "failed"
    assert orchestra.finished[0].retryable is True


async def test_a_deleted_jobs_table_is_taken_over_by_the_job_that_asks_for_it(
    source: Server, destination: Server
) -> None:
    await source.execute("CREATE TABLE t AS SELECT 1 AS id")
    former, asking = to_postgres(source, destination), to_postgres(source, destination)
    assert await former.execute() == "completed"
    new: dict[str, Any] = {"job_id": 8, "epoch": 2, "living_job_ids": (8,)}
    plain = asking.run("run-2", advanced_settings_json="{}", **new)
    assert await asking.execute(plain) == "failed"
    assert "is written by job 7" in (asking.finished[0].error or "")
    taking = asking.run("run-3", advanced_settings_json='{"take_over": true}', **new)
    assert await asking.execute(taking) == "completed"


async def test_a_run_outside_the_parquet_roots_is_refused_before_it_touches_anything(
    source: Server, lake: Lake
) -> None:
    await source.execute(THREE)
    orchestra = Orchestra(source.config, "parquet", {"local_path": str(lake.path)})
    assert await orchestra.execute(parquet_roots=("/nowhere",)) == "failed"
    (end,) = orchestra.finished
    assert f"local_path {lake.path} is not below" in (end.error or "")
    assert end.retryable is False
    assert not lake.path.exists()


async def test_a_source_that_is_away_is_tried_again_later(source: Server, destination: Server) -> None:
    orchestra = to_postgres(source, destination)
    orchestra.source = source.config | {"host": "nowhere.invalid"}
    assert await orchestra.execute() == "failed"
    assert orchestra.finished[0].retryable is True


STALLING = """
CREATE VIEW slow AS SELECT n AS id, repeat('x', 10000) AS note, CASE WHEN n > 50 THEN pg_sleep(60)::text END AS nap
FROM generate_series(1, 60) n
"""


@pytest.mark.parametrize(
    ("view", "words"), [(SLOW, "the source has sent nothing yet"), (STALLING, "the (source|destination) moved last")]
)
async def test_a_stream_that_stalls_fails_the_attempt_by_name(
    source: Server, destination: Server, view: str, words: str
) -> None:
    await source.execute(view)
    orchestra = to_postgres(source, destination)
    async with asyncio.timeout(10):
        assert await orchestra.execute(stall_timeout_seconds=0.5) == "failed"
    (end,) = orchestra.finished
    assert re.search(rf"^public\.slow: nothing has moved for 0\.5 s; {words} ", end.error or "")
    assert end.retryable is True
    assert await destination.tables() == []


async def test_a_cancelled_run_stops_at_once_and_leaves_the_destination(source: Server, destination: Server) -> None:
    await source.execute(SLOW)
    orchestra = to_postgres(source, destination)
    executing = asyncio.create_task(orchestra.execute())
    await _reading(orchestra)
    orchestra.verdict = "cancel"
    async with asyncio.timeout(10):
        assert await executing == "cancelled"
    assert orchestra.finished[0].outcome == "cancelled"
    assert await destination.tables() == []


async def test_a_run_that_was_cancelled_before_it_was_claimed_moves_nothing(
    source: Server, destination: Server
) -> None:
    orchestra = to_postgres(source, destination)
    assert await orchestra.execute(orchestra.run(cancel_requested=True)) == "cancelled"
    assert await destination.tables() == []


async def test_a_fenced_run_stops_and_reports_no_end(source: Server, destination: Server) -> None:
    await source.execute(SLOW)
    orchestra = to_postgres(source, destination)
    executing = asyncio.create_task(orchestra.execute())
    await _reading(orchestra)
    orchestra.verdict = "fenced"
    async with asyncio.timeout(10):
        assert await executing == "fenced"
    assert orchestra.finished == []


async def test_a_worker_that_wakes_up_too_late_commits_nothing(source: Server, destination: Server) -> None:
    """Its heartbeats may even be answered: the destination knows better, and the report of the end finds out."""
    await source.execute("CREATE TABLE t AS SELECT 1 AS id")
    late, taker = to_postgres(source, destination), to_postgres(source, destination)
    assert await taker.execute(taker.run(epoch=2)) == "completed"
    late.fences_the_end = True
    assert await late.execute(late.run(epoch=1)) == "fenced"


async def test_a_run_that_the_destination_alone_fences_ends_as_failed(source: Server, destination: Server) -> None:
    """As when the orchestrator was set back to an older state: nobody else would ever end the run."""
    await source.execute("CREATE TABLE t AS SELECT 1 AS id")
    younger, older = to_postgres(source, destination), to_postgres(source, destination)
    assert await younger.execute(younger.run(epoch=2)) == "completed"
    assert await older.execute(older.run(epoch=1)) == "failed"
    (end,) = older.finished
    assert (end.outcome, end.retryable) == ("failed", False)
    assert "epoch 1 of job 7 is not the destination's" in (end.error or "")


async def test_a_resumed_run_skips_the_streams_that_were_committed(source: Server, destination: Server) -> None:
    await source.execute(THREE + SLOW.replace("slow", "z_slow"))
    orchestra = to_postgres(source, destination)
    executing = asyncio.create_task(orchestra.execute())
    await _reading(orchestra, "public.z_slow: reading")
    executing.cancel()
    await asyncio.wait({executing})
    assert (orchestra.finished[0].outcome, orchestra.finished[0].given_back) == ("failed", True)
    first = await destination.value("SELECT 'a'::regclass::oid")
    await source.execute("DROP VIEW z_slow; CREATE TABLE z_slow AS SELECT 1 AS id, 'x' AS nap; DELETE FROM a")
    again = to_postgres(source, destination)
    assert await again.execute(again.run(epoch=2)) == "completed"
    assert "public.a: 100 rows are already committed" in again.messages
    assert await destination.value("SELECT 'a'::regclass::oid") == first
    assert [(item.name, item.rows_written) for item in again.finished[0].streams] == [
        ("a", 100),
        ("b", 50),
        ("c", 0),
        ("z_slow", 1),
    ]


async def test_progress_is_reported_while_a_stream_is_read(source: Server, lake: Lake) -> None:
    await source.execute(
        "CREATE TABLE big AS SELECT n AS id, pg_sleep(0)::text FROM generate_series(1, 200000) n; ANALYZE"
    )
    orchestra = Orchestra(source.config, "parquet", {"local_path": str(lake.path)})
    assert await orchestra.execute(heartbeat_seconds=0.01) == "completed"
    seen = [item for report in orchestra.heartbeats for item in report.streams]
    assert any(item.state == "running" and item.rows_total == 200_000 for item in seen)
    assert orchestra.finished[0].streams[0].bytes_read > 0


async def test_the_end_is_reported_until_it_is_heard(
    source: Server, destination: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.worker.attempt.FINISH_PAUSE_SECONDS", 0.01)
    await source.execute(THREE)
    orchestra = to_postgres(source, destination)
    orchestra.deaf_finishes = 3
    assert await orchestra.execute() == "completed"
    assert len(orchestra.finished) == 1


async def test_a_clear_run_removes_the_tables(source: Server, destination: Server) -> None:
    await source.execute(THREE)
    orchestra = to_postgres(source, destination)
    await orchestra.execute()
    assert await orchestra.execute(orchestra.run("run-2", 2, kind="clear")) == "completed"
    assert await destination.tables() == []


async def test_waiting_runs_are_claimed_and_the_rest_given_back_at_shutdown(
    source: Server, destination: Server
) -> None:
    await source.execute(THREE)
    orchestra = to_postgres(source, destination)
    orchestra.waiting = [orchestra.run(f"run-{number}", number) for number in (1, 2, 3)]
    settings = WorkerSettings(worker_poll_seconds=Live(0.05), worker_heartbeat_seconds=0.05, worker_runs_max=1)
    kinds = {RUN_WORK: WorkKind(ClaimedRun, RunExecutor(orchestra).execute, RunQueued)}
    claiming = asyncio.create_task(Claiming(settings, orchestra, SystemClock(), "worker-1", kinds).run())
    async with asyncio.timeout(20):
        while len(orchestra.finished) < 3:
            await orchestra.ended.wait()
            orchestra.ended.clear()
    assert [end.outcome for end in orchestra.finished] == ["completed"] * 3
    await source.execute(SLOW)
    orchestra.waiting = [orchestra.run("run-4", 4)]
    async with asyncio.timeout(10):
        await _reading(orchestra, "public.slow: reading")
    claiming.cancel()
    await asyncio.wait({claiming}, timeout=10)
    assert (orchestra.finished[3].outcome, orchestra.finished[3].given_back) == ("failed", True)


async def _reading(orchestra: Orchestra, line: str = "public.slow: reading") -> None:
    while not any(message.startswith(line) for message in orchestra.messages):
        await asyncio.sleep(0.01)
