"""The API's description is the API: every route of every service is in it, nothing else, and its examples hold."""

import base64
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from typing import Any

import aiohttp
import jsonschema
import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator
from pydantic import SecretStr

from libs.core.scopes import SCOPES
from libs.process.signing_keys import new_signing_key
from libs.service.definition import ServiceDefinition
from libs.service.running import RunningService, running_service
from libs.web.openapi import template_of
from services.auth.app import SERVICE as AUTH
from services.catalog.app import SERVICE as CATALOG
from services.gateway.app import SERVICE as GATEWAY
from services.job_orchestrator.app import SERVICE as JOB_ORCHESTRATOR
from services.record_sync.app import SERVICE as RECORD_SYNC

BEHIND: tuple[ServiceDefinition[Any], ...] = (AUTH, CATALOG, JOB_ORCHESTRATOR, RECORD_SYNC)
METHODS = {"get", "put", "post", "patch", "delete"}
NOT_PUBLIC = {"/internal", "/metrics", "/healthz", "/readyz"}
"""What services answer beside the API, to each other and to the operator."""


@pytest.fixture(scope="module")
async def services(mongod: str) -> AsyncIterator[dict[str, RunningService[Any]]]:
    """Every service that has public routes, behind a gateway."""
    key, public_key = new_signing_key()
    common: dict[str, Any] = {
        "port": 0,
        "mongodb_url": mongod,
        "database_prefix": "test_description_",
        "signing_key": SecretStr(key),
        "trusted_keys": {service.name: public_key for service in (*BEHIND, GATEWAY)},
    }
    own: dict[str, dict[str, Any]] = {
        "catalog": {"encryption_keys": {"k1": SecretStr(base64.b64encode(bytes(32)).decode())}}
    }
    async with AsyncExitStack() as stack:
        running: dict[str, RunningService[Any]] = {}
        for service in BEHIND:
            settings = service.settings(**common, **own.get(service.name, {}))
            running[service.name] = await stack.enter_async_context(running_service(service, settings))
        urls: dict[str, Any] = {f"{name}_url": service.base_url for name, service in running.items()}
        gateway = GATEWAY.settings(**common, **urls)
        running["gateway"] = await stack.enter_async_context(running_service(GATEWAY, gateway))
        yield running
        client = running["auth"].context.store.client
        for service in BEHIND:
            await client.drop_database(f"test_description_{service.name}")


@pytest.fixture(scope="module")
async def document(services: dict[str, RunningService[Any]]) -> dict[str, Any]:
    async with aiohttp.request("GET", f"{services['gateway'].base_url}/openapi.json") as response:
        assert response.status == 200
        read: dict[str, Any] = await response.json()
        return read


async def test_every_operation_needs_a_scope_that_credentials_can_hold(document: dict[str, Any]) -> None:
    """A route that the table of scopes does not know would need every scope."""
    needed = {
        (method, path): operation["x-required-scope"]
        for path, item in document["paths"].items()
        for method, operation in item.items()
        if "x-required-scope" in operation
    }
    assert ("post", "/api/v1/project/{projectid}/jobs") in needed
    assert {operation for operation, scope in needed.items() if scope is not None and scope not in SCOPES} == set()


def operations_of(service: RunningService[Any]) -> set[tuple[str, str]]:
    """Method and path of everything that the service answers."""
    return {
        (route.method, template_of(route.resource.get_info().get("formatter") or route.resource.canonical))
        for route in service.app.router.routes()
        if route.resource is not None and route.method not in ("HEAD", "*")
    }


def described_in(document: dict[str, Any]) -> set[tuple[str, str]]:
    return {(method.upper(), path) for path, item in document["paths"].items() for method in item if method in METHODS}


def test_every_route_is_described_and_everything_described_is_a_route(
    services: dict[str, RunningService[Any]], document: dict[str, Any]
) -> None:
    public = {
        operation
        for name in services
        if name != "gateway"
        for operation in operations_of(services[name])
        if not any(operation[1].startswith(prefix) for prefix in NOT_PUBLIC)
    }
    assert described_in(document) == public | operations_of(services["gateway"])


def test_the_document_is_valid(document: dict[str, Any]) -> None:
    OpenAPIV31SpecValidator(document).validate()


async def test_services_that_share_a_name_agree_on_what_it_means(services: dict[str, RunningService[Any]]) -> None:
    seen: dict[tuple[str, str], Any] = {}
    async with aiohttp.ClientSession() as session:
        for name in (service.name for service in BEHIND):
            async with session.get(f"{services[name].base_url}/internal/openapi.json") as response:
                part = await response.json()
            named = [((kind, key), item) for kind, items in part["components"].items() for key, item in items.items()]
            named += [((path, method), item) for path, found in part["paths"].items() for method, item in found.items()]
            for key, item in named:
                assert _meaning(seen.setdefault(key, item)) == _meaning(item), f"{name} means something else by {key}"


def test_every_example_satisfies_its_schema(document: dict[str, Any]) -> None:
    """Read as OpenAPI 3.1 reads it: JSON Schema 2020-12, with the document as the base of references."""
    checked = 0
    for schema, example in _examples_in(document):
        whole = {"$schema": "https://json-schema.org/draft/2020-12/schema", "components": document["components"]}
        jsonschema.Draft202012Validator({**whole, **schema}).validate(example)
        checked += 1
    assert checked > 150


