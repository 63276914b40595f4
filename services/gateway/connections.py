"""Kept-alive HTTP/1.1 connections to one service.

A connection is used again only when nothing can be left on it: the request was sent whole, its answer was read to its
end, not one byte came after it, neither side said close, and the caller is still there. Every answer's head is parsed
by a parser of its own (llhttp, through httptools), so that no state passes from one answer to the next.
"""

import asyncio
import select
import ssl
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self, cast

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser
from multidict import CIMultiDict
from yarl import URL

CONNECTIONS_MAX = 256
CONNECT_TIMEOUT_SECONDS = 1.0
# Shorter than the services keep idle connections, so that one is not reused in the moment that it is closed.
IDLE_SECONDS = 20.0
HEAD_TIMEOUT_SECONDS = 120.0
READ_IDLE_SECONDS = 120.0
HEAD_BYTES_MAX = 64 * 1024
READ_AHEAD_BYTES = 256 * 1024
# Chunk extensions and trailers are read and dropped; more of them in a row than this is no answer.
FRAMING_BYTES_MAX = 64 * 1024

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})
"""Methods that change nothing (RFC 9110 section 9.2.1), so that sending one again does no harm."""

_WITHOUT_BODY = frozenset({204, 304})

Body = bytes | AsyncIterator[bytes] | None
Framing = Literal["none", "sized", "chunked", "until_close"]
Headers = list[tuple[bytes, bytes]]


class AllInUse(Exception):
    """All connections are in use."""


class NotConnected(Exception):
    """The service does not take connections."""


class BrokenOff(Exception):
    """The connection ended, or what came over it is no HTTP."""


class NoAnswer(Exception):
    """The answer, or the rest of it, did not come in time."""


def _always() -> bool:
    return True


@dataclass(slots=True)
class Sent:
    """A request as it goes over the wire.

    Args:
        headers: without any that frames the body or the connection.
        body_size_bytes: the length of a body that comes in pieces, None when nobody knows it.
        awaits_continue: the body comes in pieces, and only once the service has said that it wants it.
        caller_is_there: whether somebody still wants the answer.
    """

    method: str
    path: str
    headers: CIMultiDict[str]
    body: Body
    body_size_bytes: int | None = None
    caller_is_there: Callable[[], bool] = _always
    awaits_continue: bool = False


class _Connection(asyncio.Protocol):
    """The wire: hands what comes to the exchange that has it, and ends when something comes that nobody asked for."""

    __slots__ = ("_drained", "_lost", "_readable", "exchange", "has_ended", "is_full", "transport")

    def __init__(self, lost: "Callable[[_Connection], None]") -> None:
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
            self.exchange.fail(BrokenOff("the connection ended" if exc is None else str(exc)))
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
        """Write and wait while the service does not read."""
        if self.has_ended or self.transport.is_closing():
            raise BrokenOff("the connection ended")
        self.transport.write(data)
        while self.is_full:
            self._drained = asyncio.get_running_loop().create_future()
            await self._drained

    def abort(self) -> None:
        self.has_ended = True
        self.transport.abort()


