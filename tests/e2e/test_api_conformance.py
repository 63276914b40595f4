"""The whole API as its description promises it: nothing that schemathesis tries is answered otherwise."""

import json
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from libs.testing.databases import postgres_config
from libs.testing.rest import Answer, Rest, rest
from libs.testing.servers import Postgres
from libs.testing.suite import Suite
from tests.e2e.conftest import QUICK
from tests.e2e.replication import execute, make_endpoint, make_job, sync

SCHEMATHESIS = Path(sys.executable).with_name("schemathesis")
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "response_headers_conformance",
    "unsupported_method",
)
EXAMPLES_MAX = 5
SEED = 1
RECORDS = "/api/v1/sync/records"

# A long poll would hold up all that comes after it; that it waits is tested by itself.
NO_WAITING = f"""
[parameters]
"path.projectid" = 123

[[operations]]
include-path = "{RECORDS}/changes"
parameters = {{ timeout = 0 }}
"""

# Another project, or none, is what the run without things tries.
IN_ONE_PROJECT = f"""
[[operations]]
include-path-regex = '^{RECORDS}'
parameters = {{ "header.X-Project-Id" = "123" }}
"""


@dataclass(frozen=True)
class Inhabited:
    """A suite in which every kind of thing is there twice: one to use, and one to delete.

    Args:
        ids: both ids of each kind, by a regular expression of the paths and the name of the parameter in them.
    """

    suite: Suite
    dsn: str
    ids: Mapping[tuple[str, str], tuple[Any, Any]]

    def configuration(self) -> str:
        """Schemathesis' settings that aim its requests at what is there."""
        sections = [NO_WAITING, IN_ONE_PROJECT]
        for (path, name), (used, doomed) in self.ids.items():
            sections.append(_section(path, name, used))
            sections.append(_section(path, name, doomed, 'include-method = "DELETE"\n'))
        return "\n".join(sections)


@pytest.fixture(scope="module")
async def inhabited(postgres_server: Postgres) -> AsyncIterator[Inhabited]:
    """One suite for this module, since what is tried here leaves nothing as it was."""
    await execute(postgres_server.dsn, "CREATE DATABASE conformance")
    dsn = postgres_server.dsn_of("conformance")
    await execute(dsn, "CREATE TABLE planes (tail text PRIMARY KEY, seats int)")
    await execute(dsn, "INSERT INTO planes SELECT 'N' || i, i FROM generate_series(1, 10) i")
    with Suite(QUICK) as suite:
        async with rest(suite.base_url, api_key=suite.api_key) as api:
            yield Inhabited(suite, dsn, await _inhabit(api, dsn))
    await execute(postgres_server.dsn, "DROP DATABASE conformance WITH (FORCE)")


@pytest.mark.timeout(300)
def test_any_request_to_any_route_is_answered_as_described(inhabited: Inhabited, tmp_path: Path) -> None:
    """Every boundary of every parameter and field, and every method that a path does not have."""
    _try(inhabited.suite, tmp_path, NO_WAITING, "--phases", "coverage")


@pytest.mark.timeout(300)
def test_any_use_of_what_is_there_is_answered_as_described(inhabited: Inhabited, tmp_path: Path) -> None:
    """The examples, generated requests, and chains of requests in which one uses what another answered."""
    phases = ("--phases", "examples,fuzzing,stateful", "--max-examples", str(EXAMPLES_MAX))
    _try(inhabited.suite, tmp_path, inhabited.configuration(), *phases)


