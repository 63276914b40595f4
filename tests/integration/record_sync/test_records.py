"""Developer sync records as specified: every route, field, constraint and row of the error table."""

import asyncio
from typing import Any

import pytest

from libs.core.clock import ManualClock
from libs.core.principal import Principal
from tests.integration.record_sync.record_service import RecordService, record_body, running_record_service

FIELDS = {
    "id",
    "developerId",
    "resourceType",
    "resourceKey",
    "data",
    "lastSyncedAt",
    "status",
    "createdAt",
    "updatedAt",
    "metadata",
}


async def test_a_created_record_is_answered_whole_and_fetched_the_same(service: RecordService) -> None:
    answer = await service.request("POST", body=record_body(metadata={"origin": "cli"}))
    created = answer.created()
    assert created.keys() == FIELDS
    assert created["status"] == "ACTIVE"
    assert created["metadata"] == {"origin": "cli"}
    assert created["createdAt"] == created["updatedAt"] == created["lastSyncedAt"]
    assert answer.headers["Location"] == f"/api/v1/sync/records/{created['id']}"
    assert answer.headers["ETag"] == '"1"'
    fetched = await service.request("GET", f"/{created['id']}")
    assert fetched.content == answer.content


async def test_times_move_as_the_seed_says(mongod: str, database_prefix: str) -> None:
    """``lastSyncedAt`` is null until a write leaves the status ACTIVE, and that write's time from then on."""
    clock = ManualClock()
    async with running_record_service(mongod, database_prefix, clock=clock) as service:
        created = await service.create(status="PENDING_UPDATE")
        assert created["lastSyncedAt"] is None
        path = f"/{created['id']}"
        seen = []
        bodies: list[Any] = [
            {"data": {}},
            {"status": "ACTIVE"},
            {"data": {"a": 1}},
            {"status": "ERROR"},
            {"metadata": {}},
        ]
        for body in bodies:
            clock.advance(1)
            seen.append((await service.request("PATCH", path, body)).ok())
        assert [item["lastSyncedAt"] and item["lastSyncedAt"][17:19] for item in seen] == [None, "02", "03", "03", "03"]
        assert [item["updatedAt"][17:19] for item in seen] == ["01", "02", "03", "04", "05"]
        assert {item["createdAt"] for item in seen} == {created["createdAt"]}


async def test_numbers_and_texts_come_back_as_they_were_sent(service: RecordService) -> None:
    data = '{"price": 1.10, "exact":0.1000000000000000000000000000000000001, "big": -2.50E+3, "é": "\\u00e9\\n\\u0041"}'
    text = f'{{"developerId": "d", "resourceType": "T", "resourceKey": "k", "data": {data} , "metadata": {{"v": 2.0}}}}'
    created = await service.request("POST", text=text)
    expected = (
        '"data":{"price":1.10,"exact":0.1000000000000000000000000000000000001,"big":-2.50E+3,"é":"é\\nA"}'.encode()
    )
    assert expected in created.content
    assert b'"metadata":{"v":2.0}' in created.content
    fetched = await service.request("GET", f"/{created.body['id']}")
    assert expected in fetched.content
    assert expected in (await service.request("GET")).content


async def test_a_patch_changes_what_it_names_and_nothing_else(service: RecordService) -> None:
    created = await service.create(metadata={"a": 1})
    path = f"/{created['id']}"
    patched = await service.request("PATCH", path, {"data": {"enabled": True}, "status": "PENDING_SYNC_CONFIRMATION"})
    assert patched.headers["ETag"] == '"2"'
    assert patched.ok() | {"data": 0, "status": 0, "updatedAt": 0} == created | {"data": 0, "status": 0, "updatedAt": 0}
    assert patched.body["data"] == {"enabled": True}
    unchanged = await service.request("PATCH", path, {})
    assert (unchanged.ok(), unchanged.headers["ETag"]) == (patched.body, '"2"')


