"""Replaces the rows of a table that is kept, and refuses a table where that can't work or would lose something."""

from collections.abc import Sequence
from typing import Any

import asyncpg

from libs.connectors.postgres.connection import quoted
from libs.connectors.postgres.enums import ddl
from libs.connectors.postgres.staging import Relation
from libs.connectors.postgres.target import TargetTable
from libs.connectors.postgres.types import Column
from libs.connectors.protocol import ConnectorRefused, Target


async def refuse_unfit(
    connection: "asyncpg.Connection[Any]",
    columns: Sequence[Column],
    target: Target,
    found: TargetTable,
    changing: frozenset[str] = frozenset(),
) -> None:
    """Refuse a table whose rows can't be replaced by the stream's, or only with a loss; the error names the object.

    Args:
        changing: columns that are about to be added or changed.
    """
    await _refuse_unreachable_rows(connection, target, found, ("SELECT", "INSERT", "DELETE"))
    await _refuse_rules(connection, target, found)
    await _refuse_references(connection, target, found)
    await _refuse_publications(connection, target, found)
    await _refuse_columns(connection, columns, target, found, changing, replaced=True)


async def refuse_unfit_to_add(
    connection: "asyncpg.Connection[Any]",
    columns: Sequence[Column],
    target: Target,
    found: TargetTable,
    changing: frozenset[str],
) -> None:
    """Refuse a table that can't take further rows of the stream; arguments as for ``refuse_unfit``."""
    await _refuse_unreachable_rows(connection, target, found, ("SELECT", "INSERT", "UPDATE", "DELETE"))
    await _refuse_rules(connection, target, found)
    await _refuse_columns(connection, columns, target, found, changing, replaced=False)


async def replace_rows(
    connection: "asyncpg.Connection[Any]", columns: Sequence[Column], target: Target, staging: Relation, rows: int
) -> None:
    """Within a transaction that excludes other writers; readers see the old rows until it commits."""
    name = quoted(target.namespace, target.table)
    names = ", ".join(quoted(column.name) for column in columns)
    # With this setting PostgreSQL rejects the statements if a policy would hide rows.
    await connection.execute("SET LOCAL row_security = off")
    await connection.execute("SET CONSTRAINTS ALL DEFERRED")
    await connection.execute(f"DELETE FROM {name}")  # noqa: S608
    await connection.execute(
        f"INSERT INTO {name} ({names}) OVERRIDING SYSTEM VALUE SELECT {names} FROM {quoted(*staging)}"  # noqa: S608
    )
    await connection.execute("SET CONSTRAINTS ALL IMMEDIATE")
    found = await connection.fetchval(f"SELECT count(*) FROM {name}")  # noqa: S608
    if found != rows:
        culprits = await changes_rows(connection, target) or "triggers of its partitions"
        raise ConnectorRefused(
            f"the destination's table {target} has {found} rows after {rows} were inserted, and is left as it was: "
            f"{culprits} may change rows as they are written",
            code="target_changes_rows",
        )


async def changes_rows(connection: "asyncpg.Connection[Any]", target: Target) -> str | None:
    """The rules and triggers that may change rows as they are written; None if there are none."""
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
    return f"its {', '.join(row['name'] for row in names)}" if names else None


async def _refuse_unreachable_rows(
    connection: "asyncpg.Connection[Any]", target: Target, found: TargetTable, needed: Sequence[str]
) -> None:
    row = await connection.fetchrow(
        """
        SELECT (SELECT string_agg(privilege, ', ') FROM unnest($2::text[]) AS privilege
                WHERE NOT has_table_privilege(c.oid, privilege)) AS lacks,
               row_security_active(c.oid) AS filtered,
               (SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = c.oid LIMIT 1) AS child
        FROM pg_class c WHERE c.oid = $1
        """,
        found.oid,
        list(needed),
    )
    if row is None:
        return
    if row["lacks"]:
        raise ConnectorRefused(
            f"the role may not write the rows of the destination's table {target}: it lacks {row['lacks']}; grant it "
            f"{', '.join(needed[:-1])} and {needed[-1]} on the table",
            code="permission_denied",
        )
    if row["filtered"]:
        raise ConnectorRefused(
            f"the destination's table {target} has row-level security, which hides rows from the role: use the table's "
            "owner or a role with BYPASSRLS",
            code="row_security",
        )
    if row["child"] and not found.partitioned:
        raise ConnectorRefused(
            f"the destination's table {target} is inherited by {row['child']}, whose rows would be deleted as well: "
            "choose another destination table",
            code="target_inherited",
        )


async def _refuse_rules(connection: "asyncpg.Connection[Any]", target: Target, found: TargetTable) -> None:
    rule = await connection.fetchval(
        "SELECT rulename FROM pg_rewrite WHERE ev_class = $1 AND is_instead AND ev_type IN ('3', '4') LIMIT 1",
        found.oid,
    )
    if rule is not None:
        raise ConnectorRefused(
            f"the destination's table {target} has the rule {rule!r}, which does something INSTEAD of writing the "
            "rows: drop the rule or choose another destination table",
            code="target_changes_rows",
        )


