"""The gateway in front of the real auth service."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta

import aiohttp
import pytest
from pydantic import SecretStr

from libs.mongodb.client import connect
from libs.process.live import Live
from libs.process.signing_keys import new_signing_key
from libs.service.running import running_service
from libs.testing.urls import url_settings
from services.auth.app import SERVICE as AUTH
from services.auth.config import AuthSettings
from services.gateway.app import SERVICE as GATEWAY
from services.gateway.config import GatewaySettings
from tests.integration.gateway.backends import GATEWAY_KEY, GATEWAY_PUBLIC_KEY, Backend, echoing, started

ADA = {"username": "ada", "email": "ada@example.com", "password": "password"}
PAGE = {"Origin": "http://localhost:8000", "Authorization": "Bearer authenticated"}
BOOTSTRAP_KEY = "eight characters or more"


@pytest.fixture
async def url(mongod: str, database_prefix: str) -> AsyncIterator[str]:
    """Where a gateway listens, with auth and an echoing catalog behind it."""
    auth_key, auth_public_key = new_signing_key()
    trusted_keys = {"gateway": GATEWAY_PUBLIC_KEY, "auth": auth_public_key}
    async with AsyncExitStack() as stack:
        catalog = Backend("catalog", echoing("/api/v1/project/{projectid}/sources"))
        await stack.enter_async_context(started(catalog))
        auth = await stack.enter_async_context(
            running_service(
                AUTH,
                AuthSettings(
                    port=0,
                    mongodb_url=mongod,
                    database_prefix=database_prefix,
                    signing_key=SecretStr(auth_key),
                    trusted_keys=trusted_keys,
                    api_key=SecretStr(BOOTSTRAP_KEY),
                ),
            )
        )
        gateway = await stack.enter_async_context(
            running_service(
                GATEWAY,
                GatewaySettings(
                    port=0,
                    mongodb_url=mongod,
                    database_prefix=database_prefix,
                    rate_limit_project_per_minute=Live(1_000_000),
                    **url_settings(auth=auth.base_url, catalog=catalog.url),
                    signing_key=SecretStr(GATEWAY_KEY),
                    trusted_keys=trusted_keys,
                ),
            )
        )
        yield gateway.base_url


async def test_a_page_signs_up_logs_in_works_and_logs_out_with_its_cookie(url: str) -> None:
    jar = aiohttp.CookieJar(unsafe=True)
    async with aiohttp.ClientSession(url, headers=PAGE, cookie_jar=jar) as page:
        async with page.post("/signup", json=ADA) as response:
            assert response.status == 200, await response.text()
        async with page.get("/auth") as response:
            assert response.status == 401
        async with page.post("/login", json={"username": "ada", "password": "password"}) as response:
            assert response.status == 200, await response.text()
            assert response.headers["Access-Control-Allow-Credentials"] == "true"
        async with page.get("/auth") as response:
            assert (await response.json())["data"] == {"username": "ada"}
        async with page.post("/api/v1/project/123/sources", json={}) as response:
            assert (await response.json())["principal"]["projects"] == {"123": "owner"}
        async with page.post("/logout") as response:
            assert response.status == 200
        async with page.get("/auth") as response:
            assert response.status == 401


async def test_a_wrong_password_is_refused_and_says_nothing_of_the_account(url: str) -> None:
    async with aiohttp.ClientSession(url) as caller:
        async with caller.post("/signup", json=ADA) as response:
            assert response.status == 200
        for username in ("ada", "nobody"):
            async with caller.post("/login", json={"username": username, "password": "wrong"}) as response:
                assert response.status == 401
                assert (await response.json())["success"] is False


async def test_a_key_that_was_revoked_directly_at_the_gateway_stops_at_once(url: str) -> None:
    owner = {"Authorization": f"Bearer {BOOTSTRAP_KEY}"}
    async with aiohttp.ClientSession(url, headers=owner) as caller:
        async with caller.post("/api/v2/keys", json={"name": "ci", "permission": "read-write"}) as response:
            assert response.status in (200, 201), await response.text()
            issued = await response.json()
        key = {"Authorization": f"Bearer {issued['secret']}"}
        async with caller.get("/api/v1/project/123/sources", headers=key) as response:
            assert response.status == 200
        async with caller.delete(f"/api/v2/keys/{issued['id']}") as response:
            assert response.status < 300
        async with caller.get("/api/v1/project/123/sources", headers=key) as response:
            assert response.status == 401


async def test_a_key_that_another_gateway_revoked_stops_within_a_second(
    url: str, mongod: str, database_prefix: str
) -> None:
    """The key's document changes under a gateway that is not told."""
    owner = {"Authorization": f"Bearer {BOOTSTRAP_KEY}"}
    async with aiohttp.ClientSession(url, headers=owner) as caller:
        async with caller.post("/api/v2/keys", json={"name": "ci", "permission": "read-only"}) as response:
            issued = await response.json()
        key = {"Authorization": f"Bearer {issued['secret']}"}
        async with caller.get("/api/v1/project/123/sources", headers=key) as response:
            assert response.status == 200
        client = connect(mongod)
        keys = client[f"{database_prefix}auth"]["api_keys"]
        now = datetime.now(UTC)
        found = await keys.update_one({"_id": issued["id"]}, {"$set": {"state.revoked_at": now}})
        assert found.modified_count == 1
        revoked_at = time.monotonic()
        while True:
            async with caller.get("/api/v1/project/123/sources", headers=key) as response:
                if response.status == 401:
                    break
            assert time.monotonic() - revoked_at < 1.0
        client.close()