async def test_what_needs_a_real_database_or_an_owner_is_answered_as_described(inhabited: Inhabited) -> None:
    """Schemathesis can't make up a configuration that connects, and no key may remove an owner's members."""
    base_url, config = inhabited.suite.base_url, postgres_config(inhabited.dsn)
    kind = {"type": "postgres", "version": "v1.0.0", "config": config}
    project = "/api/v1/project/{projectid}"
    async with rest(base_url) as ann:
        await ann.sign_up_and_log_in("ann-who-removes", "correct horse")
        fields = {"email": "eve@conformance.example", "username": "eve", "password": "correct horse"}
        eve = await ann.call("POST", "/api/v1/users", fields)
        removed = await ann.answer("DELETE", f"/api/v1/users/{eve['id']}")
    async with rest(base_url, api_key=inhabited.suite.api_key) as api:
        document = (await api.answer("GET", "/openapi.json")).body
        _hold(document, "DELETE", "/api/v1/users/{userid}", removed)
        for method, path, body in (
            ("POST", f"{project}/sources/streams", kind),
            ("GET", f"{project}/sources/streams", kind),
            ("GET", f"{project}/source/streams", kind),
            ("POST", f"{project}/sources/test", kind),
            ("POST", f"{project}/destinations/test", kind),
            ("POST", f"{project}/sources/test", kind | {"config": config | {"password": "wrong"}}),
        ):
            _hold(document, method, path, await api.answer(method, path.replace("{projectid}", "123"), body))


async def test_a_moment_at_an_end_of_time_is_answered_by_every_route_that_takes_one(inhabited: Inhabited) -> None:
    """The routes are those of the description, so that a later one is tried as well."""
    statuses: dict[tuple[str, str], int] = {}
    async with rest(inhabited.suite.base_url, api_key=inhabited.suite.api_key) as api:
        document = (await api.answer("GET", "/openapi.json")).body
        client = await api.answer("POST", "/api/v2/oauth/clients", {"name": "of the past", "scopes": ["sync:read"]})
        # What was tried before may have deleted the one that was there.
        fields = {"developerId": "dev-1", "resourceType": "FLAG", "resourceKey": "of the past", "data": {}}
        record_id = await _id_of(api, RECORDS, fields)
        ids = {
            **inhabited.ids,
            (r"v2/oauth/clients/", "clientid"): (client.body["id"],),
            (rf"^{RECORDS}/\{{id\}}", "id"): (record_id,),
        }
        routes = [path for path, methods in document["paths"].items() if _takes(methods.get("get"), "as_of")]
        for route in routes:
            for moment in (*MOMENTS, *NO_MOMENTS):
                answer = await api.answer("GET", _filled(route, ids), as_of=moment)
                statuses[route, moment] = answer.status
    assert len(routes) >= 9
    assert {status for (_, moment), status in statuses.items() if moment in MOMENTS} <= {200, 404}, statuses
    assert {status for (_, moment), status in statuses.items() if moment == MOMENTS[-1]} == {200}, statuses
    assert {status for (_, moment), status in statuses.items() if moment in NO_MOMENTS} == {400}, statuses


MOMENTS = (
    "0001-01-01T00:00:00Z",
    "0001-01-01T14:00:00+14:00",
    "1969-12-31T23:59:59.999999999Z",
    "9999-12-31T23:59:59.999999Z",
    "9999-12-31T23:59:59Z",
)
NO_MOMENTS = (
    "0001-01-01T00:00:00+00:01",
    "0001-01-01T00:00:00+14:00",
    "9999-12-31T23:59:59-00:01",
    "9999-12-31T23:59:59-14:00",
    "9999-12-31T23:59:60Z",
    "10000-01-01T00:00:00Z",
    "0000-01-01T00:00:00Z",
    "-0001-01-01T00:00:00Z",
    "2026-01-01T00:00:00+99:99",
    "2026-01-01T00:00:00",
    "2026-01-01",
    "2026",
    "0",
    "-1",
    "1790000000",
    "1e400",
    "99999999999999999999999999",
    "now",
    "",
)


def _takes(operation: Any, name: str) -> bool:
    parameters = operation["parameters"] if operation and "parameters" in operation else ()
    return any(parameter.get("name") == name and parameter["in"] == "query" for parameter in parameters)


def _filled(route: str, ids: Mapping[tuple[str, str], Sequence[Any]]) -> str:
    """The path of something that is there."""
    path = route.replace("{projectid}", "123")
    for (pattern, name), (there, *_) in ids.items():
        if re.search(pattern, route):
            path = path.replace(f"{{{name}}}", str(there))
    assert "{" not in path, f"the fixture has nothing at {route}"
    return path


