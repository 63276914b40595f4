"""Tables that are kept because others made or changed them: checks whether their rows can be replaced, and does it."""

from typing import Any

import asyncpg

from libs.connectors.postgres.connection import quoted
from libs.connectors.postgres.ownership import Placement
from libs.connectors.postgres.source import PostgresTable
from libs.connectors.postgres.staging import Relation, ddl
from libs.connectors.postgres.types import Column
from libs.connectors.protocol import ConnectorRefused, Target


async def refuse_unfit(
    connection: "asyncpg.Connection[Any]", table: PostgresTable, target: Target, place: Placement
) -> None:
    """Refuse, naming the object, a table whose rows can't be replaced by the stream's, or not without a loss."""
    await _refuse_unreachable_rows(connection, target, place)
    await _refuse_rules(connection, target, place)
    await _refuse_references(connection, target, place)
    await _refuse_publications(connection, target, place)
    await _refuse_columns(connection, table, target, place)


async def replace_rows(
    connection: "asyncpg.Connection[Any]", table: PostgresTable, target: Target, staging: Relation, rows: int
) -> None:
    """Within a transaction that excludes other writers; readers see the old rows until it commits."""
    name = quoted(target.namespace, target.table)
    columns = ", ".join(quoted(column.name) for column in table.columns)
    # PostgreSQL then refuses the statement if a policy would hide rows.
    await connection.execute("SET LOCAL row_security = off")
    await connection.execute("SET CONSTRAINTS ALL DEFERRED")
    await connection.execute(f"DELETE FROM {name}")  # noqa: S608
    await connection.execute(
        f"INSERT INTO {name} ({columns}) OVERRIDING SYSTEM VALUE SELECT {columns} FROM {quoted(*staging)}"  # noqa: S608
    )
    await connection.execute("SET CONSTRAINTS ALL IMMEDIATE")
    found = await connection.fetchval(f"SELECT count(*) FROM {name}")  # noqa: S608
    if found != rows:
        culprits = await changes_rows(connection, target) or "its partitions may have triggers"
        raise ConnectorRefused(
            f"the destination's table {target} holds {found} rows after {rows} were inserted: {culprits}; "
            "it stays as it was",
            code="target_changes_rows",
        )


async def changes_rows(connection: "asyncpg.Connection[Any]", target: Target) -> str | None:
    """The rules and triggers that may change what is written, in words."""
    names = await connection.fetch(
        """
        SELECT 'rule ' || quote_ident(rulename) AS name FROM pg_rewrite
        WHERE ev_class = to_regclass($1) AND ev_type IN ('3', '4')
        UNION ALL
        SELECT 'trigger ' || quote_ident(tgname) FROM pg_trigger
        WHERE tgrelid = to_regclass($1) AND NOT tgisinternal AND tgenabled <> 'D' ORDER BY name
        """,
        quoted(target.namespace, target.table),
    )
    return f"see its {', '.join(row['name'] for row in names)}" if names else None


async def _refuse_unreachable_rows(connection: "asyncpg.Connection[Any]", target: Target, place: Placement) -> None:
    found = await connection.fetchrow(
        """
        SELECT (SELECT string_agg(privilege, ', ') FROM unnest(ARRAY['SELECT', 'INSERT', 'DELETE']) AS privilege
                WHERE NOT has_table_privilege(c.oid, privilege)) AS lacks,
               row_security_active(c.oid) AS filtered,
               (SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = c.oid LIMIT 1) AS child
        FROM pg_class c WHERE c.oid = $1
        """,
        place.oid,
    )
    if found is None:
        return
    if found["lacks"]:
        raise ConnectorRefused(
            f"the role may not replace the rows of the destination's table {target}: it lacks {found['lacks']}",
            code="permission_denied",
        )
    if found["filtered"]:
        raise ConnectorRefused(
            f"the destination's table {target} has row security, which hides rows from the role: "
            "use its owner or a role with BYPASSRLS",
            code="row_security",
        )
    if found["child"] and place.kind != b"p":
        raise ConnectorRefused(
            f"the destination's table {target} is inherited by {found['child']}, whose rows would be replaced, too",
            code="target_inherited",
        )


async def _refuse_rules(connection: "asyncpg.Connection[Any]", target: Target, place: Placement) -> None:
    rule = await connection.fetchval(
        "SELECT rulename FROM pg_rewrite WHERE ev_class = $1 AND is_instead AND ev_type IN ('3', '4') LIMIT 1",
        place.oid,
    )
    if rule is not None:
        raise ConnectorRefused(
            f"the destination's table {target} has the rule {rule!r}, which does something INSTEAD of writing the rows",
            code="target_changes_rows",
        )


async def _refuse_references(connection: "asyncpg.Connection[Any]", target: Target, place: Placement) -> None:
    """A referenced row can be replaced only if the constraint is checked after the new row is there."""
    key = await connection.fetchrow(
        """
        SELECT conname, conrelid::regclass::text AS referring FROM pg_constraint
        WHERE contype = 'f' AND confrelid = $1 AND conrelid <> $1 AND NOT (condeferrable AND confdeltype = 'a')
        ORDER BY conname LIMIT 1
        """,
        place.oid,
    )
    if key is not None:
        raise ConnectorRefused(
            f"the foreign key {key['conname']!r} of {key['referring']} refers to the destination's table {target}, "
            "whose rows can't be replaced under it: make it DEFERRABLE with ON DELETE NO ACTION, drop it, or choose "
            "another destination table",
            code="target_referenced",
        )


