"""Runs that compare both ends, and repair what differs."""

from typing import Any

import pytest

from libs.core.json import JsonObject
from tests.integration.connectors.moving import Lake, Server
from tests.integration.worker.installation import Installation, Job

ORDERS = """
CREATE TABLE orders (id integer PRIMARY KEY, note text);
INSERT INTO orders SELECT n, 'note ' || n FROM generate_series(1, 100) AS n;
"""
MERGED = {"sync_mode": "incremental"}
DELETES = {"deletes": {"mode": "hard", "schedule": "@yearly"}}


def config(stream: JsonObject, **selected: Any) -> JsonObject:
    return {
        "selected_streams": {"public": [{"stream_name": "orders"} | selected]},
        "streams": [{"stream": {"name": "orders", "namespace": "public"} | stream}],
    }


async def verified(job: Job, *, repair: bool = False) -> str:
    started = await job.orchestrator.post(f"/jobs/{job.id}/verify", {"repair": repair})
    assert started.status == 200, started.body
    outcome = await job.execute(await job.claim())
    task = await job.task()
    assert task.detail["job_type"] == "verify"
    return outcome


@pytest.mark.parametrize("kind", ["postgres", "parquet"])
@pytest.mark.parametrize("mode", ["full_refresh", "incremental"])
async def test_equal_ends_are_found_equal(
    installation: Installation, source: Server, destination: Server, lake: Lake, kind: str, mode: str
) -> None:
    await source.execute(ORDERS)
    to = destination if kind == "postgres" else lake
    chosen = config(MERGED, **DELETES) if mode == "incremental" else config({})
    job = await installation.job(source.config, to, chosen, verify=False)
    assert await job.execute() == "completed"
    assert await verified(job) == "completed"
    stream = (await job.task()).streams["orders"]
    assert (stream["verified"], stream["rows_written"]) == (True, 0)
    assert stream["verification"]["source"]["rows"] == 100


@pytest.mark.parametrize("mode", ["full_refresh", "incremental"])
async def test_differing_rows_are_named_and_repaired(
    installation: Installation, source: Server, destination: Server, mode: str
) -> None:
    await source.execute(ORDERS)
    chosen = config(MERGED, **DELETES) if mode == "incremental" else config({})
    job = await installation.job(source.config, destination, chosen, verify=False)
    assert await job.execute() == "completed"
    await destination.execute(
        "UPDATE orders SET note = 'tampered' WHERE id = 7; DELETE FROM orders WHERE id = 8; "
        "INSERT INTO orders VALUES (1000, 'foreign')"
    )
    assert await verified(job) == "failed"
    task = await job.task()
    for words in ("different: (id = 7)", "missing at the destination: (id = 8)"):
        assert words in task.error
    assert task.streams["orders"]["verified"] is False
    assert task.detail["attempts"] == 1
    assert await destination.value("SELECT note FROM orders WHERE id = 7") == "tampered"

    assert await verified(job, repair=True) == "completed"
    stream = (await job.task()).streams["orders"]
    assert stream["verified"] is True
    if mode == "incremental":
        assert (stream["rows_inserted"], stream["rows_updated"], stream["rows_deleted"]) == (1, 1, 1)
    assert await source.rows("orders") == await destination.rows("orders")


async def test_a_merged_stream_is_compared_at_the_sources_present_position(
    installation: Installation, source: Server, destination: Server
) -> None:
    await source.execute(ORDERS)
    job = await installation.job(source.config, destination, config(MERGED, **DELETES), verify=False)
    assert await job.execute() == "completed"
    await source.execute("UPDATE orders SET note = 'x' WHERE id = 1; DELETE FROM orders WHERE id = 2")
    assert await verified(job) == "completed"
    stream = (await job.task()).streams["orders"]
    assert (stream["verified"], stream["rows_updated"], stream["rows_deleted"]) == (True, 1, 1)


@pytest.mark.parametrize(
    ("stream", "selected", "reason"),
    [
        ({}, {"append_mode": True}, "rows are appended"),
        (MERGED, {}, "the stream has no deletes"),
        (MERGED, {"deletes": {"mode": "soft"}}, "are marked and stay"),
    ],
)
async def test_what_cannot_be_compared_says_why(
    installation: Installation,
    source: Server,
    destination: Server,
    stream: JsonObject,
    selected: JsonObject,
    reason: str,
) -> None:
    await source.execute(ORDERS)
    job = await installation.job(source.config, destination, config(stream, **selected), verify=False)
    assert await job.execute() == "completed"
    assert await verified(job) == "completed"
    found = (await job.task()).streams["orders"]
    assert found["verified"] is None
    assert reason in found["verification"]["reason"]


async def test_a_target_that_does_not_exist_yet_is_not_comparable(
    installation: Installation, source: Server, destination: Server
) -> None:
    await source.execute(ORDERS)
    job = await installation.job(source.config, destination, config({}))
    assert await verified(job) == "completed"
    assert "public.orders yet" in (await job.task()).streams["orders"]["verification"]["reason"]
    assert await destination.tables() == []
