"""One request and its response on one connection."""

import asyncio
import select
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Self, cast

from libs.web.upstream.endpoints import Address
from libs.web.upstream.wire import Headers, Response, ResponseBroken, UpstreamRequest, head_of

READ_IDLE_SECONDS = 120.0
READ_AHEAD_BYTES = 256 * 1024


class ResponseTimeout(Exception):
    """The response, or the rest of it, did not come in time."""


class Connection(asyncio.Protocol):
    """Passes what arrives to its exchange, and ends if something arrives without one.

    Args:
        address: where it leads.
        lost: called when the connection has ended.
    """

    __slots__ = ("_drained", "_lost", "_readable", "address", "exchange", "has_ended", "is_full", "transport")

    def __init__(self, address: Address, lost: "Callable[[Connection], None]") -> None:
        self.address = address
        self._lost = lost
        self._readable = select.poll()
        self._drained: asyncio.Future[None] | None = None
        self.transport: asyncio.Transport
        self.exchange: Exchange | None = None
        self.has_ended = False
        self.is_full = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._readable.register(transport.get_extra_info("socket").fileno(), select.POLLIN)

    def data_received(self, data: bytes) -> None:
        if self.exchange is None:
            self.abort()
        else:
            self.exchange.feed(data)

    def eof_received(self) -> None:
        if self.exchange is not None:
            self.exchange.feed_end()

    def connection_lost(self, exc: Exception | None) -> None:
        self.has_ended = True
        self.resume_writing()
        if self.exchange is not None:
            self.exchange.fail(ResponseBroken("the connection ended" if exc is None else str(exc)))
        self._lost(self)

    def pause_writing(self) -> None:
        self.is_full = True

    def resume_writing(self) -> None:
        self.is_full = False
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)

    @property
    def is_usable(self) -> bool:
        """Open, and with nothing to read that the event loop has not seen yet."""
        return not self.has_ended and not self.transport.is_closing() and not self._readable.poll(0)

    async def write(self, data: bytes) -> None:
        """Write, and wait while the service does not read."""
        if self.has_ended or self.transport.is_closing():
            raise ResponseBroken("the connection ended")
        self.transport.write(data)
        while self.is_full:
            self._drained = asyncio.get_running_loop().create_future()
            await self._drained

    def abort(self) -> None:
        self.has_ended = True
        self.transport.abort()


