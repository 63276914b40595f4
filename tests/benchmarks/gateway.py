"""The cost of the gateway: an authenticated GET through it, against the same GET on the service itself.

Both sides are asked in the same run by the same client over kept-alive connections, in alternating rounds, and the
median round of each is taken. ``versions`` is answered by catalog from memory, so that nearly all of the time is HTTP;
``sources`` reads MongoDB. Load generator, gateway and service share the machine's cores.
"""

import asyncio
import statistics
import time
from dataclasses import dataclass
from typing import Any, cast

from pydantic import SecretStr

from libs.core.principal import Principal
from libs.testing.suite import Suite
from libs.web.principals import PRINCIPAL_HEADER, PrincipalSigner

CASES = {
    "versions": "/api/v1/project/123/sources/versions?type=postgres",
    "sources": "/api/v1/project/123/sources",
}
CONCURRENCY = (1, 32)
ROUNDS = 3
ROUND_SECONDS = 2.0

Result = dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Round:
    requests_per_second: float
    p99_ms: float


@dataclass(frozen=True, slots=True)
class _Side:
    """One way to send a request: the very bytes, and where to."""

    port: int
    request: bytes


async def run() -> list[Result]:
    """Requests/s and p99 by case and concurrency."""
    with Suite(environment={"LOG_LEVEL": "INFO", "RATE_LIMIT_PROJECT_PER_MINUTE": str(10**9)}) as suite:
        results = []
        for case, path in CASES.items():
            sides = {"gateway": _through_gateway(suite, path), "direct": _direct(suite, path)}
            for concurrency in CONCURRENCY:
                rounds = await _rounds(sides, concurrency)
                results += _results(f"{case}, {concurrency} at a time", rounds)
        return results


def _through_gateway(suite: Suite, path: str) -> _Side:
    return _Side(suite.port, _head(path, f"Authorization: Bearer {suite.api_key}"))


def _direct(suite: Suite, path: str) -> _Side:
    key = (suite.directory / "keys" / "gateway.ed25519").read_text().strip()
    everybody = Principal(kind="api_key", subject="bench", name="bench", projects={123: "owner"}, scopes=("*",))
    token = PrincipalSigner("gateway", SecretStr(key)).sign(everybody, "catalog", ttl_seconds=3600)
    return _Side(int(suite.settings["catalog_port"]), _head(path, f"{PRINCIPAL_HEADER}: {token}"))


def _head(path: str, credential: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n{credential}\r\n\r\n".encode()


async def _rounds(sides: dict[str, _Side], concurrency: int) -> dict[str, list[_Round]]:
    rounds: dict[str, list[_Round]] = {name: [] for name in sides}
    for number in range(ROUNDS + 1):
        for name, side in sides.items():
            measured = await _round(side, concurrency)
            if number > 0:
                rounds[name].append(measured)
    return rounds


async def _round(side: _Side, concurrency: int) -> _Round:
    latencies_seconds: list[float] = []
    started_at = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(_ask_repeatedly(side, started_at + ROUND_SECONDS, latencies_seconds))
    took_seconds = time.perf_counter() - started_at
    p99_seconds = statistics.quantiles(latencies_seconds, n=100)[98]
    return _Round(len(latencies_seconds) / took_seconds, p99_seconds * 1000)


async def _ask_repeatedly(side: _Side, until: float, latencies_seconds: list[float]) -> None:
    connection = _Connection(side.request)
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_connection(lambda: connection, "127.0.0.1", side.port)
    while (now := time.perf_counter()) < until:
        await connection.ask()
        latencies_seconds.append(time.perf_counter() - now)
    transport.close()


class _Connection(asyncio.Protocol):
    """As little client as possible: answers are told apart by their announced length."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self._received = b""
        self._transport: asyncio.WriteTransport | None = None
        self._answered: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)

    def ask(self) -> "asyncio.Future[None]":
        assert self._transport is not None
        self._answered = asyncio.get_running_loop().create_future()
        self._transport.write(self._request)
        return self._answered

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, separator, body = self._received.partition(b"\r\n\r\n")
        if not separator:
            return
        assert self._answered is not None
        if not head.startswith(b"HTTP/1.1 200 "):
            self._answered.set_exception(AssertionError(f"not the answer: {head!r}"))
            return
        length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
        if len(body) >= int(length):
            self._received = b""
            self._answered.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answered is not None and not self._answered.done():
            self._answered.set_exception(ConnectionError("the connection ended without an answer"))


def _results(case: str, rounds: dict[str, list[_Round]]) -> list[Result]:
    rate = {name: statistics.median(item.requests_per_second for item in found) for name, found in rounds.items()}
    p99 = {name: statistics.median(item.p99_ms for item in found) for name, found in rounds.items()}
    common = {"benchmark": "gateway"}
    return [
        common
        | {
            "case": case,
            "value": round(rate["gateway"]),
            "unit": "requests/s",
            "baseline": f"the same GET on the service: {rate['direct']:.0f}/s",
            "ratio": round(rate["gateway"] / rate["direct"], 2),
        },
        common
        | {
            "case": f"{case}, p99",
            "value": round(p99["gateway"], 2),
            "unit": "ms",
            "baseline": f"the same GET on the service: {p99['direct']:.2f} ms",
            "ratio": round(p99["direct"] / p99["gateway"], 2),
        },
    ]
