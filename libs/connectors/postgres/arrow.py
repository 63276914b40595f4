"""Arrow record batches from PostgreSQL: how each type maps, what Arrow can't hold, and the connections that read.

Reading goes by binary COPY through ADBC. What it would read with a loss (intervals, times with a zone, arrays of
several dimensions, types that it does not know) is asked of the server as text instead.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import adbc_driver_manager
import pyarrow as pa
import pyarrow.compute as pc
from adbc_driver_manager import dbapi as manager_dbapi
from adbc_driver_postgresql import dbapi

from libs.connectors.postgres.config import PostgresConfig
from libs.connectors.postgres.connection import failure, libpq_uri, quoted
from libs.connectors.postgres.types import Column, PostgresType
from libs.connectors.protocol import ConnectorRefused, ConnectorUnavailable, Policy

if TYPE_CHECKING:
    from libs.connectors.postgres.source import Part, PostgresTable

Result = TypeVar("Result")

BATCH_BYTES = 4 * 1024 * 1024
DECIMAL128_DIGITS = 38
DECIMAL256_DIGITS = 76
GUARD = "_datasync_guard"
# 4714-11-24 BC, the first day that PostgreSQL has: whatever is below was infinite or ran over.
FIRST_DAY = -2440588
FIRST_MICROSECOND = FIRST_DAY * 86_400_000_000
DAY_MICROSECONDS = 86_400_000_000

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
    "jsonb": pa.string(),
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
        checked: values that run over Arrow's range are refused while converting.
    """

    name: str
    type: pa.DataType
    expression: str
    guard: str | None = None


def arrow_columns(table: "PostgresTable") -> list[ArrowColumn]:
    """Every column of the table under its policy."""
    return [_arrow_column(column, table.plan.policies.get(column.name, "fail")) for column in table.columns]


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
    name = quoted(column.name)
    native = arrow_type(column.type)
    if native is None or (policy == "text" and _unholdable(column.type, name) is not None):
        return ArrowColumn(column.name, pa.string(), f"{name}::text")
    expression = name
    if column.type.element is not None and arrow_type(column.type.element) is None:
        expression = f"{name}::text[]"
    elif column.type.through_domain or (column.type.element is not None and column.type.element.through_domain):
        expression = f"{name}::{column.type.sql}"
    bad = _unholdable(column.type, name)
    if bad is None or (policy == "fail" and column.type.element is None):
        return ArrowColumn(column.name, native, expression)
    safe = f"CASE WHEN {bad} THEN NULL ELSE {expression} END"
    return ArrowColumn(column.name, native, safe, guard=bad if policy == "fail" else None)


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


def query(columns: Sequence[ArrowColumn], part: "Part") -> str:
    """The select of a part, with one more column that numbers the first column whose value can't be held."""
    selected = [f"{column.expression} AS {quoted(column.name)}" for column in columns]
    guards = [f"WHEN {column.guard} THEN {index}" for index, column in enumerate(columns) if column.guard]
    if guards:
        selected.append(f"CASE {' '.join(guards)} END AS {quoted(GUARD)}")
    return f"SELECT {', '.join(selected)} {part.from_clause}"


def convert(batch: pa.RecordBatch, columns: Sequence[ArrowColumn], stream: str) -> pa.RecordBatch:
    """The batch in its promised types; raises ``ConnectorRefused`` naming the column of a value that does not fit."""
    if batch.num_columns > len(columns):
        broken = pc.min(batch.column(len(columns))).as_py()
        if broken is not None:
            raise _unheld(stream, columns[broken].name, "is an array of several dimensions or holds such a value")
    arrays = []
    for index, column in enumerate(columns):
        try:
            arrays.append(_convert(batch.column(index), column.type))
        except (pa.ArrowInvalid, _OutOfRange) as error:
            raise _unheld(stream, column.name, str(error)) from None
    return pa.RecordBatch.from_arrays(arrays, schema=schema_of(columns))


class _OutOfRange(Exception):
    pass


def _unheld(stream: str, column: str, reason: str) -> ConnectorRefused:
    return ConnectorRefused(
        f"{stream}: column {column!r} has a value that the destination can't hold ({reason}); "
        f"choose a policy for the column: null or text",
        code="value_not_held",
    )


