"""COPY from one PostgreSQL into another: the source's bytes are handed to the destination as they come."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, Literal

import asyncpg

from libs.connectors.postgres.connection import DRIVER_ERRORS
from libs.connectors.postgres.source import Part, PostgresTable

QUEUE_BYTES = 4 * 1024 * 1024
CHUNK_BYTES = 256 * 1024
LOST_SECONDS = 1.0


class Pipe:
    """Bytes on their way in chunks of at most twice ``CHUNK_BYTES``: short rows are gathered, long ones cut up."""

    def __init__(self, taken: Callable[[int], None]) -> None:
        self._taken = taken
        self._gathered: list[bytes] = []
        self._gathered_bytes = 0
        self._chunks: asyncio.Queue[bytes | None] = asyncio.Queue(QUEUE_BYTES // CHUNK_BYTES)

    async def put(self, data: bytes) -> None:
        if len(data) > CHUNK_BYTES:
            await self._cut_up(data)
            return
        self._gathered.append(data)
        self._gathered_bytes += len(data)
        if self._gathered_bytes >= CHUNK_BYTES:
            await self._hand_on()

    async def close(self) -> None:
        if self._gathered:
            await self._hand_on()
        await self._chunks.put(None)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while (chunk := await self._chunks.get()) is not None:
            yield chunk
            self._taken(len(chunk))

    async def _cut_up(self, data: bytes) -> None:
        if self._gathered:
            await self._hand_on()
        for start in range(0, len(data), CHUNK_BYTES):
            await self._chunks.put(data[start : start + CHUNK_BYTES])

    async def _hand_on(self) -> None:
        gathered, self._gathered, self._gathered_bytes = self._gathered, [], 0
        await self._chunks.put(b"".join(gathered))


async def copy_part(
    table: PostgresTable,
    part: Part,
    destination: "asyncpg.Connection[Any]",
    into: tuple[str, str],
    *,
    binary: bool,
    moved: Callable[[int], None],
    taken: Callable[[int], None],
    written_failed: Callable[[BaseException], Exception],
) -> int:
    """Copy one part's rows.

    Args:
        into: schema and name of the table that takes them.
        binary: binary COPY, else text.
        moved: told the size of what was read, in bytes.
        taken: told the size of what the writing side took, in bytes.
        written_failed: names an error of the writing side; the reading side's is named by ``table``.

    Returns:
        The rows that both ends counted.
    """
    pipe = Pipe(taken)
    copy_format: Literal["binary", "text"] = "binary" if binary else "text"

    async def read() -> int:
        async def take(data: bytes) -> None:
            moved(len(data))
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
            status = await _unless_lost(destination, copying)
        except DRIVER_ERRORS as error:
            raise written_failed(error) from error
        return _rows(status)

    async with asyncio.TaskGroup() as tasks:
        reading = tasks.create_task(read())
        writing = tasks.create_task(write())
    assert reading.result() == writing.result(), "both ends count the rows of a COPY"
    return writing.result()


async def _unless_lost(connection: "asyncpg.Connection[Any]", copying: Coroutine[Any, Any, str]) -> str:
    """The driver waits without end for room to write where its connection is lost while there is none."""
    lost = asyncio.Event()

    def tell(_: object) -> None:
        lost.set()

    connection.add_termination_listener(tell)
    losing, task = asyncio.create_task(lost.wait()), asyncio.create_task(copying)
    try:
        await asyncio.wait({losing, task}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            # The driver's own error says why, if it is told.
            await asyncio.wait({task}, timeout=LOST_SECONDS)
        if not task.done():
            raise asyncpg.ConnectionDoesNotExistError("the connection was lost while it was written to")
        return task.result()
    finally:
        connection.remove_termination_listener(tell)
        losing.cancel()
        task.cancel()
        await asyncio.wait({losing, task}, timeout=LOST_SECONDS)


def _rows(status: str) -> int:
    """``COPY 42`` is 42 rows."""
    return int(status.rsplit(" ", 1)[1])
