"""The HTTP shell of services, over a real connection."""

import asyncio
import gzip
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

import aiohttp
import orjson
import pytest
from aiohttp import web
from pydantic import SecretStr
from yarl import URL

from libs.contracts.internal import (
    RESOLVE_CREDENTIAL,
    CredentialPresented,
    CredentialResolved,
)
from libs.core.envelope import Frozen
from libs.core.errors import (
    CallOperator,
    Conflict,
    FieldError,
    FixRequest,
    Forbidden,
    OutcomeUnknown,
    RateLimited,
    RetryLater,
    UpstreamTimeout,
)
from libs.core.principal import Principal
from libs.process.health import Degraded, Health
from libs.process.settings import ServiceSettings
from libs.process.signing_keys import new_signing_key
from libs.testing.urls import url_settings
from libs.web import body as http_body
from libs.web import routes
from libs.web.answers import Answer, json_response
from libs.web.body import read_bytes
from libs.web.calls import Call
from libs.web.internal import InternalClient, internal_route
from libs.web.principals import PRINCIPAL_HEADER, PrincipalSigner, PrincipalVerifier
from libs.web.server import ServiceRunner
from libs.web.shell import create_app

GATEWAY_KEY, GATEWAY_PUBLIC = new_signing_key()
CATALOG_KEY, CATALOG_PUBLIC = new_signing_key()
GATEWAY = PrincipalSigner("gateway", SecretStr(GATEWAY_KEY))
CATALOG = PrincipalSigner("catalog", SecretStr(CATALOG_KEY))
ADA = Principal(kind="user", subject="1", name="ada", projects={123: "owner"}, scopes=("*",))

P = "/api/v1/project/123"
MEBIBYTE = 1024 * 1024
_REAL_INFLATER = zlib.decompressobj


class Inner(Frozen):
    port: int
    tls: bool = False


class Wanted(Frozen):
    name: str
    config: Inner | None = None
    tags: tuple[str, ...] = ()


class Asked(Frozen):
    type: str
    version: str = "latest"


class Shell:
    """A service whose handlers the test chooses."""

    def __init__(self) -> None:
        self.health = Health()
        self.error: BaseException = CallOperator("unset")
        self.started = asyncio.Event()
        self.go_on = asyncio.Event()
        self.resolve: Callable[[CredentialPresented], Awaitable[CredentialResolved]] = self._resolve
        self.runner: ServiceRunner | None = None
        self.url = ""

    def routes(self) -> list[web.RouteDef]:
        project = "/api/v1/project/{projectid}"
        return [
            _post(f"{project}/things", self.create),
            _get(f"{project}/things", self.find),
            _get(f"{project}/spec", self.spec),
            _get(f"{project}/tagged", self.tagged),
            _get(f"{project}/large", self.large),
            _get(f"{project}/begin", self.seen, changes=True),
            _get(f"{project}/sources/begin", self.seen, changes=True),
            _get(f"{project}/sources/read", self.seen),
            _get(f"{project}/read", self.seen),
            _put(f"{project}/unconditional", self.seen),
            _put(f"{project}/conditional", self.seen, conditional=True),
            _patch(f"{project}/repeatable", self.seen, idempotent=True),
            _post(f"{project}/tests", self.seen),
            _get(f"{project}/seen", self.seen, conditional=True, idempotent=True),
            _put(f"{project}/seen", self.seen_with_body, conditional=True, idempotent=True, reads=read_bytes),
            web.get(f"{project}/undescribed", self.fail),
            web.get("/fails", self.fail),
            web.get("/api/v2/fails", self.fail),
            web.get("/api/v1/sync/fails", self.fail),
            web.get("/breaks", self.break_off),
            web.get("/slow", self.slow),
            _post("/login", self.seen),
            internal_route(RESOLVE_CREDENTIAL, self.answer_internal),
        ]

    async def create(self, call: Call, body: Wanted) -> Answer[Any]:
        return Answer(body, message="made")

    async def find(self, call: Call, query: Asked) -> Any:
        return query

    async def spec(self, call: Call, body: Asked) -> Any:
        return body

    async def tagged(self, call: Call) -> Answer[Any]:
        return Answer({"n": int(call.request.query["n"])}, 4, embeds_others=True)

    async def large(self, call: Call) -> Answer[Any]:
        return Answer({"text": "x" * 2000}, 4)

    async def seen(self, call: Call) -> Any:
        expected, idempotency = call.expected_version, call.idempotency
        return {
            "actor": call.metadata.actor,
            "project": call.metadata.project_id,
            "correlation": call.metadata.correlation_id,
            "traceparent": call.metadata.traceparent,
            "if_match": sorted(expected) if isinstance(expected, frozenset) else expected,
            "idempotency": idempotency and [idempotency.id, idempotency.request_hash],
            "time": datetime(2026, 2, 21, 10, 30, tzinfo=UTC),
            "fragment": orjson.Fragment(b'{"n":1e400}'),
        }

    async def seen_with_body(self, call: Call, body: bytes) -> Any:
        return await self.seen(call)

    async def fail(self, _: web.Request) -> web.Response:
        raise self.error

    async def break_off(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"begun")
        raise ZeroDivisionError

    async def slow(self, _: web.Request) -> web.Response:
        self.started.set()
        await self.go_on.wait()
        return json_response({"finished": True})

    async def answer_internal(self, presented: CredentialPresented) -> CredentialResolved:
        return await self.resolve(presented)

    async def _resolve(self, presented: CredentialPresented) -> CredentialResolved:
        return CredentialResolved(principal=None, reason=presented.credential)


