"""Queues many runs on an installed DataSync and waits for their end: ``queue_runs.py GATEWAY_URL LAKE JOBS ROWS``.

Each run copies one table of PostgreSQL into Parquet files in a folder of its own below LAKE, which needs the CPU of the
worker rather than that of the database. API_KEY, DATABASE_URL (a PostgreSQL) and DATABASE_HOST (where workers reach it)
are read from the environment. Prints how the runs ended, as JSON.
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


async def main(gateway: str, lake: str, jobs: int, rows: int) -> None:
    address = urlsplit(os.environ["DATABASE_URL"])
    server = await connected(address.geturl())
    await server.execute(f"CREATE TABLE t AS SELECT id, md5(id::text) AS note FROM generate_series(1, {rows}) id")
    postgres = {
        "host": os.environ["DATABASE_HOST"],
        "port": address.port or 5432,
        "database": address.path.lstrip("/"),
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

        async def make(path: str, name: str, kind: str, config: object) -> int:
            body = {"name": name, "type": kind, "version": "latest", "config": config}
            return int((await call("POST", path, body))["id"])

        source_id = await make("/sources", "load", "postgres", postgres)
        runs = []
        for number in range(jobs):
            folder = {"local_path": f"{lake}/{number}"}
            destination_id = await make("/destinations", f"load {number}", "parquet", folder)
            job = await call(
                "POST",
                "/jobs",
                {
                    "name": f"load {number}",
                    "source": {"id": source_id},
                    "destination": {"id": destination_id},
                    "frequency": "@monthly",
                    "streams_config": {"selected_streams": {"public": [{"stream_name": "t"}]}},
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
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
