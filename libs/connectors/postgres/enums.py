"""Enum types at the destination: created in the target's schema, and extended by the labels that the source has."""

from collections.abc import Sequence
from typing import Any

import asyncpg

from libs.connectors.postgres.connection import literal, quoted
from libs.connectors.postgres.types import Column, PostgresType
from libs.connectors.protocol import ConnectorRefused


def ddl(held: PostgresType, schema: str) -> str:
    """The type as the destination's DDL writes it: an enum is in the target's schema, other types keep their schema."""
    innermost = held.element or held
    if innermost.built_in:
        return held.sql
    suffix = "[]" if held.element is not None else ""
    return quoted(schema if innermost.kind == "enum" else innermost.schema, innermost.name) + suffix


def enums_of(columns: Sequence[Column]) -> list[PostgresType]:
    """The enums among the types of the columns and of their array elements."""
    innermost = [column.type.element or column.type for column in columns]
    return [held for held in innermost if held.kind == "enum"]


async def refuse_unfit_enums(connection: "asyncpg.Connection[Any]", columns: Sequence[Column], schema: str) -> None:
    """Refuse an enum of the destination to which the source's labels can't be added in the source's order."""
    for enum in enums_of(columns):
        present = await _enum_at(connection, enum, schema)
        if present is not None and _missing_labels(enum, present["labels"], schema) and not present["owned"]:
            raise ConnectorRefused(
                f"the destination's type {schema}.{enum.name} lacks labels that the source's has, and only its owner "
                "can add them: add them as its owner, or make the role a member of the owner",
                code="type_differs",
            )


async def create_enum(connection: "asyncpg.Connection[Any]", enum: PostgresType, schema: str) -> None:
    """Create the type, or add the labels that it lacks."""
    name = quoted(schema, enum.name)
    present = await _enum_at(connection, enum, schema)
    if present is None:
        await connection.execute(f"CREATE TYPE {name} AS ENUM ({', '.join(literal(text) for text in enum.labels)})")
        return
    for label, place in _missing_labels(enum, present["labels"], schema):
        await connection.execute(f"ALTER TYPE {name} ADD VALUE IF NOT EXISTS {literal(label)} {place}")


async def _enum_at(connection: "asyncpg.Connection[Any]", enum: PostgresType, schema: str) -> Any:
    """The destination's labels in order, None if it has no such type; refuses a type that is no enum."""
    row = await connection.fetchrow(
        """
        SELECT t.typtype = 'e' AS is_enum, pg_has_role(t.typowner, 'USAGE') AS owned,
               ARRAY(SELECT enumlabel::text FROM pg_enum WHERE enumtypid = t.oid ORDER BY enumsortorder) AS labels
        FROM pg_type t JOIN pg_namespace n ON n.oid = t.typnamespace WHERE n.nspname = $1 AND t.typname = $2
        """,
        schema,
        enum.name,
    )
    if row is not None and not row["is_enum"]:
        raise ConnectorRefused(
            f"the destination's type {schema}.{enum.name} is not an enum, unlike the source's: rename or drop it, or "
            "choose another destination schema",
            code="type_differs",
        )
    return row


def _missing_labels(enum: PostgresType, present: Sequence[str], schema: str) -> list[tuple[str, str]]:
    """The labels to add, each with its ``BEFORE`` or ``AFTER`` clause, so that they sort as at the source.

    Labels that only the destination has keep their place. Labels of both ends in different orders are refused.
    """
    common = [label for label in enum.labels if label in present]
    for ours, theirs in zip(common, (label for label in present if label in enum.labels), strict=True):
        if ours != theirs:
            raise ConnectorRefused(
                f"the destination's type {schema}.{enum.name} has its labels in another order than the source's, "
                f"{theirs!r} before {ours!r}, and PostgreSQL can't reorder them: rename or drop the type",
                code="type_differs",
            )
    added = []
    for place, label in enumerate(enum.labels):
        if label in present:
            continue
        if place > 0:
            added.append((label, f"AFTER {literal(enum.labels[place - 1])}"))
        else:
            added.append((label, f"BEFORE {literal(common[0])}" if common else ""))
    return added