_get, _post, _put, _patch = (
    partial(method, summary="Shown", tag="Test") for method in (routes.get, routes.post, routes.put, routes.patch)
)


@pytest.fixture
async def shell() -> AsyncIterator[Shell]:
    service = Shell()
    verifier = PrincipalVerifier("auth", {"gateway": GATEWAY_PUBLIC, "catalog": CATALOG_PUBLIC})
    app = create_app("auth", service.routes(), verifier, health=service.health, settings=ServiceSettings())
    service.runner = ServiceRunner(app, is_draining=lambda: False, shutdown_timeout_seconds=2.0)
    await service.runner.setup()
    await web.TCPSite(service.runner, "127.0.0.1", 0).start()
    service.url = f"http://127.0.0.1:{service.runner.addresses[0][1]}"
    yield service
    service.go_on.set()
    await service.runner.cleanup()


@pytest.fixture
async def client(shell: Shell) -> AsyncIterator[aiohttp.ClientSession]:
    headers = {PRINCIPAL_HEADER: GATEWAY.sign(ADA, "auth")}
    async with aiohttp.ClientSession(shell.url, headers=headers) as session:
        yield session


@pytest.fixture
async def internal(shell: Shell) -> AsyncIterator[InternalClient]:
    client = InternalClient(ServiceSettings(**url_settings(auth=shell.url)), GATEWAY)
    yield client
    await client.close()


async def test_a_body_becomes_a_model_and_the_answer_an_envelope(client: aiohttp.ClientSession) -> None:
    body = {"name": "n", "config": {"port": 5432}, "tags": ["a"]}
    async with client.post(f"{P}/things", json=body) as response:
        assert response.status == 200
        answer = await response.json()
    assert (answer["success"], answer["message"]) == (True, "made")
    assert answer["data"] == {"name": "n", "config": {"port": 5432, "tls": False}, "tags": ["a"]}


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        (b"{}", {"name": "missing"}),
        (b'{"name": 7}', {"name": "invalid"}),
        (b'{"name": "n", "config": {"port": "5432"}}', {"config.port": "invalid"}),
        (b'{"name": "n", "config": {"port": true}}', {"config.port": "invalid"}),
        (b'{"name": "n", "tags": ["a", 1]}', {"tags[1]": "invalid"}),
        (b'{"name": "n", "nmae": "typo"}', {"nmae": "unknown_field"}),
        (b'{"name": "a", "name": "b"}', {"name": "duplicate_key"}),
        (b'{"name": "a\\u0000"}', {"name": "nul_character"}),
        (b'{"name": "n", "config": {"port": 9223372036854775808}}', {"config.port": "integer_out_of_range"}),
    ],
)
async def test_what_is_wrong_with_a_body_is_named_by_field(
    client: aiohttp.ClientSession, body: bytes, fields: dict[str, str]
) -> None:
    async with client.post(f"{P}/things", data=body, headers={"Content-Type": "application/json"}) as response:
        assert response.status == 400
        answer = await response.json()
    assert {item["field"]: item["code"] for item in answer["errors"]} == fields
    assert all(field in answer["message"] for field in fields)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "malformed_json"),
        (b"{", "malformed_json"),
        (b"\xff\xfe", "malformed_json"),
        (b'{"name": NaN}', "malformed_json"),
        (b"[" * 10_000 + b"]" * 10_000, "too_deep"),
        (b"[]", "validation_error"),
        (b"null", "validation_error"),
    ],
)
async def test_what_is_no_json_object_is_a_400(client: aiohttp.ClientSession, body: bytes, code: str) -> None:
    async with client.post(f"{P}/things", data=body, headers={"Content-Type": "application/json"}) as response:
        assert response.status == 400
        assert (await response.json())["code"] == code


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/xml"},
        {"Content-Type": "application/json; charset=latin-1"},
        {"Content-Type": "application/json", "Content-Encoding": "compress"},
    ],
)
async def test_another_media_type_is_a_415(client: aiohttp.ClientSession, headers: dict[str, str]) -> None:
    async with client.post(f"{P}/things", data=b'{"name": "n"}', headers=headers) as response:
        assert response.status == 415


