"""The same question asked of both ends: how many rows, and the sum of their hashes in each of 16 buckets.

A row's hash is the MD5 of its canonical text; the sessions on both sides have the same settings, so that equal values
give equal text. A sum does not depend on the order of the rows and, unlike an exclusive or, counts repeated ones.
"""

import asyncio
from typing import Any

import asyncpg

from libs.connectors.postgres.connection import quoted
from libs.connectors.postgres.source import PostgresTable

BUCKETS = 16


async def compare(
    table: PostgresTable, destination: "asyncpg.Connection[Any]", copied: tuple[str, str]
) -> dict[str, Any]:
    """``{"source": …, "destination": …}``, each ``{"rows", "buckets"}``; the source is read in the table's snapshot."""

    async def at_source() -> dict[str, Any]:
        try:
            async with table.snapshot.reader() as connection:
                return await _counted(connection, _question(table, quoted(*table.name)))
        except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
            raise table.failed(error) from error

    async with asyncio.TaskGroup() as tasks:
        source = tasks.create_task(at_source())
        copy = tasks.create_task(_counted(destination, _question(table, quoted(*copied))))
    return {"source": source.result(), "destination": copy.result()}


def _question(table: PostgresTable, relation: str) -> str:
    values = ", ".join(quoted(column.name) for column in table.columns)
    return f"""
        SELECT bucket, count(*) AS rows, sum(hash)::text AS hash FROM (
            SELECT get_byte(digest, 15) % {BUCKETS} AS bucket,
                   ('x' || encode(substr(digest, 1, 8), 'hex'))::bit(64)::bigint AS hash
            FROM (SELECT decode(md5(ROW({values})::text), 'hex') AS digest FROM {relation}) AS digests
        ) AS hashes GROUP BY bucket ORDER BY bucket
    """  # noqa: S608


async def _counted(connection: "asyncpg.Connection[Any]", question: str) -> dict[str, Any]:
    rows = await connection.fetch(question)
    buckets = {str(row["bucket"]): {"rows": row["rows"], "hash": row["hash"]} for row in rows}
    return {"rows": sum(row["rows"] for row in rows), "buckets": buckets}
