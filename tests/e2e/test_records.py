"""Developer sync records through the gateway: with keys, in batches, and their changes as a stream."""

import asyncio
import json
import zlib

import aiohttp

from libs.testing.rest import Rest
from libs.testing.suite import Suite
from tests.e2e.replication import unique

RECORDS = "/api/v1/sync/records"


async def test_a_record_is_kept_and_changed_by_a_key_of_its_developer(suite: Suite, api: Rest) -> None:
    developer = unique("dev")
    issued = await api.answer("POST", "/api/v2/keys", {"name": developer, "developer_id": developer})
    assert issued.status in (200, 201), issued.body
    headers = {"Authorization": _secret_of(issued.body)}
    body = {"developerId": developer, "resourceType": "FLAG", "resourceKey": "k", "data": {"weight": 1.5}}
    async with aiohttp.ClientSession(suite.base_url, headers=headers) as session:
        async with session.post(RECORDS, json=body) as response:
            assert response.status == 201
            created = await response.json()
        async with session.patch(f"{RECORDS}/{created['id']}", json={"status": "ERROR"}) as response:
            assert (response.status, (await response.json())["status"]) == (200, "ERROR")
        async with session.post(RECORDS, json=body | {"developerId": "somebody-else"}) as response:
            assert response.status == 403
            assert response.content_type == "application/problem+json"
        await api.answer("POST", RECORDS, body | {"developerId": unique("other")})
        async with session.get(RECORDS) as response:
            listed = await response.json()
        assert (listed["total"], [item["id"] for item in listed["data"]]) == (1, [created["id"]])
        async with session.delete(f"{RECORDS}/{created['id']}") as response:
            assert response.status == 204


async def test_a_reader_of_the_compressed_form_can_change_what_it_got(suite: Suite, api: Rest) -> None:
    body = {"developerId": unique("dev"), "resourceType": "FLAG", "resourceKey": "k", "data": {"text": "x" * 4_000}}
    path = f"{RECORDS}/{(await api.answer('POST', RECORDS, body)).body['id']}"
    headers = {"Authorization": suite.api_key}
    gzip, plain = {"Accept-Encoding": "gzip"}, {"Accept-Encoding": "identity"}
    async with aiohttp.ClientSession(suite.base_url, headers=headers, auto_decompress=False) as session:
        async with session.get(path, headers=gzip) as response:
            compressed, tag = await response.read(), response.headers["ETag"]
            assert (response.status, response.headers["Content-Encoding"]) == (200, "gzip")
            assert "Accept-Encoding" in response.headers["Vary"]
            assert json.loads(zlib.decompress(compressed, wbits=31))["data"] == body["data"]
        async with session.get(path, headers=plain) as response:
            assert "Content-Encoding" not in response.headers
            assert response.headers["ETag"] != tag
        for coding in (gzip, plain):
            async with session.get(path, headers=coding | {"If-None-Match": tag}) as response:
                assert (response.status, await response.read()) == (304, b"")
                assert response.headers["Cache-Control"] == "private, no-cache"
                assert "Accept-Encoding" in response.headers["Vary"]
        async with session.patch(path, json={"status": "ERROR"}, headers=gzip | {"If-Match": tag}) as response:
            assert response.status == 200
            changed = response.headers["ETag"]
        async with session.get(path, headers=gzip | {"If-None-Match": tag}) as response:
            assert response.status == 200
            assert response.headers["ETag"] not in (tag, "")
        async with session.patch(path, json={"status": "ACTIVE"}, headers=gzip | {"If-Match": tag}) as response:
            assert response.status == 412
        async with session.patch(path, json={"status": "ACTIVE"}, headers={"If-Match": changed}) as response:
            assert response.status == 200


async def test_changes_arrive_through_the_gateway_as_they_happen(suite: Suite, api: Rest) -> None:
    headers = {"Authorization": suite.api_key, "Accept": "text/event-stream"}
    developer = unique("dev")
    async with (
        asyncio.timeout(20),
        aiohttp.ClientSession(suite.base_url, headers=headers) as session,
        session.get(f"{RECORDS}/changes", params={"after": "latest", "developerId": developer}) as response,
    ):
        assert response.status == 200
        for number in range(3):
            body = {"developerId": developer, "resourceType": "FLAG", "resourceKey": str(number), "data": {}}
            answers = await api.answer("POST", f"{RECORDS}:batch", {"operations": [{"op": "create", "record": body}]})
            record_id = answers.body["results"][0]["id"]
            while record_id not in (line := (await response.content.readline()).decode()):
                assert response.content.at_eof() is False
            assert line.startswith("data: ")


async def test_a_long_poll_through_the_gateway_ends_with_the_next_change(api: Rest) -> None:
    developer = unique("dev")
    path = f"{RECORDS}/changes"
    latest = (await api.answer("GET", path, after="latest")).body["cursor"]
    polling = asyncio.create_task(api.answer("GET", path, after=latest, timeout=20, developerId=developer))
    body = {"developerId": developer, "resourceType": "FLAG", "resourceKey": "k", "data": {}}
    created = await api.answer("POST", RECORDS, body)
    async with asyncio.timeout(10):
        found = await polling
    assert [item["recordId"] for item in found.body["data"]] == [created.body["id"]]


def _secret_of(body: dict[str, object]) -> str:
    data = body.get("data", body)
    assert isinstance(data, dict)
    secret = data.get("key") or data.get("secret")
    assert isinstance(secret, str)
    return secret
