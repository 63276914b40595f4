"""Incremental jobs through the services: states, resets, deletes on a schedule, changed columns, streams at once."""

from typing import Any

import pytest

from libs.core.json import JsonObject
from tests.integration.connectors.moving import Lake, Server
from tests.integration.worker.installation import Installation, Job

ORDERS = """
CREATE TABLE orders (id integer PRIMARY KEY, note text, at timestamptz NOT NULL DEFAULT now());
INSERT INTO orders (id, note) SELECT n, 'note ' || n FROM generate_series(1, 10) AS n;
"""


def incremental(*names: str, stream: JsonObject | None = None, **selected: Any) -> JsonObject:
    return {
        "selected_streams": {"public": [{"stream_name": name} | selected for name in names]},
        "streams": [
            {"stream": {"name": name, "namespace": "public", "sync_mode": "incremental"} | (stream or {})}
            for name in names
        ],
    }


async def counts(job: Job, name: str = "orders") -> tuple[int, int, int, int]:
    stream = (await job.task()).streams[name]
    return stream["rows_inserted"], stream["rows_updated"], stream["rows_deleted"], stream["rows_skipped"]


async def states(job: Job) -> list[JsonObject]:
    found: list[JsonObject] = (await job.orchestrator.get(f"/jobs/{job.id}/state")).data["streams"]
    return found


async def test_a_state_is_kept_shown_and_reset(installation: Installation, source: Server, destination: Server) -> None:
    await source.execute(ORDERS)
    job = await installation.job(
        source.config, destination, incremental("orders", stream={"cursor_field": "at"}), verify=False
    )
    assert await states(job) == []
    assert await job.execute() == "completed"
    (state,) = await states(job)
    assert state["position"].startswith("at: 20")
    assert (state["namespace"], state["name"], state["reset"]) == ("public", "orders", False)
    assert state["task_id"] == (await job.task()).detail["id"]

    await source.execute("UPDATE orders SET note = 'x', at = now() WHERE id = 3; INSERT INTO orders VALUES (11, 'y')")
    assert await job.execute() == "completed"
    inserted, updated, *_ = await counts(job)
    assert (inserted, updated) == (1, 1)

    reset = await job.orchestrator.post(
        f"/jobs/{job.id}/state/reset", {"streams": [{"namespace": "public", "name": "orders"}]}
    )
    assert [item["reset"] for item in reset.data["streams"]] == [True]
    await source.execute("UPDATE orders SET note = 'unseen' WHERE id = 1")
    assert await job.execute() == "completed"
    assert any("all rows are read again: its state was reset" in line for line in (await job.task()).messages)
    assert await counts(job) == (0, 1, 0, 10)
    assert [item["reset"] for item in await states(job)] == [False]
    assert await source.rows("orders") == await destination.rows("orders")


async def test_only_streams_of_the_job_can_be_reset_and_not_during_a_run(
    installation: Installation, source: Server, destination: Server
) -> None:
    await source.execute(ORDERS)
    job = await installation.job(source.config, destination, incremental("orders"))
    path = f"/jobs/{job.id}/state/reset"
    refused = await job.orchestrator.post(path, {"streams": [{"namespace": "public", "name": "others"}]})
    assert (refused.status, refused.body["errors"][0]["field"]) == (400, "streams[0]")
    assert (await job.orchestrator.post(path, {"streams": []})).status == 400
    await job.begin()
    named = {"streams": [{"namespace": "public", "name": "orders"}]}
    assert (await job.orchestrator.post(path, named)).status == 409


async def test_a_cleared_stream_has_no_state_and_is_loaded_again(
    installation: Installation, source: Server, destination: Server
) -> None:
    await source.execute(ORDERS)
    job = await installation.job(source.config, destination, incremental("orders"))
    assert await job.execute() == "completed"
    await job.begin("clear-destination")
    assert await job.execute(await job.claim()) == "completed"
    assert await states(job) == []
    assert await destination.tables() == []
    assert await job.execute() == "completed"
    assert await counts(job) == (10, 0, 0, 0)


