"""Arrow record batches from PostgreSQL: how each type maps, what Arrow can't hold, and how a part is read.

Reading goes by binary COPY. What has no like in Arrow is asked of the server as text, and so are long decimals.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import asyncpg
import pyarrow as pa
import pyarrow.compute as pc

from libs.connectors.postgres.binary import (
    DECIMAL_DIGITS_MAX,
    TRAILER,
    Malformed,
    RowBuffer,
    Unheld,
    decode,
    new_marker,
    without_header,
)
from libs.connectors.postgres.types import Column, PostgresType
from libs.connectors.protocol import ConnectorRefused, ConnectorUnavailable, Policy

if TYPE_CHECKING:
    from libs.connectors.postgres.long_rows import LongRowsTurn
    from libs.connectors.postgres.table import Part, PostgresTable

# What a batch has at least, and what a buffer for it holds with the piece that came last.
BATCH_BYTES = 2 * 1024 * 1024
BUFFER_BYTES = BATCH_BYTES + 512 * 1024
BUFFERS = 2
DECIMAL128_DIGITS = 38
DECIMAL256_DIGITS = 76

_NATIVE: dict[str, pa.DataType] = {
    "bool": pa.bool_(),
    "int2": pa.int16(),
    "int4": pa.int32(),
    "int8": pa.int64(),
    "float4": pa.float32(),
    "float8": pa.float64(),
    "text": pa.string(),
    "varchar": pa.string(),
    "bpchar": pa.string(),
    "name": pa.string(),
    "json": pa.string(),
    "bytea": pa.binary(),
    "uuid": pa.uuid(),
    "date": pa.date32(),
    "timestamp": pa.timestamp("us"),
    "timestamptz": pa.timestamp("us", "UTC"),
    "time": pa.time64("us"),
}


@dataclass(frozen=True, slots=True)
class ArrowColumn:
    """How a column is asked for and what it becomes.

    Args:
        expression: what the query selects.
        guard: an SQL condition that is true of a row whose value Arrow can't hold, where the server has to tell.
    """

    name: str
    type: pa.DataType
    expression: str
    guard: str | None = None


def arrow_columns(table: "PostgresTable") -> list[ArrowColumn]:
    """Every column of the table under its policy."""
    return [_arrow_column(column, table.plan.policies.get(column.source_name, "fail")) for column in table.columns]


def schema_of(columns: Sequence[ArrowColumn]) -> pa.Schema:
    return pa.schema([pa.field(column.name, column.type) for column in columns])


def arrow_type(postgres_type: PostgresType) -> pa.DataType | None:
    """The Arrow type that holds every ordinary value, None where only text does."""
    if postgres_type.kind == "array":
        assert postgres_type.element is not None
        return pa.list_(arrow_type(postgres_type.element) or pa.string())
    if postgres_type.name == "numeric" and postgres_type.built_in:
        return _decimal(postgres_type.precision_and_scale)
    return _NATIVE.get(postgres_type.name) if postgres_type.built_in else None


def _decimal(precision_and_scale: tuple[int, int] | None) -> pa.DataType | None:
    """Without a precision a numeric may have any number of digits, which no decimal has."""
    if precision_and_scale is None:
        return None
    precision, scale = precision_and_scale
    digits, scale = (precision - scale, 0) if scale < 0 else (max(precision, scale), scale)
    if digits <= DECIMAL128_DIGITS:
        return pa.decimal128(digits, scale)
    return pa.decimal256(digits, scale) if digits <= DECIMAL256_DIGITS else None


def _arrow_column(column: Column, policy: Policy) -> ArrowColumn:
    name = column.expression
    native = arrow_type(column.type)
    if native is None or (policy == "text" and _unholdable(column.type, name) is not None):
        return ArrowColumn(column.name, pa.string(), f"{name}::text")
    suffix = "[]" if column.type.element is not None else ""
    expression = f"{name}::text{suffix}" if _sent_as_text(column.type.element or column.type) else name
    bad = _unholdable(column.type, name)
    if bad is None or (policy == "fail" and column.type.element is None):
        return ArrowColumn(column.name, native, expression)
    safe = f"CASE WHEN {bad} THEN NULL ELSE {expression} END"
    return ArrowColumn(column.name, native, safe, guard=bad if policy == "fail" else None)


def unholdable_by_policy(table: "PostgresTable") -> dict[str, str]:
    """By column whose policy is not ``fail``: the SQL condition that holds for a value which the policy changes."""
    conditions = {
        column.name: _unholdable(column.type, column.expression)
        for column in table.columns
        if table.plan.policies.get(column.source_name, "fail") != "fail"
    }
    return {name: condition for name, condition in conditions.items() if condition is not None}


def _unholdable(postgres_type: PostgresType, value: str) -> str | None:
    """The SQL condition that holds for the values that the Arrow type can't; None where it holds them all."""
    if postgres_type.element is not None:
        within = _unholdable(postgres_type.element, "item")
        shape = f"array_ndims({value}) > 1 OR array_lower({value}, 1) <> 1"
        inside = f" OR EXISTS (SELECT FROM unnest({value}) AS item WHERE {within})" if within else ""
        return f"({shape}{inside})"
    match postgres_type.name:
        case "date":
            return f"(NOT isfinite({value}))"
        case "timestamp" | "timestamptz":
            return f"(NOT isfinite({value}) OR {value} >= '294246-01-01')"
        case "time":
            return f"({value} = '24:00')"
        case "numeric" if arrow_type(postgres_type) is not None:
            return f"({value} = 'NaN')"
        case _:
            return None


def _sent_as_text(postgres_type: PostgresType) -> bool:
    native = arrow_type(postgres_type)
    return native is None or (pa.types.is_decimal(native) and native.precision > DECIMAL_DIGITS_MAX)


