"""The gateway in front of the real auth service."""

from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import aiohttp
import pytest

from libs.mongodb.client import connect
from tests.integration.gateway.backends import BOOTSTRAP_KEY
from tests.integration.gateway.conftest import RealAuth
from tests.integration.gateway.sockets import status_of

ADA = {"username": "ada", "email": "ada@example.com", "password": "password"}
PAGE = {"Origin": "http://localhost:8000", "Authorization": "Bearer authenticated"}
SOURCES = "/api/v1/project/123/sources"


@pytest.fixture
async def caller(real_auth: RealAuth) -> AsyncIterator[aiohttp.ClientSession]:
    """Somebody without a credential of their own."""
    async with aiohttp.ClientSession(real_auth.url, cookie_jar=aiohttp.DummyCookieJar()) as session:
        yield session


@pytest.fixture
async def owner(real_auth: RealAuth) -> AsyncIterator[aiohttp.ClientSession]:
    headers = {"Authorization": f"Bearer {BOOTSTRAP_KEY}"}
    async with aiohttp.ClientSession(real_auth.url, headers=headers) as session:
        yield session


@pytest.fixture
async def page(real_auth: RealAuth) -> AsyncIterator[aiohttp.ClientSession]:
    """A page of an allowed origin in a browser that keeps cookies."""
    jar = aiohttp.CookieJar(unsafe=True)
    async with aiohttp.ClientSession(real_auth.url, headers=PAGE, cookie_jar=jar) as session:
        yield session


async def test_a_page_signs_up_logs_in_works_and_logs_out_with_its_cookie(page: aiohttp.ClientSession) -> None:
    async with page.post("/signup", json=ADA) as response:
        assert response.status == 200, await response.text()
    async with page.get("/auth") as response:
        assert response.status == 401
    async with page.post("/login", json={"username": "ada", "password": "password"}) as response:
        assert response.status == 200, await response.text()
        assert response.headers["Access-Control-Allow-Credentials"] == "true"
    async with page.get("/auth") as response:
        assert (await response.json())["data"] == {"username": "ada"}
    async with page.post(SOURCES, json={}) as response:
        assert (await response.json())["principal"]["projects"] == {"123": "owner"}
    async with page.post("/logout") as response:
        assert response.status == 200
    async with page.get("/auth") as response:
        assert response.status == 401


async def test_a_wrong_password_is_refused_alike_for_known_and_unknown_accounts(caller: aiohttp.ClientSession) -> None:
    async with caller.post("/signup", json=ADA) as response:
        assert response.status == 200
    answers = []
    for username in ("ada", "nobody"):
        async with caller.post("/login", json={"username": username, "password": "wrong"}) as response:
            answers.append((response.status, await response.json()))
    assert answers[0] == answers[1]
    assert (answers[0][0], answers[0][1]["success"]) == (401, False)


async def test_a_key_that_was_revoked_through_the_gateway_stops_at_once(owner: aiohttp.ClientSession) -> None:
    issued = await _issued(owner, permission="read-write")
    key = {"Authorization": f"Bearer {issued['secret']}"}
    async with owner.get(SOURCES, headers=key) as response:
        assert response.status == 200
    async with owner.delete(f"/api/v2/keys/{issued['id']}") as response:
        assert response.status < 300
    async with owner.get(SOURCES, headers=key) as response:
        assert response.status == 401


async def test_a_key_that_another_gateway_revoked_stops_in_steady_use(
    owner: aiohttp.ClientSession, mongod: str, database_prefix: str
) -> None:
    issued = await _issued(owner, permission="read-only")
    key = {"Authorization": f"Bearer {issued['secret']}"}
    async with owner.get(SOURCES, headers=key) as response:
        assert response.status == 200
    await _revoke(mongod, database_prefix, "api_keys", issued["id"])
    await _until_refused(owner, key)


async def test_a_key_near_its_end_says_so_on_every_response(owner: aiohttp.ClientSession) -> None:
    near, far = await _issued(owner, expires_in_days=5), await _issued(owner)
    for path, status in ((SOURCES, 200), ("/api/v1/project/7/sources", 200), ("/v2/keys/x", 404)):
        async with owner.get(path, headers={"Authorization": near["secret"]}) as response:
            assert (response.status, response.headers["X-DataSync-Key-Expires"]) == (status, near["expires_at"])
        async with owner.get(path, headers={"Authorization": far["secret"]}) as response:
            assert (response.status, "X-DataSync-Key-Expires" in response.headers) == (status, False)


