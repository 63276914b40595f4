"""Whether a table is still exactly as DataSync created it: only such a table may be swapped for a new one.

Everything that the catalog says of a table is recorded when it is published and compared in the next run, except what
changes by itself, such as statistics and storage. So a property that this code does not know of keeps a table, too.
"""

import hashlib
import json
from typing import Any

import asyncpg

# What VACUUM, ANALYZE and CLUSTER change. Privileges are left out because a swap preserves them.
_IGNORED = [
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

# What the run's log names: neither what DataSync creates itself nor what belongs to another of these objects.
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


async def describe(connection: "asyncpg.Connection[Any]", oid: int) -> dict[str, str]:
    """A digest of each group of the table's properties."""
    rows = await connection.fetch(_DESCRIPTION, oid, _IGNORED)
    groups: dict[str, list[str]] = {}
    for row in rows:
        groups.setdefault(row["what"], []).append(row["properties"])
    return {what: hashlib.sha256(json.dumps(sorted(found)).encode()).hexdigest() for what, found in groups.items()}


async def changes(connection: "asyncpg.Connection[Any]", oid: int, recorded: dict[str, str]) -> str | None:
    """The groups of properties that differ from the recorded ones, with the objects concerned; None if none does."""
    now = await describe(connection, oid)
    changed = sorted(what for what in now.keys() | recorded.keys() if now.get(what) != recorded.get(what))
    if not changed:
        return None
    names: dict[str, set[str]] = {}
    for row in await connection.fetch(_NAMED, oid):
        names.setdefault(row["what"], set()).add(row["name"])
    return "; ".join(_with_some(what, sorted(names.get(what, ()))) for what in changed)


def _with_some(what: str, names: list[str]) -> str:
    if not names:
        return what
    more = f" and {len(names) - _NAMES_MAX} more" if len(names) > _NAMES_MAX else ""
    return f"{what}: {', '.join(names[:_NAMES_MAX])}{more}"
