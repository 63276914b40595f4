"""Whether a destination table is still exactly as DataSync published it; only such a table is exchanged.

What the catalogue says of a table is recorded when it is published and compared later. Everything counts but what is
known to change by itself (statistics, files, freezing): a property that nobody thought of keeps the table as well.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import asyncpg

from libs.connectors.postgres.connection import quoted
from libs.connectors.postgres.state import Published
from libs.connectors.protocol import Target

# What VACUUM, ANALYZE and CLUSTER change, and the privileges, which an exchange preserves.
_CHANGES_BY_ITSELF = [
    *("relpages", "reltuples", "relallvisible", "relallfrozen", "relfrozenxid", "relminmxid", "relfilenode"),
    *("reltoastrelid", "relhasindex", "relhasrules", "relhastriggers", "relhassubclass", "relacl"),
]
_DESCRIPTION = """
WITH target AS (
    SELECT c.*, t.typarray FROM (SELECT oid, reltype, reltoastrelid FROM pg_class WHERE oid = $1) c
    LEFT JOIN pg_type t ON t.oid = c.reltype
), part AS (
    SELECT 'pg_class'::regclass::oid AS class, oid FROM target
    UNION ALL SELECT 'pg_type'::regclass, reltype FROM target
    UNION ALL SELECT 'pg_type'::regclass, typarray FROM target
    UNION ALL SELECT 'pg_class'::regclass, indexrelid FROM pg_index JOIN target ON indrelid = target.oid
    UNION ALL SELECT 'pg_constraint'::regclass, o.oid FROM pg_constraint o JOIN target ON conrelid = target.oid
)
SELECT 'its own properties' AS what, to_jsonb(c) - $2::text[] AS properties FROM pg_class c WHERE c.oid = $1
UNION ALL SELECT 'its own properties', to_jsonb(t) FROM pg_type t JOIN target ON t.oid = target.reltype
UNION ALL SELECT 'its own properties', jsonb_build_object('toast', c.reloptions)
    FROM pg_class c JOIN target ON c.oid = target.reltoastrelid
UNION ALL SELECT 'its columns', to_jsonb(a) - 'attmissingval' FROM pg_attribute a WHERE attrelid = $1 AND attnum > 0
UNION ALL SELECT 'its keys and constraints', to_jsonb(i) FROM pg_index i WHERE indrelid = $1
UNION ALL SELECT 'its keys and constraints', to_jsonb(c) - $2::text[]
    FROM pg_class c JOIN pg_index ON indexrelid = c.oid WHERE indrelid = $1
UNION ALL SELECT 'its keys and constraints', to_jsonb(o) FROM pg_constraint o WHERE $1 IN (conrelid, confrelid)
UNION ALL SELECT 'what depends on it', to_jsonb(d) FROM pg_depend d
    JOIN part ON (d.refclassid, d.refobjid) = (part.class, part.oid)
    WHERE NOT (d.classid = 'pg_class'::regclass AND d.objid = (SELECT reltoastrelid FROM target))
UNION ALL SELECT 'what it depends on', to_jsonb(d) FROM pg_depend d
    JOIN part ON (d.classid, d.objid) = (part.class, part.oid)
UNION ALL SELECT 'what it depends on', to_jsonb(h) FROM pg_inherits h WHERE $1 IN (inhrelid, inhparent)
UNION ALL SELECT 'what depends on it', jsonb_build_object('subscription', srsubid)
    FROM pg_subscription_rel WHERE srrelid = $1
UNION ALL SELECT 'its comments and labels', to_jsonb(d) FROM pg_description d
    JOIN part ON (d.classoid, d.objoid) = (part.class, part.oid)
UNION ALL SELECT 'its comments and labels', to_jsonb(l) FROM pg_seclabel l
    JOIN part ON (l.classoid, l.objoid) = (part.class, part.oid)
"""

# What a person has to look at where a table is kept: neither what DataSync makes nor what belongs to another of these.
_NAMED = """
WITH target AS (SELECT * FROM pg_class WHERE oid = $1),
part AS (
    SELECT 'pg_class'::regclass::oid AS class, oid FROM target
    UNION ALL SELECT 'pg_type'::regclass, reltype FROM target
    UNION ALL SELECT 'pg_constraint'::regclass, o.oid FROM pg_constraint o JOIN target ON conrelid = target.oid
), dependent AS (
    SELECT DISTINCT d.classid, d.objid FROM pg_depend d JOIN part ON (d.refclassid, d.refobjid) = (part.class, part.oid)
    WHERE d.deptype <> 'i' OR d.classid = 'pg_rewrite'::regclass
)
SELECT 'what depends on it' AS what, coalesce(
    (SELECT pg_describe_object('pg_class'::regclass, ev_class, 0) FROM pg_rewrite
     WHERE oid = objid AND classid = 'pg_rewrite'::regclass AND rulename = '_RETURN'),
    pg_describe_object(classid, objid, 0)) AS name
FROM dependent
WHERE NOT (classid = 'pg_class'::regclass AND objid IN (SELECT reltoastrelid FROM target))
    AND NOT (classid = 'pg_constraint'::regclass
             AND objid IN (SELECT oid FROM pg_constraint WHERE contype IN ('p', 'n')))
    AND NOT (classid = 'pg_trigger'::regclass AND objid IN (SELECT oid FROM pg_trigger WHERE tgisinternal))
