"""The table that has the target's name: whose it is, and whether it is swapped for a new one or kept.

A table that is exactly as DataSync created it is *swapped*: dropped, and the staging table takes its name. Any other is
*kept*: its rows are replaced. So views, indexes, grants and triggers that others added are never lost.
"""

from dataclasses import dataclass
from typing import Any

import asyncpg

from libs.connectors.postgres import description
from libs.connectors.postgres.connection import quoted
from libs.connectors.postgres.state import Published, State
from libs.connectors.protocol import ConnectorRefused, RunContext, Target

IDENTIFIER_BYTES_MAX = 63


@dataclass(frozen=True, slots=True)
class TargetTable:
    """What was found under the target's name.

    Args:
        oid: None if there is no such table.
        partitioned: it is a partitioned table.
        published: what the last run recorded; None if no run wrote it.
        kept_because: why the table is kept; None if it is swapped.
    """

    oid: int | None = None
    partitioned: bool = False
    published: Published | None = None
    kept_because: str | None = None

    @property
    def kept(self) -> bool:
        return self.kept_because is not None

    @property
    def was_swapped(self) -> bool:
        """Whether earlier runs swapped it, which took much less time."""
        return self.published is not None and self.published.description != {}


async def look_up(
    connection: "asyncpg.Connection[Any]", state: State, context: RunContext, target: Target
) -> TargetTable:
    """Raises ``TargetShared`` for another job's table and ``ConnectorRefused`` for anything but a table."""
    # A table appears with its marker, in one commit: read second, the marker of a table that was found is found too.
    found = await relation_at(connection, target)
    published = await state.published(connection, context, target)
    if found is None:
        return TargetTable()
    if found["relkind"] not in (b"r", b"p"):
        raise ConnectorRefused(f"the destination has {target}, which is not a table: choose another destination table")
    because = await _why_kept(connection, found["oid"], published)
    return TargetTable(found["oid"], found["relkind"] == b"p", published, because)


async def relation_at(connection: "asyncpg.Connection[Any]", target: Target) -> Any:
    """``oid`` and ``relkind`` of the relation with the target's name, None if there is none."""
    return await connection.fetchrow(
        """
        SELECT c.oid, c.relkind FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE n.nspname = $1 AND c.relname = $2
        """,
        target.namespace,
        target.table,
    )


async def _why_kept(connection: "asyncpg.Connection[Any]", oid: int, published: Published | None) -> str | None:
    if published is None or published.description == {}:
        return "DataSync did not create it"
    if published.description is None:
        return "an earlier version of DataSync wrote it without recording how it created it"
    changed = await description.changes(connection, oid, published.description)
    if changed is not None:
        return f"it was changed after DataSync created it ({changed})"
    if not await connection.fetchval(
        "SELECT relowner = (SELECT oid FROM pg_roles WHERE rolname = current_user) FROM pg_class WHERE oid = $1", oid
    ):
        return "another role owns it"
    if await connection.fetchval(
        "SELECT EXISTS (SELECT FROM pg_class c, aclexplode(c.relacl) a WHERE c.oid = $1 AND a.grantor <> c.relowner)",
        oid,
    ):
        return "a role other than its owner granted privileges on it"
    return None


def refuse_names(target: Target) -> None:
    """Refuse names that PostgreSQL would truncate and names that DataSync uses itself."""
    for name in (target.namespace, target.table):
        if not name or len(name.encode()) > IDENTIFIER_BYTES_MAX:
            raise ConnectorRefused(f"{name!r} is not a valid PostgreSQL name (1 to {IDENTIFIER_BYTES_MAX} bytes)")
    if target.table.startswith("_datasync_"):
        raise ConnectorRefused(f"{target}: names that begin with _datasync_ are reserved for DataSync")


async def refuse_foreign_rows(
    connection: "asyncpg.Connection[Any]", state: State, context: RunContext, target: Target, found: TargetTable
) -> None:
    """Refuse a table that no run wrote, unless it is empty; raises ``TargetShared`` if another job has just written it.

    Args:
        found: what a look-up found a moment ago.
    """
    if found.published is not None:
        return
    name = quoted(target.namespace, target.table)
    has_rows = await connection.fetchval(f"SELECT EXISTS (SELECT FROM {name})")  # noqa: S608
    # A run may have written the rows since the look-up; its marker was committed with them.
    if has_rows and await state.published(connection, context, target) is None:
        raise ConnectorRefused(
            f"the destination has a table {target} with rows that DataSync did not write: "
            "empty it, drop it or choose another destination table",
            code="table_not_ours",
        )


async def refuse_unwritable_schema(connection: "asyncpg.Connection[Any]", target: Target) -> None:
    allowed = await connection.fetchval(
        """
        SELECT coalesce((SELECT has_schema_privilege(oid, 'CREATE') FROM pg_namespace WHERE nspname = $1),
                        has_database_privilege(current_database(), 'CREATE'))
        """,
        target.namespace,
    )
    if not allowed:
        raise ConnectorRefused(
            f"the role may not create tables in the destination's schema {target.namespace!r}: grant it CREATE on the "
            "schema, or on the database if the schema does not exist",
            code="permission_denied",
        )


async def refuse_taken_type_name(connection: "asyncpg.Connection[Any]", target: Target) -> None:
    """Refuse the name of a type: a table's row type takes the table's name.

    The row type of another table is not refused: the table was created a moment ago, and publishing decides about it.
    """
    taken = await connection.fetchval(
        """
        SELECT EXISTS (SELECT FROM pg_type t JOIN pg_namespace n ON n.oid = t.typnamespace
                       LEFT JOIN pg_class c ON c.oid = t.typrelid AND c.relkind <> 'c'
                       WHERE n.nspname = $1 AND t.typname = $2 AND t.typcategory <> 'A' AND c.oid IS NULL)
        """,
        target.namespace,
        target.table,
    )
    if taken:
        raise ConnectorRefused(
            f"the destination has a type {target}, so no table can have this name: choose another destination table"
        )


async def privileges(connection: "asyncpg.Connection[Any]", oid: int) -> set[tuple[str, str, bool]]:
    """The table's grants: role as SQL writes it, privilege, and whether it has the grant option."""
    rows = await connection.fetch(
        """
        SELECT CASE WHEN a.grantee = 0 THEN 'PUBLIC' ELSE quote_ident(r.rolname) END AS role, a.privilege_type,
               a.is_grantable
        FROM pg_class c CROSS JOIN LATERAL aclexplode(coalesce(c.relacl, acldefault('r', c.relowner))) a
        LEFT JOIN pg_roles r ON r.oid = a.grantee WHERE c.oid = $1
        """,
        oid,
    )
    return {(row["role"], row["privilege_type"], row["is_grantable"]) for row in rows}


async def set_privileges(
    connection: "asyncpg.Connection[Any]", target: Target, wanted: set[tuple[str, str, bool]]
) -> None:
    """Grant exactly these privileges on a new table, whatever the default privileges are."""
    present = await privileges(connection, (await relation_at(connection, target))["oid"])
    if present == wanted:
        return
    name = quoted(target.namespace, target.table)
    for role in sorted({role for role, _, _ in present}):
        await connection.execute(f"REVOKE ALL ON {name} FROM {role}")
    for role, privilege, grantable in sorted(wanted):
        suffix = " WITH GRANT OPTION" if grantable else ""
        await connection.execute(f"GRANT {privilege} ON {name} TO {role}{suffix}")
