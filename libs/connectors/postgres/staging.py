"""Staging tables, the types that they need, and the sweeping of those that killed runs left."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import asyncpg

from libs.connectors.postgres.connection import literal, quoted
from libs.connectors.postgres.source import PostgresTable
from libs.connectors.postgres.state import APPLICATION_NAME, alone_making, create_schema
from libs.connectors.postgres.types import PostgresType
from libs.connectors.protocol import ConnectorRefused, RunContext, Target

LOCK_TIMEOUT_SECONDS = 5
# Epochs start at the clock, in seconds: a younger run may be between two of its sessions.
ABANDONED_SECONDS_MIN = 600

Relation = tuple[str, str]


def staging_of(context: RunContext, target: Target) -> Relation:
    digest = hashlib.sha256(json.dumps([target.namespace, target.table]).encode()).hexdigest()[:12]
    return target.namespace, f"_datasync_stage_{context.job_id}_{context.epoch}_{digest}"


async def create_staging(connection: "asyncpg.Connection[Any]", table: PostgresTable, staging: Relation) -> None:
    await create_schema(connection, staging[0])
    if enums := enums_of(table):
        async with alone_making(connection):
            for enum in enums:
                await _make_enum(connection, enum, staging[0])
    columns = ", ".join(f"{quoted(column.name)} {ddl(column.type, staging[0])}" for column in table.columns)
    await drop_staging(connection, staging)
    await connection.execute(f"CREATE TABLE {quoted(*staging)} ({columns}) WITH (autovacuum_enabled = false)")


async def drop_staging(connection: "asyncpg.Connection[Any]", staging: Relation) -> None:
    if not await connection.fetchval("SELECT to_regclass($1) IS NOT NULL", quoted(*staging)):
        return
    async with connection.transaction():
        await connection.execute(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT_SECONDS}s'")
        await connection.execute(f"DROP TABLE IF EXISTS {quoted(*staging)}")


async def sweep(connection: "asyncpg.Connection[Any]", context: RunContext) -> None:
    """Drop the staging tables of all runs, of any job, that can't publish any more.

    Those are older epochs of this job, which are fenced, and epochs of others that have no session left: a run whose
    sessions all broke can't go on with what it staged.
    """
    left = await connection.fetch(
        """
        WITH staged AS MATERIALIZED (
            SELECT relnamespace, relname, relowner, string_to_array(relname, '_') AS words FROM pg_class
            WHERE relkind = 'r' AND relname ~ '^_datasync_stage_[0-9]{1,18}_[0-9]{1,18}_[0-9a-f]{12}$'
        ), left_over AS (
            SELECT relnamespace, relname, relowner, words[4]::bigint AS job_id, words[5]::bigint AS epoch FROM staged
        )
        SELECT n.nspname, l.relname, l.job_id FROM left_over l JOIN pg_namespace n ON n.oid = l.relnamespace
        WHERE pg_has_role(l.relowner, 'USAGE') AND (
            (l.job_id = $1 AND l.epoch < $2)
            OR (l.epoch < extract(epoch FROM now()) - $3
                AND NOT EXISTS (SELECT FROM pg_stat_activity a WHERE a.datname = current_database()
                                AND a.application_name = format($4, l.job_id, l.epoch)))
        )
        """,
        context.job_id,
        context.epoch,
        ABANDONED_SECONDS_MIN,
        APPLICATION_NAME.format(job_id="%s", epoch="%s"),
    )
    for row in left:
        name = f"{row['nspname']}.{row['relname']}"
        try:
            await drop_staging(connection, (row["nspname"], row["relname"]))
        except asyncpg.PostgresError as error:
            if connection.is_closed():
                raise
            # This run does not need it, so it goes on.
            context.log("warning", f"the staging table {name} of a run that has ended was left: {error}")
        else:
            context.log("info", f"dropped {name}, which a run of job {row['job_id']} left behind")


def ddl(held: PostgresType, schema: str) -> str:
    """The type in the destination: enums live in the target's schema, everything else is named as at the source."""
    innermost = held.element or held
    if innermost.built_in:
        return held.sql
    suffix = "[]" if held.element is not None else ""
    return quoted(schema if innermost.kind == "enum" else innermost.schema, innermost.name) + suffix


def enums_of(table: PostgresTable) -> list[PostgresType]:
    """The enums that the columns are of, or arrays of."""
    innermost = [column.type.element or column.type for column in table.columns]
    return [held for held in innermost if held.kind == "enum"]


async def refuse_unfit_enums(connection: "asyncpg.Connection[Any]", table: PostgresTable, schema: str) -> None:
    """Refuse, naming the type, an enum of the destination that can't get the source's labels in the source's order."""
    for enum in enums_of(table):
        present = await _enum_at(connection, enum, schema)
        if present is not None and missing_labels(enum, present["labels"], schema) and not present["owned"]:
            raise ConnectorRefused(
                f"the destination's type {schema}.{enum.name} lacks labels of the source's, and only its owner can add "
                "them",
                code="type_differs",
            )


async def _make_enum(connection: "asyncpg.Connection[Any]", enum: PostgresType, schema: str) -> None:
    name = quoted(schema, enum.name)
    present = await _enum_at(connection, enum, schema)
    if present is None:
        await connection.execute(f"CREATE TYPE {name} AS ENUM ({', '.join(literal(text) for text in enum.labels)})")
        return
    for label, place in missing_labels(enum, present["labels"], schema):
        await connection.execute(f"ALTER TYPE {name} ADD VALUE IF NOT EXISTS {literal(label)} {place}")


async def _enum_at(connection: "asyncpg.Connection[Any]", enum: PostgresType, schema: str) -> Any:
    """The destination's labels in their order, None if it has no such type; refuses a type of another kind."""
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
            f"the destination's type {schema}.{enum.name} is not an enum, as the source's is", code="type_differs"
        )
    return row


def missing_labels(enum: PostgresType, present: Sequence[str], schema: str) -> list[tuple[str, str]]:
    """The labels to add, each with ``BEFORE`` or ``AFTER`` another, so that they sort as at the source.

    Labels that only the destination has stay where they are; refused are those of both ends that sort differently.
    """
    common = [label for label in enum.labels if label in present]
    for ours, theirs in zip(common, (label for label in present if label in enum.labels), strict=True):
        if ours != theirs:
            raise ConnectorRefused(
                f"the destination's type {schema}.{enum.name} has its labels in another order than the source's, "
                f"{theirs!r} before {ours!r}, which can't be changed: rename or drop it",
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
