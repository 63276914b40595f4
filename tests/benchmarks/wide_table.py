"""The table that transfers are measured with, and a suite that transfers it through REST."""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from libs.testing.databases import postgres_config
from libs.testing.rest import Rest, rest
from libs.testing.servers import Postgres
from libs.testing.suite import Suite
from tests.e2e.replication import Endpoint, await_end, execute, make_endpoint, make_job

ROWS = 2_000_000
MEBIBYTE = 1024 * 1024

_TABLE = f"""
    CREATE TABLE wide AS SELECT
        n::bigint AS id, (n % 32000)::smallint AS small, (n % 1000000)::integer AS number,
        n / 7.0::double precision AS ratio, (n % 100000 / 100.0)::numeric(12,2) AS price, n % 3 = 0 AS flag,
        'customer ' || n % 50000 AS name, md5(n::text) AS hash, date '2020-01-01' + (n % 2000)::integer AS born,
        timestamptz '2024-01-01 00:00Z' + n * interval '1 second' AS seen, md5(n::text)::uuid AS key,
        CASE WHEN n % 10 = 0 THEN NULL ELSE repeat('x', (n % 40)::integer) END AS note
    FROM generate_series(1, {ROWS}) n;
    ALTER TABLE wide ADD PRIMARY KEY (id);
"""


@dataclass(frozen=True)
class Bench:
    """A suite with a source of ``ROWS`` rows of twelve mixed columns, and an empty database beside it."""

    suite: Suite
    postgres: Postgres
    api: Rest
    source: Endpoint

    async def timed_transfer(self, destination: Endpoint) -> float:
        """One whole run through REST; returns the seconds from the request to sync until the run has ended."""
        job_id = await make_job(self.api, self.source, destination)
        seconds, run = await self.timed_run(job_id)
        assert sum(stream["rows_written"] for stream in run["streams"]) == ROWS, run
        return seconds

    async def timed_run(self, job_id: int) -> tuple[float, dict[str, Any]]:
        """Seconds and result of a job's run.

        The run's own history says when it ended: whoever asked often enough to see it would slow the run down.
        """
        started_at = datetime.now(UTC)
        await self.api.project("POST", f"jobs/{job_id}/sync", {})
        run = await await_end(self.api, job_id, ask_every_seconds=0.5)
        assert run["status"] == "completed", run
        history = await self.api.project("GET", f"jobs/{job_id}/tasks/{run['id']}/history")
        [ended_at] = [event["time"] for event in history if event["type"] == "run_finished"]
        return (datetime.fromisoformat(ended_at) - started_at).total_seconds(), run

    def worker_peak_megabytes(self) -> float:
        """The most memory that the worker has had resident since it started."""
        status = Path(f"/proc/{self.suite.processes()['worker']}/status").read_text()
        peak = re.search(r"VmHWM:\s+(\d+) kB", status)
        assert peak is not None
        return int(peak.group(1)) * 1024 / MEBIBYTE

    async def fresh_database(self, name: str) -> str:
        """An empty database of that name."""
        await execute(self.postgres.dsn, f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
        await execute(self.postgres.dsn, f"CREATE DATABASE {name}")
        return self.postgres.dsn_of(name)


@asynccontextmanager
async def bench() -> AsyncIterator[Bench]:
    """Everything that a transfer needs, on this machine."""
    with Postgres({"max_wal_size": "4GB", "shared_buffers": "512MB"}) as postgres, Suite() as suite:
        await execute(postgres.dsn, "CREATE DATABASE source")
        dsn = postgres.dsn_of("source")
        await execute(dsn, _TABLE)
        await execute(dsn, "VACUUM ANALYZE wide")
        async with rest(suite.base_url, api_key=suite.api_key) as api:
            source = await make_endpoint(api, "sources", "postgres", postgres_config(dsn))
            yield Bench(suite, postgres, api, source)


async def shell(command: str) -> None:
    """Run a pipeline; raises when any part of it fails."""
    process = await asyncio.create_subprocess_exec("bash", "-o", "pipefail", "-c", command)
    assert await process.wait() == 0, command