async def test_a_deleted_record_is_gone_and_its_key_free_again(service: RecordService) -> None:
    created = await service.create("k")
    deleted = await service.request("DELETE", f"/{created['id']}")
    assert (deleted.status, deleted.content) == (204, b"")
    for method, body in (("GET", None), ("PATCH", {"data": {}}), ("DELETE", None)):
        assert (await service.request(method, f"/{created['id']}", body)).status == 404
    assert (await service.list())["total"] == 0
    again = await service.create("k")
    assert again["id"] != created["id"]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"developerId": None}, "developerId"),
        ({"developerId": ""}, "developerId"),
        ({"developerId": "x" * 129}, "developerId"),
        ({"resourceType": 7}, "resourceType"),
        ({"resourceKey": ""}, "resourceKey"),
        ({"data": [1]}, "data"),
        ({"data": "{}"}, "data"),
        ({"data": None}, "data"),
        ({"status": "active"}, "status"),
        ({"status": "1A"}, "status"),
        ({"status": "A\n"}, "status"),
        ({"status": "A" * 65}, "status"),
        ({"metadata": {"x": "é" * 510}}, "metadata"),
        ({"metadata": []}, "metadata"),
        ({"id": "a1b2"}, "id"),
        ({"createdAt": "2026-01-01T00:00:00Z"}, "createdAt"),
        ({"colour": "red"}, "colour"),
        ({"data": {"a": {"b": "\x00"}}}, "data.a.b"),
    ],
)
async def test_a_creation_with_a_wrong_field_names_it(service: RecordService, changes: Any, field: str) -> None:
    answer = await service.request("POST", body=record_body(**changes))
    assert answer.status == 400, answer.content
    assert answer.fields == [field]
    assert answer.body["request_id"] == answer.headers["X-Request-Id"]


@pytest.mark.parametrize("field", ["developerId", "resourceType", "resourceKey", "data"])
async def test_a_missing_required_field_is_named(service: RecordService, field: str) -> None:
    body = record_body()
    del body[field]
    answer = await service.request("POST", body=body)
    assert (answer.status, answer.fields) == (400, [field])


@pytest.mark.parametrize(
    "text", ["", "{", "null", "[]", '{"data": {"x": 1e400}}', '{"data": {}, "data": {}}', '{"data": NaN}']
)
async def test_a_body_that_is_no_record_is_400(service: RecordService, text: str) -> None:
    assert (await service.request("POST", text=text)).status == 400


async def test_metadata_of_exactly_1024_bytes_as_compact_json_is_taken(service: RecordService) -> None:
    """However it was sent: here with escapes and white space that make it 3 KB."""
    metadata = {"x": "é" * 508}
    assert len('{"x":""}') + 2 * 508 == 1024
    created = await service.create(metadata=metadata)
    assert created["metadata"] == metadata


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        ({"developerId": "dev-2"}, ["developerId"]),
        ({"resourceType": "T", "resourceKey": "k"}, ["resourceType", "resourceKey"]),
        ({"id": "x", "lastSyncedAt": None}, ["id", "lastSyncedAt"]),
        ({"data": None}, ["data"]),
        ({"status": None}, ["status"]),
        ({"metadata": {"x": "y" * 1024}}, ["metadata"]),
        ({"state": "ACTIVE"}, ["state"]),
    ],
)
async def test_a_patch_of_anything_else_is_refused(service: RecordService, body: Any, fields: list[str]) -> None:
    created = await service.create()
    answer = await service.request("PATCH", f"/{created['id']}", body)
    assert (answer.status, sorted(answer.fields)) == (400, sorted(fields))
    assert (await service.request("GET", f"/{created['id']}")).ok() == created


async def test_without_a_credential_it_is_401(service: RecordService) -> None:
    async with service.session.get(f"{service.base_url}/api/v1/sync/records") as response:
        assert response.status == 401
        assert response.headers["WWW-Authenticate"].startswith("Bearer")
        assert (await response.json())["code"] == "unauthenticated"


async def test_scopes_are_enforced(service: RecordService) -> None:
    created = await service.create()
    path = f"/{created['id']}"
    reader, writer = service.with_scopes("sync:read"), service.with_scopes("sync:write")
    assert (await reader.request("GET", path)).status == 200
    assert (await writer.request("PATCH", path, {"data": {}})).status == 200
    for refused in (
        await reader.request("POST", body=record_body("other")),
        await reader.request("PATCH", path, {"data": {}}),
        await reader.request("DELETE", path),
        await reader.request("POST", ":batch", {"operations": [{"op": "delete", "id": created["id"]}]}),
        await writer.request("GET", path),
        await writer.request("GET"),
        await writer.request("GET", "/changes"),
        await writer.request("GET", f"{path}/history"),
        await service.with_scopes("jobs:write").request("DELETE", path),
    ):
        assert refused.status == 403, refused.content