def _hold(document: dict[str, Any], method: str, path: str, answer: Answer) -> None:
    """The answer is a success, and what the description says of it."""
    assert answer.status == 200, answer.body
    described = document["paths"][path][method.lower()]["responses"]["200"]["content"]["application/json"]["schema"]
    jsonschema.Draft202012Validator({**described, "components": document["components"]}).validate(answer.body)


def _try(suite: Suite, directory: Path, configuration: str, *arguments: str) -> None:
    settings = directory / "schemathesis.toml"
    settings.write_text(configuration)
    command = [
        str(SCHEMATHESIS),
        f"--config-file={settings}",
        "run",
        f"{suite.base_url}/openapi.json",
        f"--header=Authorization: Bearer {suite.api_key}",
        f"--checks={','.join(CHECKS)}",
        f"--seed={SEED}",
        "--request-timeout=30",
        "--generation-database=none",
        "--continue-on-failure",
        "--no-color",
        *arguments,
    ]
    ended = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=280, check=False)
    assert ended.returncode == 0, f"{ended.stdout}\n{ended.stderr}"
    counted = re.search(r"Selected: (\d+)/(\d+)\s+Tested: (\d+)", ended.stdout)
    assert counted is not None, ended.stdout
    assert counted[1] == counted[2] == counted[3], f"some operations were left out\n{ended.stdout}"


def _section(path: str, name: str, value: Any, more: str = "") -> str:
    parameters = f'{{ "path.{name}" = {json.dumps(value)} }}'
    return f"[[operations]]\ninclude-path-regex = '{path}'\n{more}parameters = {parameters}\n"


async def _inhabit(api: Rest, dsn: str) -> dict[tuple[str, str], tuple[Any, Any]]:
    users = [await _user(api, name) for name in ("ann", "bob")]
    sources, destinations, jobs = list[int](), list[int](), list[int]()
    keys, records = list[str](), list[str]()
    for number in (1, 2):
        source = await make_endpoint(api, "sources", "postgres", postgres_config(dsn))
        destination = await make_endpoint(api, "destinations", "postgres", postgres_config(dsn))
        sources.append(source.id)
        destinations.append(destination.id)
        jobs.append(await make_job(api, source, destination))
        keys.append(await _id_of(api, "/api/v2/keys", {"name": f"key {number}"}))
        record = {"developerId": "dev-1", "resourceType": "FLAG", "resourceKey": f"flag-{number}", "data": {}}
        records.append(await _id_of(api, RECORDS, record))
    run = await sync(api, jobs[0])
    project = r"^/api/v1/project/\{projectid\}"
    return {
        (rf"{project}/sources/\{{id\}}", "id"): (sources[0], sources[1]),
        (rf"{project}/destinations/\{{id\}}", "id"): (destinations[0], destinations[1]),
        (rf"{project}/jobs/\{{id\}}", "id"): (jobs[0], jobs[1]),
        (rf"{project}/jobs/\{{id\}}/tasks?/\{{taskid\}}", "taskid"): (run["id"], run["id"]),
        (r"^/api/v1/users/", "userid"): (users[0], users[1]),
        (r"v2/keys/", "keyid"): (keys[0], keys[1]),
        (rf"^{RECORDS}/\{{id\}}", "id"): (records[0], records[1]),
    }


async def _user(api: Rest, name: str) -> int:
    fields = {"email": f"{name}@conformance.example", "username": f"{name}-of-conformance", "password": "correct horse"}
    if name == "ann":
        await api.call("POST", "/signup", fields)
        users = await api.call("GET", "/api/v1/users")
        return int(users[0]["id"])
    return int((await api.call("POST", "/api/v1/users", fields))["id"])


async def _id_of(api: Rest, path: str, body: Mapping[str, Any]) -> str:
    answer = await api.answer("POST", path, body)
    assert answer.status == 201, answer.body
    identifier: str = answer.body["id"]
    return identifier
