"""2,000,000 rows of twelve columns into zstd Parquet, the whole run through REST, against dlt with connectorx.

DuckDB's ``COPY … TO`` over its postgres extension shows what the machine can do, where that extension can be had.
"""

import asyncio
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import duckdb

from tests.benchmarks.wide_table import MEBIBYTE, ROWS, Bench, bench
from tests.e2e.replication import make_endpoint

ROUNDS = 3
DLT = (
    "dlt[parquet,filesystem,sql_database]==1.31.0",
    "connectorx==0.4.6",
    "psycopg2-binary==2.9.13",
    "SQLAlchemy==2.1.9",
)
ENVIRONMENT = Path(__file__).resolve().parents[2] / ".cache" / "dlt-1.31.0"


async def run() -> list[dict[str, Any]]:
    """Rows a second and peak memory, ours and the baseline's."""
    python = await asyncio.to_thread(_environment)
    async with bench() as setting:
        ours, baseline, peaks = [], [], []
        for _ in range(ROUNDS):
            seconds, peak_bytes = await asyncio.to_thread(_dlt, setting, python)
            baseline.append(seconds)
            peaks.append(peak_bytes)
            ours.append(await _synced(setting))
        limit = await asyncio.to_thread(_duckdb, setting)
        return _results(ours, baseline, max(peaks), setting.worker_peak_megabytes(), limit)


def _results(
    ours: list[float], baseline: list[float], baseline_peak_bytes: int, peak_megabytes: float, limit: float | None
) -> list[dict[str, Any]]:
    ours_rate, baseline_rate = ROWS / statistics.median(ours), ROWS / statistics.median(baseline)
    baseline_megabytes = baseline_peak_bytes / MEBIBYTE
    results = [
        _result("rows", round(ours_rate), "rows/s", f"dlt: {baseline_rate:,.0f} rows/s", ours_rate / baseline_rate),
        _result(
            "peak memory of the worker",
            round(peak_megabytes, 1),
            "MB",
            f"dlt: {baseline_megabytes:,.0f} MB",
            baseline_megabytes / peak_megabytes,
        ),
    ]
    if limit is not None:
        results.append(_result("rows", round(ours_rate), "rows/s", f"DuckDB: {limit:,.0f} rows/s", ours_rate / limit))
    return results


def _result(case: str, value: float, unit: str, baseline: str, ratio: float) -> dict[str, Any]:
    return {
        "benchmark": "postgres_to_parquet",
        "case": case,
        "value": value,
        "unit": unit,
        "baseline": baseline,
        "ratio": round(ratio, 2),
    }


async def _synced(setting: Bench) -> float:
    with tempfile.TemporaryDirectory() as lake:
        config = {"type": "PARQUET", "writer": {"local_path": lake}}
        return await setting.timed_transfer(await make_endpoint(setting.api, "destinations", "parquet", config))


def _dlt(setting: Bench, python: Path) -> tuple[float, int]:
    """Seconds and peak memory in bytes of one dlt pipeline."""
    dsn = setting.postgres.dsn_of("source").replace("postgresql:", "postgresql+psycopg2:", 1)
    script = Path(__file__).with_name("dlt_baseline.py")
    with tempfile.TemporaryDirectory() as directory:
        # -P: the names of this folder's modules must not stand before those of its libraries.
        command = [str(python), "-P", str(script), dsn, "wide", directory]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout.splitlines()[-1])
    return measured["seconds"], measured["peak_bytes"]


def _duckdb(setting: Bench) -> float | None:
    """Rows a second of DuckDB, None where its extension can't be had."""
    with tempfile.TemporaryDirectory() as lake, duckdb.connect() as connection:
        try:
            connection.execute("INSTALL postgres; LOAD postgres; SET threads = 2")
        except duckdb.Error as error:
            print(f"  DuckDB's postgres extension can't be had: {str(error)[:120]}")
            return None
        connection.execute(f"ATTACH '{setting.postgres.dsn_of('source')}' AS source (TYPE postgres, READ_ONLY)")
        started = time.monotonic()
        connection.execute(f"COPY source.wide TO '{lake}/wide.parquet' (FORMAT parquet, COMPRESSION zstd)")
        return ROWS / (time.monotonic() - started)


def _environment() -> Path:
    """The Python of an environment that holds dlt, made the first time."""
    python = ENVIRONMENT / "bin" / "python"
    if not (ENVIRONMENT / "complete").exists():
        shutil.rmtree(ENVIRONMENT, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENT)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *DLT], check=True)
        (ENVIRONMENT / "complete").touch()
    return python
