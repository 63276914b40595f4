"""What passes the gateway, what it drops, and what it does when a service is down."""

import asyncio
import gzip
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

import aiohttp
import jwt
import orjson
import pytest
from structlog.testing import capture_logs
from yarl import URL

from libs.process.health import Degraded
from libs.process.signing_keys import new_signing_key
from libs.web import body as http_body
from libs.web.upstream import exchange
from libs.web.upstream.pool import CONNECTIONS_MAX
from services.gateway.upstream import breaker, responses
from tests.integration.gateway.backends import API_KEY, PROJECT, SESSION, a_key
from tests.integration.gateway.conftest import Suite
from tests.integration.gateway.sockets import connected, status_of

SOURCES = f"/api/v1/project/{PROJECT}/sources"
JOBS = f"/api/v1/project/{PROJECT}/jobs"
MEBIBYTE = 1024 * 1024


async def test_method_path_query_and_body_arrive_as_they_were_sent(suite: Suite, client: aiohttp.ClientSession) -> None:
    body = b'{"name": "caf\\u00e9"}'
    url = URL(f"{suite.url}{SOURCES}?a=1&b=%2F%20x&a=2", encoded=True)
    async with client.put(url, data=body) as response:
        seen = await response.json()
    assert (seen["method"], seen["path"]) == ("PUT", f"{SOURCES}?a=1&b=%2F%20x&a=2")
    assert seen["body"].encode() == body


async def test_the_service_gets_the_principal_and_not_the_credential(client: aiohttp.ClientSession) -> None:
    async with client.get(SOURCES, headers={"Cookie": f"datasync_session={SESSION}"}) as response:
        seen = await response.json()
    assert seen["principal"]["name"] == "ci"
    assert "authorization" not in seen["headers"]
    assert "cookie" not in seen["headers"]


async def test_only_auth_gets_the_credential(client: aiohttp.ClientSession) -> None:
    async with client.post("/logout") as response:
        seen = await response.json()
    assert seen["headers"]["authorization"] == f"Bearer {API_KEY}"


async def test_headers_that_claim_to_be_ours_and_hop_by_hop_headers_are_stripped(
    client: aiohttp.ClientSession,
) -> None:
    forged = {
        "X-DataSync-Principal": "forged",
        "x-datasync-client-address": "10.0.0.1",
        "X-Forwarded-For": "10.0.0.1",
        "Connection": "keep-alive, X-Private",
        "X-Private": "for this connection",
        "Keep-Alive": "timeout=5",
        "Proxy-Authorization": "Basic eDp5",
        "TE": "trailers",
        "X-Custom": "passes",
    }
    async with client.get(SOURCES, headers=forged) as response:
        assert response.status == 200
        headers = (await response.json())["headers"]
    assert headers["x-datasync-principal"] != "forged"
    assert headers["x-datasync-client-address"] == "127.0.0.1"
    assert headers["x-forwarded-for"] == "127.0.0.1"
    assert headers["x-custom"] == "passes"
    assert not {"x-private", "keep-alive", "proxy-authorization", "te"} & set(headers)


async def test_the_service_gets_the_public_host(client: aiohttp.ClientSession) -> None:
    async with client.get(SOURCES, headers={"Host": "data.example.com"}) as response:
        headers = (await response.json())["headers"]
    assert headers["host"] == headers["x-forwarded-host"] == "data.example.com"
    assert headers["x-forwarded-proto"] == "http"


async def test_login_needs_no_credential_and_every_cookie_it_sets_comes_back(stranger: aiohttp.ClientSession) -> None:
    async with stranger.post("/login", json={"username": "ada", "password": "x"}) as response:
        assert response.status == 200
        assert len(response.headers.getall("Set-Cookie")) == 2


async def test_the_callers_trace_is_continued(client: aiohttp.ClientSession) -> None:
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    async with client.get(SOURCES, headers={"traceparent": f"00-{trace_id}-b7ad6b7169203331-01"}) as response:
        assert trace_id in (await response.json())["headers"]["traceparent"]


