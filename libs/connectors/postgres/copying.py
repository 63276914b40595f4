"""COPY from one PostgreSQL into another: the source's bytes are passed to the destination unchanged."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, Literal

import asyncpg

from libs.connectors.postgres.connection import DRIVER_ERRORS
from libs.connectors.postgres.table import Part, PostgresTable

QUEUE_BYTES = 4 * 1024 * 1024
CHUNK_BYTES = 256 * 1024
LOST_SECONDS = 1.0


class Pipe:
    """A bounded queue of chunks of at most twice ``CHUNK_BYTES``: short rows are gathered, long ones split.

    Args:
        consumed: called with the size in bytes of each chunk that the consumer has finished with.
    """

    def __init__(self, consumed: Callable[[int], None]) -> None:
        self._consumed = consumed
        self._gathered: list[bytes] = []
        self._gathered_bytes = 0
        self._chunks: asyncio.Queue[bytes | None] = asyncio.Queue(QUEUE_BYTES // CHUNK_BYTES)

    async def put(self, data: bytes) -> None:
        if len(data) > CHUNK_BYTES:
            await self._split(data)
            return
        self._gathered.append(data)
        self._gathered_bytes += len(data)
        if self._gathered_bytes >= CHUNK_BYTES:
            await self._flush()

    async def close(self) -> None:
        if self._gathered:
            await self._flush()
        await self._chunks.put(None)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while (chunk := await self._chunks.get()) is not None:
            yield chunk
            self._consumed(len(chunk))

    async def _split(self, data: bytes) -> None:
        if self._gathered:
            await self._flush()
        for start in range(0, len(data), CHUNK_BYTES):
            await self._chunks.put(data[start : start + CHUNK_BYTES])

    async def _flush(self) -> None:
        gathered, self._gathered, self._gathered_bytes = self._gathered, [], 0
        await self._chunks.put(b"".join(gathered))


async def copy_part(
    table: PostgresTable,
    part: Part,
    destination: "asyncpg.Connection[Any]",
    into: tuple[str, str],
    *,
    binary: bool,
    bytes_read: Callable[[int], None],
    bytes_written: Callable[[int], None],
    writing_failed: Callable[[BaseException], Exception],
) -> int:
    """Copy one part's rows.

    Args:
        into: schema and name of the destination's table.
        binary: use the binary format, otherwise text.
        bytes_read, bytes_written: called with the size of each piece.
        writing_failed: turns an error of the destination into the one to raise; ``table`` does so for the source's.

    Returns:
        The number of rows, as both ends reported it.
    """
    pipe = Pipe(bytes_written)
    copy_format: Literal["binary", "text"] = "binary" if binary else "text"

    async def read() -> int:
        async def take(data: bytes) -> None:
            bytes_read(len(data))
            await turn.arrived(len(data))
            await pipe.put(data)

        try:
            async with table.snapshot.reader() as connection, table.snapshot.long_rows() as turn:
                status = await connection.copy_from_query(table.select(part), output=take, format=copy_format)
        except DRIVER_ERRORS as error:
            raise table.failed(error) from error
        await pipe.close()
        return _rows(status)

    async def write() -> int:
        try:
            copying = destination.copy_to_table(
                into[1],
                schema_name=into[0],
                columns=[column.name for column in table.columns],
                source=pipe,
                format=copy_format,
            )
            status = await unless_lost(destination, copying)
        except DRIVER_ERRORS as error:
            raise writing_failed(error) from error
        return _rows(status)

    async with asyncio.TaskGroup() as tasks:
        reading = tasks.create_task(read())
        writing = tasks.create_task(write())
    assert reading.result() == writing.result(), "both ends report the same number of rows"
    return writing.result()


async def unless_lost(connection: "asyncpg.Connection[Any]", copying: Coroutine[Any, Any, str]) -> str:
    """End the copy if the connection is lost: the driver would wait indefinitely for room in its write buffer."""
    lost = asyncio.Event()

    def tell(_: object) -> None:
        lost.set()

    connection.add_termination_listener(tell)
    losing, task = asyncio.create_task(lost.wait()), asyncio.create_task(copying)
    try:
        await asyncio.wait({losing, task}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            # The driver's own error, if it raises one, says more.
            await asyncio.wait({task}, timeout=LOST_SECONDS)
        if not task.done():
            raise asyncpg.ConnectionDoesNotExistError("the connection was lost while rows were being sent")
        return task.result()
    finally:
        connection.remove_termination_listener(tell)
        losing.cancel()
        task.cancel()
        await asyncio.wait({losing, task}, timeout=LOST_SECONDS)


def _rows(status: str) -> int:
    """The number in a command tag such as ``COPY 42``."""
    return int(status.rsplit(" ", 1)[1])