async def _refuse_references(connection: "asyncpg.Connection[Any]", target: Target, found: TargetTable) -> None:
    """A referenced row can be replaced only if the constraint is checked after the new row was inserted."""
    key = await connection.fetchrow(
        """
        SELECT conname, conrelid::regclass::text AS referring FROM pg_constraint
        WHERE contype = 'f' AND confrelid = $1 AND conrelid <> $1 AND NOT (condeferrable AND confdeltype = 'a')
        ORDER BY conname LIMIT 1
        """,
        found.oid,
    )
    if key is not None:
        raise ConnectorRefused(
            f"the foreign key {key['conname']!r} of {key['referring']} refers to the destination's table {target}, "
            "whose rows can't be replaced while it is checked: make it DEFERRABLE with ON DELETE NO ACTION, drop it, "
            "or choose another destination table",
            code="target_referenced",
        )


async def _refuse_publications(connection: "asyncpg.Connection[Any]", target: Target, found: TargetTable) -> None:
    """PostgreSQL rejects the DELETE of a published row that has no replica identity."""
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
        found.oid,
    )
    if row is not None:
        raise ConnectorRefused(
            f"the rows of the destination's table {target} can't be replaced: the publication {row['pubname']!r} "
            f"publishes deletes of {row['relation']}, which has no replica identity: set one, or drop the table from "
            "the publication",
            code="target_published",
        )


async def _refuse_columns(
    connection: "asyncpg.Connection[Any]",
    columns: Sequence[Column],
    target: Target,
    found: TargetTable,
    changing: frozenset[str],
    *,
    replaced: bool,
) -> None:
    rows = await connection.fetch(
        """
        SELECT a.attname, a.atttypid, format_type(a.atttypid, a.atttypmod) AS type, a.attgenerated <> '' AS generated,
               a.attnotnull OR t.typnotnull AS required,
               a.atthasdef OR a.attidentity <> '' OR t.typdefault IS NOT NULL AS filled,
               -- The default, if it is the same for every row.
               CASE WHEN d.adbin::text !~ '{(NEXTVALUEEXPR|SQLVALUEFUNCTION)' AND NOT EXISTS (
                   SELECT FROM regexp_matches(d.adbin::text, ':(?:op)?funcid ([0-9]+)', 'g') AS number
                   JOIN pg_proc p ON p.oid = number[1]::oid WHERE p.provolatile <> 'i'
               ) THEN pg_get_expr(d.adbin, d.adrelid) END AS fixed_default
        FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
        LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
        WHERE a.attrelid = $1 AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum
        """,
        found.oid,
    )
    present = {row["attname"]: row for row in rows}
    for column in columns:
        if column.name not in changing:
            await _refuse_column(connection, target, found, column, present)
    written = {column.name for column in columns}
    dropped = set(found.published.columns) - written if found.published else set()
    for row in rows:
        # A column that the source dropped becomes nullable.
        if row["attname"] not in written | dropped:
            await _refuse_further_column(connection, target, found, row, replaced=replaced)


async def _refuse_column(
    connection: "asyncpg.Connection[Any]",
    target: Target,
    found: TargetTable,
    column: Column,
    present: dict[str, Any],
) -> None:
    name, wanted = column.name, ddl(column.type, target.namespace)
    kept = f"and is kept because {found.kept_because}" if found.kept else "and it is not replaced"
    held = present.get(name)
    if held is None:
        raise ConnectorRefused(
            f"the destination's table {target} has no column {name!r} {kept}: add the column", code="target_differs"
        )
    if held["generated"]:
        raise ConnectorRefused(
            f"the destination's table {target} has the generated column {name!r} {kept}: leave the column out of the "
            "stream, or drop its expression",
            code="target_differs",
        )
    if (column.type.element or column.type).built_in:
        same = held["type"] == wanted
    else:
        same = held["atttypid"] == await connection.fetchval("SELECT to_regtype($1)::oid", wanted)
    if not same:
        raise ConnectorRefused(
            f"the destination's table {target} has the column {name!r} of type {held['type']} {kept}, while the "
            f"stream's is of type {wanted}: change the column's type or choose another destination table",
            code="target_differs",
        )


async def _refuse_further_column(
    connection: "asyncpg.Connection[Any]", target: Target, found: TargetTable, column: Any, *, replaced: bool
) -> None:
    """A column that the stream does not have gets its default in every new row."""
    if column["generated"] or (column["filled"] and column["fixed_default"] is None):
        return
    name, default = column["attname"], column["fixed_default"]
    if column["required"] and default is None:
        raise ConnectorRefused(
            f"the destination's table {target} has the column {name!r}, which is NOT NULL without a default and not a "
            "column of the stream: give it a default",
            code="target_differs",
        )
    if not replaced:
        return
    if found.published is not None and (found.published.description is None or name in found.published.columns):
        return
    fills = await connection.fetchval(
        # The bits of tgtype (pg_trigger.h) for ROW, BEFORE and INSERT.
        "SELECT EXISTS (SELECT FROM pg_trigger WHERE tgrelid = $1 AND tgtype & 7 = 7 AND tgenabled <> 'D')",
        found.oid,
    )
    lost = not fills and await connection.fetchval(
        f"SELECT EXISTS (SELECT FROM {quoted(target.namespace, target.table)} "  # noqa: S608
        f"WHERE {quoted(name)}::text IS DISTINCT FROM ({default or 'NULL'})::{column['type']}::text)"
    )
    if lost:
        raise ConnectorRefused(
            f"the destination's table {target} has values in the column {name!r}, which DataSync did not write and "
            "which would be lost with the rows: keep them in another table",
            code="target_differs",
        )