async def test_a_compressed_body_is_read(client: aiohttp.ClientSession) -> None:
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    async with client.post(f"{P}/things", data=gzip.compress(b'{"name": "n"}'), headers=headers) as response:
        assert response.status == 200


@pytest.mark.parametrize("compress", [False, True])
async def test_a_body_over_a_mebibyte_is_a_413_measured_after_decompression(
    client: aiohttp.ClientSession, compress: bool
) -> None:
    body = b'{"name": "' + b"x" * MEBIBYTE + b'"}'
    headers = {"Content-Type": "application/json"} | ({"Content-Encoding": "gzip"} if compress else {})
    async with client.post(f"{P}/things", data=gzip.compress(body) if compress else body, headers=headers) as response:
        assert response.status == 413


THING = b'{"name": "n"}'


@pytest.mark.parametrize(
    ("coding", "body"),
    [
        ("gzip", gzip.compress(THING, mtime=0)[:-12]),
        ("gzip", gzip.compress(THING, mtime=0)[:-1]),
        ("gzip", gzip.compress(THING, mtime=0) + b"more"),
        ("gzip", gzip.compress(THING, mtime=0) + b"\0"),
        ("gzip", gzip.compress(b"", mtime=0) * 1001),
        ("gzip", THING),
        ("gzip", gzip.compress(THING, mtime=0)[:-8] + bytes(8)),
        ("deflate", gzip.compress(THING, mtime=0)),
        ("deflate", zlib.compress(THING)[:-1]),
        ("deflate", zlib.compress(THING) * 2),
    ],
)
async def test_a_broken_compressed_body_is_a_400(client: aiohttp.ClientSession, coding: str, body: bytes) -> None:
    headers = {"Content-Type": "application/json", "Content-Encoding": coding}
    async with client.post(f"{P}/things", data=body, headers=headers) as response:
        assert response.status == 400
        assert (await response.json())["code"] == "malformed_body"


@pytest.mark.parametrize(
    ("coding", "body"),
    [
        ("x-gzip", gzip.compress(THING, mtime=0)),
        ("GZIP", gzip.compress(THING, mtime=0)),
        ("identity, gzip", gzip.compress(THING, mtime=0)),
        ("gzip", gzip.compress(THING[:5], mtime=0) + gzip.compress(b"", mtime=0) + gzip.compress(THING[5:], mtime=0)),
        ("deflate", zlib.compress(THING)),
        ("deflate", zlib.compress(THING, wbits=-15)),
        ("identity", THING),
        ("", THING),
    ],
)
async def test_every_spelling_of_a_coding_that_is_read_is_read(
    client: aiohttp.ClientSession, coding: str, body: bytes
) -> None:
    headers = {"Content-Type": "application/json", "Content-Encoding": coding}
    async with client.post(f"{P}/things", data=body, headers=headers, skip_auto_headers=["Content-Encoding"]) as got:
        assert got.status == 200


@pytest.mark.parametrize("coding", ["br", "zstd", "foo", "gzip, gzip", "gzip, deflate", "compress"])
async def test_a_coding_that_is_not_read_is_a_415_that_names_those_that_are(
    client: aiohttp.ClientSession, coding: str
) -> None:
    for path in (f"{P}/things", f"{P}/tests"):
        async with client.post(path, data=THING, headers={"Content-Encoding": coding}) as response:
            assert response.status == 415
            assert response.headers["Accept-Encoding"] == "gzip, deflate"


async def test_a_body_that_holds_nine_hundred_megabytes_is_inflated_to_its_limit(
    client: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    inflated_bytes = 0

    class Counted:
        def __init__(self, wbits: int) -> None:
            self._inflater = _REAL_INFLATER(wbits=wbits)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._inflater, name)

        def decompress(self, data: bytes, max_length: int) -> bytes:
            nonlocal inflated_bytes
            found = self._inflater.decompress(data, max_length)
            inflated_bytes += len(found)
            return found

    monkeypatch.setattr(zlib, "decompressobj", Counted)
    bomb = gzip.compress(b"x" * MEBIBYTE) * 900
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    for path in (f"{P}/things", f"{P}/tests"):
        async with client.post(path, data=bomb, headers=headers) as response:
            assert response.status == (413 if path.endswith("things") else 200)
    assert inflated_bytes == MEBIBYTE + 1


