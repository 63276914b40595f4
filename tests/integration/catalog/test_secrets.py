"""Secrets: never shown, never in events, and honoured only where they belong."""

import base64
import json
import os
from typing import Any

import pytest
from bson import json_util
from pydantic import SecretStr

from libs.mongodb.encryption import Keyring, rewrap_secrets
from tests.integration.catalog.catalog import (
    ENCRYPTION_KEYS,
    PASSWORD,
    Catalog,
    config,
    destination_body,
    running_catalog,
    source_body,
)

KEY_PEM = "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQ\n-----END PRIVATE KEY-----"


async def masked_config(catalog: Catalog, source_id: int) -> dict[str, Any]:
    shown: dict[str, Any] = json.loads((await catalog.get(f"/sources/{source_id}")).data["config"])
    return shown


async def test_no_answer_shows_a_secret(catalog: Catalog) -> None:
    sent = config(ssl={"mode": "require", "client_cert": "cert", "client_key": KEY_PEM})
    created = await catalog.post("/sources", source_body(config=sent))
    source_id = created.data["id"]
    updated = await catalog.put(f"/sources/{source_id}", source_body("renamed", config=sent))
    listed = await catalog.get("/sources?expand=config")
    history = await catalog.get(f"/sources/{source_id}/history")
    tested = await catalog.post("/sources/test", source_body(config=sent))
    for answer in (created, updated, listed, history, tested):
        text = json.dumps(answer.data)
        assert PASSWORD not in text
        assert "PRIVATE KEY" not in text
    shown = await masked_config(catalog, source_id)
    assert shown["password"].startswith(f"********:source/{source_id}/password/")
    assert shown["ssl"]["client_key"].startswith(f"********:source/{source_id}/ssl.client_key/")
    assert shown["ssl"]["client_cert"] == "cert"