async def test_a_key_near_its_end_says_so_on_every_response(url: str) -> None:
    owner = {"Authorization": f"Bearer {BOOTSTRAP_KEY}"}
    async with aiohttp.ClientSession(url, headers=owner) as caller:
        async with caller.post("/api/v2/keys", json={"name": "ci", "expires_in_days": 5}) as response:
            assert "X-DataSync-Key-Expires" not in response.headers
            near = await response.json()
        async with caller.post("/api/v2/keys", json={"name": "ci"}) as response:
            far = await response.json()
        for path, status in (
            ("/api/v1/project/123/sources", 200),
            ("/api/v1/project/7/sources", 200),
            ("/v2/keys/x", 404),
        ):
            async with caller.get(path, headers={"Authorization": near["secret"]}) as response:
                assert (response.status, response.headers["X-DataSync-Key-Expires"]) == (status, near["expires_at"])
            async with caller.get(path, headers={"Authorization": far["secret"]}) as response:
                assert (response.status, "X-DataSync-Key-Expires" in response.headers) == (status, False)
        # The former secret of a rotated key ends with the overlap.
        async with caller.post(f"/api/v2/keys/{far['id']}/rotate", json={"overlap_seconds": 600}) as response:
            rotated = await response.json()
            assert response.status == 200, rotated
        async with caller.get("/v2/keys", headers={"Authorization": far["secret"]}) as response:
            assert response.headers["X-DataSync-Key-Expires"] == rotated["previous_secret_valid_until"]
            ends_in = datetime.fromisoformat(response.headers["X-DataSync-Key-Expires"]) - datetime.now(UTC)
            assert timedelta(seconds=500) < ends_in < timedelta(seconds=601)
        async with caller.get("/v2/keys", headers={"Authorization": rotated["secret"]}) as response:
            assert (response.status, "X-DataSync-Key-Expires" in response.headers) == (200, False)


async def test_an_oauth_client_works_with_its_token_until_it_is_revoked(
    url: str, mongod: str, database_prefix: str
) -> None:
    """The client's document changes under a gateway that is not told."""
    owner = {"Authorization": f"Bearer {BOOTSTRAP_KEY}"}
    async with aiohttp.ClientSession(url) as caller:
        body = {"name": "import", "scopes": ["sources:read"]}
        async with caller.post("/api/v2/oauth/clients", json=body, headers=owner) as response:
            client = await response.json()
            assert response.status == 201, client
        basic = {"Authorization": aiohttp.encode_basic_auth(client["client_id"], client["client_secret"])}
        async with caller.post("/oauth/token", data={"grant_type": "client_credentials"}, headers=basic) as response:
            granted = await response.json()
            assert (response.status, response.headers["Cache-Control"]) == (200, "no-store")
        token = {"Authorization": f"Bearer {granted['access_token']}"}
        async with caller.get("/api/v1/project/123/sources", headers=token) as response:
            principal = (await response.json())["principal"]
            assert (principal["kind"], principal["subject"]) == ("oauth_client", client["client_id"])
        async with caller.get("/api/v2/keys", headers=token) as response:
            assert response.status == 403
            challenge = 'Bearer realm="datasync", error="insufficient_scope", scope="keys:read"'
            assert response.headers["WWW-Authenticate"] == challenge
        mongo = connect(mongod)
        clients = mongo[f"{database_prefix}auth"]["oauth_clients"]
        revoked = {"$set": {"state.revoked_at": datetime.now(UTC)}}
        assert (await clients.update_one({"_id": client["id"]}, revoked)).modified_count == 1
        revoked_at = time.monotonic()
        while True:
            async with caller.get("/api/v1/project/123/sources", headers=token) as response:
                if response.status == 401:
                    assert response.headers["WWW-Authenticate"] == 'Bearer realm="datasync", error="invalid_token"'
                    break
            assert time.monotonic() - revoked_at < 1.0
        async with caller.get("/api/v1/project/123/sources") as response:
            assert response.headers["WWW-Authenticate"] == 'Bearer realm="datasync"'
        async with caller.post("/oauth/token", data={"grant_type": "client_credentials"}, headers=basic) as response:
            assert (response.status, (await response.json())["error"]) == (401, "invalid_client")
            assert response.headers["WWW-Authenticate"] == 'Basic realm="datasync"'
        mongo.close()