async def test_a_body_that_keeps_coming_is_waited_for_and_one_that_stops_is_not(
    shell: Shell, client: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_body, "BODY_IDLE_SECONDS", 0.8)
    monkeypatch.setattr(http_body, "BODY_BYTES_PER_SECOND_MIN", 1)

    async def slowly() -> AsyncIterator[bytes]:
        yield b'{"name": "'
        for _ in range(10):
            await asyncio.sleep(0.1)
            yield b"xx"
        yield b'"}'

    async def stopping() -> AsyncIterator[bytes]:
        yield b'{"name": '
        await shell.go_on.wait()

    headers = {"Content-Type": "application/json"}
    async with client.post(f"{P}/things", data=slowly(), headers=headers) as response:
        assert response.status == 200
    async with client.post(f"{P}/things", data=stopping(), headers=headers) as response:
        assert response.status == 408
        shell.go_on.set()


async def test_a_body_that_comes_too_slowly_is_cut_off(
    client: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_body, "BODY_IDLE_SECONDS", 0.2)
    is_over = asyncio.Event()

    async def dribbling() -> AsyncIterator[bytes]:
        while not is_over.is_set():
            yield b" "
            await asyncio.sleep(0.05)

    async with client.post(f"{P}/things", data=dribbling(), headers={"Content-Type": "application/json"}) as response:
        assert response.status == 408
        is_over.set()


@pytest.mark.parametrize(
    ("method", "path", "more", "status"),
    [
        ("POST", f"{P}/nowhere", "", 404),
        ("PUT", f"{P}/things", "", 405),
        ("POST", f"{P}/things", "Content-Type: text/plain\r\n", 415),
        ("POST", f"{P}/things", "Content-Encoding: br\r\n", 415),
        ("POST", "/api/v1/project/124/things", "", 403),
        ("POST", f"{P}/things", "X-DataSync-Principal: x\r\n", 401),
    ],
)
async def test_what_will_be_refused_is_refused_before_its_body_is_asked_for(
    shell: Shell, method: str, path: str, more: str, status: int
) -> None:
    who = "" if PRINCIPAL_HEADER in more else f"{PRINCIPAL_HEADER}: {GATEWAY.sign(ADA, 'auth')}\r\n"
    kind = "" if "Content-Type" in more else "Content-Type: application/json\r\n"
    answer = await _raw(
        shell,
        f"{method} {path} HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 13\r\n{who}{kind}{more}\r\n",
    )
    head, _, _ = answer.partition(b"\r\n\r\n")
    assert int(head.split()[1]) == status
    assert b"\r\nConnection: close" in head


async def test_a_body_over_its_limit_is_refused_before_it_is_asked_for(shell: Shell) -> None:
    who = f"{PRINCIPAL_HEADER}: {GATEWAY.sign(ADA, 'auth')}\r\nContent-Type: application/json\r\n"
    head = f"POST {P}/things HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 1048577\r\n{who}\r\n"
    assert (await _raw(shell, head)).startswith(b"HTTP/1.1 413 ")


async def test_a_body_that_will_be_read_is_asked_for(shell: Shell) -> None:
    reader, writer = await _connected(shell)
    who = f"{PRINCIPAL_HEADER}: {GATEWAY.sign(ADA, 'auth')}\r\nContent-Type: application/json\r\n"
    writer.write(
        f"POST {P}/things HTTP/1.1\r\nHost: x\r\nExpect: 100-Continue\r\nContent-Length: 13\r\n{who}\r\n".encode()
    )
    async with asyncio.timeout(5):
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(THING)
        head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert b"Connection: close" not in head
    writer.close()


@pytest.mark.parametrize("expectation", ["\xff", "200-ok", "100-continue, x"])
async def test_another_expectation_is_a_417(shell: Shell, expectation: str) -> None:
    who = f"{PRINCIPAL_HEADER}: {GATEWAY.sign(ADA, 'auth')}"
    head = f"GET {P}/seen HTTP/1.1\r\nHost: x\r\n{who}\r\nExpect: {expectation}\r\n\r\n"
    assert (await _raw(shell, head)).startswith(b"HTTP/1.1 417 ")


