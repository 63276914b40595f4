"""What connectors tell through the API: versions, specs, tests and streams."""

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from libs.core.json import JsonObject, dump_json
from services.catalog.http import TEST_SECONDS_MIN
from tests.integration.catalog.catalog import (
    Catalog,
    config,
    destination_body,
    job_created,
    running_catalog,
    source_body,
    stream,
)


@pytest.mark.parametrize(
    "path", ["/sources/versions", "/sources/versions?type=postgres", "/destinations/versions?type=parquet"]
)
async def test_versions_are_listed_newest_first(catalog: Catalog, path: str) -> None:
    assert (await catalog.get(path)).data == {"version": ["v1.0.0"]}


async def test_every_type_has_the_same_versions_and_the_spec_of_an_unsupported_one_is_refused(catalog: Catalog) -> None:
    assert (await catalog.get("/sources/versions?type=oracle")).data == {"version": ["v1.0.0"]}
    refused = await catalog.post("/sources/spec", {"type": "oracle"})
    assert (refused.status, refused.fields) == (400, ["type"])
    assert "sources of the type 'oracle' are not supported; supported are postgres" in refused.body["message"]


@pytest.mark.parametrize(
    ("role", "kind", "title"),
    [
        ("source", "postgres", "PostgreSQL source"),
        ("destination", "postgres", "PostgreSQL destination"),
        ("destination", "parquet", "Parquet files destination"),
    ],
)
async def test_a_form_is_written_for_people(catalog: Catalog, role: str, kind: str, title: str) -> None:
    spec = (await catalog.post(f"/{role}s/spec", {"type": kind})).data["spec"]
    assert spec["jsonschema"]["title"] == title

    def fields(schema: Any) -> Iterator[tuple[str, Any]]:
        for name, field in schema.get("properties", {}).items():
            yield name, field
            yield from fields(field)
        assert "anyOf" not in schema
        assert all(choice["title"] and "_" not in choice["title"] for choice in schema.get("oneOf", ()))

    for name, field in fields(spec["jsonschema"]):
        assert field["title"][0].isupper(), name
        assert " " in field["description"], name
    if kind == "postgres":
        tunnel = spec["jsonschema"]["properties"]["ssh_config"]["properties"]["type"]
        assert tunnel["oneOf"] == [{"const": "no_tunnel", "title": "No tunnel"}]
        widgets = json.loads(spec["uischema"])["ssl"]
        assert {widgets[name]["ui:widget"] for name in ("server_ca", "client_cert", "client_key")} == {"textarea"}


@pytest.mark.parametrize(
    ("kind", "changes", "status"),
    [("postgres", {}, 200), ("postgres", {"port": "five"}, 400), ("mongodb", {}, 400)],
    ids=["tested", "a bad configuration", "an unsupported type"],
)
async def test_a_test_is_not_answered_before_the_page_is_ready_for_it(
    catalog: Catalog, kind: str, changes: JsonObject, status: int
) -> None:
    """The page shows refusals in the same dialogue as results."""
    begun = time.monotonic()
    answer = await catalog.post("/sources/test", source_body(type=kind, config=config(**changes)))
    assert answer.status == status
    assert time.monotonic() - begun >= TEST_SECONDS_MIN


async def test_a_spec_is_given_for_a_query_a_body_and_a_post(catalog: Catalog) -> None:
    asked = {"type": "postgres", "version": "v1.0.0"}
    answers = [
        await catalog.get("/sources/spec?type=postgres&version=v1.0.0"),
        await catalog.get("/sources/spec", body=asked),
        await catalog.get("/sources/spec?type=postgres", body=asked),
        await catalog.post("/sources/spec", asked),
        await catalog.post("/sources/spec", {"type": "postgresql"}),
    ]
    for answer in answers:
        assert answer.data == answers[0].data
    data = answers[0].data
    assert (data["type"], data["version"]) == ("postgres", "v1.0.0")
    assert "host" in data["spec"]["jsonschema"]["properties"]
    assert json.loads(data["spec"]["uischema"])["password"]["ui:widget"] == "password"


