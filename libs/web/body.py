"""Reads request bodies: 100 Continue, timeouts and decompression, all bounded.

The server does not decompress bodies by itself (no ``auto_decompress``), so only bodies that are read are decompressed.
"""

import asyncio
import zlib
from collections.abc import AsyncIterator
from typing import Literal

import aiohttp
from aiohttp import web

from libs.core.errors import FixRequest, RequestTimeout, TooLarge, UnsupportedMediaType

BODY_IDLE_SECONDS = 30.0
BODY_SECONDS_MAX = 600.0
BODY_BYTES_PER_SECOND_MIN = 1024
# Larger bodies are decompressed in a thread: a kilobyte may expand to a megabyte.
INFLATED_IN_PLACE_BYTES_MAX = 4 * 1024
INFLATED_TOGETHER_BYTES = 64 * 1024
GZIP_MEMBERS_MAX = 1000

CODINGS = "gzip, deflate"
"""The supported content codings, as a value of ``Accept-Encoding``."""

BODY: web.RequestKey[bytes] = web.RequestKey("body", bytes)
EXPECTATION: web.RequestKey[str] = web.RequestKey("expectation", str)
"""The request's ``Expect`` until it is met; the server moves the header here."""

Coding = Literal["identity", "gzip", "deflate"]


def require_readable(request: web.Request) -> None:
    """Refuse a body that can't be read before the client is asked to send it.

    Raises:
        UnsupportedMediaType: the content coding is not supported.
        FixRequest: 417, the expectation is not supported (RFC 9110 section 10.1.1).
    """
    coding_of(request)
    if EXPECTATION in request and request[EXPECTATION].strip().lower() != "100-continue":
        unmet = FixRequest("the only supported expectation is 100-continue", code="expectation_failed")
        unmet.status = 417
        raise unmet


def coding_of(request: web.Request) -> Coding:
    """The content coding of the body (RFC 9110 section 8.4).

    Raises:
        UnsupportedMediaType: the coding is not supported, or there are several.
    """
    if "Content-Encoding" not in request.headers:
        return "identity"
    values = request.headers.getall("Content-Encoding")
    names = [item.strip().lower() for value in values for item in value.split(",")]
    match [name for name in names if name not in ("", "identity")]:
        case []:
            return "identity"
        case ["gzip" | "x-gzip"]:
            return "gzip"
        case ["deflate"]:
            return "deflate"
        case unknown:
            told = ", ".join(unknown)[:64]
            message = f"the content encoding {told!r} is not supported; use one of {CODINGS}"
            raise UnsupportedMediaType(message, code="unsupported_content_encoding")


async def read_bytes(request: web.Request) -> bytes:
    """The body, decompressed, within the application's limit.

    Raises:
        TooLarge: it is over the limit, compressed or decompressed.
        RequestTimeout: it did not arrive in time.
        FixRequest: it can't be decoded.
    """
    known: bytes | None = request.get(BODY)
    if known is not None:
        return known
    coding = coding_of(request)
    size_bytes_max = request.client_max_size
    body = await read_coded(request, size_bytes_max)
    if coding != "identity" and request.body_exists:
        if len(body) <= INFLATED_IN_PLACE_BYTES_MAX:
            body = inflated(body, coding, size_bytes_max)
        else:
            body = await asyncio.to_thread(inflated, body, coding, size_bytes_max)
    request[BODY] = body
    return body


async def read_coded(request: web.Request, size_bytes_max: int) -> bytes:
    """The body, not decompressed; raises as ``pieces``."""
    announced_bytes = request.content_length
    if announced_bytes is not None and announced_bytes > size_bytes_max:
        raise too_large(size_bytes_max)
    if request.content.is_eof() and request.content.exception() is None:
        # The body arrived together with the head, so there is nothing to wait for.
        body = await request.content.read()
        if len(body) > size_bytes_max:
            raise too_large(size_bytes_max)
        return body
    return b"".join([piece async for piece in pieces(request, size_bytes_max)])


async def pieces(request: web.Request, size_bytes_max: int) -> AsyncIterator[bytes]:
    """The body in pieces as it arrives, not decompressed.

    Raises:
        TooLarge: it exceeds the limit.
        RequestTimeout: nothing arrived for 30 seconds, less than 1 KiB per second, or not all of it within 10 minutes.
        FixRequest: its framing is broken.
    """
    await continue_with(request)
    loop = asyncio.get_running_loop()
    started_at = loop.time()
    passed_bytes = 0
    try:
        while True:
            allowed_seconds = BODY_IDLE_SECONDS + passed_bytes / BODY_BYTES_PER_SECOND_MIN
            deadline = started_at + min(allowed_seconds, BODY_SECONDS_MAX)
            async with asyncio.timeout_at(min(deadline, loop.time() + BODY_IDLE_SECONDS)):
                piece = await request.content.readany()
            if not piece:
                return
            passed_bytes += len(piece)
            if passed_bytes > size_bytes_max:
                raise too_large(size_bytes_max)
            yield piece
    except TimeoutError:
        raise RequestTimeout("the request body did not arrive in time") from None
    except (web.RequestPayloadError, aiohttp.ClientPayloadError, aiohttp.http_exceptions.HttpProcessingError):
        raise malformed("its framing is broken") from None


async def continue_with(request: web.Request) -> None:
    """Send 100 Continue to a client that waits for it (RFC 9110 section 10.1.1)."""
    if EXPECTATION in request:
        del request[EXPECTATION]
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        # An interim response does not count as the start of the answer.
        request.writer.output_size = 0


def inflated(body: bytes, coding: Coding, size_bytes_max: int) -> bytes:
    """Decompress a body; stops at the limit.

    Raises:
        TooLarge: the decompressed body exceeds the limit.
        FixRequest: it is truncated, corrupt, or followed by other data.
    """
    found = bytearray()
    position, members, inflater = 0, 0, None
    try:
        while position < len(body):
            if inflater is None:
                if (members and coding != "gzip") or members == GZIP_MEMBERS_MAX:
                    raise malformed("other data follows its end")
                members, inflater = members + 1, _inflater(body, coding)
            piece = body[position : position + INFLATED_TOGETHER_BYTES]
            found += inflater.decompress(piece, size_bytes_max + 1 - len(found))
            if len(found) > size_bytes_max:
                raise too_large(size_bytes_max)
            position += len(piece) - len(inflater.unused_data)
            if inflater.eof:
                inflater = None
    except zlib.error:
        raise malformed(f"it is not valid {coding}") from None
    if inflater is not None or not members:
        raise malformed(f"its {coding} data are truncated")
    return bytes(found)


def _inflater(body: bytes, coding: Coding) -> "zlib._Decompress":
    if coding == "gzip":
        return zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    # RFC 9110 section 8.4.1.2: "deflate" means the zlib format, but some clients send the raw stream.
    is_zlib = len(body) > 1 and body[0] & 0x0F == 8 and (body[0] << 8 | body[1]) % 31 == 0
    return zlib.decompressobj(wbits=zlib.MAX_WBITS if is_zlib else -zlib.MAX_WBITS)


def too_large(size_bytes_max: int) -> TooLarge:
    """The refusal of a body that is too large."""
    return TooLarge(f"the request body is over {size_bytes_max} bytes")


def malformed(why: str) -> FixRequest:
    """The refusal of a body that can't be decoded."""
    return FixRequest(f"the request body can't be decoded: {why}", code="malformed_body")
