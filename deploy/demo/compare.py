"""Both ends read directly, without DataSync: the rows' number and a hash of their contents that no order changes."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import asyncpg
import pyarrow as pa
import pyarrow.parquet as pq

ROWS_PER_FETCH = 20_000


@dataclass(frozen=True)
class Fingerprint:
    """Comparable within one process: it is made of Python's hashes."""

    rows: int
    content: int

    def __add__(self, other: "Fingerprint") -> "Fingerprint":
        return Fingerprint(self.rows + other.rows, (self.content + other.content) & (1 << 64) - 1)


EMPTY = Fingerprint(0, 0)


async def of_table(dsn: str, schema: str, table: str, columns: Sequence[str] | None = None) -> Fingerprint:
    """A PostgreSQL table's; ``columns`` in that order, all of them as they stand when None."""
    connection = await asyncpg.connect(dsn)
    try:
        chosen = ", ".join(f'"{name}"' for name in columns) if columns else "*"
        total = EMPTY
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            cursor = await connection.cursor(f'SELECT {chosen} FROM "{schema}"."{table}"')
            while rows := await cursor.fetch(ROWS_PER_FETCH):
                total += _of_rows(tuple(row) for row in rows)
        return total
    finally:
        await connection.close()


async def columns_of(dsn: str, schema: str, table: str) -> dict[str, str]:
    """A PostgreSQL table's columns and their types, in order."""
    connection = await asyncpg.connect(dsn)
    try:
        rows = await connection.fetch(
            "SELECT column_name, data_type FROM information_schema.columns"
            " WHERE table_schema = $1 AND table_name = $2 ORDER BY ordinal_position",
            schema,
            table,
        )
        return {row["column_name"]: row["data_type"] for row in rows}
    finally:
        await connection.close()


def of_parquet(lake: Path, table: str, columns: dict[str, str]) -> Fingerprint:
    """That of the Parquet files which together hold a table of these columns and PostgreSQL types."""
    total = EMPTY
    for path in sorted(lake.rglob(f"{table}/*.parquet")):
        for batch in pq.ParquetFile(path).iter_batches(ROWS_PER_FETCH, columns=list(columns)):
            values = [_values(batch.column(name), postgres_type) for name, postgres_type in columns.items()]
            total += _of_rows(zip(*values, strict=True))
    return total


def _values(column: "pa.Array[Any]", postgres_type: str) -> list[Any]:
    """A column's values as asyncpg would have given them."""
    values = column.to_pylist()
    if postgres_type == "numeric" and not pa.types.is_decimal(column.type):
        # A numeric without precision has no fixed-size decimal; its text is exact.
        return [None if value is None else Decimal(value) for value in values]
    return values


def _of_rows(rows: Iterable[tuple[Any, ...]]) -> Fingerprint:
    count = content = 0
    for row in rows:
        count += 1
        content += hash(row)
    return Fingerprint(count, content & (1 << 64) - 1)