async def test_a_destinations_spec_gives_back_what_was_sent_beside_it(catalog: Catalog) -> None:
    sent = {"type": "parquet", "version": "latest", "catalog": "glue", "source_type": "postgres", "source_version": ""}
    data = (await catalog.post("/destinations/spec", sent)).data
    assert data | sent == data | {"version": "latest"}
    assert data["spec"]["jsonschema"]["properties"]


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/sources/spec", None, "type"),
        ("/sources/spec?type=oracle", None, "type"),
        ("/sources/spec?type=postgres&version=0", None, "version"),
        ("/sources/spec?type=postgres", {"type": "mysql"}, "type"),
        ("/sources/spec?type=postgres&type=mysql", None, "type"),
        ("/source/streams?type=postgres&config=%7B%7D", None, "config"),
        ("/source/streams?type=postgres", None, "config"),
    ],
)
async def test_a_bad_question_is_refused(catalog: Catalog, path: str, body: Any, field: str) -> None:
    refused = await catalog.get(path, body=body)
    assert (refused.status, refused.fields) == (400, [field])


async def test_a_connection_test_tells_how_it_went_with_200_in_both_cases(catalog: Catalog) -> None:
    passed = (await catalog.post("/sources/test", source_body())).data
    assert passed["connection_result"] == {"status": "SUCCEEDED", "message": "connected"}
    assert passed["logs"][0].keys() == {"level", "time", "message"}
    assert passed["config"] == config(password="********")
    catalog.worker.succeeds = False
    try:
        failed = await catalog.post(
            "/destinations/test", destination_body() | {"source_type": "", "source_version": ""}
        )
    finally:
        catalog.worker.succeeds = True
    assert failed.data["connection_result"] == {"status": "FAILED", "message": "password authentication failed"}
    assert failed.data["config"] == destination_body()["config"]


async def test_a_test_of_a_bad_configuration_is_refused_by_field(catalog: Catalog) -> None:
    refused = await catalog.post("/sources/test", source_body(config=config(port="five")))
    assert (refused.status, refused.fields) == (400, ["config.port"])


async def test_streams_come_as_a_catalog_with_all_of_them_selected(catalog: Catalog) -> None:
    asked = {"type": "postgres", "version": "v1.0.0", "config": config(), "name": "", "job_name": "", "job_id": -1}
    posted = (await catalog.post("/sources/streams", asked)).data
    assert [item["stream"]["name"] for item in posted["streams"]] == ["flights", "planes"]
    [first, second] = posted["selected_streams"]["public"]
    assert (first["stream_name"], second["stream_name"], first["normalization"]) == ("flights", "planes", True)
    assert posted["streams_config"] == {name: posted[name] for name in ("streams", "selected_streams")}
    got = await catalog.get("/source/streams?type=postgres", body={"config": config(), "version": "v1.0.0"})
    assert got.data == posted


async def test_a_jobs_saved_choice_is_merged_into_its_streams(catalog: Catalog) -> None:
    saved: JsonObject = {
        "selected_streams": {"public": [{"stream_name": "planes", "filter": "x > 1"}, {"stream_name": "dropped"}]},
        "streams": [stream("planes", destination_table="aircraft", sync_mode="cdc")],
    }
    job_id = 1000 + catalog.project
    await catalog.job_happened(job_id, job_created(1, 2, streams_config_json=dump_json(saved)))
    asked = {"type": "postgres", "version": "v1.0.0", "config": config(), "job_id": job_id}
    async with asyncio.timeout(10):
        while (merged := await catalog.post("/sources/streams", asked)).status == 404:
            await asyncio.sleep(0.01)
    assert merged.data["selected_streams"] == {"public": [{"stream_name": "planes", "filter": "x > 1"}]}
    planes = merged.data["streams"][1]["stream"]
    assert (planes["destination_table"], planes["sync_mode"]) == ("aircraft", "full_refresh")
    stranger = catalog.in_new_project()
    assert (await stranger.post("/sources/streams", asked)).status == 404


async def test_a_worker_that_can_not_be_reached_is_a_503(mongod: str, database_prefix: str) -> None:
    async with running_catalog(mongod, database_prefix, worker_url="http://127.0.0.1:9") as catalog:
        answer = await catalog.post("/sources/test", source_body())
    assert (answer.status, answer.body["success"]) == (503, False)
    assert "Retry-After" in answer.headers