async def test_a_token_that_may_only_read_is_refused_by_what_changes_something(shell: Shell) -> None:
    headers = {PRINCIPAL_HEADER: GATEWAY.sign(ADA, "auth", may_only_read=True)}
    assert GATEWAY.sign(ADA, "auth") != headers[PRINCIPAL_HEADER]
    async with aiohttp.ClientSession(shell.url, headers=headers) as session:
        for method, path, status in (
            ("GET", "read", 200),
            ("HEAD", "read", 200),
            ("GET", "begin", 403),
            ("GET", "%62egin", 403),
            ("HEAD", "begin", 405),
            ("PUT", "conditional", 403),
            ("GET", "undescribed", 403),
            ("GET", "nowhere", 404),
        ):
            async with session.request(method, URL(f"{shell.url}{P}/{path}", encoded=True)) as response:
                assert response.status == status, (method, path)


async def test_a_key_that_may_only_read_is_refused_by_what_changes_something(shell: Shell) -> None:
    for scope, path, status in (
        ("sources:read", "read", 200),
        ("sources:read", "begin", 403),
        ("sources:read", "%62egin", 403),
        ("sources:write", "begin", 200),
    ):
        key = Principal(kind="api_key", subject="1", name="ci", projects={123: "member"}, scopes=(scope,))
        headers = {PRINCIPAL_HEADER: GATEWAY.sign(key, "auth")}
        async with (
            aiohttp.ClientSession(shell.url, headers=headers) as session,
            session.get(URL(f"{shell.url}{P}/sources/{path}", encoded=True)) as response,
        ):
            assert response.status == status, (scope, path)


@pytest.mark.parametrize(
    ("method", "route", "header", "status"),
    [
        ("PUT", "unconditional", "If-Match", 400),
        ("PUT", "conditional", "If-Match", 200),
        ("PUT", "conditional", "If-None-Match", 400),
        ("PUT", "conditional", "Idempotency-Key", 400),
        ("PATCH", "repeatable", "Idempotency-Key", 200),
        ("POST", "tests", "Idempotency-Key", 200),
        ("GET", "read", "Idempotency-Key", 200),
    ],
)
async def test_a_header_that_makes_a_change_safe_is_heeded_or_refused_by_name(
    client: aiohttp.ClientSession, method: str, route: str, header: str, status: int
) -> None:
    async with client.request(method, f"{P}/{route}", headers={header: '"1"'}) as response:
        assert response.status == status
        if status == 400:
            assert header in (await response.json())["message"]


async def test_two_idempotency_keys_are_a_400(client: aiohttp.ClientSession) -> None:
    headers = [("Idempotency-Key", "a"), ("Idempotency-Key", "a")]
    async with client.patch(f"{P}/repeatable", headers=headers) as response:
        assert response.status == 400


async def test_if_match_is_a_list_that_may_stand_on_several_lines(client: aiohttp.ClientSession) -> None:
    for lines, expected in (
        (['"3"'], 3),
        (['"3", W/"4" ,"5.ab"'], [3, 5]),
        (['"3"', '"7-gzip"'], [3, 7]),
        ([', ,"3",'], 3),
        (["*"], None),
        (['"a,b", "3"'], 3),
    ):
        async with client.get(f"{P}/seen", headers=[("If-Match", line) for line in lines]) as response:
            assert f'"if_match":{orjson.dumps(expected).decode()},' in await response.text()


async def test_plain_and_compressed_have_tags_of_their_own_that_name_one_version(
    client: aiohttp.ClientSession,
) -> None:
    tags = {}
    for coding in ("identity", "gzip"):
        async with client.get(f"{P}/large", headers={"Accept-Encoding": coding}) as response:
            assert response.headers.get("Content-Encoding", "identity") == coding
            tags[coding] = response.headers["ETag"]
    assert tags == {"identity": '"4"', "gzip": '"4-gzip"'}
    async with client.get(f"{P}/seen", headers={"If-Match": tags["gzip"]}) as response:
        assert '"if_match":4,' in await response.text()


@pytest.mark.parametrize("coding", ["identity", "gzip"])
@pytest.mark.parametrize(
    ("lines", "status"),
    [
        (['"4"'], 304),
        (['W/"4"'], 304),
        (['"3", "4-gzip"'], 304),
        (['"3"', '"4"'], 304),
        (["*"], 304),
        (['"x,4", "y"'], 200),
        (["4"], 200),
        (['"40"'], 200),
    ],
)
async def test_if_none_match_is_a_list_compared_weakly(
    client: aiohttp.ClientSession, lines: list[str], status: int, coding: str
) -> None:
    headers = [("Accept-Encoding", coding), *(("If-None-Match", line) for line in lines)]
    async with client.get(f"{P}/large", headers=headers) as response:
        assert response.status == status
        assert response.headers["Vary"] == "Accept-Encoding"
        assert response.headers["Cache-Control"] == "private, no-cache"
        assert response.headers["ETag"] in ('"4"', '"4-gzip"')


