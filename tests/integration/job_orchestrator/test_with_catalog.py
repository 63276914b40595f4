"""Jobs and the catalog that holds their ends: both services, over HTTP and the event log."""

import json
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from libs.contracts.internal import RESOLVE_ENDPOINTS, ResolveEndpoints
from libs.core.json import JsonObject
from libs.testing.waiting import until
from libs.web.internal import InternalClient
from tests.integration.job_orchestrator.catalog import running_catalog
from tests.integration.job_orchestrator.orchestrator import (
    Orchestrator,
    job_body,
    running_orchestrator,
    signer,
)

SOURCE: JsonObject = {
    "name": "shop",
    "type": "postgres",
    "version": "v1.0.0",
    "config": {
        "host": "db.example",
        "port": 5432,
        "database": "shop",
        "username": "ada",
        "password": "s3cr3t-of-ada",
    },
}
DESTINATION: JsonObject = {
    "name": "lake",
    "type": "parquet",
    "version": "v1.0.0",
    "config": {"type": "PARQUET", "writer": {"local_path": "/data/lake"}},
}


@pytest.fixture
async def both(mongod: str, database_prefix: str) -> AsyncIterator[tuple[Orchestrator, Orchestrator, InternalClient]]:
    """The orchestrator, the same client pointed at catalog, and a worker that calls catalog."""
    async with (
        running_catalog(mongod, database_prefix) as (catalog_url, settings),
        running_orchestrator(mongod, database_prefix, catalog_url) as orchestrator,
    ):
        worker = InternalClient(settings, signer("worker"))
        try:
            yield orchestrator, replace(orchestrator, base_url=catalog_url, audience="catalog"), worker
        finally:
            await worker.close()


async def test_a_job_its_ends_and_its_run_hold_together(
    both: tuple[Orchestrator, Orchestrator, InternalClient],
) -> None:
    orchestrator, catalog, worker = both
    created = await orchestrator.post("/jobs", job_body(source=SOURCE, destination=DESTINATION))
    job_id = created.data["id"]
    assert "s3cr3t-of-ada" not in json.dumps(created.body)
    [job] = (await orchestrator.get("/jobs")).data
    assert (job["source"]["name"], job["destination"]["type"]) == ("shop", "parquet")
    assert "s3cr3t-of-ada" not in json.dumps(job)

    source_id, destination_id = job["source"]["id"], job["destination"]["id"]
    in_use = await catalog.request("DELETE", f"/sources/{source_id}")
    assert in_use.status == 409
    assert "nightly" in in_use.body["message"]

    async def listed() -> bool:
        [source] = (await catalog.get("/sources")).data
        return [item["id"] for item in source["jobs"]] == [job_id]

    await until(listed)
    await orchestrator.post(f"/jobs/{job_id}/sync")
    run = await orchestrator.claimed()
    resolved = await worker.call(RESOLVE_ENDPOINTS, ResolveEndpoints(grant=run.grant))
    assert (resolved.source.id, resolved.destination.id) == (source_id, destination_id)
    assert resolved.source.config["password"] == "s3cr3t-of-ada"
    await orchestrator.finish(run)

    renamed = job["source"] | {"name": "renamed"}
    assert (await catalog.put(f"/sources/{source_id}", {k: v for k, v in renamed.items() if k != "id"})).status == 200

    async def shows_the_new_name() -> bool:
        return str((await orchestrator.get(f"/jobs/{job_id}")).data["source"]["name"]) == "renamed"

    await until(shows_the_new_name)

    async def is_free() -> bool:
        return (await catalog.request("DELETE", f"/sources/{source_id}")).status == 200

    assert (await orchestrator.request("DELETE", f"/jobs/{job_id}")).status == 200
    await until(is_free)


async def test_a_job_moves_to_another_destination_and_frees_the_first(
    both: tuple[Orchestrator, Orchestrator, InternalClient],
) -> None:
    orchestrator, catalog, _ = both
    job_id = (await orchestrator.post("/jobs", job_body(source=SOURCE, destination=DESTINATION))).data["id"]
    before = (await orchestrator.get(f"/jobs/{job_id}")).data

    async def known() -> bool:
        """The seed's PUT names its ends without ids, so their names must have arrived."""
        again = await orchestrator.put(f"/jobs/{job_id}", job_body("again", source=SOURCE, destination=DESTINATION))
        return again.status == 200

    await until(known)
    after = (await orchestrator.get(f"/jobs/{job_id}")).data
    assert (after["source"]["id"], after["destination"]["id"]) == (before["source"]["id"], before["destination"]["id"])

    other = DESTINATION | {"name": "lake 2"}
    moved = await orchestrator.put(
        f"/jobs/{job_id}", job_body(source={"id": before["source"]["id"]}, destination=other)
    )
    assert moved.status == 200, moved.body
    now = (await orchestrator.get(f"/jobs/{job_id}")).data["destination"]
    assert (now["name"], now["id"] != before["destination"]["id"]) == ("lake 2", True)

    async def first_is_free() -> bool:
        return (await catalog.request("DELETE", f"/destinations/{before['destination']['id']}")).status == 200

    await until(first_is_free)
    assert (await catalog.request("DELETE", f"/destinations/{now['id']}")).status == 409


async def test_one_of_two_ends_missing_leaves_nothing_behind(
    both: tuple[Orchestrator, Orchestrator, InternalClient],
) -> None:
    orchestrator, catalog, _ = both
    refused = await orchestrator.post("/jobs", job_body(source=SOURCE, destination={"id": 77}))
    assert refused.status == 404
    assert (await catalog.get("/sources")).data == []
    assert (await orchestrator.get("/jobs")).data == []
