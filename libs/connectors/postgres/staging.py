"""Staging tables: where rows are copied to before they are published, and the removal of those that killed runs left.

A staging table stands in the target's schema, so that it can take the target's name, and bears the job and the epoch in
its own.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import asyncpg

from libs.connectors.postgres.connection import quoted
from libs.connectors.postgres.enums import create_enum, ddl, enums_of
from libs.connectors.postgres.state import APPLICATION_NAME, create_schema, one_at_a_time
from libs.connectors.postgres.types import Column
from libs.connectors.protocol import RunContext, Target

LOCK_TIMEOUT_SECONDS = 5
# A run that started less than this ago may have no session open at the moment. An epoch is at least the time, in Unix
# seconds, at which it was taken.
ABANDONED_SECONDS_MIN = 600

Relation = tuple[str, str]


def staging_of(context: RunContext, target: Target, what: str = "rows") -> Relation:
    """The staging table of a target's rows, or of the keys of all of the source's rows."""
    parts = [target.namespace, target.table, *([] if what == "rows" else [what])]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]
    return target.namespace, f"_datasync_stage_{context.job_id}_{context.epoch}_{digest}"


async def create_staging(connection: "asyncpg.Connection[Any]", columns: Sequence[Column], staging: Relation) -> None:
    await create_schema(connection, staging[0])
    if enums := enums_of(columns):
        async with one_at_a_time(connection):
            for enum in enums:
                await create_enum(connection, enum, staging[0])
    declared = ", ".join(f"{quoted(column.name)} {ddl(column.type, staging[0])}" for column in columns)
    await drop_staging(connection, staging)
    await connection.execute(f"CREATE TABLE {quoted(*staging)} ({declared}) WITH (autovacuum_enabled = false)")


async def drop_staging(connection: "asyncpg.Connection[Any]", staging: Relation) -> None:
    if not await connection.fetchval("SELECT to_regclass($1) IS NOT NULL", quoted(*staging)):
        return
    async with connection.transaction():
        await connection.execute(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT_SECONDS}s'")
        await connection.execute(f"DROP TABLE IF EXISTS {quoted(*staging)}")


async def sweep(connection: "asyncpg.Connection[Any]", context: RunContext) -> None:
    """Drop the staging tables of runs, of any job, that can no longer publish.

    These are lower epochs of this job, which are fenced, and epochs of other jobs without a session: a run that lost
    all its sessions does not continue with what it staged.
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
            context.log(
                "warning", f"could not drop the staging table {name}, which a run of job {row['job_id']} left: {error}"
            )
        else:
            context.log("info", f"dropped the staging table {name}, which a run of job {row['job_id']} left")
