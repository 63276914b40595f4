"""Bytes straight to a socket, for what an HTTP client would not send."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

TIMEOUT_SECONDS = 10


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection to the server at ``url``, aborted at the end of the block or after ten seconds."""
    host, port = url.removeprefix("http://").split(":")
    async with asyncio.timeout(TIMEOUT_SECONDS):
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            yield reader, writer
        finally:
            writer.transport.abort()


async def all_received(url: str, sent: bytes) -> bytes:
    """Everything that comes back until the server ends the connection, which it may do before it has read all."""
    received = b""
    async with connected(url) as (reader, writer):
        writer.write(sent)
        with suppress(ConnectionError):
            while chunk := await reader.read(65_536):
                received += chunk
    return received


async def status_of(url: str, sent: bytes) -> int:
    """The status of the first response."""
    async with connected(url) as (reader, writer):
        writer.write(sent)
        return int((await reader.readline()).split()[1])
