"""Kept-alive HTTP/1.1 connections to one service.

aiohttp's own pieces under its client session: the parser, flow control and header writer in C, without redirects,
cookies, URL objects and the request and response classes, which a hop does not need and which cost more than the rest.
"""

import asyncio
import ssl
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from aiohttp.client_exceptions import ClientError
from aiohttp.client_proto import ResponseHandler
from aiohttp.http import RawResponseMessage, StreamWriter
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.streams import EofStream, StreamReader
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

CONNECTIONS_MAX = 256
CONNECT_TIMEOUT_SECONDS = 1.0
# Shorter than the services keep idle connections, so that one is not reused in the moment that it is closed.
IDLE_SECONDS = 20.0
READ_IDLE_SECONDS = 120.0

_REPEATABLE = frozenset({"GET", "HEAD", "OPTIONS", "PUT", "DELETE"})
"""Methods that may be sent again when nobody knows whether the first time counted (RFC 9110 section 9.2.2)."""

Body = bytes | AsyncIterator[bytes] | None


class NotConnected(Exception):
    """The service does not take connections."""


class BrokenOff(Exception):
    """The connection ended, or what came over it is no HTTP."""


@dataclass(slots=True)
class Sent:
    """A request as it goes over the wire; ``headers`` hold no framing of their own."""

    method: str
    path: str
    headers: CIMultiDict[str]
    body: Body
    body_size_bytes: int | None = None


class Exchange:
    """One request and its answer; leaving it as a context manager gives the connection back."""

    def __init__(self, owner: "Connections", connection: ResponseHandler, *, is_reused: bool) -> None:
        self._owner = owner
        self._connection = connection
        self._is_reused = is_reused
        self._writing: asyncio.Task[None] | None = None
        self._message: RawResponseMessage | None = None
        self._content: StreamReader | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def status(self) -> int:
        assert self._message is not None
        return self._message.code

    @property
    def headers(self) -> CIMultiDictProxy[str]:
        assert self._message is not None
        return self._message.headers

    @property
    def size_bytes(self) -> int | None:
        """The announced length of the body."""
        length = self.headers.get("Content-Length")
        return None if length is None else int(length)

    @property
    def is_reused(self) -> bool:
        return self._is_reused

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it comes; raises ``BrokenOff`` when it ends before it should."""
        assert self._content is not None
        try:
            while chunk := await self._content.readany():
                yield chunk
        except (ClientError, OSError, HttpProcessingError) as error:
            raise BrokenOff(str(error)) from error

    async def whole(self) -> bytes:
        """The whole body."""
        assert self._content is not None
        try:
            return await self._content.read()
        except (ClientError, OSError, HttpProcessingError) as error:
            raise BrokenOff(str(error)) from error

    async def send(self, request: Sent) -> None:
        """Send the request and await the answer's head."""
        connection = self._connection
        connection.set_response_params(
            skip_payload=request.method == "HEAD",
            read_until_eof=True,
            auto_decompress=False,
            read_timeout=READ_IDLE_SECONDS,
        )
        try:
            await self._write(request)
            await self._await_head()
        except (ClientError, OSError, HttpProcessingError, EofStream) as error:
            raise BrokenOff(str(error)) from error

    def close(self) -> None:
        """Give the connection back, or end it where something is left on it."""
        if self._writing is not None and (not self._writing.done() or self._writing.cancelled()):
            self._writing.cancel()
            self._connection.force_close()
        elif self._writing is not None and self._writing.exception() is not None:
            self._connection.force_close()
        is_clean = self._message is not None and not self._connection.should_close
        self._owner.take_back(self._connection, is_clean=is_clean)

    async def _write(self, request: Sent) -> None:
        writer = StreamWriter(self._connection, asyncio.get_running_loop())
        headers = request.headers
        body = request.body
        if isinstance(body, bytes):
            headers["Content-Length"] = str(len(body))
        elif body is None:
            if request.method not in ("GET", "HEAD", "OPTIONS"):
                headers["Content-Length"] = "0"
        elif request.body_size_bytes is not None:
            headers["Content-Length"] = str(request.body_size_bytes)
        else:
            headers["Transfer-Encoding"] = "chunked"
            writer.enable_chunking()
        await writer.write_headers(f"{request.method} {request.path} HTTP/1.1", headers)
        if body is None or isinstance(body, bytes):
            await writer.write_eof(body or b"")
        else:
            writer.send_headers()
            self._writing = asyncio.get_running_loop().create_task(self._write_body(writer, body))

    async def _write_body(self, writer: StreamWriter, body: AsyncIterator[bytes]) -> None:
        async for chunk in body:
            await writer.write(chunk)
        await writer.write_eof()

    async def _await_head(self) -> None:
        """A service may answer before it has all of the body; a body that fails ends the waiting."""
        if self._writing is not None:
            reading = asyncio.ensure_future(self._read_head())
            try:
                await asyncio.wait({reading, self._writing}, return_when=asyncio.FIRST_COMPLETED)
                if not reading.done():
                    self._writing.result()
                await reading
            finally:
                reading.cancel()
        else:
            await self._read_head()

    async def _read_head(self) -> None:
        self._connection.start_timeout()
        while True:
            message, content = await self._connection.read()
            if message.code >= 200:
                break
        self._message, self._content = message, content


