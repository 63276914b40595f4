"""Forwarding: one request to the service behind, its answer back, bodies streamed both ways.

The only module that knows how the gateway talks to services.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from functools import lru_cache
from http import HTTPStatus
from urllib.parse import quote

from aiohttp import HttpVersion10, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.helpers import rfc822_formatted_time
from multidict import CIMultiDict

from libs.core.errors import DataSyncError, RequestTimeout, RetryLater, UpstreamTimeout
from libs.process.telemetry import UPSTREAM_UNAVAILABLE
from libs.web.body import BODY, EXPECTATION, pieces, read_coded, too_large
from libs.web.shell import RESPONSE_HEADERS
from services.gateway.breaker import Breaker
from services.gateway.connections import (
    SAFE_METHODS,
    AllInUse,
    BrokenOff,
    Connections,
    Exchange,
    Headers,
    NoAnswer,
    NotConnected,
    Sent,
)
from services.gateway.routes import Target

WRITE_IDLE_SECONDS = 30.0
BUFFERED_BYTES_MAX = 64 * 1024
WATCH_SECONDS = 0.5
LET_GO_SECONDS = 1.0

_HOP_BY_HOP = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
"""RFC 9110 section 7.6.1: meant for one connection, not for the next."""

_MADE_ANEW = frozenset(
    {"host", "expect", "content-length", "x-forwarded-for", "x-forwarded-proto", "x-forwarded-host", "forwarded"}
)
_NOT_ANSWERED_BACK = _HOP_BY_HOP | {"date", "server", "x-request-id"}
OUR_PREFIX = "x-datasync-"

_PHRASES = {int(status): status.phrase for status in HTTPStatus}


class Upstream:
    """The ways to the services, each service's apart from the others'.

    Args:
        urls: where each service listens.
        timeout_seconds: until an answer begins, where the target says nothing else.
    """

    def __init__(self, urls: Mapping[str, str], timeout_seconds: float) -> None:
        self._timeout_seconds = timeout_seconds
        self._connections = {service: Connections(url) for service, url in urls.items()}
        # Slow requests have connections of their own, so that many long polls can't block all others.
        self._slow_connections = {service: Connections(url, waits_for_place=False) for service, url in urls.items()}
        self._breakers = {service: Breaker(time.monotonic) for service in urls}
        self._waiting: set[asyncio.Timeout] = set()
        self._let_go_at: float | None = None

    def let_go(self) -> None:
        """The gateway stops: event streams end, and what only reads and has no answer in a second is to be asked again.

        A long poll would keep it for a minute.
        """
        self._let_go_at = asyncio.get_running_loop().time() + LET_GO_SECONDS
        for waiting in self._waiting:
            waiting.reschedule(self._let_go_at)

    def close(self) -> None:
        for connections in (*self._connections.values(), *self._slow_connections.values()):
            connections.close()

    async def forward(self, request: web.Request, target: Target, headers: CIMultiDict[str]) -> web.StreamResponse:
        """Send the request on and answer it with what comes back.

        Args:
            headers: what the service gets, see ``forwarded_headers``.

        Raises:
            RetryLater: the service can't be reached; at once while its circuit is open.
            UpstreamTimeout: its answer did not begin in time.
            TooLarge: the body is over the target's limit, found out before or while it is sent.
            RequestTimeout: the body stopped coming.
        """
        breaker = self._breakers[target.service]
        wait_seconds = breaker.refuses_for_seconds()
        if wait_seconds is not None:
            raise _unavailable(target.service, wait_seconds)
        try:
            exchange = await self._send(request, target, headers)
        except NotConnected as error:
            breaker.failed()
            raise _unavailable(target.service) from error
        except BaseException:
            breaker.gave_up()
            raise
        breaker.connected()
        async with exchange:
            return await _answer(request, exchange, lambda: self._let_go_at is not None)

    async def _send(self, request: web.Request, target: Target, headers: CIMultiDict[str]) -> Exchange:
        timeout_seconds = target.timeout_seconds or self._timeout_seconds
        body = _Body(request, target.body_bytes_max)
        pools = self._connections if target.timeout_seconds is None else self._slow_connections
        connections = pools[target.service]
        try:
            content = await body.start()
            sent = Sent(
                request.method,
                _path_of(request),
                headers,
                content,
                body.announced_bytes,
                lambda: request.transport is not None and not request.transport.is_closing(),
                body.is_awaited,
            )
            if request.method not in SAFE_METHODS:
                return await connections.exchange(sent, timeout_seconds)
            return await self._read(connections, sent, timeout_seconds)
        except AllInUse:
            message = f"too many requests of this kind wait for the service {target.service}"
            raise RetryLater(message, code="too_many_waiting", retry_after_seconds=1) from None
        except NoAnswer:
            if body.is_coming:
                raise RequestTimeout("the request body did not arrive in time") from None
            raise UpstreamTimeout(f"no answer within {timeout_seconds:g} seconds", code="gateway_timeout") from None
        except BrokenOff as error:
            if body.refusal is not None:
                raise body.refusal from None
            raise _broken_off(target.service) from error

    async def _read(self, connections: Connections, sent: Sent, timeout_seconds: float) -> Exchange:
        try:
            async with asyncio.timeout_at(self._let_go_at) as waiting:
                self._waiting.add(waiting)
                try:
                    return await connections.exchange(sent, timeout_seconds)
                finally:
                    self._waiting.discard(waiting)
        except TimeoutError:
            raise RetryLater("the gateway is shutting down", code="shutting_down", retry_after_seconds=1) from None


def _path_of(request: web.Request) -> str:
    """The path and query as they were sent; bytes outside ASCII, which no URL may have, in their escaped form."""
    path = request.raw_path
    return path if path.isascii() else quote(path.encode("utf-8", "surrogateescape"), safe="%/?#[]@!$&'()*+,;=:~")


def forwarded_headers(request: web.Request, *, with_credentials: bool) -> CIMultiDict[str]:
    """The headers that a service may see: nothing of this connection, nothing that claims to be from us.

    Args:
        with_credentials: pass ``Authorization`` and ``Cookie`` on, to the service that issues them.
    """
    dropped = set(_MADE_ANEW)
    if not with_credentials:
        dropped |= {"authorization", "cookie"}
    connection = request.headers.get("Connection")
    if connection is not None:
        dropped |= {token.strip().lower() for token in connection.split(",")}
    headers: CIMultiDict[str] = CIMultiDict()
    for name, value in request.headers.items():
        lowered = name.lower()
        if lowered not in _HOP_BY_HOP and lowered not in dropped and not lowered.startswith(OUR_PREFIX):
            headers.add(name, value)
    headers["Host"] = request.host
    return headers


class _Body:
    """The request's body on its way through: read ahead when it is small, streamed with its size watched else.

    It passes coded as it came: a service that reads it holds it to its limit; what nobody reads is inflated nowhere.
    """

    def __init__(self, request: web.Request, size_bytes_max: int) -> None:
        self._request = request
        self._size_bytes_max = size_bytes_max
        self.is_awaited = EXPECTATION in request and request.body_exists
        self.is_coming = False
        self.announced_bytes: int | None = None
        self.refusal: DataSyncError | None = None

    async def start(self) -> bytes | AsyncIterator[bytes] | None:
        request = self._request
        known: bytes | None = request.get(BODY)
        if known is not None or not request.body_exists:
            return known
        self.announced_bytes = request.content_length
        if self.announced_bytes is not None and self.announced_bytes > self._size_bytes_max:
            raise too_large(self._size_bytes_max)
        if self.is_awaited or self.announced_bytes is None or self.announced_bytes > BUFFERED_BYTES_MAX:
            return self._pieces()
        return await read_coded(request, self._size_bytes_max)

    async def _pieces(self) -> AsyncIterator[bytes]:
        self.is_coming = True
        try:
            async for piece in pieces(self._request, self._size_bytes_max):
                yield piece
        except DataSyncError as error:
            self.refusal = error
            raise
        self.is_coming = False


async def _answer(request: web.Request, exchange: Exchange, is_stopping: Callable[[], bool]) -> web.StreamResponse:
    if request.method == "HEAD" or exchange.status in (204, 304):
        return _Passed(exchange, b"")
    if exchange.size_bytes is not None and exchange.size_bytes <= BUFFERED_BYTES_MAX:
        try:
            return _Passed(exchange, await exchange.whole())
        except BrokenOff as error:
            raise RetryLater("the service broke off its answer", code="service_broke_off") from error
    answer = web.StreamResponse(status=exchange.status, headers=_answered_headers(exchange))
    if EXPECTATION in request:
        answer.force_close()
    await answer.prepare(request)
    try:
        with _Watch(request, exchange, is_stopping):
            async for chunk in exchange.chunks():
                async with asyncio.timeout(WRITE_IDLE_SECONDS):
                    await answer.write(chunk)
    except (BrokenOff, TimeoutError) as error:
        # The head has gone out, so the only honest end is an incomplete body: the connection is cut.
        if request.transport is not None:
            request.transport.abort()
        reason = "the service broke off its answer" if isinstance(error, BrokenOff) else "the caller does not read"
        raise ConnectionResetError(reason) from None
    await answer.write_eof()
    return answer


class _Passed(web.StreamResponse):
    """A small answer, all of it here: its head as the service wrote it, with ours added, and its body in one write."""

    def __init__(self, exchange: Exchange, body: bytes) -> None:
        super().__init__(status=exchange.status)
        self._passed = exchange.headers
        self._whole_body = body

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        """Write everything: what aiohttp would compute for an answer is known of this one."""
        if self._eof_sent:
            return None
        transport = request.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the caller is gone")
        if self._keep_alive is None:
            self._keep_alive = request.keep_alive
        wire = self._head(request) + self._whole_body
        transport.write(wire)
        writer = request.writer
        writer.output_size += len(wire)
        self._eof_sent = True
        await writer.drain()
        return None

    def _head(self, request: web.BaseRequest) -> bytes:
        ours: dict[str, str] = request.get(RESPONSE_HEADERS, {})
        replaced = {name.lower() for name in ours}
        named = _named_by_connection(self._passed)
        lines = [_status_line(self.status)]
        for raw_name, value in self._passed:
            name = _answered_name(raw_name)
            if name is None:
                continue
            lowered = name.lower()
            if lowered == "vary" and "Vary" in ours:
                ours = ours | {"Vary": f"{value.decode('latin-1')}, {ours['Vary']}"}
            elif lowered not in replaced and lowered not in named:
                lines.append(b"%b: %b" % (raw_name, value))
        lines += [f"{name}: {value}".encode("utf-8", "surrogateescape") for name, value in ours.items()]
        lines.append(b"Date: " + rfc822_formatted_time().encode())
        if not self._keep_alive:
            lines.append(b"Connection: close")
        elif request.version == HttpVersion10:
            lines.append(b"Connection: keep-alive")
        head = b"\r\n".join(lines)
        assert head.count(b"\n") == len(lines) - 1, "a line of the head holds a line break"
        return head + b"\r\n\r\n"


@lru_cache(maxsize=1024)
def _status_line(status: int) -> bytes:
    return f"HTTP/1.1 {status} {_PHRASES.get(status, '')}".encode()


class _Watch:
    """Breaks an event stream off once its listener has gone or the gateway stops: no event may come to show either."""

    def __init__(self, request: web.Request, exchange: Exchange, is_stopping: Callable[[], bool]) -> None:
        self._request = request
        self._exchange = exchange
        self._is_stopping = is_stopping
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> None:
        if any(name.lower() == b"content-type" and b"event-stream" in value for name, value in self._exchange.headers):
            self._wait()

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _wait(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(WATCH_SECONDS, self._look)

    def _look(self) -> None:
        transport = self._request.transport
        if self._is_stopping() or transport is None or transport.is_closing():
            self._exchange.fail(BrokenOff("nobody listens any more"))
        else:
            self._wait()


def _answered_headers(exchange: Exchange) -> CIMultiDict[str]:
    headers: CIMultiDict[str] = CIMultiDict()
    named = _named_by_connection(exchange.headers)
    for raw_name, value in exchange.headers:
        name = _answered_name(raw_name)
        if name is not None and name.lower() not in named:
            headers.add(name, value.decode("utf-8", "surrogateescape"))
    return headers


def _named_by_connection(headers: Headers) -> frozenset[str]:
    """The headers that the service meant for its connection to us only."""
    named: frozenset[str] = frozenset()
    for name, value in headers:
        if len(name) == len("connection") and name.lower() == b"connection":
            named |= _tokens(value.decode("latin-1"))
    return named


@lru_cache(maxsize=1024)
def _answered_name(raw: bytes) -> str | None:
    """A header's name as text, None where it is not passed on."""
    name = raw.decode("ascii")
    lowered = name.lower()
    return None if lowered in _NOT_ANSWERED_BACK or lowered.startswith(OUR_PREFIX) else name


def _tokens(connection: str) -> frozenset[str]:
    """The names of headers that are for one connection only."""
    return frozenset(token.strip().lower() for token in connection.split(","))


def _unavailable(service: str, retry_after_seconds: float = 1.0) -> RetryLater:
    UPSTREAM_UNAVAILABLE.labels(service).inc()
    return RetryLater(
        f"the service {service} is not available at the moment",
        code="service_unavailable",
        retry_after_seconds=retry_after_seconds,
    )


def _broken_off(service: str) -> RetryLater:
    UPSTREAM_UNAVAILABLE.labels(service).inc()
    return RetryLater(f"the service {service} ended the connection without an answer", code="service_broke_off")
