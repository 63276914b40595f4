"""A fuzzer for the one fault that a gateway must never have: an answer that was meant for somebody else.

Two tenants send requests of every shape through one gateway to a service that frames, fragments, cuts, poisons and ends
its answers as each request tells it to, while callers hang up at any point. Every request has an identity of its own;
its body consists of nothing else, and so does its answer's. The service checks what it gets, the callers what they get.
"""

import asyncio
import os
import random
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import parse_qsl

import aiohttp
import jwt

from libs.core.principal import Principal
from libs.suite.child_process import die_with_parent, free_port
from libs.web.principals import PRINCIPAL_HEADER
from tests.integration.gateway.backends import GATEWAY_KEY, Auth, started

TENANTS = {"ada": (1, "ds_live_" + "a" * 38), "bob": (2, "ds_live_" + "b" * 38)}
CALLERS = 24
ANSWER_TIMEOUT_SECONDS = 30.0
FOUND_MAX = 20

FRAMINGS = ("sized", "sized", "sized", "chunked", "chunked", "until_close", "empty", "204", "304")
SIZES = (20, 20, 20, 300, 300, 5_000, 100_000)
WAYS = ("whole", "whole", "whole", "pieces", "drip", "interim", "eager")
ENDS = ("kept",) * 12 + ("poisoned", "crlf", "ended", "says_close", "cut_head", "cut_body", "silent")
METHODS = ("GET", "GET", "GET", "GET", "HEAD", "POST", "POST", "PUT", "DELETE")
ABORTS = (None,) * 9 + ("sending", "waiting", "reading")

Plan = dict[str, str]


@dataclass
class Report:
    """What happened; ``wrong`` must stay empty."""

    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def accuse(self, what: str) -> None:
        if len(self.wrong) < FOUND_MAX:
            self.wrong.append(what)


async def fuzz(requests: int, seed: int) -> Report:
    """Send so many requests.

    Args:
        seed: chooses every request's shape; the interleaving is the machine's.
    """
    report = Report()
    async with _gateway(report) as port:
        numbers = iter(range(requests))
        async with asyncio.TaskGroup() as callers:
            for caller in range(CALLERS):
                callers.create_task(_Caller(port, random.Random(f"{seed}/{caller}"), report).run(numbers))
    return report


@asynccontextmanager
async def _gateway(report: Report) -> AsyncIterator[int]:
    """A gateway in a process of its own, before a service in this one."""
    auth = Auth()
    for tenant, (project, key) in TENANTS.items():
        auth.credentials["bearer", key] = Principal(
            kind="api_key", subject=tenant, name=tenant, projects={project: "owner"}, scopes=("*",)
        )
    loop = asyncio.get_running_loop()
    service = await loop.create_server(lambda: _Service(report), "127.0.0.1", 0, backlog=1024)
    port = free_port()
    async with started(auth.backend):
        environment = {
            "PORT": str(port),
            "AUTH_URL": auth.backend.url,
            "CATALOG_URL": f"http://127.0.0.1:{service.sockets[0].getsockname()[1]}",
            "SIGNING_KEY": GATEWAY_KEY,
            "RATE_LIMITS": "false",
            "LOG_LEVEL": "ERROR",
            "SERVER_TIMEOUT": "20",
        }
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "services.gateway",
            env={**os.environ, **environment},
            preexec_fn=die_with_parent,
            stdout=sys.stderr,
        )
        try:
            await _healthy(port)
            yield port
        finally:
            process.terminate()
            await process.wait()
            service.close()


async def _healthy(port: int) -> None:
    async with asyncio.timeout(ANSWER_TIMEOUT_SECONDS), aiohttp.ClientSession() as session:
        while True:
            with suppress(aiohttp.ClientError):
                async with session.get(f"http://127.0.0.1:{port}/healthz") as response:
                    if response.status == 200:
                        return
            await asyncio.sleep(0.05)


