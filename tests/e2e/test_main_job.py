"""The main job, end to end: tables of a PostgreSQL replicated through the gateway."""

import asyncio
from pathlib import Path

import asyncpg
import pyarrow.parquet as pq
import pytest

from libs.testing.databases import postgres_config
from libs.testing.rest import CallFailed, Rest, rest
from libs.testing.suite import Suite
from tests.e2e.replication import discover, execute, log_lines, make_endpoint, make_job, rows_of, sync

THINGS = """
    CREATE TYPE mood AS ENUM ('sad', 'ok', 'happy');
    CREATE TABLE things (
        id bigint PRIMARY KEY, small smallint, flag boolean, price numeric(12,2), exact numeric,
        ratio double precision, name text, code varchar(20), born date, seen timestamptz, at time,
        pause interval, key uuid, doc jsonb, raw bytea,
        tags text[], feeling mood);
    INSERT INTO things SELECT
        n, n % 100, n % 2 = 0, n / 7.0, n::numeric ^ 5 / 3, n / 3.0, 'thing № ' || n, 'c' || n,
        date '2024-01-01' + n % 1000,
        timestamptz '2024-01-01 00:00:00.000001+00' + n * interval '1 second', time '00:00' + n * interval '1 second',
        n * interval '1 minute', md5(n::text)::uuid, jsonb_build_object('n', n), decode(md5(n::text), 'hex'),
        ARRAY['a' || n, NULL], (ARRAY['sad', 'ok', 'happy'])[1 + n % 3]::mood
    FROM generate_series(1, 5000) n;
    INSERT INTO things (id, ratio, exact) VALUES (0, 'NaN', 'NaN'), (-1, '-Infinity', NULL);
    CREATE TABLE nothing (id integer PRIMARY KEY);
"""
SIMPLE = """
    CREATE TABLE things (id bigint PRIMARY KEY, name text, price numeric(12,2), seen timestamptz);
    INSERT INTO things SELECT n, 'thing ' || n, n / 7.0, timestamptz '2024-01-01 00:00Z' + n * interval '1 second'
    FROM generate_series(1, 5000) n;
"""


async def test_tables_arrive_row_by_row_the_same_in_another_postgres(
    api: Rest, postgres_database: str, replica: str
) -> None:
    await execute(postgres_database, THINGS)
    source = await make_endpoint(api, "sources", "postgres", postgres_config(postgres_database))
    destination = await make_endpoint(api, "destinations", "postgres", postgres_config(replica))
    job_id = await make_job(api, source, destination, settings={"verify": True})

    run = await sync(api, job_id)

    assert run["status"] == "completed", run
    streams = {stream["name"]: stream for stream in run["streams"]}
    assert {name: stream["rows_written"] for name, stream in streams.items()} == {"things": 5002, "nothing": 0}
    assert all(stream["verified"] is True for stream in streams.values())
    everything = "SELECT t::text FROM (SELECT {} FROM things ORDER BY id) t"
    columns = await rows_of(
        postgres_database,
        "SELECT attname FROM pg_attribute WHERE attrelid = 'things'::regclass AND attnum > 0 ORDER BY attnum",
    )
    query = everything.format(", ".join(f'"{name}"' for (name,) in columns))
    assert await rows_of(replica, query) == await rows_of(postgres_database, query)
    assert (await log_lines(api, job_id, run))[-1].startswith("Sync completed")

    await execute(postgres_database, "DELETE FROM things WHERE id < 10; UPDATE things SET name = 'new' WHERE id = 10")
    assert (await sync(api, job_id))["status"] == "completed"
    assert await rows_of(replica, query) == await rows_of(postgres_database, query)
    assert len(await api.project("GET", f"jobs/{job_id}/tasks")) == 2


async def test_a_table_arrives_in_parquet_files(api: Rest, postgres_database: str, tmp_path: Path) -> None:
    await execute(postgres_database, SIMPLE)
    source = await make_endpoint(api, "sources", "postgres", postgres_config(postgres_database))
    config = {"type": "PARQUET", "writer": {"local_path": str(tmp_path)}}
    destination = await make_endpoint(api, "destinations", "parquet", config)

    run = await sync(api, await make_job(api, source, destination, settings={"verify": True}))

    assert run["status"] == "completed", run
    found = [
        tuple(row[name] for name in ("id", "name", "price", "seen"))
        for path in await asyncio.to_thread(lambda: sorted(tmp_path.rglob("things/*.parquet")))
        for row in pq.read_table(path).to_pylist()
    ]
    assert sorted(found) == await rows_of(postgres_database, "SELECT id, name, price, seen FROM things ORDER BY id")