async def test_a_key_bound_to_a_developer_sees_and_writes_that_developer_alone(service: RecordService) -> None:
    mine = await service.create("mine", developerId="dev-1")
    other = await service.create("other", developerId="dev-2")
    bound = service.for_developer("dev-1")
    assert [item["id"] for item in (await bound.list())["data"]] == [mine["id"]]
    assert (await bound.list(developerId="dev-1"))["total"] == 1
    assert (await bound.request("GET", f"/{mine['id']}")).ok() == mine
    path = f"/{other['id']}"
    for refused in (
        await bound.request("GET", developerId="dev-2"),
        await bound.request("GET", path),
        await bound.request("GET", path, as_of="2100-01-01T00:00:00Z"),
        await bound.request("GET", f"{path}/history"),
        await bound.request("PATCH", path, {"data": {}}),
        await bound.request("DELETE", path),
        await bound.request("POST", body=record_body("new", developerId="dev-2")),
        await bound.request("GET", "/changes", developerId="dev-2"),
    ):
        assert (refused.status, refused.body["code"]) == (403, "other_developer")
    changes = (await bound.request("GET", "/changes")).ok()["data"]
    assert {item["developerId"] for item in changes} == {"dev-1"}
    results = (await bound.request("POST", ":batch", {"operations": [{"op": "delete", "id": other["id"]}]})).ok()
    assert results["results"][0]["status"] == 403


async def test_a_record_of_another_project_is_403_and_an_unknown_one_404(service: RecordService) -> None:
    created = await service.create()
    stranger = service.in_new_project()
    for method, body in (("GET", None), ("PATCH", {"data": {}}), ("DELETE", None)):
        assert (await stranger.request(method, f"/{created['id']}", body)).status == 403
        for unknown in ("00000000-0000-7000-8000-000000000000", "7", "a1b2c3d4-e5f6-...", created["id"][:-1]):
            answer = await service.request(method, f"/{unknown}", body)
            assert (answer.status, answer.body["code"]) == (404, "record_not_found")
    await stranger.create()
    assert (await stranger.list())["total"] == 1


async def test_somebody_with_several_projects_names_one(service: RecordService) -> None:
    other = service.in_new_project()
    both = Principal(
        kind="user",
        subject="1",
        name="ada",
        projects={service.project: "owner", other.project: "member"},
        scopes=("*",),
    )
    await service.create()
    unnamed = await service.request("GET", principal=both)
    assert (unnamed.status, unnamed.fields) == (400, ["X-Project-Id"])
    for project, total in ((service.project, 1), (other.project, 0)):
        found = await service.request("GET", principal=both, headers={"X-Project-Id": str(project)})
        assert found.ok()["total"] == total
    for project in (service.project, other.project):
        headers = {"X-Project-Id": str(project), "Idempotency-Key": f"once-{service.project}"}
        created = await service.request("POST", body=record_body("k"), principal=both, headers=headers)
        listed = await service.request("GET", principal=both, headers={"X-Project-Id": str(project)})
        assert listed.ok()["data"][0] == created.created()
    foreign = await service.request("GET", principal=both, headers={"X-Project-Id": "1"})
    assert foreign.status == 403


async def test_a_second_record_of_the_same_key_is_409(service: RecordService) -> None:
    await service.create("k")
    answer = await service.request("POST", body=record_body("k"))
    assert (answer.status, answer.fields) == (409, ["resourceKey"])
    await service.create("k", developerId="dev-2")
    await service.create("k", resourceType="PROJECT_CONFIG")


async def test_500_creations_of_one_key_at_once_make_one_record(service: RecordService) -> None:
    answers = await asyncio.gather(*(service.request("POST", body=record_body("k")) for _ in range(500)))
    assert sorted(answer.status for answer in answers) == [201] + [409] * 499
    listed = await service.list()
    [created] = [answer.body for answer in answers if answer.status == 201]
    assert (listed["total"], listed["data"]) == (1, [created])


async def test_concurrent_patches_of_different_fields_both_take_effect(service: RecordService) -> None:
    for number in range(20):
        created = await service.create(f"k{number}")
        path = f"/{created['id']}"
        await asyncio.gather(
            service.request("PATCH", path, {"data": {"enabled": True}}),
            service.request("PATCH", path, {"status": "ERROR"}),
            service.request("PATCH", path, {"metadata": {"by": "cli"}}),
        )
        after = (await service.request("GET", path)).ok()
        assert (after["data"], after["status"], after["metadata"]) == ({"enabled": True}, "ERROR", {"by": "cli"})