def _text_of(identity: str, size_bytes: int) -> bytes:
    piece = f"{identity};".encode()
    return (piece * (size_bytes // len(piece) + 1))[:size_bytes]


def _chunked(text: bytes, rng: random.Random) -> bytes:
    pieces = [text] if rng.random() < 0.5 else _cut(text, rng)
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces if piece) + b"0\r\n\r\n"


def _cut(text: bytes, rng: random.Random) -> list[bytes]:
    """Into a few pieces, at any point."""
    points = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randrange(1, 5)))
    pieces = (text[start:end] for start, end in zip([0, *points], [*points, len(text)], strict=True))
    return [piece for piece in pieces if piece]


class _Service(asyncio.Protocol):
    """Answers as it is told, and accuses whoever sends what is not one whole request after another."""

    _tenants: dict[str, str] = {}  # noqa: RUF012 - tokens are the same on every connection

    def __init__(self, report: Report) -> None:
        self._report = report
        self._received = b""
        self._answered = ""
        self._said_close = False
        self._answering: asyncio.Task[None] | None = None
        self._is_over = False
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answering is not None:
            self._answering.cancel()

    def data_received(self, data: bytes) -> None:
        self._received += data
        if self._said_close and data.startswith(tuple(f"{method} /".encode() for method in METHODS)):
            self._accuse(f"a request after a close: {data[:200]!r}")
        while self._received and not self._is_over:
            head, end, rest = self._received.partition(b"\r\n\r\n")
            try:
                if not end or not self._take(head.decode(), rest):
                    break
            except ValueError as error:
                self._accuse(f"not HTTP: {error}: {self._received[:200]!r}")

    def _take(self, head: str, rest: bytes) -> bool:
        """Take a request; gives whether it was a whole one."""
        line, _, fields = head.partition("\r\n")
        headers = {name.lower(): value for name, _, value in (item.partition(": ") for item in fields.split("\r\n"))}
        method, path, _ = line.split(" ")
        plan = dict(parse_qsl(path.partition("?")[2]))
        if method not in METHODS or "n" not in plan:
            self._accuse(f"not a request: {head[:200]!r}")
            return False
        body, is_whole, rest = _split(headers, rest)
        # An eager service answers before the body is here; what it gets of it later is checked all the same.
        if (is_whole or plan["way"] == "eager") and self._answered != plan["n"]:
            if self._answering is not None and not self._answering.done():
                self._accuse(f"a request before the former's answer had ended: {head[:200]!r}")
                return False
            self._answered = plan["n"]
            self._answering = asyncio.get_running_loop().create_task(self._answer(method, plan))
        if is_whole:
            self._check(plan, headers, body)
            self._received = rest
        return is_whole

    def _accuse(self, what: str) -> None:
        self._report.accuse(what)
        self._end()

    def _check(self, plan: Plan, headers: dict[str, str], body: bytes) -> None:
        identity = plan["n"]
        if body != _text_of(identity, len(body)):
            self._report.accuse(f"the body of {identity} is {body[:200]!r}")
        token = headers[PRINCIPAL_HEADER.lower()]
        tenant = self._tenants.get(token)
        if tenant is None:
            claims: dict[str, Any] = jwt.decode(token, options={"verify_signature": False})
            tenant = self._tenants[token] = str(claims["sub"])
        if not identity.startswith(f"{tenant}-"):
            self._report.accuse(f"{identity} came as {tenant}")

    async def _answer(self, method: str, plan: Plan) -> None:
        rng = random.Random(plan["n"])
        end = plan["end"]
        head, body = _answer_of(method, plan, rng)
        whole = head + body
        # More bytes are told from the answer's own where it has an end, and seen at once where it is small.
        is_bounded = (plan["framing"] != "until_close" or method == "HEAD") and len(whole) < 10_000
        if end == "silent":
            self._end()
            return
        if end == "cut_head":
            whole = whole[: rng.randrange(1, len(head))]
        elif end == "cut_body":
            whole = whole[: len(head) + rng.randrange(len(body) + 1)]
        elif end == "crlf" and is_bounded:
            whole += b"\r\n"
        elif end == "poisoned" and is_bounded:
            whole += b"HTTP/1.1 200 OK\r\nX-Answer: poison\r\nContent-Length: 6\r\n\r\npoison"
        # What comes too much comes with the answer's end: a later one could come after the next request.
        await self._write(whole, "whole" if end in ("crlf", "poisoned") else plan["way"], rng)
        self._said_close = end == "says_close"
        if end in ("ended", "cut_head", "cut_body") or plan["framing"] == "until_close":
            self._end()

    async def _write(self, whole: bytes, way: str, rng: random.Random) -> None:
        match way:
            case "pieces":
                pieces = _cut(whole, rng)
            case "drip" if len(whole) < 500:
                pieces = [bytes((byte,)) for byte in whole]
            case "interim":
                pieces = [b"HTTP/1.1 103 Early Hints\r\nX-Answer: interim\r\n\r\n", whole]
            case _:
                pieces = [whole]
        for number, piece in enumerate(pieces):
            if number:
                await asyncio.sleep(0)
            self._transport.write(piece)

    def _end(self) -> None:
        self._is_over = True
        self._transport.close()