async def test_the_previous_secret_of_a_rotated_key_says_when_its_overlap_ends(owner: aiohttp.ClientSession) -> None:
    issued = await _issued(owner)
    async with owner.post(f"/api/v2/keys/{issued['id']}/rotate", json={"overlap_seconds": 600}) as response:
        rotated = await response.json()
        assert response.status == 200, rotated
    async with owner.get("/v2/keys", headers={"Authorization": issued["secret"]}) as response:
        assert response.headers["X-DataSync-Key-Expires"] == rotated["previous_secret_valid_until"]
        ends_in = datetime.fromisoformat(response.headers["X-DataSync-Key-Expires"]) - datetime.now(UTC)
        assert timedelta(seconds=500) < ends_in < timedelta(seconds=601)
    async with owner.get("/v2/keys", headers={"Authorization": rotated["secret"]}) as response:
        assert (response.status, "X-DataSync-Key-Expires" in response.headers) == (200, False)


async def test_an_oauth_client_works_with_its_token_until_it_is_revoked(
    owner: aiohttp.ClientSession, caller: aiohttp.ClientSession, mongod: str, database_prefix: str
) -> None:
    async with owner.post("/api/v2/oauth/clients", json={"name": "import", "scopes": ["sources:read"]}) as response:
        client = await response.json()
        assert response.status == 201, client
    basic = {"Authorization": aiohttp.encode_basic_auth(client["client_id"], client["client_secret"])}
    async with caller.post("/oauth/token", data={"grant_type": "client_credentials"}, headers=basic) as response:
        granted = await response.json()
        assert (response.status, response.headers["Cache-Control"]) == (200, "no-store")
    token = {"Authorization": f"Bearer {granted['access_token']}"}
    async with caller.get(SOURCES, headers=token) as response:
        principal = (await response.json())["principal"]
        assert (principal["kind"], principal["subject"]) == ("oauth_client", client["client_id"])
    async with caller.get("/api/v2/keys", headers=token) as response:
        assert response.status == 403
        challenge = 'Bearer realm="datasync", error="insufficient_scope", scope="keys:read"'
        assert response.headers["WWW-Authenticate"] == challenge
    await _revoke(mongod, database_prefix, "oauth_clients", client["id"])
    refused = await _until_refused(caller, token)
    assert refused["WWW-Authenticate"] == 'Bearer realm="datasync", error="invalid_token"'
    async with caller.get(SOURCES) as response:
        assert response.headers["WWW-Authenticate"] == 'Bearer realm="datasync"'
    async with caller.post("/oauth/token", data={"grant_type": "client_credentials"}, headers=basic) as response:
        assert (response.status, (await response.json())["error"]) == (401, "invalid_client")
        assert response.headers["WWW-Authenticate"] == 'Basic realm="datasync"'


async def _issued(owner: aiohttp.ClientSession, **asked: Any) -> Any:
    """A new API key."""
    async with owner.post("/api/v2/keys", json={"name": "ci", **asked}) as response:
        assert response.status in (200, 201), await response.text()
        assert "X-DataSync-Key-Expires" not in response.headers
        return await response.json()


async def _revoke(mongod: str, database_prefix: str, collection: str, entity_id: str) -> None:
    """Change the document behind the gateway's back, as another gateway's request would."""
    client = connect(mongod)
    revoked = {"$set": {"state.revoked_at": datetime.now(UTC)}}
    found = await client[f"{database_prefix}auth"][collection].update_one({"_id": entity_id}, revoked)
    assert found.modified_count == 1
    client.close()


async def _until_refused(caller: aiohttp.ClientSession, credential: dict[str, str]) -> Mapping[str, str]:
    """The headers of the first 401."""
    while True:
        async with caller.get(SOURCES, headers=credential) as response:
            if response.status == 401:
                return response.headers


async def test_the_token_endpoint_answers_in_its_own_shape_whoever_refuses(caller: aiohttp.ClientSession) -> None:
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


async def test_bytes_that_are_not_utf_8_never_cause_an_internal_error(real_auth: RealAuth) -> None:
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
        status = await status_of(
            real_auth.url, line + headers + content + b"Connection: close\r\n\r\n" + (b"" if b"GET" in line else body)
        )
        if not 200 <= status < 500:
            found[line + headers] = status
    assert not found


async def test_a_session_cookie_counts_on_any_line(caller: aiohttp.ClientSession) -> None:
    async with caller.post("/signup", json=ADA) as response:
        assert response.status == 200
    async with caller.post("/login", json={"username": "ada", "password": "password"}) as response:
        session = response.cookies["datasync_session"].value
    ours = f"datasync_session={session}"
    for lines in (
        ["theme=dark", ours],
        [ours, "theme=dark"],
        [f'a="b;c"; {ours}'],
        [f"x;;=;{ours}; y"],
        ["e=\udcff", ours],
    ):
        async with caller.get("/auth", headers=[("Cookie", line) for line in lines]) as response:
            assert response.status == 200, lines
    async with caller.get("/auth", headers={"Cookie": f"other_{ours}"}) as response:
        assert response.status == 401