async def test_a_reader_may_ask_for_one_version_alone(client: aiohttp.ClientSession) -> None:
    for tag, status in (('"4"', 200), ('"4-gzip"', 200), ('"3", "4"', 200), ('"3"', 412), ('W/"4"', 412), ("*", 200)):
        async with client.get(f"{P}/large", headers={"If-Match": tag}) as response:
            assert response.status == status, tag


@pytest.mark.parametrize(
    ("accepted", "is_compressed"),
    [
        ("gzip", True),
        ("GZIP", True),
        ("x-gzip", True),
        ("br, gzip;q=0.5", True),
        ("*", True),
        ("gzip ; Q=1.000", True),
        ("gzip;q=0", False),
        ("gzip;q=0.000", False),
        ("gzip;q=0, *", False),
        ("*;q=0", False),
        ("notgzip", False),
        ("gzipx", False),
        ("br", False),
        ("identity, gzip;q=0.5", False),
        ("gzip;q=x", False),
        ("", False),
    ],
)
async def test_an_answer_is_compressed_for_whom_wants_it(
    client: aiohttp.ClientSession, accepted: str, is_compressed: bool
) -> None:
    async with client.get(f"{P}/large", headers={"Accept-Encoding": accepted}) as response:
        assert (response.headers.get("Content-Encoding") == "gzip") == is_compressed
        assert response.headers["Vary"] == "Accept-Encoding"


async def test_query_parameters_become_a_model(client: aiohttp.ClientSession) -> None:
    async with client.get(f"{P}/things?type=postgres") as response:
        assert (await response.json())["data"] == {"type": "postgres", "version": "latest"}
    for query in ("", "?type=a&type=b", "?type=a&typo=b"):
        async with client.get(f"{P}/things{query}") as response:
            assert response.status == 400


async def test_a_get_takes_its_fields_from_the_query_or_from_a_body(client: aiohttp.ClientSession) -> None:
    expected = {"type": "postgres", "version": "v1"}
    async with client.get(f"{P}/spec?type=postgres&version=v1") as response:
        assert (await response.json())["data"] == expected
    async with client.get(f"{P}/spec", json=expected) as response:
        assert (await response.json())["data"] == expected
    async with client.get(f"{P}/spec?type=postgres", json={"version": "v1"}) as response:
        assert (await response.json())["data"] == expected
    async with client.get(f"{P}/spec?type=postgres", json={"type": "mysql"}) as response:
        assert response.status == 400
        assert "differs between" in (await response.json())["message"]
    async with client.get(f"{P}/spec?type=postgres&config=x") as response:
        assert response.status == 400


async def test_a_project_of_others_is_a_403_and_no_project_a_404(client: aiohttp.ClientSession) -> None:
    for project, status in (("124", 403), ("abc", 404), ("-1", 404), ("9" * 30, 404)):
        async with client.post(f"/api/v1/project/{project}/things", json={"name": "n"}) as response:
            assert response.status == status


async def test_events_learn_who_did_it_where_and_in_which_conversation(client: aiohttp.ClientSession) -> None:
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    headers = {"X-Request-Id": "r-1", "traceparent": f"00-{trace_id}-b7ad6b7169203331-01", "If-Match": '"12.abc"'}
    async with client.get(f"{P}/seen", headers=headers) as response:
        seen = await response.text()
    assert '"actor":"ada","project":123,"correlation":"r-1"' in seen
    assert trace_id in seen
    assert '"if_match":12' in seen
    assert '"time":"2026-02-21T10:30:00.000Z"' in seen
    assert '"fragment":{"n":1e400}' in seen


@pytest.mark.parametrize("tag", ["12", '"x"', 'W/"12"', '"x", W/"2"', '"12', '"12" "13"'])
async def test_an_if_match_that_is_no_version_of_ours_is_a_412(client: aiohttp.ClientSession, tag: str) -> None:
    async with client.get(f"{P}/seen", headers={"If-Match": tag}) as response:
        assert response.status == 412


async def test_idempotency_keys_are_apart_by_caller_method_path_and_body(shell: Shell) -> None:
    bob = ADA.model_copy(update={"subject": "2"})
    found = []
    async with aiohttp.ClientSession(shell.url) as session:
        for principal, method, body in ((ADA, "PUT", b"a"), (ADA, "PUT", b"b"), (ADA, "GET", b"a"), (bob, "PUT", b"a")):
            headers = {PRINCIPAL_HEADER: GATEWAY.sign(principal, "auth"), "Idempotency-Key": "k"}
            async with session.request(method, f"{P}/seen", data=body, headers=headers) as response:
                found.append(orjson.loads((await response.read()).replace(b"1e400", b"1"))["data"]["idempotency"])
    assert found[0][0] == found[1][0]
    assert found[0][1] != found[1][1]
    assert len({identity for identity, _ in found}) == 3