def _answer_of(method: str, plan: Plan, rng: random.Random) -> tuple[bytes, bytes]:
    identity, framing = plan["n"], plan["framing"]
    text = _text_of(identity, 0 if framing == "empty" else int(plan["size"]))
    lines = [f"X-Answer: {identity}"]
    if plan["end"] == "says_close":
        lines.append("Connection: close")
    body = text
    match framing:
        case "204":
            status, body = "204 No Content", b""
        case "304":
            # Tells the length of what it does not send (RFC 9110 section 8.6).
            status, body = "304 Not Modified", b""
            lines.append(f"Content-Length: {len(text)}")
        case "chunked":
            status, body = "200 OK", _chunked(text, rng)
            lines.append("Transfer-Encoding: chunked")
        case "until_close":
            status = "200 OK"
        case _:
            status = "200 OK"
            lines.append(f"Content-Length: {len(text)}")
    head = "\r\n".join([f"HTTP/1.1 {status}", *lines]) + "\r\n\r\n"
    return head.encode(), b"" if method == "HEAD" else body


def _split(headers: dict[str, str], received: bytes) -> tuple[bytes, bool, bytes]:
    """The body, whether it is whole, and what comes after it."""
    if "transfer-encoding" not in headers:
        size_bytes = int(headers.get("content-length", 0))
        return received[:size_bytes], len(received) >= size_bytes, received[size_bytes:]
    pieces: list[bytes] = []
    while True:
        size, end, rest = received.partition(b"\r\n")
        size_bytes = int(size, 16) if end else 0
        if not end or len(rest) < size_bytes + 2:
            return b"".join(pieces), False, b""
        pieces.append(rest[:size_bytes])
        received = rest[size_bytes + 2 :]
        if size_bytes == 0:
            return b"".join(pieces), True, received


