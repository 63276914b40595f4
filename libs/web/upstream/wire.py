"""HTTP/1.1 on the wire, without I/O: what a request looks like, and where a response begins and ends."""

from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Literal

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser
from multidict import CIMultiDict

HEAD_BYTES_MAX = 64 * 1024
FRAMING_BYTES_MAX = 64 * 1024
"""Chunk extensions and trailers are read and dropped; a response with more of them in a row is rejected."""

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})
"""Methods that change nothing (RFC 9110 section 9.2.1), so that their requests may be sent again."""

_WITHOUT_BODY = frozenset({204, 304})

Body = bytes | AsyncIterator[bytes] | None
Framing = Literal["none", "sized", "chunked", "until_close"]
Headers = list[tuple[bytes, bytes]]


class ResponseBroken(Exception):
    """The connection ended before the response did, or the response is not HTTP."""


def _always() -> bool:
    return True


@dataclass(slots=True)
class UpstreamRequest:
    """A request as a service gets it.

    Args:
        headers: without those that frame the body or concern the connection.
        body_size_bytes: the length of a body that is streamed, None if it is not known.
        caller_is_there: whether the caller still waits for the response.
        awaits_continue: the body is streamed, and only once the service has sent 100 Continue.
        may_repeat: it may be sent again although its method is not safe, because the service carries it out once.
    """

    method: str
    path: str
    headers: CIMultiDict[str]
    body: Body
    body_size_bytes: int | None = None
    caller_is_there: Callable[[], bool] = _always
    awaits_continue: bool = False
    may_repeat: bool = False

    @property
    def is_repeatable(self) -> bool:
        is_harmless = self.may_repeat or self.method in SAFE_METHODS
        return is_harmless and (self.body is None or isinstance(self.body, bytes))


def head_of(request: UpstreamRequest) -> bytes:
    """The request's head, framed by what its body is.

    Raises:
        ValueError: a line of it contains a line break.
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
        raise ValueError("a line of the request contains a line break")
    return f"{head}\r\n\r\n".encode("utf-8", "surrogateescape")


class Response:
    """One response, read from the bytes that are fed to it.

    Each head is parsed by a parser of its own (llhttp), so that no state passes from one response to the next.

    Args:
        method: the request's; the response to HEAD has no body.

    Attributes:
        status: 0 until a head has come; below 200 while only interim heads have.
        size_bytes: the announced length of the body.
        pieces: the part of the body that has come and was not taken.
        says_close: the service ends the connection after this response.
        has_surplus: bytes came after the end, which no request asked for.
    """

    __slots__ = (
        "_framing",
        "_framing_bytes",
        "_head",
        "_left_bytes",
        "_method",
        "_parser",
        "buffered_bytes",
        "has_begun",
        "has_surplus",
        "headers",
        "is_complete",
        "pieces",
        "says_close",
        "size_bytes",
        "status",
    )

    def __init__(self, method: str) -> None:
        self._method = method
        self._parser: HttpResponseParser | None = None
        self._head = b""
        self._framing: Framing = "none"
        self._framing_bytes = 0
        self._left_bytes = 0
        self.pieces: deque[bytes] = deque()
        self.buffered_bytes = 0
        self.status = 0
        self.headers: Headers = []
        self.size_bytes: int | None = None
        self.has_begun = False
        self.is_complete = False
        self.has_surplus = False
        self.says_close = False

    def feed(self, data: bytes) -> None:
        """Read what came over the connection; raises ``ResponseBroken``."""
        self.has_begun = True
        if self.is_complete:
            self.has_surplus = True
            return
        try:
            rest = data if self.status >= 200 else self._feed_head(data)
            if rest or self.is_complete:
                self._feed_body(rest)
        except (HttpParserError, HttpParserUpgrade, ValueError) as error:
            raise ResponseBroken(f"the response is not HTTP: {error}") from error

    def feed_end(self) -> None:
        """The service will send nothing more; raises ``ResponseBroken`` if the response is not complete."""
        if self._framing == "until_close":
            self._complete()
        elif not self.is_complete:
            raise ResponseBroken("the connection ended")

    def take(self) -> bytes:
        """Remove the first of ``pieces``."""
        piece = self.pieces.popleft()
        self.buffered_bytes -= len(piece)
        return piece

    def drop_parser(self) -> None:
        """Break the cycle with the parser, which holds this object's methods, so that both are freed at once."""
        self._parser = None

    def _feed_head(self, data: bytes) -> bytes:
        """Parse the heads that have come up to the final one, and return what follows it."""
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
                raise ValueError("a change of protocol that was not requested")
            if self.status >= 200:
                self._frame(head)
                return rest
            data = rest
        self._head = data
        return b""

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called by the parser; what comes after the head is a trailer, which is dropped."""
        if self._framing == "none":
            self.headers.append((name, value.rstrip(b" \t")))

    def on_headers_complete(self) -> None:
        """Called by the parser."""
        assert self._parser is not None
        self.status = self._parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        """Called by the parser; used for chunked bodies only."""
        if not self.is_complete and self._framing == "chunked":
            self._framing_bytes = 0
            self._push(data)

    def on_message_complete(self) -> None:
        """Called by the parser; used for chunked bodies only, the others end by their length."""
        if self._framing == "chunked":
            self._complete()

    def _frame(self, head: bytes) -> None:
        """Decide where the response ends (RFC 9112 section 6.3), and whether the connection does."""
        length, coding = None, None
        self.says_close = not head.startswith(b"HTTP/1.1 ")
        for name, value in self.headers:
            match name.lower():
                case b"content-length":
                    if not value.isdigit():
                        raise ValueError("a length that is not a number")
                    length = int(value)
                case b"transfer-encoding":
                    if coding is not None or value.lower() != b"chunked" or self.says_close:
                        raise ValueError("a transfer coding that was not requested")
                    coding = value
                case b"connection":
                    self.says_close |= b"close" in value.lower()
        self.size_bytes = length
        if self._method == "HEAD" or self.status in _WITHOUT_BODY or (length == 0 and coding is None):
            self._complete()
        elif coding is not None:
            if length is not None:
                raise ValueError("a length together with a transfer coding")
            self._framing = "chunked"
        elif length is not None:
            self._framing, self._left_bytes = "sized", length
            self._parser = None
        else:
            self._framing, self.says_close = "until_close", True

    def _feed_body(self, data: bytes) -> None:
        if self._framing == "chunked":
            self._feed_chunks(data)
        elif self.is_complete:
            self.has_surplus |= bool(data)
        elif self._framing == "until_close":
            self._push(data)
        else:
            left_bytes = self._left_bytes
            self._left_bytes -= len(data)
            self._push(data if len(data) <= left_bytes else data[:left_bytes])
            if self._left_bytes <= 0:
                self.has_surplus = self._left_bytes < 0
                self._complete()

    def _feed_chunks(self, data: bytes) -> None:
        """The last byte is fed by itself: if the body is complete before it, the byte is surplus."""
        assert self._parser is not None
        parser = self._parser
        view = memoryview(data)
        self._framing_bytes += len(data)
        try:
            parser.feed_data(view[:-1])
            if self.is_complete:
                self.has_surplus = True
            else:
                parser.feed_data(view[-1:])
        except (HttpParserError, HttpParserUpgrade):
            if not self.is_complete:
                raise
            self.has_surplus = True
        if self._framing_bytes > FRAMING_BYTES_MAX + len(data):
            raise ValueError("more framing than body")

    def _push(self, data: bytes) -> None:
        self.pieces.append(data)
        self.buffered_bytes += len(data)

    def _complete(self) -> None:
        self.is_complete = True
        self._parser = None