class Exchange:
    """One request and its answer; leaving it as a context manager gives the connection back.

    ``status`` and ``headers`` are there once ``send`` has returned.
    """

    __slots__ = (
        "_buffered_bytes",
        "_chunks",
        "_connection",
        "_error",
        "_framing",
        "_framing_bytes",
        "_has_begun",
        "_head",
        "_is_complete",
        "_is_foreign",
        "_is_paused",
        "_left_bytes",
        "_loop",
        "_owner",
        "_parser",
        "_request",
        "_says_close",
        "_sent_whole",
        "_timer",
        "_waiter",
        "_writing",
        "_written_at",
        "headers",
        "size_bytes",
        "status",
    )

    def __init__(self, owner: "Connections", connection: _Connection) -> None:
        self._owner = owner
        self._connection = connection
        self._loop = asyncio.get_running_loop()
        self._request: Sent | None = None
        self._writing: asyncio.Task[None] | None = None
        self._written_at = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._parser: HttpResponseParser | None = None
        self._head = b""
        self._framing: Framing = "none"
        self._framing_bytes = 0
        self._left_bytes = 0
        self._chunks: deque[bytes] = deque()
        self._buffered_bytes = 0
        self._error: Exception | None = None
        self._sent_whole = False
        self._has_begun = False
        self._is_complete = False
        self._is_foreign = False
        self._is_paused = False
        self._says_close = False
        self.status = 0
        self.headers: Headers = []
        self.size_bytes: int | None = None
        connection.exchange = self

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # The request

    async def send(self, request: Sent, timeout_seconds: float) -> None:
        """Send the request and await the answer's head, which may come before all of the request's body is sent.

        Args:
            timeout_seconds: until the answer begins, counted from the last of the body that was written.
        """
        self._request = request
        body = request.body
        head = _head_of(request)
        if body is None or isinstance(body, bytes):
            # Behind the head in one write: the whole request is with the operating system when this returns.
            self._connection.transport.write(head + body if body else head)
            self._sent_whole = True
        else:
            self._connection.transport.write(head)
            while request.awaits_continue and self.status == 0:
                await self._wait(timeout_seconds)
            if self.status < 200:
                self._writing = self._loop.create_task(self._write_body(body, request.body_size_bytes))
        while self.status < 200:
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
                    raise BrokenOff("the request's body is longer than announced")
                else:
                    await self._connection.write(piece)
            if size_bytes is None:
                await self._connection.write(b"0\r\n\r\n")
            elif written_bytes < size_bytes:
                raise BrokenOff("the request's body is shorter than announced")
            self._sent_whole = True
        except Exception as error:  # noqa: BLE001 - whoever waits for the answer gets it
            self.fail(error)

    # The answer

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it comes; raises ``BrokenOff`` when it ends before it should."""
        while True:
            while self._chunks:
                yield self._take()
            if self._is_complete:
                return
            await self._wait_for_body()

    async def whole(self) -> bytes:
        """The whole body."""
        if self._is_complete and len(self._chunks) <= 1:
            return self._take() if self._chunks else b""
        return b"".join([chunk async for chunk in self.chunks()])

    def _take(self) -> bytes:
        chunk = self._chunks.popleft()
        self._buffered_bytes -= len(chunk)
        if self._is_paused and not self._chunks:
            self._is_paused = False
            self._connection.transport.resume_reading()
        return chunk

    async def _wait_for_body(self) -> None:
        try:
            await self._wait(READ_IDLE_SECONDS)
        except NoAnswer as error:
            raise BrokenOff("the rest of the answer did not come") from error

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
            self.fail(NoAnswer())

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def fail(self, error: Exception) -> None:
        """End the waiting with ``error``, unless all of the answer is here."""
        if self._is_complete or self._error is not None:
            return
        self._error = error
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(error)

    def feed(self, data: bytes) -> None:
        """Take what came over the connection."""
        self._has_begun = True
        if self._error is not None:
            return
        if self._is_complete:
            self._is_foreign = True
            return
        try:
            rest = data if self.status >= 200 else self._feed_head(data)
            if rest or self._is_complete:
                self._feed_body(rest)
        except (HttpParserError, HttpParserUpgrade, ValueError) as error:
            self.fail(BrokenOff(f"the answer is no HTTP: {error}"))
        else:
            if self.status:
                self._wake()

    def feed_end(self) -> None:
        """The service will send nothing more."""
        if self._framing == "until_close" and self._error is None:
            self._complete()
            self._wake()
        else:
            self.fail(BrokenOff("the connection ended"))

    def _feed_head(self, data: bytes) -> bytes:
        """Parse what came up to the end of the head that is no interim one; what follows it is given back."""
        data = self._head + data
        while data:
            if not data.startswith(b"HTTP/1.") and not b"HTTP/1.".startswith(data):
                raise ValueError("not a status line")
            head, end, rest = data.partition(b"\r\n\r\n")
            if len(head) > HEAD_BYTES_MAX:
                raise ValueError("the head is too long")
            if not end:
                break
            self.headers = []
            parser = self._parser = HttpResponseParser(self)
            parser.feed_data(head + end)
            if self.status == 101:
                raise ValueError("nobody asked for another protocol")
            if self.status >= 200:
                self._frame(head)
                return rest
            data = rest
        self._head = data
        return b""

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called by the parser; what comes after the head is a trailer, which nobody asked for."""
        if self._framing == "none":
            self.headers.append((name, value.rstrip(b" \t")))

    def on_headers_complete(self) -> None:
        """Called by the parser."""
        assert self._parser is not None
        self.status = self._parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        """Called by the parser, for chunked bodies only."""
        if not self._is_complete and self._framing == "chunked":
            self._framing_bytes = 0
            self._push(data)

    def on_message_complete(self) -> None:
        """Called by the parser; counts for chunked bodies, the others' ends are told by their lengths."""
        if self._framing == "chunked":
            self._complete()

    def _frame(self, head: bytes) -> None:
        """Where the answer ends (RFC 9112 section 6.3), and whether the connection does."""
        length, coding = None, None
        self._says_close = not head.startswith(b"HTTP/1.1 ")
        for name, value in self.headers:
            match name.lower():
                case b"content-length":
                    if not value.isdigit():
                        raise ValueError("a length that is no number")
                    length = int(value)
                case b"transfer-encoding":
                    if coding is not None or value.lower() != b"chunked" or self._says_close:
                        raise ValueError("a transfer coding that nobody asked for")
                    coding = value
                case b"connection":
                    self._says_close |= b"close" in value.lower()
        self.size_bytes = length
        assert self._request is not None
        if self._request.method == "HEAD" or self.status in _WITHOUT_BODY or (length == 0 and coding is None):
            self._complete()
        elif coding is not None:
            if length is not None:
                raise ValueError("a length together with a transfer coding")
            self._framing = "chunked"
        elif length is not None:
            self._framing, self._left_bytes = "sized", length
            self._parser = None
        else:
            self._framing, self._says_close = "until_close", True

    def _feed_body(self, data: bytes) -> None:
        if self._framing == "chunked":
            self._feed_chunks(data)
        elif self._is_complete:
            self._is_foreign |= bool(data)
        elif self._framing == "until_close":
            self._push(data)
        else:
            left_bytes = self._left_bytes
            self._left_bytes -= len(data)
            self._push(data if len(data) <= left_bytes else data[:left_bytes])
            if self._left_bytes <= 0:
                self._is_foreign = self._left_bytes < 0
                self._complete()

    def _feed_chunks(self, data: bytes) -> None:
        """The last byte is fed apart, so that an end before it is told from an end with it."""
        assert self._parser is not None
        parser = self._parser
        view = memoryview(data)
        self._framing_bytes += len(data)
        try:
            parser.feed_data(view[:-1])
            if self._is_complete:
                self._is_foreign = True
            else:
                parser.feed_data(view[-1:])
        except (HttpParserError, HttpParserUpgrade):
            if not self._is_complete:
                raise
            self._is_foreign = True
        if self._framing_bytes > FRAMING_BYTES_MAX + len(data):
            raise ValueError("more framing than body")

    def _push(self, data: bytes) -> None:
        self._chunks.append(data)
        self._buffered_bytes += len(data)
        if self._buffered_bytes > READ_AHEAD_BYTES and not self._is_paused:
            self._is_paused = True
            self._connection.transport.pause_reading()

    def _complete(self) -> None:
        self._is_complete = True
        # The parser holds this object's methods; without the cycle both are freed at once.
        self._parser = None

    def may_be_sent_again(self) -> bool:
        """Whether the request did no harm: it never does, and no answer to it had begun."""
        request = self._request
        return (
            request is not None
            and not self._has_begun
            and request.method in SAFE_METHODS
            and (request.body is None or isinstance(request.body, bytes))
        )

    def close(self) -> None:
        """Give the connection back, or end it where something is or may be left on it."""
        connection = self._connection
        connection.exchange = None
        if self._writing is not None and not self._writing.done():
            self._writing.cancel()
        is_clean = (
            self._sent_whole
            and self._is_complete
            and self._error is None
            and not self._is_foreign
            and not self._says_close
            and not connection.has_ended
            and not connection.transport.get_write_buffer_size()
            and self._request is not None
            and self._request.caller_is_there()
        )
        self._parser = None
        if is_clean and self._is_paused:
            connection.transport.resume_reading()
        self._owner.take_back(connection, is_clean=is_clean)


