"""What there is to read in a PostgreSQL: the catalog entries of its tables and views."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import asyncpg

from libs.connectors.postgres.incremental import is_cursor
from libs.connectors.postgres.types import Column, columns_of
from libs.connectors.protocol import CatalogEntry
from libs.contracts.capabilities import FULL_REFRESH, INCREMENTAL

# A database may be a destination too: what DataSync itself keeps there is left out, told by its columns, and so are the
# tables that it fills before they take a target's place, told by their names and their storage parameter.
_RELATIONS = r"""
WITH own_schemas AS (
    SELECT relnamespace FROM pg_class c
    WHERE relname = '_datasync_state' AND relkind = 'r' AND (
        SELECT array_agg(attname::text ORDER BY attnum) FROM pg_attribute
        WHERE attrelid = c.oid AND attnum > 0 AND NOT attisdropped
    ) @> '{job_id,epoch,run_id,taken_at}'
)
SELECT c.oid, n.nspname AS namespace, c.relname AS name, c.relkind IN ('r', 'p') AS is_table
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f') AND NOT c.relispartition AND c.relpersistence <> 't'
  AND n.nspname <> 'information_schema' AND n.nspname NOT LIKE 'pg\_%'
  AND NOT (c.relname IN ('_datasync_state', '_datasync_streams') AND n.oid IN (SELECT relnamespace FROM own_schemas))
  AND NOT (c.relname ~ '^_datasync_stage_[0-9]+_[0-9]+_[0-9a-f]{12}$'
           AND coalesce(c.reloptions @> '{autovacuum_enabled=false}', false))
  AND ($1::text[] = '{}' OR n.nspname = ANY($1::text[]))
  AND has_schema_privilege(n.oid, 'USAGE')
  AND (has_table_privilege(c.oid, 'SELECT') OR has_any_column_privilege(c.oid, 'SELECT'))
ORDER BY n.nspname, c.relname
"""


async def discover(connection: "asyncpg.Connection[Any]", schemas: Sequence[str]) -> list[CatalogEntry]:
    """The entries of every table, partitioned table, view and foreign table that the role may read."""
    relations = await connection.fetch(_RELATIONS, list(schemas))
    oids = [row["oid"] for row in relations]
    columns = await columns_of(connection, oids)
    keys = await primary_keys(connection, oids)
    return [{"stream": _entry(row, columns[row["oid"]], keys[row["oid"]])} for row in relations]


async def primary_keys(connection: "asyncpg.Connection[Any]", oids: Sequence[int]) -> dict[int, list[str]]:
    """The columns of each relation's primary key in the key's order; empty where there is none."""
    rows = await connection.fetch(
        """
        SELECT i.indrelid, a.attname FROM pg_index i
        CROSS JOIN LATERAL unnest(i.indkey::int2[]) WITH ORDINALITY AS k(attnum, place)
        JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum
        WHERE i.indisprimary AND i.indrelid = ANY($1::oid[]) AND k.place <= i.indnkeyatts ORDER BY i.indrelid, k.place
        """,
        list(oids),
    )
    keys: dict[int, list[str]] = defaultdict(list)
    for row in rows:
        keys[row["indrelid"]].append(row["attname"])
    return keys


def _entry(relation: Any, columns: Sequence[Column], primary_key: list[str]) -> dict[str, Any]:
    cursors = [column.name for column in columns if is_cursor(column)]
    incremental = [INCREMENTAL] if cursors or relation["is_table"] else []
    return {
        "name": relation["name"],
        "namespace": relation["namespace"],
        "type_schema": {
            "properties": {
                column.name: {
                    "type": [column.json_type, *(["null"] if column.nullable else [])],
                    "destination_column_name": column.name,
                    "native_type": column.declared,
                }
                for column in columns
            }
        },
        "supported_sync_modes": [FULL_REFRESH, *incremental],
        "source_defined_primary_key": primary_key,
        "available_cursor_fields": cursors,
        "sync_mode": FULL_REFRESH,
        "cursor_field": "",
        "destination_database": relation["namespace"],
        "destination_table": relation["name"],
        "default_stream_properties": {"normalization": True, "append_mode": False},
    }
