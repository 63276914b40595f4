"""The main job against an installed DataSync: replicates a table between two schemas of a database, and compares.

Reads GATEWAY_URL, API_KEY and DATABASE_URL. What it makes it removes. Exits with 0 if the rows are equal.
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
    """One request to the gateway, repeated while it answers 429 or 503 or can't be reached."""
    deadline = time.monotonic() + READY_SECONDS
    while True:
        request = urllib.request.Request(
            PROJECT + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={
                "Authorization": "Bearer " + os.environ["API_KEY"],
                "Content-Type": "application/json",
                "Idempotency-Key": str(uuid.uuid4()),
            },
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return json.load(response)["data"]
        except urllib.error.HTTPError as error:
            text = error.read().decode()
            if error.code not in (429, 502, 503) or time.monotonic() > deadline:
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


async def rows_of(database, schema):
    text = f"SELECT count(*), md5(string_agg(t::text, ',' ORDER BY id)) FROM {schema}.orders t"
    return tuple(await database.fetchrow(text))


async def main():
    url = os.environ["DATABASE_URL"]
    address = urlsplit(url)
    config = {
        "host": os.environ.get("DATABASE_HOST") or address.hostname,
        "port": address.port or 5432,
        "database": address.path.lstrip("/"),
        "username": unquote(address.username or ""),
        "password": unquote(address.password or ""),
    }
    run = uuid.uuid4().hex[:8]
    source_schema, target_schema = f"datasync_test_{run}", f"datasync_test_{run}_copy"
    database = await connected(url)
    made = []
    try:
        await database.execute(
            f"CREATE SCHEMA {source_schema}; CREATE TABLE {source_schema}.orders AS "
            f"SELECT id, md5(id::text) AS note, now() AS at FROM generate_series(1, {ROWS}) id; "
            f"ALTER TABLE {source_schema}.orders ADD PRIMARY KEY (id)"
        )
        connection = {"name": f"helm-test-{run}", "type": "postgres", "version": "latest", "config": config}
        source = call("POST", "/sources", connection)
        made.append(f"/sources/{source['id']}")
        destination = call("POST", "/destinations", connection)
        made.append(f"/destinations/{destination['id']}")
        stream = {"stream_name": "orders", "destination_database": target_schema}
        job = call(
            "POST",
            "/jobs",
            {
                "name": f"helm-test-{run}",
                "source": {"id": source["id"]},
                "destination": {"id": destination["id"]},
                "frequency": "@monthly",
                "streams_config": {"selected_streams": {source_schema: [stream]}},
                "advanced_settings": {"verify": True},
            },
        )
        made.append(f"/jobs/{job['id']}")
        task = call("POST", f"/jobs/{job['id']}/sync")["task_id"]
        deadline = time.monotonic() + RUN_SECONDS
        while (state := call("GET", f"/jobs/{job['id']}/tasks/{task}"))["status"] in ("scheduled", "running"):
            if time.monotonic() > deadline:
                sys.exit(f"the run has not ended within {RUN_SECONDS} s: {state}")
            time.sleep(1)
        print(json.dumps(state, indent=1))
        at_source = await rows_of(database, source_schema)
        at_destination = await rows_of(database, target_schema)
        if at_source != at_destination or at_source[0] != ROWS:
            sys.exit(f"the rows differ: {at_source} at the source, {at_destination} at the destination")
        print(f"{ROWS} rows were replicated and are equal")
    finally:
        for path in reversed(made):
            call("DELETE", path)
        await database.execute(
            f"DROP SCHEMA IF EXISTS {source_schema} CASCADE; DROP SCHEMA IF EXISTS {target_schema} CASCADE"
        )
        await database.close()


asyncio.run(main())
