"""The main job against an installed DataSync: replicates a table from one database into another, and compares.

Reads GATEWAY_URL, API_KEY, DATABASE_URL (a PostgreSQL whose user may create databases) and DATABASE_HOST (where the
worker reaches it, if that differs). What it makes it removes. Exits with 0 if the rows are equal.
"""

import asyncio
import json
import os
import sys
import time
import urllib.error
import urllib.request
import uuid
from urllib.parse import unquote, urlsplit

import asyncpg

ROWS = 10_000
READY_SECONDS = 120
RUN_SECONDS = 180
PROJECT = os.environ["GATEWAY_URL"] + "/api/v1/project/123"


def call(method, path, body=None):
    """One request to the gateway, repeated while what keeps it from succeeding will pass."""
    deadline = time.monotonic() + READY_SECONDS
    while True:
        request = urllib.request.Request(
            PROJECT + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={
                "Authorization": "Bearer " + os.environ["API_KEY"],
                "Content-Type": "application/json",
            },
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return json.load(response)["data"]
        except urllib.error.HTTPError as error:
            text = error.read().decode()
            # A source or destination is in use until its service has heard that the job was deleted.
            passes = error.code in (429, 502, 503) or (method == "DELETE" and error.code == 409)
            if not passes or time.monotonic() > deadline:
                sys.exit(f"{method} {path}: {error.code} {text}")
        except OSError as error:
            if time.monotonic() > deadline:
                sys.exit(f"{method} {path}: {error}")
        time.sleep(1)


async def connected(url):
    deadline = time.monotonic() + READY_SECONDS
    while True:
        try:
            return await asyncpg.connect(url, timeout=10)
        except (OSError, asyncpg.PostgresError, TimeoutError):
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(1)


async def rows_of(database):
    return tuple(await database.fetchrow("SELECT count(*), md5(string_agg(t::text, ',' ORDER BY id)) FROM orders t"))


async def main():
    address = urlsplit(os.environ["DATABASE_URL"])
    run = uuid.uuid4().hex[:8]
    names = [f"datasync_test_{run}_source", f"datasync_test_{run}_destination"]
    server = await connected(address.geturl())
    try:
        for name in names:
            await server.execute(f"CREATE DATABASE {name}")
        ends = [await connected(address._replace(path=f"/{name}").geturl()) for name in names]
        try:
            await replicate_and_compare(run, [config_of(address, name) for name in names], *ends)
        finally:
            for end in ends:
                await end.close()
    finally:
        for name in names:
            await server.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
        await server.close()


def config_of(address, database):
    return {
        "host": os.environ.get("DATABASE_HOST") or address.hostname,
        "port": address.port or 5432,
        "database": database,
        "username": unquote(address.username or ""),
        "password": unquote(address.password or ""),
    }


async def replicate_and_compare(run, configs, source_end, destination_end):
    await source_end.execute(
        "CREATE TABLE orders AS SELECT id, md5(id::text) AS note, now() AS at "
        f"FROM generate_series(1, {ROWS}) id; ALTER TABLE orders ADD PRIMARY KEY (id)"
    )
    made = []

    def make(path, body):
        entity = call("POST", path, {"name": f"datasync-test-{run}", **body})
        made.append(f"{path}/{entity['id']}")
        return entity["id"]

    try:
        source, destination = [
            make(path, {"type": "postgres", "version": "latest", "config": config})
            for path, config in zip(("/sources", "/destinations"), configs, strict=True)
        ]
        job = make(
            "/jobs",
            {
                "source": {"id": source},
                "destination": {"id": destination},
                "frequency": "@monthly",
                "streams_config": {"selected_streams": {"public": [{"stream_name": "orders"}]}},
                "advanced_settings": {"verify": True},
            },
        )
        task = call("POST", f"/jobs/{job}/sync")["task_id"]
        deadline = time.monotonic() + RUN_SECONDS
        while (state := call("GET", f"/jobs/{job}/tasks/{task}"))["status"] in ("scheduled", "running"):
            if time.monotonic() > deadline:
                sys.exit(f"the run has not ended within {RUN_SECONDS} s: {state}")
            await asyncio.sleep(1)
        print(json.dumps(state, indent=1))
        at_source, at_destination = await rows_of(source_end), await rows_of(destination_end)
        if at_source != at_destination or at_source[0] != ROWS:
            sys.exit(f"the rows differ: {at_source} at the source, {at_destination} at the destination")
        print(f"{ROWS} rows were replicated and are equal")
    finally:
        for path in reversed(made):
            call("DELETE", path)


asyncio.run(main())