class Connections:
    """The connections to one service: at most 256 at a time, idle ones kept for 20 seconds.

    Args:
        url: scheme, host and port.
    """

    def __init__(self, url: str) -> None:
        parsed = URL(url)
        self._host = parsed.host or ""
        self._port = parsed.port or 80
        self._tls = ssl.create_default_context() if parsed.scheme == "https" else None
        self._idle: deque[tuple[ResponseHandler, float]] = deque()
        self._places = asyncio.Semaphore(CONNECTIONS_MAX)

    def close(self) -> None:
        while self._idle:
            connection, _ = self._idle.pop()
            connection.close()

    async def exchange(self, request: Sent) -> Exchange:
        """Send a request and await the head of its answer; the caller closes the exchange.

        Raises:
            NotConnected: the service refuses connections or does not take one in a second.
            BrokenOff: the connection ended without an answer.
        """
        while True:
            exchange = await self._begin()
            try:
                await exchange.send(request)
                return exchange
            except BrokenOff:
                exchange.close()
                # A kept connection may end in the moment that it is used; a new one tells whether the service is there.
                if not exchange.is_reused or not _is_repeatable(request):
                    raise
            except BaseException:
                exchange.close()
                raise

    async def _begin(self) -> Exchange:
        await self._places.acquire()
        kept = self._kept()
        if kept is not None:
            return Exchange(self, kept, is_reused=True)
        try:
            return Exchange(self, await self._connect(), is_reused=False)
        except BaseException:
            self._places.release()
            raise

    def _kept(self) -> ResponseHandler | None:
        now = asyncio.get_running_loop().time()
        while self._idle:
            connection, since = self._idle.pop()
            if connection.is_connected() and not connection.should_close and now - since < IDLE_SECONDS:
                return connection
            connection.close()
        return None

    async def _connect(self) -> ResponseHandler:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_SECONDS):
                _, connection = await loop.create_connection(
                    lambda: ResponseHandler(loop), self._host, self._port, ssl=self._tls
                )
        except (OSError, TimeoutError) as error:
            raise NotConnected(str(error)) from error
        return connection

    def take_back(self, connection: ResponseHandler, *, is_clean: bool) -> None:
        """Keep a connection on which nothing is left, end any other."""
        self._places.release()
        if is_clean and connection.is_connected():
            self._idle.append((connection, asyncio.get_running_loop().time()))
        else:
            connection.abort()


def _is_repeatable(request: Sent) -> bool:
    return request.method in _REPEATABLE and (request.body is None or isinstance(request.body, bytes))
