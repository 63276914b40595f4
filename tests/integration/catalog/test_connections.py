"""Sources and destinations over HTTP, on a real mongod."""

import asyncio
import json
from collections import Counter
from typing import Any

import pytest

from libs.core.clock import isoformat_z
from libs.core.principal import Principal
from tests.integration.catalog.catalog import PASSWORD, Catalog, config, destination_body, source_body

ROLES = pytest.mark.parametrize(
    ("path", "body"), [("/sources", source_body("one")), ("/destinations", destination_body("one"))]
)


@ROLES
async def test_what_was_created_is_listed_and_read(catalog: Catalog, path: str, body: dict[str, Any]) -> None:
    assert (await catalog.get(path)).data == []
    created = await catalog.post(path, body)
    assert created.headers["ETag"] == '"1"'
    assert {name: created.data[name] for name in ("name", "type", "version")} == {
        name: body[name] for name in ("name", "type", "version")
    }
    await catalog.post(path, {**body, "name": "two"})
    listed = (await catalog.get(path)).data
    assert [item["name"] for item in listed] == ["two", "one"]
    [one] = [item for item in listed if item["name"] == "one"]
    assert one == (await catalog.get(f"{path}/{created.data['id']}")).data
    assert (one["created_by"], one["updated_by"], one["jobs"]) == ("ada", "ada", [])
    assert one["created_at"] == one["updated_at"]
    assert one["created_at"].endswith("Z")
    assert json.loads(one["config"]).keys() == body["config"].keys()
    expanded = (await catalog.get(f"{path}/{created.data['id']}?expand=config")).data
    assert expanded["config"] == json.loads(one["config"])


@ROLES
async def test_a_second_one_of_the_same_name_is_refused(catalog: Catalog, path: str, body: dict[str, Any]) -> None:
    await catalog.post(path, body)
    refused = await catalog.post(path, {**body, "name": "  one "})
    assert (refused.status, refused.body["success"], refused.fields) == (409, False, ["name"])


@ROLES
async def test_a_deleted_one_is_gone_and_its_name_free(catalog: Catalog, path: str, body: dict[str, Any]) -> None:
    entity_id = (await catalog.post(path, body)).data["id"]
    deleted = await catalog.delete(f"{path}/{entity_id}")
    assert deleted.data["name"] == "one"
    assert deleted.body["message"]
    assert (await catalog.get(f"{path}/{entity_id}")).status == 404
    assert (await catalog.delete(f"{path}/{entity_id}")).status == 404
    assert (await catalog.put(f"{path}/{entity_id}", body)).status == 404
    assert (await catalog.post(path, body)).data["id"] != entity_id


async def test_a_change_shows_who_and_when_and_keeps_the_id(catalog: Catalog) -> None:
    source_id = await catalog.create_source("one")
    eve = Principal(kind="user", subject="u2", name="eve", projects={catalog.project: "member"}, scopes=("*",))
    changed = await catalog.put(f"/sources/{source_id}", source_body("renamed"), principal=eve)
    assert (changed.data["id"], changed.data["name"]) == (source_id, "renamed")
    shown = (await catalog.get(f"/sources/{source_id}")).data
    assert (shown["name"], shown["created_by"], shown["updated_by"]) == ("renamed", "ada", "eve")
    await catalog.create_source("one")


async def test_a_change_of_the_type_is_refused(catalog: Catalog) -> None:
    destination_id = await catalog.create_destination()
    postgres = destination_body(type="postgres", config=config())
    refused = await catalog.put(f"/destinations/{destination_id}", postgres)
    assert (refused.status, refused.fields) == (400, ["type"])


async def test_a_change_without_difference_makes_no_event(catalog: Catalog) -> None:
    source_id = await catalog.create_source()
    again = await catalog.put(f"/sources/{source_id}", source_body())
    assert again.headers["ETag"] == '"1"'


async def test_a_stale_version_is_refused(catalog: Catalog) -> None:
    source_id = await catalog.create_source()
    tag = (await catalog.get(f"/sources/{source_id}")).headers["ETag"]
    await catalog.put(f"/sources/{source_id}", source_body("first"), headers={"If-Match": tag})
    for call in (
        catalog.put(f"/sources/{source_id}", source_body("second"), headers={"If-Match": tag}),
        catalog.delete(f"/sources/{source_id}", headers={"If-Match": tag}),
    ):
        assert (await call).status == 412


async def test_an_unchanged_answer_is_not_sent_again(catalog: Catalog) -> None:
    source_id = await catalog.create_source()
    for path in (f"/sources/{source_id}", "/sources"):
        tag = (await catalog.get(path)).headers["ETag"]
        again = await catalog.get(path, headers={"If-None-Match": tag})
        assert (again.status, again.body) == (304, None)


