"""The target's columns against the stream's: what has to change, and the statements that change it."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import asyncpg

from libs.connectors.postgres.connection import quoted
from libs.connectors.postgres.enums import ddl
from libs.connectors.postgres.target import TargetTable
from libs.connectors.postgres.types import Column
from libs.connectors.protocol import StreamPlan, Target
from libs.connectors.schema_changes import Reconciled, SchemaChange, reconcile

_WITH_MODIFIER = re.compile(r"^(?P<name>[a-z ]+?)(?:\((?P<first>-?\d+)(?:,(?P<second>-?\d+))?\))?(?P<rest> with.*)?$")
# Every value of the type on the left is one of each type on the right.
_WIDER = {
    "smallint": ("integer", "bigint", "numeric", "real", "double precision"),
    "integer": ("bigint", "numeric", "double precision"),
    "bigint": ("numeric",),
    "real": ("double precision",),
    "character varying": ("text",),
    "date": ("timestamp without time zone",),
    "name": ("text",),
    "json": ("text",),
}
_INTEGER_DIGITS = {"smallint": 5, "integer": 10, "bigint": 19}


async def reconciled(
    connection: "asyncpg.Connection[Any]",
    plan: StreamPlan,
    columns: Sequence[Column],
    target: Target,
    found: TargetTable,
) -> Reconciled:
    """What has to change about a target that a run has written before; nothing for any other."""
    if found.oid is None or found.published is None:
        return Reconciled()
    wanted = {column.name: await _type_there(connection, column, target) for column in columns}
    present = await types_of(connection, found.oid)
    concerned = {name: kind for name, kind in present.items() if name in found.published.columns or name in wanted}
    return reconcile(
        plan.stream,
        present=concerned,
        wanted=wanted,
        policy=plan.schema_policy,
        widens=widens,
        replaced=plan.disposition == "replace" and not found.kept,
    )


async def types_of(connection: "asyncpg.Connection[Any]", oid: int) -> dict[str, str]:
    """The columns of a relation in their order, with their types as PostgreSQL prints them."""
    rows = await connection.fetch(
        "SELECT attname, format_type(atttypid, atttypmod) AS type FROM pg_attribute "
        "WHERE attrelid = $1 AND attnum > 0 AND NOT attisdropped ORDER BY attnum",
        oid,
    )
    return {row["attname"]: row["type"] for row in rows}


async def _type_there(connection: "asyncpg.Connection[Any]", column: Column, target: Target) -> str:
    written = ddl(column.type, target.namespace)
    if (column.type.element or column.type).built_in:
        return written
    # An enum is created by the run that first writes it.
    return await connection.fetchval("SELECT format_type(to_regtype($1), -1)", written) or written


def widens(before: str, after: str) -> bool:
    """Whether every value of one type is a value of the other; the types are as ``format_type`` prints them."""
    if before.endswith("[]") and after.endswith("[]"):
        return widens(before[:-2], after[:-2])
    one, other = _WITH_MODIFIER.match(before), _WITH_MODIFIER.match(after)
    if one is None or other is None:
        return False
    if one["name"] + (one["rest"] or "") == other["name"] + (other["rest"] or ""):
        return _modifier_widens(one, other)
    if other["name"] + (other["rest"] or "") not in _WIDER.get(one["name"] + (one["rest"] or ""), ()):
        return False
    if other["name"] == "numeric" and other["first"]:
        scale = int(other["second"] or 0)
        return scale >= 0 and int(other["first"]) - scale >= _INTEGER_DIGITS[one["name"]]
    return other["first"] is None


def _modifier_widens(one: "re.Match[str]", other: "re.Match[str]") -> bool:
    if other["first"] is None:
        return one["name"] not in ("character", "bit")
    if one["first"] is None:
        return False
    if one["name"] == "numeric":
        precision, scale = int(one["first"]), int(one["second"] or 0)
        wider, wider_scale = int(other["first"]), int(other["second"] or 0)
        return wider_scale >= scale and wider - wider_scale >= precision - scale
    # The blanks of a character(n) and the length of a bit(n) are part of the value.
    return one["name"] not in ("character", "bit") and int(other["first"]) >= int(one["first"])


async def apply_changes(
    connection: "asyncpg.Connection[Any]",
    target: Target,
    columns: Iterable[Column],
    changes: Sequence[SchemaChange],
) -> None:
    """Change the target's columns, within a transaction that may lock the table."""
    name = quoted(target.namespace, target.table)
    by_name: Mapping[str, Column] = {column.name: column for column in columns}
    for change in changes:
        column = quoted(change.column)
        match change.kind:
            case "added":
                kind = ddl(by_name[change.column].type, target.namespace)
                await connection.execute(f"ALTER TABLE {name} ADD COLUMN {column} {kind}")
            case "dropped":
                await connection.execute(f"ALTER TABLE {name} ALTER COLUMN {column} DROP NOT NULL")
            case _:
                kind = ddl(by_name[change.column].type, target.namespace)
                await connection.execute(f"ALTER TABLE {name} ALTER COLUMN {column} TYPE {kind} USING {column}::{kind}")
