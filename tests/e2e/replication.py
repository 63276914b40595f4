"""What the end-to-end tests do again and again: databases with a table, endpoints over them, a job, a run."""

import asyncio
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import asyncpg

from libs.testing.rest import ENDED, Rest, selected

RUN_TIMEOUT_SECONDS = 90.0


def unique(word: str) -> str:
    """A name that no other test uses; all tests share one project."""
    return f"{word}-{uuid.uuid4().hex[:8]}"


@dataclass(frozen=True)
class Endpoint:
    id: int
    name: str
    type: str
    version: str
    config: dict[str, Any]

    @property
    def fields(self) -> dict[str, Any]:
        return {"name": self.name, "type": self.type, "version": self.version, "config": self.config}


async def make_endpoint(api: Rest, family: str, kind: str, config: dict[str, Any]) -> Endpoint:
    """A source (``sources``) or destination (``destinations``)."""
    version = (await api.project("GET", f"{family}/versions", type=kind))["version"][0]
    name = unique(kind)
    body = {"name": name, "type": kind, "version": version, "config": config}
    made = await api.project("POST", family, body)
    return Endpoint(made["id"], name, kind, version, config)


async def discover(api: Rest, source: Endpoint) -> dict[str, Any]:
    """The catalog of the source's streams."""
    body = {**source.fields, "job_name": "", "job_id": -1}
    catalog: dict[str, Any] = await api.project("POST", "sources/streams", body)
    return catalog


async def make_job(
    api: Rest,
    source: Endpoint,
    destination: Endpoint,
    *,
    settings: Mapping[str, Any] | None = None,
    streams_config: Mapping[str, Any] | None = None,
) -> int:
    """A manual job that replicates every stream of the source in full, unless told otherwise."""
    body = {
        "name": unique("job"),
        "source": source.fields | {"id": source.id},
        "destination": destination.fields | {"id": destination.id},
        "frequency": "",
        "streams_config": selected(await discover(api, source)) if streams_config is None else streams_config,
        "advanced_settings": dict(settings) if settings else None,
    }
    made = await api.project("POST", "jobs", body)
    job_id: int = made["id"]
    return job_id


async def newest_run(api: Rest, job_id: int) -> dict[str, Any]:
    """The job's latest run with its streams."""
    task = await api.newest_task(job_id)
    run: dict[str, Any] = await api.project("GET", f"jobs/{job_id}/tasks/{task['id']}")
    return run


async def await_end(api: Rest, job_id: int, *, ask_every_seconds: float = 0.05) -> dict[str, Any]:
    """The job's latest run, once it has ended."""
    async with asyncio.timeout(RUN_TIMEOUT_SECONDS):
        while (run := await newest_run(api, job_id))["status"] not in ENDED:
            await asyncio.sleep(ask_every_seconds)
        return run


async def sync(api: Rest, job_id: int) -> dict[str, Any]:
    """Run the job; returns the run, ended."""
    await api.project("POST", f"jobs/{job_id}/sync", {})
    return await await_end(api, job_id)


async def log_lines(api: Rest, job_id: int, run: Mapping[str, Any]) -> list[str]:
    """The run's log."""
    path = f"jobs/{job_id}/tasks/{run['id']}/logs"
    page = await api.project("POST", path, {"file_path": run["file_path"]}, cursor=-1, limit=1000, direction="older")
    return [line["message"] for line in page["logs"]]


async def execute(dsn: str, sql: str) -> None:
    """Run SQL on a database."""
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute(sql)
    finally:
        await connection.close()


async def rows_of(dsn: str, query: str) -> list[tuple[Any, ...]]:
    """The rows of a query."""
    connection = await asyncpg.connect(dsn)
    try:
        return [tuple(row) for row in await connection.fetch(query)]
    finally:
        await connection.close()
