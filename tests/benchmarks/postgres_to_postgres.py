"""2,000,000 rows of twelve columns, the whole run through REST, against ``psql`` binary COPY piped into ``psql``."""

import statistics
import time
from typing import Any

from libs.testing.databases import postgres_config
from libs.testing.servers import postgres_binaries
from tests.benchmarks.wide_table import ROWS, Bench, bench, shell
from tests.e2e.replication import execute, make_endpoint

ROUNDS = 3


async def run() -> list[dict[str, Any]]:
    """Rows a second, and the worker's peak memory."""
    async with bench() as setting:
        ours, baseline = [], []
        for _ in range(ROUNDS):
            baseline.append(await _piped(setting))
            ours.append(await _synced(setting))
        ours_rate, baseline_rate = ROWS / statistics.median(ours), ROWS / statistics.median(baseline)
        return [
            {
                "benchmark": "postgres_to_postgres",
                "case": "rows",
                "value": round(ours_rate),
                "unit": "rows/s",
                "baseline": f"psql binary COPY into psql: {baseline_rate:,.0f} rows/s",
                "ratio": round(ours_rate / baseline_rate, 2),
            },
            {
                "benchmark": "postgres_to_postgres",
                "case": "peak memory of the worker",
                "value": round(setting.worker_peak_megabytes(), 1),
                "unit": "MB",
                "baseline": "250 MB at most",
                "ratio": None,
            },
        ]


async def _piped(setting: Bench) -> float:
    """Seconds that ``psql`` takes, with the key made after the rows, as ours is."""
    source, target = setting.postgres.dsn_of("source"), await setting.fresh_database("piped")
    psql = f"{postgres_binaries() / 'psql'} -X -q -v ON_ERROR_STOP=1"
    await execute(setting.postgres.dsn, "CHECKPOINT")
    started = time.monotonic()
    ddl = (
        "CREATE TABLE wide (id bigint NOT NULL, small smallint, number integer, ratio double precision,"
        " price numeric(12,2), flag boolean, name text, hash text, born date, seen timestamptz, key uuid, note text)"
    )
    await shell(
        f'{psql} "{target}" -c "{ddl}" && {psql} "{source}" -c "COPY wide TO STDOUT (FORMAT binary)"'
        f' | {psql} "{target}" -c "COPY wide FROM STDIN (FORMAT binary)"'
        f' && {psql} "{target}" -c "ALTER TABLE wide ADD PRIMARY KEY (id)"'
    )
    return time.monotonic() - started


async def _synced(setting: Bench) -> float:
    """Seconds from the request to sync until the run has ended."""
    target = await setting.fresh_database("synced")
    destination = await make_endpoint(setting.api, "destinations", "postgres", postgres_config(target))
    await execute(setting.postgres.dsn, "CHECKPOINT")
    return await setting.timed_transfer(destination)