async def test_of_two_patches_of_the_same_version_the_later_is_412(service: RecordService) -> None:
    created = await service.create()
    path, known = f"/{created['id']}", {"If-Match": '"1"'}
    answers = await asyncio.gather(
        *(service.request("PATCH", path, {"data": {"by": number}}, headers=known) for number in range(5))
    )
    assert sorted(answer.status for answer in answers) == [200] + [412] * 4
    [winner] = [answer.body for answer in answers if answer.status == 200]
    assert (await service.request("GET", path)).ok() == winner
    assert (await service.request("DELETE", path, headers=known)).status == 412
    assert (await service.request("DELETE", path, headers={"If-Match": '"2"'})).status == 204


async def test_a_caller_who_has_this_version_gets_304(service: RecordService) -> None:
    created = await service.create()
    path = f"/{created['id']}"
    assert (await service.request("GET", path, headers={"If-None-Match": '"1"'})).status == 304
    await service.request("PATCH", path, {"data": {}})
    assert (await service.request("GET", path, headers={"If-None-Match": '"1"'})).status == 200


async def test_a_repeated_creation_with_its_idempotency_key_gives_the_same_record(service: RecordService) -> None:
    key = {"Idempotency-Key": f"first-{service.project}"}
    first = await service.request("POST", body=record_body("k"), headers=key)
    await service.request("PATCH", f"/{first.created()['id']}", {"status": "ERROR"})
    again = await service.request("POST", body=record_body("k"), headers=key)
    assert (again.status, again.content) == (201, first.content)
    other = await service.request("POST", body=record_body("other"), headers=key)
    assert other.status == 422


async def test_data_over_the_limit_is_413_and_says_so(service: RecordService) -> None:
    answer = await service.request("POST", body=record_body(data={"x": '"' * 500_000}))
    assert (answer.status, answer.fields) == (413, ["data"])
    whole = await service.request("POST", body=record_body(data={"x": "y" * 1_100_000}))
    assert whole.status == 413


async def test_other_media_types_and_methods_are_refused(service: RecordService) -> None:
    assert (await service.request("POST", text="x", headers={"Content-Type": "text/plain"})).status == 415
    answer = await service.request("PUT", "/7", {})
    assert answer.status == 405
    assert set(answer.headers["Allow"].split(",")) >= {"GET", "PATCH", "DELETE"}


async def test_a_broken_document_is_500_and_tells_nothing_of_the_inside(service: RecordService) -> None:
    created = await service.create()
    records = service.context.documents.collection("records")
    await records.update_one({"_id": created["id"]}, {"$unset": {"state.status": ""}})
    answer = await service.request("GET", f"/{created['id']}")
    assert (answer.status, answer.body["code"]) == (500, "internal_error")
    assert answer.headers["Content-Type"].startswith("application/problem+json")
    assert b"Traceback" not in answer.content
    assert b"status" not in answer.content.replace(b'"status":500', b"")


async def test_history_and_as_of_show_every_version(mongod: str, database_prefix: str) -> None:
    clock = ManualClock()
    async with running_record_service(mongod, database_prefix, clock=clock) as service:
        created = await service.create(data={"v": 1})
        path = f"/{created['id']}"
        clock.advance(60)
        await service.request("PATCH", path, {"data": {"v": 2}, "status": "ERROR"})
        clock.advance(60)
        await service.request("DELETE", path)
        events = (await service.request("GET", f"{path}/history")).ok()["data"]
        assert [(item["version"], item["type"], item["actor"]) for item in events] == [
            (3, "record_deleted", "ada's key"),
            (2, "record_updated", "ada's key"),
            (1, "record_created", "ada's key"),
        ]
        assert events[1]["changes"] == {"data": {"v": 2}, "status": "ERROR"}
        assert len((await service.request("GET", f"{path}/history", before=3, limit=1)).ok()["data"]) == 1
        assert (await service.request("GET", path, as_of="2026-01-01T00:00:30Z")).ok() == created
        then = (await service.request("GET", path, as_of="2026-01-01T01:01:30+01:00")).ok()
        assert (then["data"], then["status"]) == ({"v": 2}, "ERROR")
        for moment, status in (("2025-12-31T00:00:00Z", 404), ("2026-01-02T00:00:00Z", 404), ("yesterday", 400)):
            assert (await service.request("GET", path, as_of=moment)).status == status