@pytest.mark.parametrize("kind", ["postgres", "parquet"])
async def test_deleted_rows_are_looked_for_on_schedule(
    installation: Installation, source: Server, destination: Server, lake: Lake, kind: str
) -> None:
    await source.execute(ORDERS)
    to = destination if kind == "postgres" else lake

    async def job_with(schedule: str) -> Job:
        stream = {"destination_table": schedule.strip("@").replace(" ", "_")}
        config = incremental("orders", stream=stream, deletes={"mode": "hard", "schedule": schedule})
        return await installation.job(source.config, to, config)

    often, seldom = await job_with("every run"), await job_with("@yearly")
    for job in (often, seldom):
        assert await job.execute() == "completed"
    await source.execute("DELETE FROM orders WHERE id > 5")
    for job, deleted, verified in ((often, 5, True), (seldom, 0, None)):
        assert await job.execute() == "completed"
        assert (await counts(job))[2] == deleted
        assert (await job.task()).streams["orders"]["verified"] is verified


async def test_a_change_of_columns_is_in_the_result_and_the_log(
    installation: Installation, source: Server, destination: Server
) -> None:
    await source.execute(ORDERS)
    job = await installation.job(source.config, destination, incremental("orders"), verify=False)
    assert await job.execute() == "completed"
    await source.execute("ALTER TABLE orders ADD COLUMN extra text, ALTER COLUMN id TYPE bigint")
    assert await job.execute() == "completed"
    task = await job.task()
    assert task.streams["orders"]["columns_changed"] == [
        {"column": "extra", "kind": "added", "before": None, "after": "text"},
        {"column": "id", "kind": "widened", "before": "integer", "after": "bigint"},
    ]
    assert any("column extra (text) is new; the destination follows" in line for line in task.messages)
    history = (await job.orchestrator.get(f"/jobs/{job.id}/tasks/{task.detail['id']}/history")).data
    assert "columns_changed" in str(history)


async def test_the_jobs_policy_holds_for_streams_without_their_own(
    installation: Installation, source: Server, destination: Server
) -> None:
    await source.execute(ORDERS)
    job = await installation.job(source.config, destination, incremental("orders"), schema_policy="freeze")
    assert await job.execute() == "completed"
    await source.execute("ALTER TABLE orders ADD COLUMN extra text")
    assert await job.execute() == "failed"
    assert "schema_policy is freeze" in (await job.task()).error


async def test_changed_settings_lead_to_reading_all_rows(
    installation: Installation, source: Server, destination: Server
) -> None:
    await source.execute(ORDERS)
    job = await installation.job(source.config, destination, incremental("orders", filter="id > 5"), verify=False)
    assert await job.execute() == "completed"
    assert await counts(job) == (5, 0, 0, 0)
    await job.begin()
    run = await job.claim()
    wider = run.model_copy(update={"streams_config_json": run.streams_config_json.replace("id > 5", "id > 2")})
    assert await job.execute(wider) == "completed"
    assert any("its settings have changed" in line for line in (await job.task()).messages)
    assert await destination.value("SELECT min(id) FROM orders") == 3


async def test_streams_move_at_the_same_time(installation: Installation, source: Server, destination: Server) -> None:
    names = [f"t{number}" for number in range(8)]
    for name in names:
        await source.execute(
            f"CREATE TABLE {name} (id int PRIMARY KEY); INSERT INTO {name} SELECT generate_series(1, 50)"
        )
    job = await installation.job(source.config, destination, incremental(*names), concurrent_streams=4)
    assert await job.execute() == "completed"
    assert {stream["rows_inserted"] for stream in (await job.task()).streams.values()} == {50}
    for name in names:
        await source.execute(f"INSERT INTO {name} VALUES (51)")
    assert await job.execute() == "completed"
    assert {stream["rows_inserted"] for stream in (await job.task()).streams.values()} == {1}
    assert await destination.value("SELECT count(*) FROM t7") == 51


async def test_what_an_end_cannot_do_is_refused_when_the_job_is_created(
    installation: Installation, source: Server, lake: Lake
) -> None:
    await source.execute(ORDERS)
    with pytest.raises(AssertionError, match="partition_regex"):
        await installation.job(source.config, lake, incremental("orders", partition_regex="/{id}"))