async def test_the_same_idempotency_key_creates_once(catalog: Catalog) -> None:
    key = {"Idempotency-Key": f"key-{catalog.project}"}
    first = await catalog.post("/sources", source_body(), headers=key)
    again = await catalog.post("/sources", source_body(), headers=key)
    assert first.data == again.data
    assert (await catalog.post("/sources", source_body("other"), headers=key)).status == 422
    assert len((await catalog.get("/sources")).data) == 1


@pytest.mark.parametrize("text", [False, True])
async def test_a_configuration_is_an_object_or_a_text(catalog: Catalog, text: bool) -> None:
    sent = json.dumps(config()) if text else config()
    created = (await catalog.post("/sources", source_body(config=sent))).data
    assert isinstance(created["config"], str) is text
    shown = (await catalog.get(f"/sources/{created['id']}")).data
    assert json.loads(shown["config"])["host"] == "db.example.com"


async def test_postgresql_comes_back_as_postgres_and_latest_as_a_version(catalog: Catalog) -> None:
    created = (await catalog.post("/sources", source_body(type="postgresql", version="latest"))).data
    assert (created["type"], created["version"]) == ("postgres", "v1.0.0")


async def test_of_500_creations_of_one_name_one_succeeds_and_honest_ones_do_not_suffer(catalog: Catalog) -> None:
    same = [catalog.post("/sources", source_body("same")) for _ in range(500)]
    honest = [catalog.post("/sources", source_body(f"honest {number}")) for number in range(100)]
    answers = await asyncio.gather(*same, *honest)
    assert Counter(answer.status for answer in answers[:500]) == {200: 1, 409: 499}
    assert Counter(answer.status for answer in answers[500:]) == {200: 100}
    assert len((await catalog.get("/sources")).data) == 101


async def test_changes_at_once_all_take_effect_and_leave_one_secret(catalog: Catalog) -> None:
    source_id = await catalog.create_source()
    renamings = [catalog.put(f"/sources/{source_id}", source_body(f"name {number}")) for number in range(30)]
    passwords = [
        catalog.put(f"/sources/{source_id}", source_body(config=config(password=f"new {number}")))
        for number in range(4)
    ]
    answers = await asyncio.gather(*renamings, *passwords)
    assert Counter(answer.status for answer in answers) == {200: 34}
    stored = catalog.context.documents.plain("secrets")
    assert await stored.count_documents({"project_id": catalog.project}) == 1
    shown = (await catalog.get(f"/sources/{source_id}")).data
    assert (await catalog.post("/sources/test", source_body(config=shown["config"]))).status == 200


async def test_another_projects_things_are_not_there(catalog: Catalog) -> None:
    source_id = await catalog.create_source()
    stranger = catalog.in_new_project()
    assert (await stranger.get("/sources")).data == []
    for method in ("GET", "PUT", "DELETE"):
        assert (await stranger.request(method, f"/sources/{source_id}", source_body("mine"))).status == 404
    assert (await stranger.get(f"/sources/{source_id}/history")).status == 404
    assert (await stranger.get(f"/sources/{source_id}?as_of=2030-01-01T00:00:00Z")).status == 404
    assert (await stranger.get("/sources", project=catalog.project)).status == 403
    await stranger.create_source("flights")


async def test_history_tells_who_did_what_and_any_moment_can_be_read(catalog: Catalog) -> None:
    source_id = await catalog.create_source("one")
    created_at = (await catalog.get(f"/sources/{source_id}")).data["created_at"]
    while isoformat_z(catalog.context.clock.now()) == created_at:
        await asyncio.sleep(0.001)
    await catalog.put(f"/sources/{source_id}", source_body("two", config=config(host="other.example.com")))
    await catalog.delete(f"/sources/{source_id}")
    events = (await catalog.get(f"/sources/{source_id}/history")).data
    assert [event["type"] for event in events] == ["source_deleted", "source_updated", "source_created"]
    assert [event["version"] for event in events] == [3, 2, 1]
    assert {event["actor"] for event in events} == {"ada"}
    assert events[1]["data"]["config"]["host"] == "other.example.com"
    assert PASSWORD not in json.dumps(events)
    before = (await catalog.get(f"/sources/{source_id}?as_of={created_at}")).data
    assert (before["name"], json.loads(before["config"])["host"]) == ("one", "db.example.com")
    assert (await catalog.get(f"/sources/{source_id}?as_of=2020-01-01T00:00:00Z")).status == 404
    assert (await catalog.get(f"/sources/{source_id}?as_of=yesterday")).fields == ["as_of"]


async def test_a_name_is_checked_for_being_unique(catalog: Catalog) -> None:
    await catalog.create_source("one")
    for kind, name, status in (("source", "one", 409), ("source", "two", 200), ("destination", "one", 200)):
        answer = await catalog.post("/check-unique", {"name": name, "entity_type": kind})
        assert answer.status == status
    assert (await catalog.post("/check-unique", {"name": "two", "entity_type": "source"})).data == {"unique": True}