class _Caller:
    """Sends one request after another, two at once now and then, and looks closely at what comes back."""

    def __init__(self, port: int, rng: random.Random, report: Report) -> None:
        self._port = port
        self._rng = rng
        self._report = report
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def run(self, numbers: Iterator[int]) -> None:
        for number in numbers:
            try:
                async with asyncio.timeout(ANSWER_TIMEOUT_SECONDS):
                    await self._ask(number)
            except TimeoutError:
                self._report.accuse(f"request {number} got no answer")
                self._hang_up()
            except (ConnectionError, asyncio.IncompleteReadError):
                self._report.outcomes["cut"] += 1
                self._hang_up()
        self._hang_up()

    async def _ask(self, number: int) -> None:
        rng = self._rng
        count = 2 if rng.random() < 0.03 else 1
        asked = [self._request(f"{number}.{place}") for place in range(count)]
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._streams
        abort = rng.choice(ABORTS)
        wire = b"".join(request for _, _, request in asked)
        if abort == "sending":
            wire = wire[: rng.randrange(len(wire))]
        for piece in _cut(wire, rng) if rng.random() < 0.2 else [wire]:
            if writer.is_closing():
                raise ConnectionResetError("the gateway has hung up")
            writer.write(piece)
            await asyncio.sleep(rng.choice((0, 0, 0.003)))
        if abort == "waiting":
            await asyncio.sleep(rng.choice((0, 0.001, 0.003)))
        elif abort is None or abort == "reading":
            for method, plan, _ in asked:
                if not await self._read(reader, method, plan, is_whole=abort is None):
                    break
        if abort is not None:
            self._report.outcomes["hung up"] += 1
            self._hang_up()

    def _request(self, number: str) -> tuple[str, Plan, bytes]:
        rng = self._rng
        tenant = rng.choice(("ada", "bob"))
        project, key = TENANTS[tenant]
        method = rng.choice(METHODS)
        plan = {
            "n": f"{tenant}-{number}",
            "framing": rng.choice(FRAMINGS),
            "size": str(rng.choice(SIZES)),
            "way": rng.choice(WAYS),
            "end": rng.choice(ENDS),
        }
        query = "&".join(f"{name}={value}" for name, value in plan.items())
        head = (
            f"{method} /api/v1/project/{project}/sources?{query} HTTP/1.1\r\n"
            f"Host: localhost\r\nAuthorization: Bearer {key}\r\n"
        )
        body = b""
        if method in ("POST", "PUT") or rng.random() < 0.03:
            text = _text_of(plan["n"], rng.choice((1, 30, 30, 2_000, 70_000)))
            if rng.random() < 0.4:
                head, body = head + "Transfer-Encoding: chunked\r\n", _chunked(text, rng)
            else:
                head, body = head + f"Content-Length: {len(text)}\r\n", text
        return method, plan, head.encode() + b"\r\n" + body

    async def _read(self, reader: asyncio.StreamReader, method: str, plan: Plan, *, is_whole: bool) -> bool:
        """Check an answer; gives whether another may follow on the connection."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        line, _, fields = head.partition("\r\n")
        headers = {name.lower(): value for name, _, value in (item.partition(": ") for item in fields.split("\r\n"))}
        status = int(line.split(" ")[1])
        identity = headers.get("x-answer")
        if identity is None and status >= 500:
            self._report.outcomes["refused"] += 1
        elif identity != plan["n"]:
            self._report.accuse(f"{plan['n']} was answered {head[:200]!r}")
        if not is_whole:
            return False
        body = await _body_of(reader, method, status, headers)
        if identity is not None:
            self._report.outcomes["answered"] += 1
            self._check(plan, method, status, body)
        if headers.get("connection", "").lower() == "close":
            self._hang_up()
            return False
        return True

    def _check(self, plan: Plan, method: str, status: int, body: bytes) -> None:
        framing = plan["framing"]
        expected = int(framing) if framing in ("204", "304") else 200
        size_bytes = 0 if method == "HEAD" or framing in ("204", "304", "empty") else int(plan["size"])
        if framing == "until_close" and plan["end"] == "cut_body":
            size_bytes = len(body)
        if (status, body) != (expected, _text_of(plan["n"], size_bytes)):
            self._report.accuse(f"{method} {plan}: {status}, {len(body)} bytes of {size_bytes}, {body[:100]!r}")

    def _hang_up(self) -> None:
        if self._streams is not None:
            self._streams[1].transport.abort()
            self._streams = None


async def _body_of(reader: asyncio.StreamReader, method: str, status: int, headers: dict[str, str]) -> bytes:
    if method == "HEAD" or status in (204, 304):
        return b""
    if headers.get("transfer-encoding") == "chunked":
        body = b""
        while size_bytes := int(await reader.readuntil(b"\r\n"), 16):
            body += (await reader.readexactly(size_bytes + 2))[:-2]
        await reader.readexactly(2)
        return body
    if "content-length" in headers:
        return await reader.readexactly(int(headers["content-length"]))
    return await reader.read()
