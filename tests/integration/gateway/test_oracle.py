"""aiohttp's client as the oracle: the same requests through it and through our pool give the same answers."""

import asyncio
import random
from collections.abc import AsyncIterator

import aiohttp
import pytest
from multidict import CIMultiDict
from yarl import URL

from libs.web.upstream.pool import ConnectionPool
from libs.web.upstream.wire import UpstreamRequest

Answer = tuple[int, list[tuple[bytes, bytes]], bytes]

EXCHANGES = 400
METHODS = ("GET", "GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
STATUSES = (
    *("200 OK", "200 OK", "201 Created", "204 No Content", "206 Partial Content", "304 Not Modified"),
    *("404 Nope", "500 ", "503 Busy", "299 Unheard Of"),
)
SIZES = (0, 1, 2, 17, 1_000, 65_536, 65_537, 300_000)


@pytest.fixture
async def url() -> AsyncIterator[str]:
    """A server whose answer to the n-th request is the same whoever asks."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                method, path, _ = head.decode().split(" ", 2)
                if b"content-length:" in head.lower():
                    length = head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
                    await reader.readexactly(int(length))
                if not await _say(writer, method, random.Random(path)):
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    server.close()


async def _say(writer: asyncio.StreamWriter, method: str, rng: random.Random) -> bool:
    """Answer in one of the many ways; gives whether the connection goes on."""
    status, body = rng.choice(STATUSES), rng.randbytes(rng.choice(SIZES))
    lines = [
        f"HTTP/1.1 {status}",
        "Content-Type: text/plain",
        "X-Empty:",
        "X-Twice: a",
        "x-twice:  b , c ",
        'ETag: W/"1"',
    ]
    has_body = method != "HEAD" and status[:3] not in ("204", "304")
    way = rng.choice(("sized", "sized", "chunked", "until_close"))
    goes_on = way != "until_close" and rng.random() < 0.8
    if way == "sized" and status[:3] != "204":
        lines.append(f"Content-Length: {len(body)}")
    if way == "chunked" and has_body:
        lines.append("Transfer-Encoding: chunked")
        pieces = [body[start : start + 40_000] for start in range(0, len(body), 40_000)]
        body = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
    if not goes_on:
        lines.append("Connection: close")
    interim = b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" if rng.random() < 0.1 else b""
    wire = interim + ("\r\n".join(lines) + "\r\n\r\n").encode() + (body if has_body else b"")
    cut = rng.randrange(len(wire) + 1)
    for piece in (wire[:cut], wire[cut:]):
        writer.write(piece)
        await writer.drain()
        await asyncio.sleep(0)
    return goes_on


async def test_answers_are_what_aiohttps_client_makes_of_them(url: str) -> None:
    pool = ConnectionPool(url)
    async with aiohttp.ClientSession(auto_decompress=False) as session:
        for number in range(EXCHANGES):
            method = random.Random(number).choice(METHODS)
            body = b"x" * number if method in ("POST", "PUT", "PATCH") else None
            expected = await _through_aiohttp(session, url, method, f"/{number}", body)
            assert await _through_ours(pool, method, f"/{number}", body) == expected, number
    pool.close()


async def _through_aiohttp(
    session: aiohttp.ClientSession, url: str, method: str, path: str, body: bytes | None
) -> Answer:
    async with session.request(method, URL(url + path), data=body, allow_redirects=False) as response:
        return response.status, list(response.raw_headers), await response.read()


async def _through_ours(pool: ConnectionPool, method: str, path: str, body: bytes | None) -> Answer:
    async with await pool.exchange(UpstreamRequest(method, path, CIMultiDict({"Host": "x"}), body)) as exchange:
        return exchange.status, exchange.headers, await exchange.whole()
