"""1 percent of 2,000,000 rows changed: an incremental run through REST against a plain SQL upsert of the same rows.

The baseline knows which rows changed: ``psql`` copies them, by an index on the cursor, into a temporary table of the
other database and upserts from there. By transaction means without a cursor: the source's whole table is scanned.
"""

import statistics
import time
from typing import Any

from libs.testing.databases import postgres_config
from libs.testing.servers import postgres_binaries
from tests.benchmarks.wide_table import ROWS, Bench, bench, shell
from tests.e2e.replication import execute, make_endpoint, make_job

ROUNDS = 3
CHANGED = ROWS // 100
_COLUMNS = ("small", "number", "ratio", "price", "flag", "name", "hash", "born", "seen", "key", "note")


async def run() -> list[dict[str, Any]]:
    """Changed rows a second."""
    async with bench() as setting:
        source = setting.postgres.dsn_of("source")
        await execute(source, "CREATE INDEX ON wide (seen)")
        return [
            await _measured(setting, f"{name}, into {kind}", cursor, kind)
            for name, cursor in (("by cursor, indexed", "seen"), ("by transaction", ""))
            for kind in ("postgres", "parquet")
        ]


async def _measured(setting: Bench, case: str, cursor: str, kind: str) -> dict[str, Any]:
    ours, baseline = [], []
    config: dict[str, Any] = {"local_path": str(setting.suite.directory / f"lake-{cursor}")}
    if kind == "postgres":
        config = postgres_config(await setting.fresh_database("merged"))
    plain = await setting.fresh_database("plain")
    destination = await make_endpoint(setting.api, "destinations", kind, config)
    stream = {"name": "wide", "namespace": "public", "sync_mode": "incremental", "cursor_field": cursor}
    chosen = {"selected_streams": {"public": [{"stream_name": "wide"}]}, "streams": [{"stream": stream}]}
    job_id = await make_job(setting.api, setting.source, destination, streams_config=chosen)
    await setting.timed_run(job_id)
    await _psql(setting, f'"{setting.postgres.dsn_of("source")}" -c "COPY wide TO STDOUT (FORMAT binary)"', plain)
    await execute(plain, "VACUUM ANALYZE wide")
    for number in range(ROUNDS):
        await execute(
            setting.postgres.dsn_of("source"),
            f"UPDATE wide SET note = 'round {number}', seen = now() WHERE id IN "
            f"(SELECT id FROM wide ORDER BY hash OFFSET {number * CHANGED} LIMIT {CHANGED})",
        )
        await execute(setting.postgres.dsn_of("source"), "VACUUM ANALYZE wide")
        await execute(setting.postgres.dsn, "CHECKPOINT")
        baseline.append(await _upserted(setting, plain))
        await execute(setting.postgres.dsn, "CHECKPOINT")
        seconds, run = await setting.timed_run(job_id)
        assert run["streams"][0]["rows_updated"] == CHANGED, run
        ours.append(seconds)
    rate, theirs = CHANGED / statistics.median(ours), CHANGED / statistics.median(baseline)
    return {
        "benchmark": "incremental",
        "case": case,
        "value": round(rate),
        "unit": "changed rows/s",
        "baseline": f"SQL upsert by psql: {theirs:,.0f} rows/s",
        "ratio": round(rate / theirs, 2),
    }


async def _psql(setting: Bench, copy: str, target: str) -> None:
    psql = f"{postgres_binaries() / 'psql'} -X -q -v ON_ERROR_STOP=1"
    await shell(
        f'{psql} "{target}" -c "CREATE TABLE wide (id bigint PRIMARY KEY, small smallint, number integer, '
        "ratio double precision, price numeric(12,2), flag boolean, name text, hash text, born date, seen timestamptz, "
        f'key uuid, note text)" && {psql} {copy} | {psql} "{target}" -c "COPY wide FROM STDIN (FORMAT binary)"'
    )


async def _upserted(setting: Bench, target: str) -> float:
    psql = f"{postgres_binaries() / 'psql'} -X -q -v ON_ERROR_STOP=1"
    source = setting.postgres.dsn_of("source")
    assignments = ", ".join(f"{name} = excluded.{name}" for name in _COLUMNS)
    newest = "seen >= (SELECT max(seen) FROM wide)"
    started = time.monotonic()
    await shell(
        f'{psql} "{source}" -c "COPY (SELECT * FROM wide WHERE {newest}) TO STDOUT (FORMAT binary)" | '
        f'{psql} "{target}" -c "CREATE TEMP TABLE changed (LIKE wide)" '
        '-c "COPY changed FROM STDIN (FORMAT binary)" '
        f'-c "INSERT INTO wide SELECT * FROM changed ON CONFLICT (id) DO UPDATE SET {assignments}"'
    )
    return time.monotonic() - started