async def test_a_valid_request_id_is_kept_and_passed_to_the_service(client: aiohttp.ClientSession) -> None:
    async with client.get(SOURCES, headers={"X-Request-Id": "order-66.a_b"}) as response:
        assert response.headers.getall("X-Request-Id") == ["order-66.a_b"]
        assert (await response.json())["headers"]["x-request-id"] == "order-66.a_b"


@pytest.mark.parametrize("request_id", ["with space", "x" * 129, "<script>", ""])
async def test_an_invalid_request_id_is_replaced(client: aiohttp.ClientSession, request_id: str) -> None:
    async with client.get(SOURCES, headers={"X-Request-Id": request_id}) as response:
        assert response.headers["X-Request-Id"] not in ("", request_id)


async def test_a_matching_entity_tag_is_a_304_through_the_gateway(client: aiohttp.ClientSession) -> None:
    async with client.get(f"{SOURCES}/tagged", headers={"If-None-Match": '"7"'}) as response:
        assert response.status == 304
        assert response.headers["ETag"] == '"7"'
        assert await response.read() == b""


async def test_a_compressed_response_is_passed_on_unchanged(client: aiohttp.ClientSession) -> None:
    async with client.get(f"{SOURCES}/tagged", headers={"Accept-Encoding": "gzip"}) as response:
        assert response.headers["Content-Encoding"] == "gzip"
        assert int(response.headers["Content-Length"]) < 200
        assert (await response.json())["some"].startswith("thingthing")
        assert response.headers["Vary"] == "Accept-Encoding, Origin"


async def test_head_returns_the_length_without_a_body(client: aiohttp.ClientSession) -> None:
    async with client.get(f"{SOURCES}/tagged", headers={"Accept-Encoding": "identity"}) as got:
        length = got.headers["Content-Length"]
    async with client.head(f"{SOURCES}/tagged", headers={"Accept-Encoding": "identity"}) as response:
        assert (response.status, response.headers["Content-Length"]) == (200, length)


async def test_check_unique_goes_to_the_owner_of_the_entity_type(client: aiohttp.ClientSession) -> None:
    path = f"/api/v1/project/{PROJECT}/check-unique"
    for entity_type, service in (("source", "catalog"), ("job", "job_orchestrator")):
        async with client.post(path, json={"name": "n", "entity_type": entity_type}) as response:
            seen = await response.json()
            assert response.status == 200
            assert f'"entity_type": "{entity_type}"' in seen["body"]
            assert _audience(seen["headers"]["x-datasync-principal"]) == service


async def test_a_large_response_is_streamed_and_arrives_whole(client: aiohttp.ClientSession) -> None:
    size_bytes = 50 * MEBIBYTE
    received = 0
    async with client.get(f"{SOURCES}/stream?size={size_bytes}") as response:
        assert response.headers["Content-Length"] == str(size_bytes)
        async for chunk in response.content.iter_any():
            received += len(chunk)
    assert received == size_bytes


async def test_a_caller_that_does_not_read_holds_the_service_back(suite: Suite, client: aiohttp.ClientSession) -> None:
    size_bytes = 500 * MEBIBYTE
    async with client.get(f"{SOURCES}/stream?size={size_bytes}") as response:
        sent_bytes = await _settled(lambda: suite.catalog.sent_bytes)
        assert 0 < sent_bytes < 50 * MEBIBYTE
        assert len(await response.content.readexactly(60 * MEBIBYTE)) == 60 * MEBIBYTE
        assert suite.catalog.sent_bytes > sent_bytes


async def _settled(value: Callable[[], int]) -> int:
    """The value once a thousand turns of the event loop, which all ends share, have not changed it."""
    turns, found = 0, value()
    while turns < 1000:
        await asyncio.sleep(0)
        turns, found = (turns + 1, found) if value() == found else (0, value())
    return found


async def test_a_get_may_have_a_body(client: aiohttp.ClientSession) -> None:
    async with client.get(SOURCES, data=b'{"type": "postgres"}') as response:
        assert (await response.json())["body"] == '{"type": "postgres"}'


async def test_events_arrive_one_by_one(suite: Suite, client: aiohttp.ClientSession) -> None:
    async with client.get(f"{SOURCES}/events") as response:
        assert await response.content.readuntil(b"\n\n") == b"data: 1\n\n"
        suite.catalog.go_on.set()
        assert await response.content.read() == b"data: 2\n\n"