UNION ALL SELECT 'its own properties', name FROM target, LATERAL (VALUES
    (relrowsecurity, 'row-level security'),
    (relforcerowsecurity, 'forced row-level security'),
    (relpersistence = 'u', 'UNLOGGED'),
    (relreplident <> 'd', 'replica identity'),
    (reltablespace <> 0, 'tablespace'),
    (relispartition, 'is a partition'),
    (reloptions IS NOT NULL, array_to_string(reloptions, ', '))
) AS property (holds, name) WHERE holds
UNION ALL SELECT 'its own properties', 'privileges on its row type' FROM pg_type JOIN target ON pg_type.oid = reltype
    WHERE typacl IS NOT NULL
UNION ALL SELECT 'its keys and constraints', pg_describe_object('pg_class'::regclass, indexrelid, 0)
    FROM pg_index WHERE indrelid = $1 AND NOT indisprimary
UNION ALL SELECT 'its keys and constraints', pg_describe_object('pg_constraint'::regclass, oid, 0)
    FROM pg_constraint WHERE $1 IN (conrelid, confrelid) AND contype NOT IN ('p', 'n')
"""
_NAMES_MAX = 5


@dataclass(frozen=True, slots=True)
class Placement:
    """The table that has the target's name now, and what may be done with it.

    Args:
        oid: None where there is no such table.
        kind: ``pg_class.relkind``.
        published: what a run of the job left of it, None if no run wrote it.
        kept_because: why it is not exchanged for a new one; None if it is exactly what DataSync made.
    """

    oid: int | None = None
    kind: bytes = b""
    published: Published | None = None
    kept_because: str | None = None

    @property
    def kept(self) -> bool:
        return self.kept_because is not None

    @property
    def was_exchanged(self) -> bool:
        """Whether it is one that DataSync made, so that earlier runs exchanged it at much less cost."""
        return self.published is not None and self.published.description != {}


async def describe(connection: "asyncpg.Connection[Any]", oid: int) -> dict[str, str]:
    """A digest of each group of the table's properties."""
    rows = await connection.fetch(_DESCRIPTION, oid, _CHANGES_BY_ITSELF)
    groups: dict[str, list[str]] = {}
    for row in rows:
        groups.setdefault(row["what"], []).append(row["properties"])
    return {what: hashlib.sha256(json.dumps(sorted(found)).encode()).hexdigest() for what, found in groups.items()}


async def existing(connection: "asyncpg.Connection[Any]", target: Target) -> Any:
    """``oid`` and ``relkind`` of what has the target's name, None if nothing has."""
    return await connection.fetchrow(
        """
        SELECT c.oid, c.relkind FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE n.nspname = $1 AND c.relname = $2
        """,
        target.namespace,
        target.table,
    )


async def why_kept(connection: "asyncpg.Connection[Any]", oid: int, published: Published | None) -> str | None:
    """Why the table has to be kept; None if it is exactly what DataSync made, so that a new one lacks nothing."""
    if published is None or published.description == {}:
        return "DataSync did not make it"
    if published.description is None:
        return "it was written before DataSync recorded what it made"
    now = await describe(connection, oid)
    changed = sorted(
        what for what in now.keys() | published.description.keys() if now.get(what) != published.description.get(what)
    )
    if changed:
        return f"it is not as DataSync made it ({await _with_names(connection, oid, changed)})"
    if not await connection.fetchval(
        "SELECT relowner = (SELECT oid FROM pg_roles WHERE rolname = current_user) FROM pg_class WHERE oid = $1", oid
    ):
        return "another role owns it"
    if await connection.fetchval(
        "SELECT EXISTS (SELECT FROM pg_class c, aclexplode(c.relacl) a WHERE c.oid = $1 AND a.grantor <> c.relowner)",
        oid,
    ):
        return "another role than its owner granted privileges on it"
    return None


async def _with_names(connection: "asyncpg.Connection[Any]", oid: int, changed: list[str]) -> str:
    """The groups of properties that changed, each with what the table now has of it beyond what DataSync makes."""
    names: dict[str, set[str]] = {}
    for row in await connection.fetch(_NAMED, oid):
        names.setdefault(row["what"], set()).add(row["name"])
    return "; ".join(_with_some(what, sorted(names.get(what, ()))) for what in changed)


def _with_some(what: str, names: list[str]) -> str:
    if not names:
        return what
    more = f" and {len(names) - _NAMES_MAX} more" if len(names) > _NAMES_MAX else ""
    return f"{what}: {', '.join(names[:_NAMES_MAX])}{more}"


async def privileges(connection: "asyncpg.Connection[Any]", oid: int) -> set[tuple[str, str, bool]]:
    """Who may do what with the table: role as SQL writes it, privilege, and whether it may be passed on."""
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
    """Give a new table these privileges and no other, whatever the default privileges gave it."""
    present = await privileges(connection, (await existing(connection, target))["oid"])
    if present == wanted:
        return
    name = quoted(target.namespace, target.table)
    for role in sorted({role for role, _, _ in present}):
        await connection.execute(f"REVOKE ALL ON {name} FROM {role}")
    for role, privilege, grantable in sorted(wanted):
        suffix = " WITH GRANT OPTION" if grantable else ""
        await connection.execute(f"GRANT {privilege} ON {name} TO {role}{suffix}")
