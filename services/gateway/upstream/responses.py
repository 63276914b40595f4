"""A service's response on its way to the caller: in one write if it is small, streamed otherwise."""

import asyncio
from collections.abc import Callable
from functools import lru_cache
from http import HTTPStatus

import structlog
from aiohttp import HttpVersion10, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.helpers import rfc822_formatted_time

from libs.core.errors import RetryLater
from libs.core.text import readable
from libs.web.body import EXPECTATION
from libs.web.shell import RESPONSE_HEADERS
from libs.web.upstream.exchange import Exchange, ResponseTimeout
from libs.web.upstream.wire import Headers, ResponseBroken
from services.gateway.upstream.headers import named_by_connection, passed_name, response_headers

WRITE_IDLE_SECONDS = 30.0
BUFFERED_BYTES_MAX = 64 * 1024
WATCH_SECONDS = 0.5

_PHRASES = {int(status): status.phrase for status in HTTPStatus}

log = structlog.get_logger(__name__)


class _ListenerGone(Exception):
    """The listener to an event stream has gone, or the gateway is stopping."""


class _CallerStalled(Exception):
    """The caller does not read."""


async def pass_on(request: web.Request, exchange: Exchange, is_stopping: Callable[[], bool]) -> web.StreamResponse:
    """Answer the request with the exchange's response.

    Raises:
        RetryLater: the response broke off before any of it was passed on.
        ConnectionResetError: it can't be completed, so the caller's connection was aborted.
    """
    if request.method == "HEAD" or exchange.status in (204, 304):
        return _SmallResponse(exchange.status, exchange.headers, b"")
    if exchange.size_bytes is not None and exchange.size_bytes <= BUFFERED_BYTES_MAX:
        try:
            return _SmallResponse(exchange.status, exchange.headers, await exchange.whole())
        except (ResponseBroken, ResponseTimeout) as error:
            raise RetryLater("the service did not complete its response", code="service_broke_off") from error
    response = web.StreamResponse(status=exchange.status, headers=response_headers(exchange.headers))
    if EXPECTATION in request:
        response.force_close()
    await response.prepare(request)
    try:
        await _stream(request, response, exchange, is_stopping)
    except (ResponseBroken, ResponseTimeout, _CallerStalled, _ListenerGone) as error:
        raise _aborted(request, error) from error
    await response.write_eof()
    return response


async def _stream(
    request: web.Request, response: web.StreamResponse, exchange: Exchange, is_stopping: Callable[[], bool]
) -> None:
    with _ListenerWatch(request, exchange, is_stopping):
        async for chunk in exchange.chunks():
            try:
                async with asyncio.timeout(WRITE_IDLE_SECONDS):
                    await response.write(chunk)
            except TimeoutError as error:
                raise _CallerStalled(f"nothing was read for {WRITE_IDLE_SECONDS:g} seconds") from error


def _aborted(request: web.Request, error: Exception) -> ConnectionResetError:
    """The head has been sent, so the caller can only be told by a connection that ends before the body does."""
    match error:
        case ResponseBroken():
            log.warning("response_aborted", cause="service_broke_off", path=readable(request.path), error=str(error))
        case ResponseTimeout():
            log.warning("response_aborted", cause="service_stalled", path=readable(request.path), error=str(error))
        case _CallerStalled():
            log.info("response_aborted", cause="caller_stalled", path=readable(request.path), error=str(error))
    if request.transport is not None:
        request.transport.abort()
    return ConnectionResetError(str(error))


class _SmallResponse(web.StreamResponse):
    """A response that is all here: its head as the service wrote it, with our headers, and its body in one write."""

    def __init__(self, status: int, headers: Headers, body: bytes) -> None:
        super().__init__(status=status)
        self._service_headers = headers
        self._whole_body = body

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        """Write everything; what aiohttp would compute for a response is known of this one."""
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
        named = named_by_connection(self._service_headers)
        lines = [_status_line(self.status)]
        for raw_name, value in self._service_headers:
            name = passed_name(raw_name)
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
        assert head.count(b"\n") == len(lines) - 1, "a line of the head contains a line break"
        return head + b"\r\n\r\n"


@lru_cache(maxsize=1024)
def _status_line(status: int) -> bytes:
    return f"HTTP/1.1 {status} {_PHRASES.get(status, '')}".encode()


class _ListenerWatch:
    """Ends an event stream when its listener has gone or the gateway stops, though no event comes."""

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
            self._exchange.fail(_ListenerGone())
        else:
            self._wait()
