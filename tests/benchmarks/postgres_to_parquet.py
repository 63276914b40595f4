"""2,000,000 rows of twelve columns into zstd Parquet, the whole run through REST, against two named baselines.

dlt with connectorx does the same work; DuckDB's ``COPY … TO`` over its postgres extension shows what the machine can
do. Each has an environment of its own.
"""

import asyncio
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.wide_table import MEBIBYTE, ROWS, Bench, bench
from tests.e2e.replication import make_endpoint

ROUNDS = 3
DLT = (
    "dlt[parquet,filesystem,sql_database]==1.31.0",
    "connectorx==0.4.6",
    "psycopg2-binary==2.9.13",
    "SQLAlchemy==2.1.9",
)
DUCKDB = ("duckdb==1.5.5", "duckdb-extension-postgres-scanner==1.5.5")
ENVIRONMENTS = Path(__file__).resolve().parents[2] / ".cache"


async def run() -> list[dict[str, Any]]:
    """Rows a second and peak memory, ours and the baselines'."""
    dlt = await asyncio.to_thread(_environment, "dlt-1.31.0", DLT)
    duckdb = await asyncio.to_thread(_environment, "duckdb-1.5.5", DUCKDB)
    postgresql = "postgresql+psycopg2:"
    async with bench() as setting:
        dsn = setting.postgres.dsn_of("source")
        ours, slower, faster = [], [], []
        for _ in range(ROUNDS):
            slower.append(
                await asyncio.to_thread(_baseline, dlt, "dlt_baseline.py", dsn.replace("postgresql:", postgresql, 1))
            )
            faster.append(await asyncio.to_thread(_baseline, duckdb, "duckdb_baseline.py", dsn))
            ours.append(await _synced(setting))
        return _results(ours, {"dlt": slower, "DuckDB": faster}, setting.worker_peak_megabytes())


def _results(
    ours: list[float], baselines: dict[str, list[tuple[float, int]]], peak_megabytes: float
) -> list[dict[str, Any]]:
    rate = ROWS / statistics.median(ours)
    results = []
    for name, runs in baselines.items():
        theirs = ROWS / statistics.median(seconds for seconds, _ in runs)
        results.append(_result("rows", round(rate), "rows/s", f"{name}: {theirs:,.0f} rows/s", rate / theirs))
        megabytes = max(peak_bytes for _, peak_bytes in runs) / MEBIBYTE
        memory = _result(
            "peak memory of the worker",
            round(peak_megabytes, 1),
            "MB",
            f"{name}: {megabytes:,.0f} MB",
            megabytes / peak_megabytes,
        )
        results.append(memory)
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


def _baseline(python: Path, script: str, dsn: str) -> tuple[float, int]:
    """Seconds and peak memory in bytes of one transfer."""
    with tempfile.TemporaryDirectory() as directory:
        # -P: the names of this folder's modules must not stand before those of its libraries.
        command = [str(python), "-P", str(Path(__file__).with_name(script)), dsn, "wide", directory]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout.splitlines()[-1])
    return measured["seconds"], measured["peak_bytes"]


def _environment(name: str, packages: Sequence[str]) -> Path:
    """The Python of an environment that holds the packages, made the first time."""
    environment = ENVIRONMENTS / name
    python = environment / "bin" / "python"
    if not (environment / "complete").exists():
        shutil.rmtree(environment, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages], check=True)
        (environment / "complete").touch()
    return python