async def test_no_secret_is_stored_or_logged_in_clear(
    mongod: str, database_prefix: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    async with running_catalog(mongod, database_prefix) as catalog:
        source_id = await catalog.create_source()
        await catalog.put(f"/sources/{source_id}", source_body("two", config=config(password=f"{PASSWORD}-2")))
        await catalog.post("/sources/test", source_body(config=config(port="five")))
        await catalog.post("/sources/test", source_body())
        database = catalog.context.store.database
        written = ""
        for name in await database.list_collection_names():
            async for document in database[name].find():
                written += json_util.dumps(document)
        assert "db.example.com" in written
        assert PASSWORD not in written
        assert base64.b64encode(PASSWORD.encode()).decode() not in written
        assert await database["secrets"].count_documents({}) == 1
    captured = capsys.readouterr()
    assert "http_request" in captured.out
    assert PASSWORD not in captured.out + captured.err + caplog.text


async def test_the_masked_secret_is_honoured_in_tests_streams_and_changes(catalog: Catalog) -> None:
    source_id = await catalog.create_source()
    shown = await masked_config(catalog, source_id)
    catalog.worker.asked.clear()
    assert (await catalog.post("/sources/test", source_body(config=shown))).data["config"] == shown
    await catalog.post("/sources/streams", source_body(config=json.dumps(shown)))
    assert [call.config["password"] for call in catalog.worker.asked] == [PASSWORD, PASSWORD]
    changed = await catalog.put(f"/sources/{source_id}", source_body("renamed", config=shown | {"username": "eve"}))
    assert changed.data["config"]["password"] == shown["password"]
    catalog.worker.asked.clear()
    await catalog.post("/sources/test", source_body(config=await masked_config(catalog, source_id)))
    assert [(call.config["username"], call.config["password"]) for call in catalog.worker.asked] == [("eve", PASSWORD)]


async def test_a_new_password_replaces_the_old_one_and_the_old_mask(catalog: Catalog) -> None:
    source_id = await catalog.create_source()
    old = await masked_config(catalog, source_id)
    await catalog.put(f"/sources/{source_id}", source_body(config=config(password="another")))
    new = await masked_config(catalog, source_id)
    assert new["password"] != old["password"]
    refused = await catalog.post("/sources/test", source_body(config=old))
    assert (refused.status, refused.fields) == (400, ["config.password"])
    assert "again" in refused.body["message"]


@pytest.mark.parametrize("changes", [{"host": "evil.example.com"}, {"port": 6432}])
async def test_a_masked_secret_does_not_travel_to_another_address(catalog: Catalog, changes: dict[str, Any]) -> None:
    source_id = await catalog.create_source()
    redirected = await masked_config(catalog, source_id) | changes
    catalog.worker.asked.clear()
    for call in (
        catalog.post("/sources/test", source_body(config=redirected)),
        catalog.post("/sources/streams", source_body(config=redirected)),
        catalog.post("/sources", source_body("copy", config=redirected)),
        catalog.put(f"/sources/{source_id}", source_body(config=redirected)),
    ):
        refused = await call
        assert (refused.status, refused.fields) == (400, ["config.password"])
    assert catalog.worker.asked == []


async def test_a_masked_secret_is_worth_nothing_in_another_project_role_or_field(catalog: Catalog) -> None:
    source_id = await catalog.create_source()
    shown = await masked_config(catalog, source_id)
    stranger = catalog.in_new_project()
    assert (await stranger.post("/sources/test", source_body(config=shown))).status == 400
    as_destination = destination_body(type="postgres", config=shown)
    assert (await catalog.post("/destinations/test", as_destination)).status == 400
    elsewhere = config(password="typed", ssl={"mode": "require", "client_cert": "c", "client_key": shown["password"]})
    assert (await catalog.post("/sources/test", source_body(config=elsewhere))).fields == ["config.ssl.client_key"]


@pytest.mark.parametrize(
    "forged", ["********", "********:source/1/password/", "********:source/1/password/" + "A" * 22]
)
async def test_a_forged_mask_is_refused_and_never_stored(catalog: Catalog, forged: str) -> None:
    refused = await catalog.post("/sources", source_body(config=config(password=forged)))
    assert (refused.status, refused.fields) == (400, ["config.password"])


async def test_a_mask_of_the_entity_next_door_is_refused(catalog: Catalog) -> None:
    first, second = await catalog.create_source("one"), await catalog.create_source("two")
    shown = await masked_config(catalog, first)
    shown["password"] = shown["password"].replace(f"source/{first}/", f"source/{second}/")
    assert (await catalog.post("/sources/test", source_body(config=shown))).status == 400


async def test_the_secrets_of_a_deleted_source_are_deleted(catalog: Catalog) -> None:
    source_id = await catalog.create_source()
    stored = catalog.context.documents.plain("secrets")
    assert await stored.count_documents({"project_id": catalog.project, "entity_id": source_id}) == 1
    await catalog.delete(f"/sources/{source_id}")
    assert await stored.count_documents({"project_id": catalog.project}) == 0


async def test_a_secret_moved_to_another_place_in_the_database_does_not_open(catalog: Catalog) -> None:
    source_id = await catalog.create_source()
    await catalog.context.documents.plain("secrets").update_one(
        {"project_id": catalog.project}, {"$set": {"address": "evil.example.com:5432"}}
    )
    shown = await masked_config(catalog, source_id) | {"host": "evil.example.com"}
    assert (await catalog.post("/sources/test", source_body(config=shown))).status == 500


async def test_rewrapped_secrets_need_the_old_key_no_more(mongod: str, database_prefix: str) -> None:
    new_keys = {"k2": SecretStr(base64.b64encode(os.urandom(32)).decode())}
    async with running_catalog(mongod, database_prefix) as catalog:
        source_id = await catalog.create_source()
        shown = await masked_config(catalog, source_id)
        project, secrets = catalog.project, catalog.context.documents.plain("secrets")
        both = Keyring({**new_keys, **ENCRYPTION_KEYS})
        assert await rewrap_secrets(secrets, both) == 1
        assert await rewrap_secrets(secrets, both) == 0
    async with running_catalog(mongod, database_prefix, encryption_keys=new_keys) as catalog:
        catalog.project = project
        assert (await catalog.post("/sources/test", source_body(config=shown))).status == 200
        assert catalog.worker.asked[-1].config["password"] == PASSWORD