async def test_a_listener_that_disconnects_is_disconnected_from_the_service_too(
    suite: Suite, client: aiohttp.ClientSession
) -> None:
    """Although no event comes that could not be delivered."""
    response = await client.get(f"{SOURCES}/events")
    assert await response.content.readuntil(b"\n\n") == b"data: 1\n\n"
    assert suite.catalog.listener is not None
    assert not suite.catalog.listener.is_closing()
    response.close()
    while not suite.catalog.listener.is_closing():
        await asyncio.sleep(0.01)


async def test_a_body_reaches_the_service_while_it_is_still_being_sent(
    suite: Suite, client: aiohttp.ClientSession
) -> None:
    arrived = asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        yield b"x" * 1000
        while suite.catalog.received_bytes < 1000:
            await asyncio.sleep(0.001)
        arrived.set()
        yield b"x" * 1000

    async with client.post(f"{SOURCES}/upload", data=body()) as response:
        assert await response.json() == {"received": 2000}
    assert arrived.is_set()


async def test_a_response_that_breaks_off_is_not_passed_on_as_whole(client: aiohttp.ClientSession) -> None:
    async with client.get(f"{SOURCES}/broken") as response:
        with pytest.raises(aiohttp.ClientPayloadError):
            await response.read()


@pytest.mark.parametrize(("path", "cause"), [("broken", "service_broke_off"), ("stalled", "service_stalled")])
async def test_why_a_service_did_not_complete_its_response_is_logged(
    client: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch, path: str, cause: str
) -> None:
    monkeypatch.setattr(exchange, "READ_IDLE_SECONDS", 0.05)
    with capture_logs() as logs:
        async with client.get(f"{SOURCES}/{path}") as response:
            with pytest.raises(aiohttp.ClientPayloadError):
                await response.read()
    assert _causes(logs) == [cause]