async def test_history_tells_what_happened_and_lists_follow(api: Rest, postgres_database: str, replica: str) -> None:
    await execute(postgres_database, SIMPLE)
    source = await make_endpoint(api, "sources", "postgres", postgres_config(postgres_database))
    destination = await make_endpoint(api, "destinations", "postgres", postgres_config(replica))
    job_id = await make_job(api, source, destination)
    await sync(api, job_id)

    kinds = [event["type"] for event in await api.project("GET", f"jobs/{job_id}/history")]
    assert sorted(kinds) == ["job_created", "job_run_ended", "job_run_requested"]
    async with asyncio.timeout(5):
        while True:
            jobs = (await api.project("GET", f"sources/{source.id}"))["jobs"]
            if jobs and jobs[0].get("last_run_state") == "completed":
                break
            await asyncio.sleep(0.02)
    assert jobs[0]["id"] == job_id
    with pytest.raises(CallFailed) as refused:
        await api.project("DELETE", f"sources/{source.id}")
    assert refused.value.status == 409


async def test_an_unreachable_source_is_told_in_words(api: Rest, postgres_database: str) -> None:
    config = postgres_config(postgres_database)
    version = (await api.project("GET", "sources/versions", type="postgres"))["version"][0]
    for changed, word in (({"password": "wrong"}, "password"), ({"port": 1}, "refused"), ({"database": "no"}, "no")):
        body = {"type": "postgres", "version": version, "config": {**config, **changed}}
        result = (await api.project("POST", "sources/test", body))["connection_result"]
        assert result["status"] == "FAILED"
        assert word in result["message"].lower()
        assert "wrong" not in result["message"]


async def test_a_table_dropped_after_discovery_fails_the_run_by_name(
    api: Rest, postgres_database: str, replica: str
) -> None:
    await execute(postgres_database, SIMPLE)
    source = await make_endpoint(api, "sources", "postgres", postgres_config(postgres_database))
    destination = await make_endpoint(api, "destinations", "postgres", postgres_config(replica))
    job_id = await make_job(api, source, destination)
    await execute(postgres_database, "DROP TABLE things")

    run = await sync(api, job_id)

    assert run["status"] == "failed"
    assert "things" in run["error"]
    with pytest.raises(asyncpg.UndefinedTableError):
        await rows_of(replica, "SELECT 1 FROM things")


async def test_discovery_names_every_table_with_its_keys(api: Rest, postgres_database: str) -> None:
    await execute(postgres_database, THINGS)
    source = await make_endpoint(api, "sources", "postgres", postgres_config(postgres_database))
    streams = {entry["stream"]["name"]: entry["stream"] for entry in (await discover(api, source))["streams"]}
    assert set(streams) == {"things", "nothing"}
    assert streams["things"]["source_defined_primary_key"] == ["id"]
    assert streams["things"]["namespace"] == "public"


async def test_a_deleted_jobs_tables_go_to_the_job_that_takes_them_over(
    embedded_suite: Suite, postgres_database: str, replica: str
) -> None:
    await execute(postgres_database, "CREATE TABLE t AS SELECT 1 AS id")
    async with rest(embedded_suite.base_url, api_key=embedded_suite.api_key) as api:
        source = await make_endpoint(api, "sources", "postgres", postgres_config(postgres_database))
        destination = await make_endpoint(api, "destinations", "postgres", postgres_config(replica))
        former = await make_job(api, source, destination)
        assert (await sync(api, former))["status"] == "completed"
        taking = await make_job(api, source, destination, settings={"take_over": True})
        refused = await sync(api, taking)
        assert (refused["status"], refused["attempts"]) == ("failed", 1)
        assert f"is written by job {former}" in refused["error"]
        await api.project("DELETE", f"jobs/{former}")
        assert (await sync(api, taking))["status"] == "completed"