def _convert(array: "pa.Array[Any]", wanted: pa.DataType) -> "pa.Array[Any]":
    if isinstance(array, pa.ListArray) and isinstance(wanted, pa.ListType):
        values = _convert(array.values, wanted.value_type)
        mask = array.is_null() if array.null_count else None
        return pa.ListArray.from_arrays(array.offsets, values, type=wanted, mask=mask)
    if isinstance(array, pa.ExtensionArray) and array.type != wanted:
        array = array.storage
    if pa.types.is_date32(wanted):
        _not_below(array.view(pa.int32()), FIRST_DAY, "an infinite date")
    elif pa.types.is_timestamp(wanted):
        _not_below(array.view(pa.int64()), FIRST_MICROSECOND, "an infinite time, or one after the year 294245")
    elif pa.types.is_time64(wanted):
        _not_above(array.view(pa.int64()), DAY_MICROSECONDS - 1, "the time 24:00")
    return array if array.type == wanted else array.cast(wanted)


def _not_below(array: "pa.Array[Any]", limit: int, what: str) -> None:
    least = pc.min(array).as_py()
    if least is not None and least < limit:
        raise _OutOfRange(what)


def _not_above(array: "pa.Array[Any]", limit: int, what: str) -> None:
    most = pc.max(array).as_py()
    if most is not None and most > limit:
        raise _OutOfRange(what)


class ArrowReader:
    """The ADBC connections of a snapshot: as many as are read from at once, each used by one thread at a time."""

    def __init__(self, uri: str, exported: str, pool: ThreadPoolExecutor) -> None:
        self._uri = uri
        self._exported = exported
        self._pool = pool
        self._idle: list[manager_dbapi.Connection] = []

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, config: PostgresConfig, exported: str) -> AsyncIterator["ArrowReader"]:
        pool = ThreadPoolExecutor(config.max_threads + 1, thread_name_prefix="arrow-read")
        with libpq_uri(config, "datasync read") as uri:
            reader = cls(uri, exported, pool)
            try:
                yield reader
            finally:
                await reader.close()
                pool.shutdown(wait=False)

    async def read(self, table: "PostgresTable", part: "Part") -> AsyncGenerator[pa.RecordBatch, None]:
        """The batches of one part, converted."""
        columns = arrow_columns(table)
        stream = str(table.plan.stream)
        try:
            connection = self._idle.pop() if self._idle else await self._run(self._connect, _nothing)
            cursor = connection.cursor()
        except adbc_driver_manager.Error as error:
            # The holder of the snapshot had logged in with the same configuration.
            raise ConnectorUnavailable(f"the source's snapshot can't be read: {error}") from error
        finished = False
        try:
            batches = await self._run(lambda: _execute(cursor, query(columns, part)), cursor.adbc_cancel)
            while (batch := await self._run(lambda: _next(batches, columns, stream), cursor.adbc_cancel)) is not None:
                yield batch
            finished = True
        except adbc_driver_manager.Error as error:
            raise _failed(table, error) from error
        finally:
            if finished:
                cursor.close()
                self._idle.append(connection)
            else:
                await self._run(lambda: _abandon(cursor, connection), _nothing)

    async def close(self) -> None:
        while self._idle:
            await self._run(self._idle.pop().close, _nothing)

    def _connect(self) -> manager_dbapi.Connection:
        connection: manager_dbapi.Connection = dbapi.connect(self._uri, autocommit=True)
        with connection.cursor() as cursor:
            cursor.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
            cursor.execute(f"SET TRANSACTION SNAPSHOT '{self._exported}'")
        return connection

    async def _run(self, work: Callable[[], Result], cancel: Callable[[], None]) -> Result:
        """Run in a thread; when cancelled, tell the server so and wait for the thread to let go of the connection."""
        future = asyncio.get_running_loop().run_in_executor(self._pool, work)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            cancel()
            await asyncio.wait({future})
            raise


def _nothing() -> None:
    pass


def _execute(cursor: manager_dbapi.Cursor, sql: str) -> pa.RecordBatchReader:
    cursor.adbc_statement.set_options(**{"adbc.postgresql.batch_size_hint_bytes": str(BATCH_BYTES)})
    cursor.execute(sql)
    return cursor.fetch_record_batch()


def _next(batches: pa.RecordBatchReader, columns: Sequence[ArrowColumn], stream: str) -> pa.RecordBatch | None:
    try:
        batch = batches.read_next_batch()
    except StopIteration:
        return None
    return convert(batch, columns, stream)


def _abandon(cursor: manager_dbapi.Cursor, connection: manager_dbapi.Connection) -> None:
    with contextlib.suppress(adbc_driver_manager.Error):
        cursor.adbc_cancel()
    with contextlib.suppress(adbc_driver_manager.Error):
        cursor.close()
        connection.close()


def _failed(table: "PostgresTable", error: adbc_driver_manager.Error) -> Exception:
    from libs.connectors.postgres.source import gone  # noqa: PLC0415

    if error.sqlstate == "42P01":
        return gone(table.plan)
    return failure(error, f"reading {table.plan.stream} from the source")