async def test_the_token_endpoint_answers_in_its_own_shape_whoever_refuses(url: str) -> None:
    async with aiohttp.ClientSession(url) as caller:
        async with caller.get("/oauth/token") as response:
            assert (response.status, response.headers["Allow"]) == (405, "POST")
            assert set(await response.json()) == {"error", "error_description"}
        async with caller.post("/oauth/token", data=b"x" * 2_000_000) as response:
            assert response.status == 413
            assert (await response.json())["error"] == "invalid_request"


NO_TEXT = (b"\xff", b"\xe9", b"\xed\xa0\x80", b"a\x80b", b"\xc3\xa9")
PLACES = (
    b"Authorization: Bearer %b",
    b"Authorization: Basic %b",
    b"Authorization: %b",
    b"Cookie: datasync_session=%b",
    b"Cookie: theme=%b; datasync_session=x",
    b"Expect: %b",
    b"Accept: %b",
    b"Accept-Encoding: %b",
    b"Content-Type: %b",
    b"Content-Type: application/json; charset=%b",
    b"Content-Encoding: %b",
    b"Idempotency-Key: %b",
    b"If-Match: %b",
    b"If-None-Match: %b",
    b"Origin: %b",
    b"Referer: %b",
    b"Host: %b",
    b"X-Request-Id: %b",
    b"X-Forwarded-For: %b",
    b"X-Project-Id: %b",
    b"Last-Event-ID: %b",
    b"traceparent: %b",
    b"tracestate: %b",
    b"User-Agent: %b",
    b"Connection: %b",
    b"X-Anything: %b",
)
TARGETS = (b"/%b", b"/auth?x=%b", b"/api/v2/keys/%b", b"/api/v2/keys?limit=%b", b"/docs/%b", b"/api/v2/keys/x?as_of=%b")


async def test_no_byte_of_a_request_is_our_fault(url: str) -> None:
    """What comes from a client is decoded in one place each; bytes that are no text are answered like any others."""
    owner = f"Authorization: Bearer {BOOTSTRAP_KEY}\r\n".encode()
    requests = [
        (method + target + b" HTTP/1.1\r\n", place % junk + b"\r\n" + (b"" if b"Authorization" in place else owner))
        for junk in NO_TEXT
        for place in PLACES
        for method, target in (
            (b"GET ", b"/auth"),
            (b"POST ", b"/login"),
            (b"POST ", b"/signup"),
            (b"POST ", b"/oauth/token"),
        )
    ]
    requests += [
        (b"GET " + target % junk + b" HTTP/1.1\r\n", owner + b"Accept: " + accept + b"\r\n")
        for junk in (*NO_TEXT, b"%FF", b"%ED%A0%80", b"%00", b"%C3%A9", b"\xd9\xa1", b"0001-01-01T00:00:00%2B14:00")
        for target in TARGETS
        for accept in (b"*/*", b"application/problem+json")
    ]
    form = b"grant_type=client_credentials"
    found = {}
    for line, headers in requests:
        kind = b"application/x-www-form-urlencoded" if b"/oauth/token" in line else b"application/json"
        body = form if b"/oauth/token" in line else b'{"username": "ada", "password": "password"}'
        content = b"" if b"GET" in line else b"Content-Length: %d\r\n" % len(body)
        content += b"" if b"Content-Type" in headers else b"Content-Type: " + kind + b"\r\n"
        content += b"" if b"Host" in headers else b"Host: x\r\n"
        status = await _status(
            url, line + headers + content + b"Connection: close\r\n\r\n" + (b"" if b"GET" in line else body)
        )
        if not 200 <= status < 500:
            found[line + headers] = status
    assert not found


async def test_a_session_cookie_counts_on_any_line(url: str) -> None:
    async with aiohttp.ClientSession(url, cookie_jar=aiohttp.DummyCookieJar()) as page:
        async with page.post("/signup", json=ADA) as response:
            assert response.status == 200
        async with page.post("/login", json={"username": "ada", "password": "password"}) as response:
            session = response.cookies["datasync_session"].value
        ours = f"datasync_session={session}"
        for lines in (
            ["theme=dark", ours],
            [ours, "theme=dark"],
            [f'a="b;c"; {ours}'],
            [f"x;;=;{ours}; y"],
            ["e=\udcff", ours],
        ):
            async with page.get("/auth", headers=[("Cookie", line) for line in lines]) as response:
                assert response.status == 200, lines
        async with page.get("/auth", headers={"Cookie": f"other_{ours}"}) as response:
            assert response.status == 401


async def _status(url: str, sent: bytes) -> int:
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(sent)
    async with asyncio.timeout(10):
        answer = await reader.readline()
    writer.close()
    return int(answer.split()[1])