async def test_a_caller_that_does_not_read_is_cut_off_and_not_blamed_on_the_service(
    client: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(responses, "WRITE_IDLE_SECONDS", 0.05)
    with capture_logs() as logs:
        async with client.get(f"{SOURCES}/stream?size={500 * MEBIBYTE}") as response:
            while not _causes(logs):
                await asyncio.sleep(0.01)
            with pytest.raises(aiohttp.ClientPayloadError):
                await response.read()
    assert _causes(logs) == ["caller_stalled"]


def _causes(logs: Sequence[Mapping[str, Any]]) -> list[str]:
    return [line["cause"] for line in logs if line["event"] == "response_aborted"]


async def test_a_body_over_the_limit_is_refused_by_its_announced_length(
    suite: Suite, client: aiohttp.ClientSession
) -> None:
    async with client.post(SOURCES, data=b"x" * (MEBIBYTE + 1)) as response:
        assert response.status == 413
        assert "1048576 bytes" in (await response.json())["message"]


async def test_a_body_over_the_limit_is_refused_while_it_is_streamed(
    suite: Suite, client: aiohttp.ClientSession
) -> None:
    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b"x" * 65536

    async with client.post(f"{SOURCES}/upload", data=endless()) as response:
        assert response.status == 413
    assert suite.catalog.received_bytes <= MEBIBYTE


async def test_a_compressed_body_is_passed_on_unchanged(suite: Suite, client: aiohttp.ClientSession) -> None:
    """The service that reads it applies its limit, and the gateway decompresses nothing."""
    body, headers = gzip.compress(b"x" * (20 * MEBIBYTE)), {"Content-Encoding": "gzip"}
    async with client.post(f"{SOURCES}/upload", data=body, headers=headers) as response:
        assert await response.json() == {"received": len(body)}


@pytest.mark.parametrize("entity_type", ["job", "source"])
async def test_a_compressed_body_that_decides_the_target_is_decompressed(
    client: aiohttp.ClientSession, entity_type: str
) -> None:
    body = orjson.dumps({"entity_type": entity_type, "name": "x"})
    async with client.post(
        f"/api/v1/project/{PROJECT}/check-unique", data=gzip.compress(body), headers={"Content-Encoding": "gzip"}
    ) as response:
        assert response.status == 200
        assert (await response.json())["body"] == body.decode()


@pytest.mark.parametrize("coding", ["br", "zstd", "foo", "gzip, gzip", "compress"])
async def test_an_unsupported_coding_is_a_415_that_names_the_supported_ones(
    stranger: aiohttp.ClientSession, client: aiohttp.ClientSession, coding: str
) -> None:
    """RFC 9110 section 15.5.16; before authentication, and nothing reaches the service."""
    for caller, path in ((stranger, "/login"), (client, SOURCES)):
        async with caller.post(path, data=b"{}", headers={"Content-Encoding": coding}) as response:
            assert response.status == 415
            assert response.headers["Accept-Encoding"] == "gzip, deflate"
            assert (await response.json())["code"] == "unsupported_content_encoding"


async def test_a_body_that_does_not_match_its_coding_is_rejected(client: aiohttp.ClientSession) -> None:
    async with client.post(SOURCES, data=b"not gzip at all", headers={"Content-Encoding": "gzip"}) as response:
        assert response.status == 400


@pytest.mark.parametrize(
    ("path", "more", "status"),
    [
        (SOURCES, "Content-Length: 13\r\n", 401),
        ("/nowhere", "Content-Length: 13\r\n", 404),
        (SOURCES, f"Authorization: {API_KEY}\r\nContent-Length: 1048577\r\n", 413),
        (SOURCES, f"Authorization: {API_KEY}\r\nContent-Length: 13\r\nContent-Encoding: br\r\n", 415),
        (f"{SOURCES}/nothing", f"Authorization: {API_KEY}\r\nContent-Length: 13\r\n", 404),
        (f"{SOURCES}/tagged", f"Authorization: {API_KEY}\r\nContent-Length: 13\r\n", 405),
        (f"{SOURCES}/tagged", f"Authorization: {API_KEY}\r\nTransfer-Encoding: chunked\r\n", 405),
    ],
)
async def test_a_request_that_will_be_rejected_is_rejected_before_its_body_is_sent(
    suite: Suite, path: str, more: str, status: int
) -> None:
    """By the gateway, and by the service that the request would go to."""
    async with connected(suite.url) as (reader, writer):
        writer.write(f"POST {path} HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n{more}\r\n".encode())
        head = await reader.readuntil(b"\r\n\r\n")
    assert int(head.split()[1]) == status
    assert b"\r\nConnection: close" in head


@pytest.mark.parametrize("framing", ["Content-Length: 5", "Transfer-Encoding: chunked"])
async def test_a_body_that_the_service_accepts_is_continued(suite: Suite, framing: str) -> None:
    head = f"Host: x\r\nAuthorization: {API_KEY}\r\nExpect: 100-continue\r\n{framing}\r\n"
    async with connected(suite.url) as (reader, writer):
        for _ in range(2):
            writer.write(f"POST {SOURCES}/upload HTTP/1.1\r\n{head}\r\n".encode())
            assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            writer.write(b"5\r\n12345\r\n0\r\n\r\n" if "chunked" in framing else b"12345")
            assert (await reader.readuntil(b'{"received":5}')).startswith(b"HTTP/1.1 200 ")


async def test_an_upload_that_progresses_may_take_longer_than_the_timeout(
    suite: Suite, client: aiohttp.ClientSession
) -> None:
    """The gateway of this suite waits a second for an answer to begin."""

    async def slowly() -> AsyncIterator[bytes]:
        for _ in range(6):
            yield b"x" * 20_000
            await asyncio.sleep(0.25)

    async with client.post(f"{SOURCES}/upload", data=slowly()) as response:
        assert await response.json() == {"received": 120_000}


async def test_an_upload_that_stops_coming_is_a_408(
    suite: Suite, client: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_body, "BODY_IDLE_SECONDS", 0.2)

    async def stopping() -> AsyncIterator[bytes]:
        yield b"x"
        await suite.catalog.go_on.wait()

    async with client.post(f"{SOURCES}/upload", data=stopping()) as response:
        assert response.status == 408
        suite.catalog.go_on.set()


async def test_ingest_takes_ten_mebibytes_and_no_more(client: aiohttp.ClientSession) -> None:
    async with client.post("/api/v2/ingest", data=b"x" * (10 * MEBIBYTE)) as response:
        assert response.status == 200
    async with client.post("/api/v2/ingest", data=b"x" * (10 * MEBIBYTE + 1)) as response:
        assert response.status == 413
        assert set(await response.json()) == {"error", "message", "code"}


async def test_a_response_that_does_not_begin_in_time_is_a_504(suite: Suite, client: aiohttp.ClientSession) -> None:
    async with client.get(f"{SOURCES}/hang") as response:
        assert response.status == 504
        assert "1 seconds" in (await response.json())["message"]
    suite.catalog.go_on.set()


async def test_while_a_circuit_is_open_nothing_is_sent_to_its_service(
    suite: Suite, client: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(breaker, "OPEN_SECONDS", 3600.0)
    await suite.catalog.backend.stop()
    for attempt in range(breaker.FAILURES_MAX + 1):
        if attempt == breaker.FAILURES_MAX:
            await suite.catalog.backend.start()
        async with client.get(SOURCES) as response:
            assert response.status == 503
            assert int(response.headers["Retry-After"]) >= 1
            assert (await response.json())["code"] == "service_unavailable"
    async with client.get(JOBS) as response:
        assert response.status == 200, "the other services are not affected"


async def test_a_service_that_was_dead_is_found_again(suite: Suite, client: aiohttp.ClientSession) -> None:
    await suite.catalog.backend.stop()
    for _ in range(breaker.FAILURES_MAX):
        async with client.get(SOURCES) as response:
            assert response.status == 503
    await suite.catalog.backend.start()
    status = 503
    while status == 503:
        await asyncio.sleep(0.02)
        async with client.get(SOURCES) as response:
            status = response.status
    assert status == 200


async def test_kept_connections_that_the_service_closed_are_not_used(
    suite: Suite, client: aiohttp.ClientSession
) -> None:
    async with client.post(SOURCES, data=b"{}") as response:
        assert response.status == 200
    await suite.catalog.backend.stop()
    await suite.catalog.backend.start()
    async with client.post(SOURCES, data=b"{}") as response:
        assert response.status == 200


async def test_ready_only_while_the_services_behind_are(suite: Suite, stranger: aiohttp.ClientSession) -> None:
    async with stranger.get("/readyz") as response:
        assert response.status == 200
        needed = {"auth", "catalog", "job_orchestrator", "record_sync", "worker"}
        assert set((await response.json())["checks"]) == {"background tasks", "signing_key", *needed}
    suite.catalog.backend.health.stop()
    async with stranger.get("/readyz") as response:
        assert response.status == 503
        told = "not ready: shutdown: the service is stopping"
        assert (await response.json())["checks"]["catalog"] == {"ready": False, "message": told}
    async with stranger.get("/healthz") as response:
        assert response.status == 200


async def test_readiness_is_degraded_without_a_worker(suite: Suite, stranger: aiohttp.ClientSession) -> None:
    async def absent() -> str:
        return Degraded("no worker has ever asked for runs")

    suite.jobs.health.add("worker", absent)
    async with stranger.get("/readyz") as response:
        assert response.status == 200
        body = await response.json()
    assert body["status"] == "degraded"
    assert body["checks"]["worker"] == {"ready": False, "message": "no worker has ever asked for runs"}
    await suite.jobs.stop()
    async with stranger.get("/readyz") as response:
        assert response.status == 503
        assert "not known" in (await response.json())["checks"]["worker"]["message"]


async def test_readiness_names_the_service_that_does_not_trust_the_gateway(
    suite: Suite, stranger: aiohttp.ClientSession
) -> None:
    await suite.catalog.backend.stop()
    suite.catalog.backend.trusted_keys = {"gateway": new_signing_key()[1]}
    await suite.catalog.backend.start()
    async with stranger.get("/readyz") as response:
        assert response.status == 503
        checks = (await response.json())["checks"]
    assert "TRUSTED_KEYS" in checks["catalog"]["message"]
    assert checks["record_sync"]["ready"]


async def test_metrics_are_for_members_of_the_first_project(
    suite: Suite, client: aiohttp.ClientSession, stranger: aiohttp.ClientSession
) -> None:
    async with stranger.get("/metrics") as response:
        assert response.status == 401
    other = "ds_live_" + "c" * 38
    suite.auth.credentials["bearer", other] = a_key().model_copy(update={"projects": {124: "owner"}})
    async with stranger.get("/metrics", headers={"Authorization": f"Bearer {other}"}) as response:
        assert response.status == 403
    async with client.get("/metrics") as response:
        assert response.status == 200
        assert "datasync_http_server_request_duration_seconds_bucket" in await response.text()


@pytest.mark.parametrize(
    "path",
    ["/", "/nowhere", "/api/v1/project/123", "/api/v1/project/123/nothing", "/internal/credentials/resolve"],
)
async def test_an_unknown_path_is_a_404(client: aiohttp.ClientSession, path: str) -> None:
    async with client.get(path) as response:
        assert response.status == 404
        body = await response.json()
    assert (body["success"], body["code"]) == (False, "unknown_route")


async def test_a_known_path_with_another_method_is_a_405_that_names_the_methods(client: aiohttp.ClientSession) -> None:
    async with client.delete(f"{SOURCES}/tagged") as response:
        assert response.status == 405
        assert response.headers["Allow"] == "GET,HEAD"


async def test_no_path_reaches_the_internal_calls_of_a_service(suite: Suite) -> None:
    target = "/api/v1/project/1/sources/../../../../../internal/credentials/resolve"
    sent = f"GET {target} HTTP/1.1\r\nHost: x\r\nAuthorization: {API_KEY}\r\n\r\n".encode()
    assert await status_of(suite.url, sent) == 404


async def test_an_unreachable_service_is_a_503_of_its_family(suite: Suite, client: aiohttp.ClientSession) -> None:
    await suite.records.stop()
    async with client.get("/api/v1/sync/records") as response:
        assert response.status == 503
        assert response.content_type == "application/problem+json"


def _audience(token: str) -> str:
    return str(jwt.decode(token, options={"verify_signature": False})["aud"])


async def test_a_read_that_waits_is_ended_when_the_gateway_stops(
    suite: Suite, client: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long poll would keep the gateway from stopping; this route has a longer timeout than the suite's."""
    monkeypatch.setattr("services.gateway.upstream.forwarding.STOP_GRACE_SECONDS", 0.05)
    url = f"/api/v1/project/{PROJECT}/source/hang"
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(_answer_of(client, url))
        async with asyncio.timeout(10):
            while suite.catalog.hanging < 1:
                await asyncio.sleep(0.01)
        suite.health.stop()
    status, headers, body = waiting.result()
    assert (status, headers["Retry-After"], body["success"]) == (503, "1", False)
    assert "shutting down" in body["message"]


async def test_slow_requests_do_not_block_the_others(suite: Suite) -> None:
    """Slow requests use connections of their own. If all of those are in use, another slow request is rejected."""
    hanging = f"/api/v1/project/{PROJECT}/source/hang"
    headers = {"Authorization": f"Bearer {API_KEY}"}
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(suite.url, headers=headers, connector=connector) as crowd:
        waiting = [asyncio.create_task(_answer_of(crowd, hanging)) for _ in range(CONNECTIONS_MAX)]
        async with asyncio.timeout(20):
            while suite.catalog.hanging < CONNECTIONS_MAX:
                await asyncio.sleep(0.01)
        status, answered, body = await _answer_of(crowd, hanging)
        assert (status, answered["Retry-After"], body["code"]) == (503, "1", "too_many_waiting")
        async with crowd.get(SOURCES) as response:
            assert response.status == 200
        suite.catalog.go_on.set()
        assert {status for status, _, _ in await asyncio.gather(*waiting)} == {200}


async def _answer_of(client: aiohttp.ClientSession, url: str) -> tuple[int, Any, Any]:
    async with client.get(url) as response:
        return response.status, response.headers, await response.json()
