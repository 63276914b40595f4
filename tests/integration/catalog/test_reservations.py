"""Jobs' holds on sources and destinations: internal calls, job events, and the sweep of what came to nothing."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from libs.contracts.internal import (
    RESERVE_ENDPOINTS,
    RESOLVE_ENDPOINTS,
    EndpointsReserved,
    EndpointWanted,
    JobEndpoints,
    ReserveEndpoints,
    ResolveEndpoints,
)
from libs.contracts.jobs import (
    JobActivated,
    JobDeactivated,
    JobDeleted,
    JobRunEnded,
    JobRunRequested,
    JobUpdated,
)
from libs.core.clock import ManualClock, SystemClock
from libs.core.errors import Conflict, DataSyncError, InvalidInput, NotFound, Unauthenticated
from tests.integration.catalog.catalog import (
    PASSWORD,
    Catalog,
    config,
    destination_body,
    job_created,
    running_catalog,
    signer,
    source_body,
)


async def reserve(
    catalog: Catalog, source: Any, destination: Any, job_id: int = 1, job_name: str = "nightly"
) -> EndpointsReserved:
    """``source`` and ``destination`` are ids, or the fields of what is to be made."""
    ends = [EndpointWanted(id=end) if isinstance(end, int) else EndpointWanted(**end) for end in (source, destination)]
    call = ReserveEndpoints(
        project_id=catalog.project,
        job_id=job_id,
        job_name=job_name,
        actor="ada",
        source=ends[0],
        destination=ends[1],
    )
    return await catalog.call("job_orchestrator", RESERVE_ENDPOINTS, call)


async def resolve(catalog: Catalog, source_id: int, destination_id: int, issuer: str = "job_orchestrator") -> Any:
    claims = {
        "run_id": "r",
        "project_id": catalog.project,
        "source_id": source_id,
        "destination_id": destination_id,
    }
    grant = signer(issuer).sign_grant(claims)
    return await catalog.call("worker", RESOLVE_ENDPOINTS, ResolveEndpoints(grant=grant))


async def eventually(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(10):
        while not await condition():
            await asyncio.sleep(0.01)


async def references(catalog: Catalog, path: str, entity_id: int) -> dict[int, bool]:
    """The jobs that hold on, and whether each is confirmed."""
    document = await catalog.context.documents.collection(path).find_one({"_id": entity_id})
    assert document is not None
    return {item["job_id"]: item["reserved_until"] is None for item in document["state"]["references"]}


async def held(catalog: Catalog, source_id: int, expected: dict[int, bool]) -> None:
    async def as_expected() -> bool:
        return await references(catalog, "sources", source_id) == expected

    await eventually(as_expected)


async def test_reserved_ends_can_not_be_deleted_and_the_refusal_names_the_jobs(catalog: Catalog) -> None:
    source_id, destination_id = await catalog.create_source(), await catalog.create_destination()
    reserved = await reserve(catalog, source_id, destination_id, job_name="nightly copy")
    assert (reserved.source.id, reserved.destination.id) == (source_id, destination_id)
    assert reserved.source.name == "flights"
    assert PASSWORD not in reserved.source.config_json
    for path, entity_id in (("sources", source_id), ("destinations", destination_id)):
        refused = await catalog.delete(f"/{path}/{entity_id}")
        assert refused.status == 409
        assert '"nightly copy"' in refused.body["message"]


async def test_the_same_reservation_again_answers_the_same(catalog: Catalog) -> None:
    first = await reserve(catalog, source_body("new"), destination_body("new"))
    again = await reserve(catalog, source_body("new"), destination_body("new"))
    assert (first.source, first.destination) == (again.source, again.destination)
    assert len((await catalog.get("/sources")).data) == 1
    assert await references(catalog, "sources", first.source.id) == {1: False}


async def test_twenty_equal_reservations_at_once_make_one_of_each(catalog: Catalog) -> None:
    answers = await asyncio.gather(*(reserve(catalog, source_body("new"), destination_body("new")) for _ in range(20)))
    assert len({(answer.source.id, answer.destination.id) for answer in answers}) == 1
    assert len((await catalog.get("/destinations")).data) == 1


async def test_an_inline_end_that_equals_an_existing_one_is_that_one(catalog: Catalog) -> None:
    source_id = await catalog.create_source("flights")
    shown = json.loads((await catalog.get(f"/sources/{source_id}")).data["config"])
    for same in (config(), shown):
        reserved = await reserve(catalog, source_body("flights", config=same), destination_body())
        assert reserved.source.id == source_id
    with pytest.raises(Conflict) as refusal:
        await reserve(catalog, source_body("flights", config=config(host="other")), destination_body())
    assert refusal.value.errors[0].field == "source.name"


async def test_nothing_is_made_when_one_end_is_refused(catalog: Catalog) -> None:
    cases: list[tuple[Any, Any, type[DataSyncError], str]] = [
        (source_body("new"), 777_777, NotFound, ""),
        (source_body("new"), destination_body(config={}), InvalidInput, "destination.config"),
        (source_body("new"), destination_body(version="v0.9.0"), InvalidInput, "destination.version"),
        ({"name": "new"}, destination_body(), InvalidInput, "source.type"),
        (source_body("n" * 256), destination_body(), InvalidInput, "source.name"),
        (source_body("new", type="oracle"), destination_body(), InvalidInput, "source.type"),
    ]
    for source, destination, kind, field in cases:
        with pytest.raises(kind) as refusal:
            await reserve(catalog, source, destination)
        if field:
            assert refusal.value.errors[0].field.startswith(field), refusal.value.errors
    assert (await catalog.get("/sources")).data == []
    assert (await catalog.get("/destinations")).data == []


async def test_ends_of_another_project_can_not_be_reserved(catalog: Catalog) -> None:
    source_id, destination_id = await catalog.create_source(), await catalog.create_destination()
    with pytest.raises(NotFound):
        await reserve(catalog.in_new_project(), source_id, destination_id)


async def test_a_grant_resolves_both_configurations_with_their_secrets(catalog: Catalog) -> None:
    source_id, destination_id = await catalog.create_source(), await catalog.create_destination()
    resolved = await resolve(catalog, source_id, destination_id)
    assert resolved.source.config == config()
    assert resolved.destination.type == "parquet"
    with pytest.raises(Unauthenticated):
        await resolve(catalog, source_id, destination_id, issuer="worker")
    with pytest.raises(NotFound):
        await resolve(catalog.in_new_project(), source_id, destination_id)


async def test_a_job_confirms_moves_and_releases_its_holds(catalog: Catalog) -> None:
    source_id, destination_id = await catalog.create_source("a"), await catalog.create_destination()
    other_id = await catalog.create_source("b")
    await reserve(catalog, source_id, destination_id, job_id=11)
    created = job_created(source_id, destination_id)
    await catalog.job_happened(11, created)
    await held(catalog, source_id, {11: True})
    await reserve(catalog, other_id, destination_id, job_id=11)
    moved = created.model_dump() | {"source_id": other_id}
    await catalog.job_happened(11, JobUpdated(**moved, previous_source_id=source_id))
    await held(catalog, other_id, {11: True})
    await held(catalog, source_id, {})
    assert (await catalog.delete(f"/sources/{source_id}")).status == 200
    assert (await catalog.delete(f"/sources/{other_id}")).status == 409
    await catalog.job_happened(11, JobDeleted(source_id=other_id, destination_id=destination_id))
    await held(catalog, other_id, {})
    assert (await catalog.delete(f"/sources/{other_id}")).status == 200
    assert await references(catalog, "destinations", destination_id) == {}


async def test_sources_and_destinations_show_their_jobs(catalog: Catalog) -> None:
    source_id, destination_id = await catalog.create_source(), await catalog.create_destination("lake")
    untagged = (await catalog.get(f"/sources/{source_id}")).headers["ETag"]
    await catalog.job_happened(21, job_created(source_id, destination_id, "first"))
    await catalog.job_happened(22, job_created(source_id, destination_id, "second"), JobDeactivated())
    await catalog.job_happened(21, JobRunRequested(run_id="r", kind="sync", trigger="manual"))
    await catalog.job_happened(21, JobRunEnded(run_id="r", outcome="cancelled"))
    await catalog.job_happened(22, JobActivated(), JobDeactivated())

    async def both_shown() -> bool:
        states = [job["last_run_state"] for job in (await catalog.get(f"/sources/{source_id}")).data["jobs"]]
        return states == ["", "canceled"]

    await eventually(both_shown)
    shown = await catalog.get(f"/sources/{source_id}")
    second, first = shown.data["jobs"]
    assert (first["id"], first["name"], first["activate"], second["activate"]) == (21, "first", True, False)
    assert (first["dest_name"], first["destination_name"], first["destination_type"]) == ("lake", "lake", "parquet")
    assert first["last_run_time"].endswith("Z")
    assert "last_run_time" not in second
    assert shown.headers["ETag"] != untagged
    [destination] = (await catalog.get("/destinations")).data
    assert {(job["source_name"], job["source_type"]) for job in destination["jobs"]} == {("flights", "postgres")}
    await catalog.job_happened(21, JobDeleted(source_id=source_id, destination_id=destination_id))

    async def one_left() -> bool:
        [listed] = (await catalog.get("/sources")).data
        return [job["id"] for job in listed["jobs"]] == [22]

    await eventually(one_left)


@pytest.fixture
async def sweeping_catalog(mongod: str, database_prefix: str) -> AsyncIterator[tuple[Catalog, ManualClock]]:
    clock = ManualClock(SystemClock().now())
    async with running_catalog(mongod, database_prefix, clock=clock, reservation_sweep_seconds=0.02) as catalog:
        yield catalog, clock


async def test_reservations_whose_job_never_appears_are_released(
    sweeping_catalog: tuple[Catalog, ManualClock],
) -> None:
    catalog, clock = sweeping_catalog
    abandoned, used = await catalog.create_source("abandoned"), await catalog.create_source("used")
    destination_id = await catalog.create_destination()
    await reserve(catalog, abandoned, destination_id, job_id=1)
    await reserve(catalog, used, destination_id, job_id=2)
    await reserve(catalog, abandoned, destination_id, job_id=2)
    catalog.jobs.jobs[2] = JobEndpoints(job_id=2, source_id=used, destination_id=destination_id)
    clock.advance(59)
    assert await references(catalog, "sources", abandoned) == {1: False, 2: False}
    clock.advance(2)
    await held(catalog, abandoned, {})
    await held(catalog, used, {2: True})
    assert (await catalog.delete(f"/sources/{abandoned}")).status == 200
    assert (await catalog.delete(f"/sources/{used}")).status == 409