def query(columns: Sequence[ArrowColumn], part: "Part", marker: int) -> str:
    """The select of a part: the marker, where there are guards their verdict, the columns."""
    selected = [f"'{marker}'::int8", *_verdict(columns), *(column.expression for column in columns)]
    return f"SELECT {', '.join(selected)} {part.from_clause}"


def record_batch(rows: RowBuffer, columns: Sequence[ArrowColumn], marker: int, stream: str) -> pa.RecordBatch:
    """The rows in their promised types; raises ``ConnectorRefused`` naming the column of a value that does not fit."""
    verdict = [pa.int32() for _ in _verdict(columns)]
    try:
        arrays = decode(rows, [*verdict, *(column.type for column in columns)], marker)
    except Unheld as error:
        raise _unheld(stream, columns[error.index - len(verdict)].name, str(error)) from None
    except Malformed as error:
        raise _unreadable(stream, error) from error
    if verdict and arrays[0].null_count < len(arrays[0]):
        broken = columns[pc.min(arrays[0]).as_py()].name
        raise _unheld(stream, broken, "is an array of several dimensions or holds such a value")
    return pa.RecordBatch.from_arrays(arrays[len(verdict) :], schema=schema_of(columns))


def _verdict(columns: Sequence[ArrowColumn]) -> list[str]:
    """An expression that numbers the first column whose value can't be held; empty when no column has a guard."""
    guards = [f"WHEN {column.guard} THEN {index}" for index, column in enumerate(columns) if column.guard]
    return [f"CASE {' '.join(guards)} END"] if guards else []


def _unheld(stream: str, column: str, reason: str) -> ConnectorRefused:
    return ConnectorRefused(
        f"{stream}: column {column!r} has a value that the destination can't hold ({reason}); "
        f"choose a policy for the column: null or text",
        code="value_not_held",
    )


def _unreadable(stream: str, error: Malformed) -> ConnectorUnavailable:
    return ConnectorUnavailable(f"{stream}: the source sent what can't be read: {error}")


async def read(table: "PostgresTable", part: "Part") -> AsyncGenerator[pa.RecordBatch, None]:
    """The batches of one part; the next one's rows arrive while one is worked on."""
    columns, marker = arrow_columns(table), new_marker()
    copy = _Copy(table, query(columns, part, marker))
    copying = asyncio.create_task(copy.run())
    try:
        while (rows := await copy.filled.get()) is not None:
            if isinstance(rows, Exception):
                raise rows
            batch = await asyncio.to_thread(record_batch, rows, columns, marker, str(table.plan.stream))
            copy.give_back(rows)
            # What is held here would not be free while others work, or the next rows arrive.
            del rows
            yield batch
            del batch
            copy.filled.task_done()
    finally:
        copying.cancel()
        await asyncio.gather(copying, return_exceptions=True)
        copy.leave_buffers()


class _Copy:
    """A COPY under way, into ``BUFFERS`` buffers in turn: while one is filled the other is worked on.

    A long row is a batch of its own, and done with before the next arrives.

    ``filled`` has the rows of one batch after the other, at last None or why the COPY broke off.
    """

    def __init__(self, table: "PostgresTable", sql: str) -> None:
        self.filled: asyncio.Queue[RowBuffer | Exception | None] = asyncio.Queue(BUFFERS + 1)
        self._empty: asyncio.Queue[RowBuffer] = asyncio.Queue(BUFFERS)
        self._idle = table.snapshot.row_buffers
        for _ in range(BUFFERS - 1):
            self._empty.put_nowait(self._buffer())
        self._filling = self._buffer()
        self._table = table
        self._sql = sql
        self._begun = False

    def give_back(self, rows: RowBuffer) -> None:
        """A buffer that grew for a long row is not kept."""
        rows.clear()
        self._empty.put_nowait(rows if rows.capacity_bytes == BUFFER_BYTES else RowBuffer(BUFFER_BYTES))

    def leave_buffers(self) -> None:
        """Leave the buffers to the next part."""
        while not self._empty.empty():
            self._idle.append(self._empty.get_nowait())

    async def run(self) -> None:
        try:
            async with self._table.snapshot.reader() as connection, self._table.snapshot.long_rows() as turn:
                await connection.copy_from_query(self._sql, output=partial(self._take, turn), format="binary")
            self._filling.cut_trailer()
        except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
            self.filled.put_nowait(self._table.failed(error))
        except Malformed as error:
            self.filled.put_nowait(_unreadable(str(self._table.plan.stream), error))
        except Exception as error:  # noqa: BLE001
            # Whoever waits for the rows raises it.
            self.filled.put_nowait(error)
        else:
            (self.filled if self._filling.length_bytes else self._empty).put_nowait(self._filling)
            self.filled.put_nowait(None)

    async def _take(self, turn: "LongRowsTurn", data: bytes) -> None:
        """Takes whole rows: a server sends each as one message (PostgreSQL documentation, "Message Flow")."""
        if not self._begun:
            data, self._begun = without_header(data), True
        long = await turn.arrived(len(data))
        if self._filling.length_bytes >= BATCH_BYTES or (long and self._filling.length_bytes):
            await self._hand_on()
        self._filling.append(data)
        if long and not self._filling.data.endswith(TRAILER, 0, self._filling.length_bytes):
            await self._hand_on()
            await self.filled.join()

    async def _hand_on(self) -> None:
        self.filled.put_nowait(self._filling)
        self._filling = await self._empty.get()

    def _buffer(self) -> RowBuffer:
        return self._idle.pop() if self._idle else RowBuffer(BUFFER_BYTES)
