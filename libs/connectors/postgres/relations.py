"""What a stream is read from: its relation, the tables below its views, its partitions.

A snapshot does not protect against everything. ``pg_class`` is read as of the snapshot, but files and locks belong to
the present: after a TRUNCATE the snapshot finds an empty table. So relations are locked, and compared with the present.
"""

from typing import Any

import asyncpg

from libs.connectors.postgres.connection import quoted
from libs.connectors.postgres.table import Leaf
from libs.connectors.protocol import ConnectorRefused, ConnectorUnavailable, StreamPlan

PAGE_BYTES = 8192
LOCK_TIMEOUT_SECONDS = 30.0
# Earlier servers scan the whole table for each range of pages.
TID_RANGE_SCAN_VERSION = (14,)

# The beginning of a query on all relations that a stream reads: views are followed down to their tables, as of the
# snapshot. A materialized view is not followed, since its rows are stored. $1 is the OID of the stream's relation.
USED_RELATIONS = """
    WITH RECURSIVE used(oid, kind) AS (
        SELECT oid, relkind FROM pg_class WHERE oid = $1
        UNION
        SELECT c.oid, c.relkind FROM used CROSS JOIN LATERAL (
            SELECT d.refobjid AS oid FROM pg_rewrite r JOIN pg_depend d
                ON d.classid = 'pg_rewrite'::regclass AND d.objid = r.oid AND d.refclassid = 'pg_class'::regclass
            WHERE r.ev_class = used.oid AND used.kind = 'v'
            UNION ALL SELECT inhrelid FROM pg_inherits WHERE inhparent = used.oid
        ) AS next JOIN pg_class c ON c.oid = next.oid
    ),
"""
# Functions such as pg_relation_filenode and pg_partition_tree see the present, queries see the snapshot.
_CHANGED_SINCE_SNAPSHOT = f"""
    {USED_RELATIONS}
    partitions_then AS (
        SELECT inhrelid AS oid FROM pg_inherits JOIN used ON inhparent = used.oid WHERE used.kind = 'p'
    ),
    partitions_now AS (
        SELECT t.relid::oid AS oid FROM used CROSS JOIN LATERAL pg_partition_tree(used.oid) t
        WHERE used.kind = 'p' AND t.relid <> used.oid
    )
    SELECT min(c.oid::regclass::text) FROM pg_class c WHERE
        c.oid IN (SELECT oid FROM used WHERE kind = 'r')
            AND c.relfilenode <> 0 AND c.relfilenode IS DISTINCT FROM pg_relation_filenode(c.oid)
        OR (c.oid IN (SELECT oid FROM partitions_then)) <> (c.oid IN (SELECT oid FROM partitions_now))
"""  # noqa: S608


async def lock_relation(connection: "asyncpg.Connection[Any]", plan: StreamPlan) -> Any:
    """The stream's row of ``pg_class``; a table is locked so that it can be neither dropped nor truncated."""
    relation = await connection.fetchrow(
        """
        SELECT c.oid, c.relkind, c.relhassubclass, c.relpages, c.reltuples, a.amname, n.nspname, c.relname,
               has_table_privilege(c.oid, 'SELECT') AS readable
        FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace LEFT JOIN pg_am a ON a.oid = c.relam
        WHERE n.nspname = $1 AND c.relname = $2 AND c.relkind IN ('r', 'p', 'v', 'm', 'f')
        """,
        plan.stream.namespace,
        plan.stream.name,
    )
    # The snapshot's pg_class still lists a table that has just been dropped. The function sees the present.
    if relation is None or not await connection.fetchval("SELECT pg_table_is_visible($1) IS NOT NULL", relation["oid"]):
        raise ConnectorRefused(
            f"the source has no table {plan.stream}: it was dropped or renamed after its streams were discovered",
            code="table_missing",
        )
    await connection.execute(f"SET LOCAL lock_timeout = '{round(LOCK_TIMEOUT_SECONDS * 1000)}ms'")
    if relation["relkind"] in (b"r", b"p") and relation["readable"]:
        # As pg_dump does.
        await connection.execute(f"LOCK TABLE {quoted(relation['nspname'], relation['relname'])} IN ACCESS SHARE MODE")
    return relation


async def refuse_changed(connection: "asyncpg.Connection[Any]", plan: StreamPlan, oid: int) -> None:
    """Refuse what was truncated, rewritten, attached or detached after the snapshot and before the lock.

    The snapshot sees no rows in files that were created after it, and no partition that was detached since.
    """
    changed = await connection.fetchval(_CHANGED_SINCE_SNAPSHOT, oid)
    if changed is not None:
        raise ConnectorUnavailable(
            f"{plan.stream}: {changed} was truncated, rewritten, attached or detached while the run was starting, so "
            "the run's snapshot does not contain its rows",
            code="source_changed",
        )


async def leaves_of(connection: "asyncpg.Connection[Any]", relation: Any) -> tuple[Leaf, ...]:
    """The relations that hold the rows: the partitions, or the relation itself."""
    rows = [relation]
    if relation["relkind"] == b"p":
        found = await connection.fetch(
            """
            SELECT c.oid, c.relkind, false AS relhassubclass, c.relpages, c.reltuples, a.amname, n.nspname, c.relname,
                   true AS readable,
                   has_schema_privilege(n.oid, 'USAGE') AND has_table_privilege(c.oid, 'SELECT')
                   AND NOT row_security_active(c.oid) AND NOT row_security_active($1::oid) AS same_alone
            FROM pg_partition_tree($1::oid::regclass) t JOIN pg_class c ON c.oid = t.relid
            JOIN pg_namespace n ON n.oid = c.relnamespace LEFT JOIN pg_am a ON a.oid = c.relam WHERE t.isleaf
            """,
            relation["oid"],
        )
        # Privileges and policies are those of the relation that a query names, so that a partition may be readable
        # through its parent only.
        rows = found if all(row["same_alone"] for row in found) else rows
    return tuple([await _leaf(connection, row) for row in rows])


async def _leaf(connection: "asyncpg.Connection[Any]", row: Any) -> Leaf:
    by_page = (
        connection.get_server_version() >= TID_RANGE_SCAN_VERSION
        and row["relkind"] in (b"r", b"m")
        and not row["relhassubclass"]
        and row["amname"] == "heap"
        # Privileges on columns do not include ctid.
        and row["readable"]
    )
    size = await connection.fetchval("SELECT pg_relation_size($1::oid::regclass)", row["oid"]) if by_page else 0
    pages = (size or 0) // PAGE_BYTES
    estimated = _rows_estimated(row["reltuples"], row["relpages"], pages)
    return Leaf(row["oid"], quoted(row["nspname"], row["relname"]), by_page, pages, estimated)


def _rows_estimated(tuples: float, pages_then: int, pages_now: int) -> int | None:
    """As the planner does: the density at the last ANALYZE times the size now."""
    if tuples < 0:
        return None
    return round(tuples / pages_then * pages_now) if pages_then and pages_now else round(tuples)