class Connections:
    """The connections to one service: at most 256 at a time, idle ones kept for 20 seconds.

    Args:
        url: scheme, host and port.
        waits_for_place: what comes while all are in use waits for one; else it is refused at once.
    """

    def __init__(self, url: str, *, waits_for_place: bool = True) -> None:
        parsed = URL(url)
        self._host = parsed.host or ""
        self._port = parsed.port or 80
        self._tls = ssl.create_default_context() if parsed.scheme == "https" else None
        self._idle: deque[tuple[_Connection, float]] = deque()
        self._places = asyncio.Semaphore(CONNECTIONS_MAX)
        self._waits_for_place = waits_for_place
        self._sweeping: asyncio.TimerHandle | None = None

    def close(self) -> None:
        if self._sweeping is not None:
            self._sweeping.cancel()
        while self._idle:
            connection, _ = self._idle.pop()
            connection.transport.close()

    async def exchange(self, request: Sent, timeout_seconds: float = HEAD_TIMEOUT_SECONDS) -> Exchange:
        """Send a request and await the head of its answer; the caller closes the exchange.

        A request is sent again, once and on a new connection, where the connection ended without a byte of an answer
        and the method is safe: the service may have ended in the moment that it was asked, and be coming back.

        Raises:
            NotConnected: the service refuses connections or does not take one in a second.
            AllInUse: there is no place, and this one does not wait for it.
            BrokenOff: the connection ended without an answer.
            NoAnswer: the answer did not begin in time.
        """
        exchange = await self._begin(timeout_seconds, may_reuse=True)
        try:
            await exchange.send(request, timeout_seconds)
            return exchange
        except BrokenOff:
            exchange.close()
            if not exchange.may_be_sent_again():
                raise
        except BaseException:
            exchange.close()
            raise
        exchange = await self._begin(timeout_seconds, may_reuse=False)
        try:
            await exchange.send(request, timeout_seconds)
            return exchange
        except BaseException:
            exchange.close()
            raise

    async def _begin(self, timeout_seconds: float, *, may_reuse: bool) -> Exchange:
        if self._places.locked():
            if not self._waits_for_place:
                raise AllInUse
            try:
                async with asyncio.timeout(timeout_seconds):
                    await self._places.acquire()
            except TimeoutError:
                raise NoAnswer from None
        else:
            await self._places.acquire()
        try:
            kept = self._kept() if may_reuse else None
            if kept is not None:
                return Exchange(self, kept)
            return Exchange(self, await self._connect())
        except BaseException:
            self._places.release()
            raise

    def _kept(self) -> _Connection | None:
        oldest = asyncio.get_running_loop().time() - IDLE_SECONDS
        while self._idle:
            connection, since = self._idle.pop()
            if since > oldest and connection.is_usable:
                return connection
            connection.abort()
        return None

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_SECONDS):
                _, connection = await loop.create_connection(
                    lambda: _Connection(self._forget), self._host, self._port, ssl=self._tls
                )
        except (OSError, TimeoutError) as error:
            raise NotConnected(str(error)) from error
        return connection

    def take_back(self, connection: _Connection, *, is_clean: bool) -> None:
        """Keep a connection on which nothing is left, end any other."""
        self._places.release()
        if not is_clean:
            connection.abort()
            return
        loop = asyncio.get_running_loop()
        self._idle.append((connection, loop.time()))
        if self._sweeping is None:
            self._sweeping = loop.call_later(IDLE_SECONDS, self._sweep)

    def _forget(self, ended: _Connection) -> None:
        """A connection ended; were it idle, it is not any more."""
        if any(connection is ended for connection, _ in self._idle):
            self._idle = deque(item for item in self._idle if item[0] is not ended)

    def _sweep(self) -> None:
        """End the connections that nobody used for too long."""
        loop = asyncio.get_running_loop()
        oldest = loop.time() - IDLE_SECONDS
        while self._idle and self._idle[0][1] <= oldest:
            connection, _ = self._idle.popleft()
            connection.abort()
        self._sweeping = loop.call_at(self._idle[0][1] + IDLE_SECONDS, self._sweep) if self._idle else None


def _head_of(request: Sent) -> bytes:
    """The request's head, framed by what its body is.

    Raises:
        ValueError: something in it would end a line before its end.
    """
    lines = [f"{request.method} {request.path} HTTP/1.1"]
    lines += [f"{name}: {value}" for name, value in request.headers.items()]
    body = request.body
    if isinstance(body, bytes):
        lines.append(f"Content-Length: {len(body)}")
    elif body is None:
        if request.method not in SAFE_METHODS:
            lines.append("Content-Length: 0")
    elif request.body_size_bytes is not None:
        lines.append(f"Content-Length: {request.body_size_bytes}")
    else:
        lines.append("Transfer-Encoding: chunked")
    if request.awaits_continue:
        lines.append("Expect: 100-continue")
    head = "\r\n".join(lines)
    if head.count("\n") != len(lines) - 1 or head.count("\r") != len(lines) - 1 or "\0" in head:
        raise ValueError("a line of the request holds a line break")
    return f"{head}\r\n\r\n".encode("utf-8", "surrogateescape")