def test_a_jobs_streams_and_settings_are_described_field_by_field(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    body = schemas["JobBody"]["properties"]
    for field, model in (("streams_config", "StreamsConfig"), ("advanced_settings", "AdvancedSettings")):
        assert {"$ref": f"#/components/schemas/{model}"} in body[field]["anyOf"]
    assert {"selected_streams", "streams"} <= schemas["StreamsConfig"]["properties"].keys()
    assert {"stream_name", "selected_columns", "value_policies"} <= schemas["SelectedStream"]["properties"].keys()
    assert {"destination_table", "destination_database"} <= schemas["CatalogStream"]["properties"].keys()
    assert {"verify", "take_over"} <= schemas["AdvancedSettings"]["properties"].keys()


def test_every_operation_says_what_it_takes_answers_and_refuses(document: dict[str, Any]) -> None:
    for path, item in document["paths"].items():
        for method, operation in item.items():
            where = f"{method} {path}"
            statuses = set(operation["responses"])
            assert operation["summary"], where
            assert any(status.startswith("2") for status in statuses), where
            assert "500" in statuses, where
            assert operation.get("security") == [] or {"401", "403"} <= statuses, where
            if "requestBody" in operation:
                assert {"400", "413", "415"} <= statuses, where
                assert all("example" in media for media in operation["requestBody"]["content"].values()), where
            for answer in operation["responses"].values():
                resolved = _resolved(document, answer)
                assert resolved["headers"]["X-Request-Id"]["required"] is True, where


def test_operation_ids_are_unique(document: dict[str, Any]) -> None:
    ids = [operation["operationId"] for item in document["paths"].values() for operation in item.values()]
    assert len(ids) == len(set(ids))


async def test_an_unchanged_document_is_not_sent_again(services: dict[str, RunningService[Any]]) -> None:
    url = f"{services['gateway'].base_url}/openapi.json"
    async with aiohttp.ClientSession() as session:
        async with session.get(url) as first:
            text = await first.read()
        async with session.get(url, headers={"If-None-Match": first.headers["ETag"]}) as second:
            assert (second.status, await second.read()) == (304, b"")
        async with session.get(url, headers={"Accept-Encoding": "identity"}) as third:
            assert await third.read() == text


async def test_the_page_loads_from_here_all_that_it_needs(services: dict[str, RunningService[Any]]) -> None:
    base_url = services["gateway"].base_url
    async with aiohttp.ClientSession() as session:
        async with session.get(f"{base_url}/docs") as response:
            page = await response.text()
            assert (response.status, response.content_type) == (200, "text/html")
            assert "default-src 'none'" in response.headers["Content-Security-Policy"]
        wanted = [part.split('"')[0] for part in page.replace('src="', 'href="').split('href="')[1:]]
        assert len(wanted) == 5
        for path in wanted:
            async with session.get(base_url + path) as response:
                assert (response.status, len(await response.read()) > 0) == (200, True), path
        async with session.get(f"{base_url}/docs/../pyproject.toml") as response:
            assert response.status == 404


async def test_what_the_gateway_answers_itself_refuses_other_methods(services: dict[str, RunningService[Any]]) -> None:
    async with aiohttp.ClientSession() as session:
        for path in ("/openapi.json", "/docs", "/docs/start.js", "/healthz", "/readyz", "/metrics"):
            async with session.post(services["gateway"].base_url + path) as response:
                assert (response.status, response.headers["Allow"]) == (405, "GET,HEAD"), path


async def test_a_services_own_part_is_not_public(services: dict[str, RunningService[Any]]) -> None:
    async with aiohttp.request("GET", f"{services['gateway'].base_url}/internal/openapi.json") as response:
        assert response.status == 404


def _meaning(item: Any) -> Any:
    """Without what may be worded differently where two services answer one path."""
    text = json.dumps(item).replace("JobNameBody", "NameBody").replace("JobNameIsFree", "NameIsFree")
    read = json.loads(text)
    if isinstance(read, dict):
        for content in read.get("requestBody", {}).get("content", {}).values():
            content.pop("example", None)
    return read


def _resolved(document: dict[str, Any], item: dict[str, Any]) -> dict[str, Any]:
    reference = item.get("$ref")
    if reference is None:
        return item
    found: Any = document
    for part in reference.removeprefix("#/").split("/"):
        found = found[part]
    resolved: dict[str, Any] = found
    return resolved


def _examples_in(node: Any) -> Iterator[tuple[dict[str, Any], Any]]:
    """Every example with its schema: those of media types, and those that stand in schemas."""
    if isinstance(node, list):
        for item in node:
            yield from _examples_in(item)
    elif isinstance(node, dict):
        if "schema" in node and "example" in node:
            yield node["schema"], node["example"]
        if isinstance(node.get("examples"), list):
            yield from ((node, example) for example in node["examples"])
        for key, item in node.items():
            if key not in ("example", "examples", "default"):
                yield from _examples_in(item)