async def test_an_answer_that_embeds_others_changes_its_tag_with_its_body(client: aiohttp.ClientSession) -> None:
    async with client.get(f"{P}/tagged?n=1") as response:
        tag = response.headers["ETag"]
    assert tag.startswith('"4.')
    async with client.get(f"{P}/tagged?n=1", headers={"If-None-Match": f'"x", W/{tag}'}) as response:
        assert (response.status, response.headers["ETag"]) == (304, tag)
    async with client.get(f"{P}/tagged?n=2", headers={"If-None-Match": tag}) as response:
        assert response.status == 200


async def test_no_route_but_the_public_ones_answers_without_a_principal(shell: Shell) -> None:
    async with aiohttp.ClientSession(shell.url) as session:
        for method, path, status in (
            ("GET", f"{P}/things", 401),
            ("GET", "/nowhere", 401),
            ("POST", RESOLVE_CREDENTIAL.path, 401),
            ("POST", "/login", 200),
            ("GET", "/healthz", 200),
            ("GET", "/metrics", 200),
        ):
            async with session.request(method, path) as response:
                assert response.status == status, path


async def test_a_forged_principal_is_refused(shell: Shell) -> None:
    key, _ = new_signing_key()
    forged = PrincipalSigner("gateway", SecretStr(key)).sign(ADA, "auth")
    async with aiohttp.ClientSession(shell.url, headers={PRINCIPAL_HEADER: forged}) as session:
        for path in (f"{P}/things", "/healthz"):
            async with session.get(path) as response:
                assert response.status == 401


async def test_a_user_can_not_make_internal_calls_nor_a_service_the_public_ones(shell: Shell) -> None:
    as_user = {PRINCIPAL_HEADER: GATEWAY.sign(ADA, "auth")}
    as_gateway = {PRINCIPAL_HEADER: GATEWAY.sign_as_service("auth")}
    as_catalog = {PRINCIPAL_HEADER: CATALOG.sign_as_service("auth")}
    async with aiohttp.ClientSession(shell.url) as session:
        for headers, status in ((as_user, 403), (as_catalog, 403), (as_gateway, 200)):
            body = CredentialPresented(kind="bearer", credential="x").model_dump()
            async with session.post(RESOLVE_CREDENTIAL.path, json=body, headers=headers) as response:
                assert response.status == status
        async with session.get(f"{P}/things?type=a", headers=as_gateway) as response:
            assert response.status == 403


@pytest.mark.parametrize("path", ["/fails", "/api/v2/fails", "/api/v1/sync/fails"])
async def test_a_crash_is_a_500_that_tells_nothing_of_the_inside(
    shell: Shell, client: aiohttp.ClientSession, path: str
) -> None:
    shell.error = ValueError("postgresql://u:hunter2@h/d")
    async with client.get(path) as response:
        assert response.status == 500
        text = await response.text()
    assert "hunter2" not in text
    assert "ValueError" not in text
    assert "internal_error" in text


async def test_errors_say_when_to_come_back(shell: Shell, client: aiohttp.ClientSession) -> None:
    for error, status, seconds in (
        (RateLimited("slow down", retry_after_seconds=12.1), 429, "13"),
        (RetryLater("full"), 503, "1"),
    ):
        shell.error = error
        async with client.get("/fails") as response:
            assert (response.status, response.headers["Retry-After"]) == (status, seconds)


async def test_a_connection_error_of_a_database_is_a_500_and_not_a_lost_caller(
    shell: Shell, client: aiohttp.ClientSession
) -> None:
    shell.error = ConnectionRefusedError()
    async with client.get("/fails") as response:
        assert response.status == 500


async def test_a_stream_that_fails_is_cut_off(client: aiohttp.ClientSession) -> None:
    async with client.get("/breaks") as response:
        with pytest.raises(aiohttp.ClientPayloadError):
            await response.read()