async def _refuse_publications(connection: "asyncpg.Connection[Any]", target: Target, place: Placement) -> None:
    """PostgreSQL refuses to delete a published row that has no replica identity."""
    row = await connection.fetchrow(
        """
        SELECT p.pubname, c.oid::regclass::text AS relation
        FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        JOIN pg_publication_tables t ON (t.schemaname, t.tablename) = (n.nspname, c.relname)
        JOIN pg_publication p ON p.pubname = t.pubname AND p.pubdelete
        WHERE (c.oid = $1 OR c.oid IN (SELECT relid FROM pg_partition_tree($1::oid::regclass)))
          AND c.relkind = 'r' AND c.relreplident <> 'f'
          AND NOT EXISTS (SELECT FROM pg_index WHERE indrelid = c.oid
                          AND CASE c.relreplident WHEN 'd' THEN indisprimary WHEN 'i' THEN indisreplident END)
        LIMIT 1
        """,
        place.oid,
    )
    if row is not None:
        raise ConnectorRefused(
            f"the rows of the destination's table {target} can't be replaced: the publication {row['pubname']!r} "
            f"publishes what is deleted from {row['relation']}, which has no replica identity: set one or leave it out",
            code="target_published",
        )


async def _refuse_columns(
    connection: "asyncpg.Connection[Any]", table: PostgresTable, target: Target, place: Placement
) -> None:
    rows = await connection.fetch(
        """
        SELECT a.attname, a.atttypid, format_type(a.atttypid, a.atttypmod) AS type, a.attgenerated <> '' AS generated,
               a.attnotnull OR t.typnotnull AS required,
               a.atthasdef OR a.attidentity <> '' OR t.typdefault IS NOT NULL AS filled,
               -- A default that gives every row the same value.
               CASE WHEN d.adbin::text !~ '{(NEXTVALUEEXPR|SQLVALUEFUNCTION)' AND NOT EXISTS (
                   SELECT FROM regexp_matches(d.adbin::text, ':(?:op)?funcid ([0-9]+)', 'g') AS number
                   JOIN pg_proc p ON p.oid = number[1]::oid WHERE p.provolatile <> 'i'
               ) THEN pg_get_expr(d.adbin, d.adrelid) END AS fixed_default
        FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
        LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
        WHERE a.attrelid = $1 AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum
        """,
        place.oid,
    )
    present = {row["attname"]: row for row in rows}
    for column in table.columns:
        await _refuse_column(connection, target, place, column, present)
    written = {column.name for column in table.columns}
    for row in rows:
        if row["attname"] not in written:
            await _refuse_further_column(connection, target, place, row)


async def _refuse_column(
    connection: "asyncpg.Connection[Any]",
    target: Target,
    place: Placement,
    column: Column,
    present: dict[str, Any],
) -> None:
    name, wanted = column.name, ddl(column.type, target.namespace)
    kept = f"and is kept, because {place.kept_because}"
    held = present.get(name)
    if held is None:
        raise ConnectorRefused(
            f"the destination's table {target} lacks the column {name!r} {kept}: add the column", code="target_differs"
        )
    if held["generated"]:
        raise ConnectorRefused(
            f"the destination's table {target} generates the column {name!r} {kept}: leave the column out of the "
            "stream, or drop its expression",
            code="target_differs",
        )
    if (column.type.element or column.type).built_in:
        same = held["type"] == wanted
    else:
        same = held["atttypid"] == await connection.fetchval("SELECT to_regtype($1)::oid", wanted)
    if not same:
        raise ConnectorRefused(
            f"the destination's table {target} has the column {name!r} as {held['type']}, the stream as {wanted}, "
            f"{kept}",
            code="target_differs",
        )


async def _refuse_further_column(
    connection: "asyncpg.Connection[Any]", target: Target, place: Placement, column: Any
) -> None:
    """A column that the stream lacks gets its default in every row."""
    if column["generated"] or (column["filled"] and column["fixed_default"] is None):
        return
    name, default = column["attname"], column["fixed_default"]
    if column["required"] and default is None:
        raise ConnectorRefused(
            f"the destination's table {target} has the column {name!r}, which is NOT NULL without a default and which "
            "the stream lacks: give it a default",
            code="target_differs",
        )
    if place.published is not None and (place.published.description is None or name in place.published.columns):
        return
    fills = await connection.fetchval(
        # Bits of tgtype (pg_trigger.h): for each row, BEFORE, INSERT.
        "SELECT EXISTS (SELECT FROM pg_trigger WHERE tgrelid = $1 AND tgtype & 7 = 7 AND tgenabled <> 'D')",
        place.oid,
    )
    lost = not fills and await connection.fetchval(
        f"SELECT EXISTS (SELECT FROM {quoted(target.namespace, target.table)} "  # noqa: S608
        f"WHERE {quoted(name)}::text IS DISTINCT FROM ({default or 'NULL'})::{column['type']}::text)"
    )
    if lost:
        raise ConnectorRefused(
            f"the destination's table {target} has values in the column {name!r}, which DataSync did not write and "
            "which would be lost with the rows: keep them in a table of their own",
            code="target_differs",
        )