class Exchange:
    """A request on its way and its response; as a context manager it releases the connection.

    Args:
        release: takes the connection back, and whether it may be used again.
    """

    __slots__ = (
        "_connection",
        "_error",
        "_is_paused",
        "_loop",
        "_release",
        "_request",
        "_response",
        "_sent_whole",
        "_timer",
        "_waiter",
        "_writing",
        "_written_at",
    )

    def __init__(
        self, connection: Connection, request: UpstreamRequest, release: Callable[[Connection, bool], None]
    ) -> None:
        self._connection = connection
        self._request = request
        self._response = Response(request.method)
        self._release = release
        self._loop = asyncio.get_running_loop()
        self._writing: asyncio.Task[None] | None = None
        self._written_at = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._error: Exception | None = None
        self._sent_whole = False
        self._is_paused = False
        connection.exchange = self

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def status(self) -> int:
        """The response's status, once ``send`` has returned."""
        return self._response.status

    @property
    def headers(self) -> Headers:
        return self._response.headers

    @property
    def size_bytes(self) -> int | None:
        """The announced length of the response's body."""
        return self._response.size_bytes

    async def send(self, timeout_seconds: float) -> None:
        """Send the request and await the response's head, which may come before all of the request's body is sent.

        Args:
            timeout_seconds: until the response begins, counted from the last piece of the body that was written.
        """
        request, response = self._request, self._response
        body = request.body
        head = head_of(request)
        if body is None or isinstance(body, bytes):
            # One write behind the head: the whole request is with the operating system when this returns.
            self._connection.transport.write(head + body if body else head)
            self._sent_whole = True
        else:
            self._connection.transport.write(head)
            while request.awaits_continue and response.status == 0:
                await self._wait(timeout_seconds)
            if response.status < 200:
                self._writing = self._loop.create_task(self._write_body(body, request.body_size_bytes))
        while response.status < 200:
            await self._wait(timeout_seconds)

    async def _write_body(self, body: AsyncIterator[bytes], size_bytes: int | None) -> None:
        written_bytes = 0
        try:
            async for piece in body:
                if not piece:
                    continue
                written_bytes += len(piece)
                self._written_at = self._loop.time()
                if size_bytes is None:
                    await self._connection.write(b"%x\r\n%b\r\n" % (len(piece), piece))
                elif written_bytes > size_bytes:
                    raise ResponseBroken("the request's body is longer than announced")
                else:
                    await self._connection.write(piece)
            if size_bytes is None:
                await self._connection.write(b"0\r\n\r\n")
            elif written_bytes < size_bytes:
                raise ResponseBroken("the request's body is shorter than announced")
            self._sent_whole = True
        except Exception as error:  # noqa: BLE001 - raised to whoever waits for the response
            self.fail(error)

    async def chunks(self) -> AsyncIterator[bytes]:
        """The response's body as it comes.

        Raises:
            ResponseBroken: it ended before its end.
            ResponseTimeout: nothing came for two minutes.
        """
        response = self._response
        while True:
            while response.pieces:
                yield self._take()
            if response.is_complete:
                return
            await self._wait(READ_IDLE_SECONDS)

    async def whole(self) -> bytes:
        """The response's whole body; raises as ``chunks``."""
        response = self._response
        if response.is_complete and len(response.pieces) <= 1:
            return self._take() if response.pieces else b""
        return b"".join([chunk async for chunk in self.chunks()])

    def _take(self) -> bytes:
        piece = self._response.take()
        if self._is_paused and not self._response.pieces:
            self._is_paused = False
            self._connection.transport.resume_reading()
        return piece

    async def _wait(self, timeout_seconds: float) -> None:
        """Return when something came; raises what went wrong."""
        if self._error is not None:
            raise self._error
        self._waiter = self._loop.create_future()
        self._timer = self._loop.call_later(timeout_seconds, self._time_out, timeout_seconds)
        try:
            await self._waiter
        finally:
            self._timer.cancel()
            self._waiter = None

    def _time_out(self, timeout_seconds: float) -> None:
        left_seconds = self._written_at + timeout_seconds - self._loop.time()
        if left_seconds > 0:
            self._timer = self._loop.call_later(left_seconds, self._time_out, timeout_seconds)
        else:
            self.fail(ResponseTimeout(f"nothing came for {timeout_seconds:g} seconds"))

    def feed(self, data: bytes) -> None:
        """Take what came over the connection."""
        if self._error is not None:
            return
        response = self._response
        try:
            response.feed(data)
        except ResponseBroken as error:
            self.fail(error)
            return
        if response.buffered_bytes > READ_AHEAD_BYTES and not self._is_paused:
            self._is_paused = True
            self._connection.transport.pause_reading()
        if response.status:
            self._wake()

    def feed_end(self) -> None:
        """The service will send nothing more."""
        if self._error is not None:
            return
        try:
            self._response.feed_end()
        except ResponseBroken as error:
            self.fail(error)
        else:
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def fail(self, error: Exception) -> None:
        """Raise ``error`` to whoever waits, unless all of the response is here."""
        if self._response.is_complete or self._error is not None:
            return
        self._error = error
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(error)

    @property
    def address(self) -> Address:
        """Where the request was sent to."""
        return self._connection.address

    @property
    def was_sent_whole(self) -> bool:
        """No part of the request depends on its caller."""
        return self._request.body is None or isinstance(self._request.body, bytes)

    @property
    def may_be_repeated(self) -> bool:
        """The request may be sent again: it changes nothing, and no response to it has begun."""
        return not self._response.has_begun and self._request.is_repeatable

    def close(self) -> None:
        """Release the connection; it may be used again only if nothing is or may be left on it."""
        connection, response = self._connection, self._response
        connection.exchange = None
        if self._writing is not None and not self._writing.done():
            self._writing.cancel()
        is_clean = (
            self._sent_whole
            and response.is_complete
            and self._error is None
            and not response.has_surplus
            and not response.says_close
            and not connection.has_ended
            and not connection.transport.get_write_buffer_size()
            and self._request.caller_is_there()
        )
        response.drop_parser()
        if is_clean and self._is_paused:
            connection.transport.resume_reading()
        self._release(connection, is_clean)