async def test_readiness_names_what_is_wrong(shell: Shell, client: aiohttp.ClientSession) -> None:
    async def fine() -> str | None:
        return None

    async def wrong() -> str | None:
        return "the store does not answer"

    async def broken() -> str | None:
        raise ZeroDivisionError

    shell.health.add("log", fine)
    async with client.get("/readyz") as response:
        assert response.status == 200
    shell.health.add("store", wrong)
    shell.health.add("other", broken)
    async with client.get("/readyz") as response:
        assert response.status == 503
        checks = (await response.json())["checks"]
    assert checks["log"]["ready"]
    assert checks["store"] == {"ready": False, "message": "the store does not answer"}
    assert "ZeroDivisionError" in checks["other"]["message"]


async def test_what_only_degrades_keeps_the_service_ready(shell: Shell, client: aiohttp.ClientSession) -> None:
    async def degraded() -> str:
        return Degraded("no worker")

    shell.health.add("worker", degraded)
    async with client.get("/readyz") as response:
        assert response.status == 200
        body = await response.json()
    assert body["status"] == "degraded"
    assert body["checks"]["worker"] == {"ready": False, "message": "no worker"}


async def test_a_service_that_stops_is_not_ready_and_finishes_what_is_in_flight(
    shell: Shell, client: aiohttp.ClientSession
) -> None:
    in_flight = asyncio.create_task(_json(client, "/slow"))
    await shell.started.wait()
    shell.health.stop()
    async with client.get("/readyz") as response:
        assert response.status == 503
    assert shell.runner is not None
    stopping = asyncio.create_task(shell.runner.cleanup())
    await asyncio.sleep(0)
    shell.go_on.set()
    assert await in_flight == {"finished": True}
    await stopping


async def test_requests_are_measured_by_route_and_not_by_path(client: aiohttp.ClientSession) -> None:
    for project in (123, 124, 125):
        async with client.get(f"/api/v1/project/{project}/tagged?n=1"):
            pass
    async with client.get("/metrics") as response:
        page = await response.text()
    route = 'method="GET",route="/api/v1/project/{projectid}/tagged",status_class="2xx"'
    assert f"datasync_http_server_request_duration_seconds_count{{{route}}}" in page
    assert "project/124" not in page


async def test_an_internal_call_answers_a_model(internal: InternalClient) -> None:
    answer = await internal.call(RESOLVE_CREDENTIAL, CredentialPresented(kind="bearer", credential="x"))
    assert answer == CredentialResolved(principal=None, reason="x")


@pytest.mark.parametrize(
    "error",
    [
        Conflict("taken", code="name_taken", errors=[FieldError("name", "is taken", "taken")]),
        FixRequest("no"),
        Forbidden("no", code="not_a_member"),
        OutcomeUnknown("perhaps", retry_after_seconds=3),
        CallOperator("look at it"),
    ],
)
async def test_what_the_callee_raises_is_raised_at_the_caller(
    shell: Shell, internal: InternalClient, error: FixRequest
) -> None:
    async def refuse(_: CredentialPresented) -> CredentialResolved:
        raise error

    shell.resolve = refuse
    with pytest.raises(type(error)) as raised:
        await internal.call(RESOLVE_CREDENTIAL, CredentialPresented(kind="bearer", credential="x"))
    assert _told(raised.value) == _told(error)


async def test_a_service_that_is_down_is_retry_later(shell: Shell, internal: InternalClient) -> None:
    assert shell.runner is not None
    await shell.runner.cleanup()
    with pytest.raises(RetryLater, match="auth can't be reached"):
        await internal.call(RESOLVE_CREDENTIAL, CredentialPresented(kind="bearer", credential="x"))


async def test_a_service_that_hangs_is_a_timeout(shell: Shell, internal: InternalClient) -> None:
    async def hang(_: CredentialPresented) -> CredentialResolved:
        await shell.go_on.wait()
        return CredentialResolved(principal=None)

    shell.resolve = hang
    with pytest.raises(UpstreamTimeout, match=r"0\.2 seconds"):
        await internal.call(
            replace(RESOLVE_CREDENTIAL, timeout_seconds=0.2), CredentialPresented(kind="bearer", credential="x")
        )


def _told(error: Any) -> tuple[Any, ...]:
    return error.status, error.code, error.message, error.errors, error.retry_after_seconds


async def _json(client: aiohttp.ClientSession, path: str) -> Any:
    async with client.get(path) as response:
        return await response.json()


async def _connected(shell: Shell) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = shell.url.removeprefix("http://").split(":")
    return await asyncio.open_connection(host, int(port))


async def _raw(shell: Shell, sent: str) -> bytes:
    """The head of the answer to what is sent, its characters up to \xff as bytes."""
    reader, writer = await _connected(shell)
    writer.write(sent.encode("latin-1"))
    async with asyncio.timeout(5):
        answer = await reader.readuntil(b"\r\n\r\n")
    writer.close()
    return answer