async def test_a_read_only_credential_reads_and_changes_nothing(catalog: Catalog) -> None:
    reader = Principal(
        kind="api_key", subject="k1", name="reader", projects={catalog.project: "member"}, scopes=("sources:read",)
    )
    assert (await catalog.get("/sources", principal=reader)).status == 200
    assert (await catalog.post("/sources", source_body(), principal=reader)).status == 403
    lacking = await catalog.get("/destinations", principal=reader)
    assert (lacking.status, lacking.body["code"]) == (403, "insufficient_scope")
    assert 'error="insufficient_scope", scope="destinations:read"' in lacking.headers["WWW-Authenticate"]


DEEP = b'{"name":"n","type":"postgres","version":"v1.0.0","config":' + b'{"a":' * 10_000 + b"1" + b"}" * 10_001

BAD_BODIES: list[tuple[str, Any, int, str]] = [
    ("malformed JSON", b'{"name": ', 400, ""),
    ("no object", b"[]", 400, ""),
    ("an empty body", b"", 400, ""),
    ("nesting", DEEP, 400, ""),
    ("nesting in the text", source_body(config="[" * 10_000), 400, ""),
    ("a duplicate key", b'{"name":"a","name":"b"}', 400, "name"),
    ("no name", {"type": "postgres", "version": "v1.0.0", "config": {}}, 400, "name"),
    ("an empty name", source_body("  "), 400, "name"),
    ("an over-long name", source_body("n" * 256), 400, "name"),
    ("a name of a hundred thousand", source_body("n" * 100_000), 400, "name"),
    ("a control character", source_body("a\nb"), 400, "name"),
    ("a NUL", source_body("a\x00b"), 400, "name"),
    ("a number for a name", source_body() | {"name": 7}, 400, "name"),
    ("null for a name", source_body() | {"name": None}, 400, "name"),
    ("an unknown type", source_body(type="oracle"), 400, "type"),
    ("a destination's type", source_body(type="parquet"), 400, "type"),
    ("a version that never was", source_body(version="v0.1.0"), 400, "version"),
    ("a version yet to come", source_body(version="v99.0.0"), 400, "version"),
    ("a version that is none", source_body(version="newest"), 400, "version"),
    ("no configuration", {"name": "n", "type": "postgres", "version": "v1.0.0"}, 400, "config"),
    ("a configuration that is a list", source_body(config=[]), 400, "config"),
    ("a text that is no object", source_body(config="[]"), 400, "config"),
    ("a text that is no JSON", source_body(config="host=db"), 400, ""),
    ("a missing field", source_body(config={"host": "db"}), 400, "config.database"),
    ("an unknown field", source_body(config=config(hots="x")), 400, "config.hots"),
    ("a wrong type", source_body(config=config(port="five")), 400, "config.port"),
    ("a port out of bounds", source_body(config=config(port=70_000)), 400, "config.port"),
    ("an integer over 2^63", source_body(config=config(port=2**63)), 400, "config.port"),
    ("an integer over 2^63 in the text", source_body(config=json.dumps(config(port=2**70))), 400, "port"),
    ("infinity", b'{"name":"n","type":"postgres","version":"v1.0.0","config":{"port":Infinity}}', 400, ""),
]


@pytest.mark.parametrize(("body", "status", "field"), [case[1:] for case in BAD_BODIES], ids=[c[0] for c in BAD_BODIES])
async def test_bad_input_is_refused_by_field(catalog: Catalog, body: Any, status: int, field: str) -> None:
    raw = {"data": body, "headers": {"Content-Type": "application/json"}} if isinstance(body, bytes) else {"body": body}
    refused = await catalog.post("/sources", **raw)
    assert (refused.status, refused.body["success"]) == (status, False), refused.body
    assert refused.body["message"]
    if field:
        assert any(name.startswith(field) for name in refused.fields), refused.body
    assert (await catalog.get("/sources")).data == []


async def test_unknown_fields_beside_the_configuration_are_tolerated(catalog: Catalog) -> None:
    assert (await catalog.post("/sources", source_body() | {"filter": "", "disabled": False})).status == 200


async def test_a_configuration_too_large_for_an_event_is_refused(catalog: Catalog) -> None:
    large = config(ssl={"mode": "require", "server_ca": "x" * 900_000})
    refused = await catalog.post("/sources", source_body(config=large))
    assert (refused.status, refused.fields) == (413, ["config"])
    over_the_limit = config(ssl={"mode": "require", "server_ca": "x" * 1_100_000})
    assert (await catalog.post("/sources", source_body(config=over_the_limit))).status == 413


@pytest.mark.parametrize("text", ["abc", "-1", str(2**63), "9" * 40, "7777"])
async def test_an_id_that_names_nothing_is_not_found(catalog: Catalog, text: str) -> None:
    assert (await catalog.get(f"/sources/{text}")).status == 404


async def test_another_media_type_is_refused(catalog: Catalog) -> None:
    refused = await catalog.post("/sources", data=b"{}", headers={"Content-Type": "text/plain"})
    assert refused.status == 415
