"""Errors in the shape of their family, and the answers to what is not HTTP."""

import aiohttp
import pytest

from libs.web import server as http_server
from tests.integration.gateway.backends import API_KEY, PROJECT, a_key
from tests.integration.gateway.conftest import Suite
from tests.integration.gateway.sockets import all_received, connected

SOURCES = f"/api/v1/project/{PROJECT}/sources"


async def test_project_routes_answer_success_false(stranger: aiohttp.ClientSession) -> None:
    async with stranger.get(SOURCES) as response:
        assert response.content_type == "application/json"
        body = await response.json()
    assert (body["success"], body["code"]) == (False, "unauthenticated")
    assert "authentication is required" in body["message"]


@pytest.mark.parametrize("path", ["/api/v2/jobs/x", "/v2/jobs/x"])
async def test_v2_answers_error_message_and_code(stranger: aiohttp.ClientSession, path: str) -> None:
    async with stranger.get(path) as response:
        body = await response.json()
    assert set(body) == {"error", "message", "code"}
    assert (body["error"], body["code"]) == ("Unauthorized", "unauthenticated")


@pytest.mark.parametrize("path", ["/api/v1/sync", "/api/v1/sync/sync_1", "/api/v1/sync/records"])
async def test_sync_answers_problem_details(stranger: aiohttp.ClientSession, path: str) -> None:
    async with stranger.get(path, headers={"X-Request-Id": "r-1"}) as response:
        assert response.content_type == "application/problem+json"
        body = await response.json()
    assert (body["status"], body["title"], body["request_id"]) == (401, "Unauthorized", "r-1")
    assert set(body) == {"type", "title", "status", "detail", "code", "request_id", "errors"}


async def test_problem_details_are_given_anywhere_on_request(stranger: aiohttp.ClientSession) -> None:
    async with stranger.get(SOURCES, headers={"Accept": "application/problem+json"}) as response:
        assert response.content_type == "application/problem+json"


async def test_a_key_that_may_only_read_is_refused_a_change(suite: Suite, client: aiohttp.ClientSession) -> None:
    suite.auth.credentials["bearer", API_KEY] = a_key("sync:read", "sources:read")
    async with client.get(SOURCES) as response:
        assert response.status == 200
    for method, path in (("POST", SOURCES), ("GET", f"/api/v1/project/{PROJECT}/jobs/7/cancel")):
        async with client.request(method, path) as response:
            assert response.status == 403
            assert (await response.json())["code"] == "read_only_credential"


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"this is not http\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nno colon\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 20_000 + b"\r\n\r\n", 431),
        (b"GET /" + b"y" * 20_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 431),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    ],
)
async def test_what_is_not_http_is_answered_as_json_and_the_connection_closed(
    suite: Suite, sent: bytes, status: int
) -> None:
    answer = await all_received(suite.url, sent)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert int(head.split()[1]) == status
    assert b"X-Request-Id" in head
    assert b"Server: datasync\r\n" in head
    assert b"Python" not in head
    assert body.startswith(b'{"success":false,"message":"')


async def test_a_request_whose_head_never_ends_is_cut_off(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "HEAD_TIMEOUT_SECONDS", 0.2)
    for begun in (b"", b"GET / HTTP/1.1\r\nHost: x\r\n"):
        assert await all_received(suite.url, begun) == b""
    async with connected(suite.url) as (reader, writer):
        writer.write(b"GET /nowhere HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 404 ")
        writer.write(b"GET /nowhere HT")
        await reader.read()


async def test_the_server_header_does_not_name_the_software(client: aiohttp.ClientSession) -> None:
    async with client.get(SOURCES) as response:
        assert response.headers.getall("Server") == ["datasync"]


async def test_callers_that_leave_in_an_upload_do_not_affect_others(
    suite: Suite, client: aiohttp.ClientSession
) -> None:
    head = f"POST {SOURCES}/upload HTTP/1.1\r\nHost: x\r\nAuthorization: {API_KEY}\r\nContent-Length: 500000\r\n\r\n"
    for _ in range(5):
        async with connected(suite.url) as (_, writer):
            writer.write(head.encode() + b"x" * 100_000)
            await writer.drain()
    async with client.get(SOURCES) as response:
        assert response.status == 200
