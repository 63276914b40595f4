"""What a caller must not do is refused at the gateway, in words, and changes nothing."""

import asyncio
import json
from typing import Any

import aiohttp
import pytest

from libs.testing.rest import Rest, rest
from libs.testing.suite import Suite
from tests.e2e.replication import make_endpoint, unique

CONFIG: dict[str, Any] = {"host": "127.0.0.1", "port": 5432, "database": "d", "username": "u", "password": "secret-1"}
SOURCES = "/api/v1/project/123/sources"


async def source_body(api: Rest, name: str) -> dict[str, Any]:
    version = (await api.project("GET", "sources/versions", type="postgres"))["version"][0]
    return {"name": name, "type": "postgres", "version": version, "config": CONFIG}


async def post_text(suite: Suite, text: bytes) -> tuple[int, dict[str, Any]]:
    headers = {"Authorization": f"Bearer {suite.api_key}", "Content-Type": "application/json"}
    async with (
        aiohttp.ClientSession() as session,
        session.post(suite.base_url + SOURCES, data=text, headers=headers) as response,
    ):
        return response.status, await response.json()


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (b'{"name": ', "JSON"),
        (b"[]", ""),
        (b'{"type": "postgres", "version": "v1.0.0", "config": {}}', "name"),
        (b'{"name": 7, "type": "postgres", "version": "v1.0.0", "config": {}}', "name"),
        (b'{"name": "a", "name": "b", "type": "postgres", "version": "v1.0.0", "config": {}}', "name"),
        (b'{"name": "a", "type": "postgres", "version": "v1.0.0", "config": {"port": 9223372036854775808}}', "port"),
        (
            b'{"name": "a", "type": "postgres", "version": "v1.0.0", "config": ' + b"[" * 10_000 + b"]" * 10_000 + b"}",
            "",
        ),
        (b'{"name": "' + b"a" * 10_000 + b'", "type": "postgres", "version": "v1.0.0", "config": {}}', "name"),
        (b'{"name": "a", "type": "postgres", "version": "v1.0.0", "config": {"no such field": 1}}', "no such field"),
    ],
)
async def test_bad_input_is_refused_naming_what_is_wrong(embedded_suite: Suite, text: bytes, word: str) -> None:
    status, body = await post_text(embedded_suite, text)
    assert status == 400, body
    assert body["success"] is False
    assert word.lower() in json.dumps(body).lower()


async def test_a_body_over_the_limit_is_refused(embedded_suite: Suite) -> None:
    status, body = await post_text(embedded_suite, b'{"name": "' + b"a" * 1_100_000 + b'"}')
    assert status == 413
    assert body["success"] is False


async def test_one_of_five_hundred_sources_of_one_name_is_made_and_others_do_not_suffer(api: Rest) -> None:
    contested = await source_body(api, unique("contested"))
    honest = [await source_body(api, unique("honest")) for _ in range(20)]
    answers = await asyncio.gather(
        *(api.answer("POST", SOURCES, contested) for _ in range(500)),
        *(api.answer("POST", SOURCES, body) for body in honest),
    )
    statuses = [answer.status for answer in answers]
    assert sorted(statuses[:500]) == [200] + [409] * 499
    assert statuses[500:] == [200] * 20


async def test_another_project_is_closed(suite: Suite, api: Rest) -> None:
    source = await make_endpoint(api, "sources", "postgres", CONFIG)
    async with rest(suite.base_url) as founder, rest(suite.base_url) as stranger:
        # The first account of an installation owns project 123, so the stranger is another one.
        await founder.sign_up_and_log_in(unique("founder").replace("-", "_"), "correct horse battery")
        await stranger.sign_up_and_log_in(unique("stranger").replace("-", "_"), "correct horse battery")
        assert (await stranger.answer("GET", f"{SOURCES}/{source.id}")).status == 403
        projects = await stranger.call("GET", "/api/v1/projects")
        own = projects[0]["id"]
        assert own != 123
        assert (await stranger.answer("GET", f"/api/v1/project/{own}/sources/{source.id}")).status == 404
        assert (await stranger.answer("GET", f"/api/v1/project/{own}/sources")).data == []


async def test_without_a_credential_nothing_is_open(suite: Suite) -> None:
    async with rest(suite.base_url) as nobody:
        answer = await nobody.answer("GET", SOURCES)
        assert answer.status == 401
        assert answer.body["success"] is False
        assert "WWW-Authenticate" in answer.headers


async def test_no_secret_is_shown_or_logged(suite: Suite, api: Rest) -> None:
    secret = unique("secret")
    source = await make_endpoint(api, "sources", "postgres", {**CONFIG, "password": secret})
    shown = [
        await api.answer("GET", f"{SOURCES}/{source.id}"),
        await api.answer("GET", SOURCES),
        await api.answer("GET", f"{SOURCES}/{source.id}/history"),
    ]
    assert all(answer.status == 200 for answer in shown)
    assert secret not in json.dumps([answer.body for answer in shown])
    assert secret not in suite.log_path.read_text()
