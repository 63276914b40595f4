"""Queues many runs on an installed DataSync and waits until all have ended: ``queue_runs.py GATEWAY_URL JOBS ROWS``.

API_KEY, DATABASE_URL (a PostgreSQL whose user may create databases) and DATABASE_HOST (where workers reach it) are read
from the environment. Prints how the runs ended, as JSON.
"""

import asyncio
import json
import os
import sys
from collections import Counter
from typing import Any
from urllib.parse import unquote, urlsplit

import aiohttp
import asyncpg

POLL_SECONDS = 2


async def main(gateway: str, jobs: int, rows: int) -> None:
    address = urlsplit(os.environ["DATABASE_URL"])
    server = await connected(address.geturl())
    for database in ("load_source", "load_destination"):
        await server.execute(f"CREATE DATABASE {database}")
    source = await connected(address._replace(path="/load_source").geturl())
    for number in range(jobs):
        await source.execute(
            f"CREATE TABLE t{number} AS SELECT id, md5(id::text) AS note FROM generate_series(1, {rows}) id"
        )
    config = {
        "host": os.environ["DATABASE_HOST"],
        "port": address.port or 5432,
        "username": unquote(address.username or ""),
        "password": unquote(address.password or ""),
    }
    headers = {"Authorization": "Bearer " + os.environ["API_KEY"]}
    async with aiohttp.ClientSession(gateway, headers=headers) as session:

        async def call(method: str, path: str, body: object = None) -> Any:
            async with session.request(method, f"/api/v1/project/123{path}", json=body) as response:
                answer = await response.json()
                if response.status >= 400:
                    sys.exit(f"{method} {path}: {response.status} {answer}")
                return answer["data"]

        async def make(path: str, database: str) -> int:
            body = {"type": "postgres", "version": "latest", "config": {**config, "database": database}}
            return int((await call("POST", path, {"name": f"load {database}", **body}))["id"])

        source_id = await make("/sources", "load_source")
        destination_id = await make("/destinations", "load_destination")
        runs = []
        for number in range(jobs):
            job = await call(
                "POST",
                "/jobs",
                {
                    "name": f"load {number}",
                    "source": {"id": source_id},
                    "destination": {"id": destination_id},
                    "frequency": "@monthly",
                    "streams_config": {"selected_streams": {"public": [{"stream_name": f"t{number}"}]}},
                    "advanced_settings": {"verify": True},
                },
            )
            runs.append((job["id"], (await call("POST", f"/jobs/{job['id']}/sync"))["task_id"]))
        print("queued", flush=True)
        ended: dict[str, str] = {}
        while len(ended) < len(runs):
            await asyncio.sleep(POLL_SECONDS)
            for job_id, run in runs:
                if run not in ended:
                    status = (await call("GET", f"/jobs/{job_id}/tasks/{run}"))["status"]
                    if status not in ("scheduled", "running"):
                        ended[run] = status
        print(json.dumps(Counter(ended.values())), flush=True)


async def connected(url: str) -> "asyncpg.Connection[Any]":
    while True:
        try:
            return await asyncpg.connect(url, timeout=10)
        except (OSError, asyncpg.PostgresError, TimeoutError):
            await asyncio.sleep(1)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
