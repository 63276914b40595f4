"""PostgreSQL as a destination: rows are staged by COPY and put in place in one transaction with epoch and marker.

A target that is a plain table of our own is exchanged for the staged one, its grants kept. One that others built on
(views, foreign keys, indexes, triggers, policies, …) keeps its identity: its rows are replaced within the transaction.
"""

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import asyncpg

from libs.connectors.postgres.config import CONNECTION_PARAMETERS, PostgresDestinationConfig
from libs.connectors.postgres.connection import connect, failure, literal, quoted, translated
from libs.connectors.postgres.copying import copy_part
from libs.connectors.postgres.source import PostgresTable, close
from libs.connectors.postgres.state import APPLICATION_NAME, DEFAULT_SCHEMA, State, create_schema
from libs.connectors.postgres.types import PostgresType
from libs.connectors.postgres.verification import compare
from libs.connectors.protocol import (
    ConnectorRefused,
    ConnectorUnavailable,
    Progress,
    RunContext,
    StreamName,
    StreamPlan,
    Table,
    Target,
    Written,
)

IDENTIFIER_BYTES_MAX = 63
LOCK_TIMEOUT_SECONDS = 60
STAGING_LOCK_TIMEOUT_SECONDS = 5


class PostgresDestination:
    def __init__(self, config: PostgresDestinationConfig) -> None:
        self._config = config

    async def check(self) -> None:
        connection = await connect(self._config, application_name="datasync check")
        schema = self._config.default_schema or DEFAULT_SCHEMA
        try:
            with translated("the destination"):
                async with _rolled_back(connection):
                    await create_schema(connection, schema)
                    await connection.execute(f"CREATE TABLE {quoted(schema, '_datasync_check')} ()")
        finally:
            await close(connection)

    @contextlib.asynccontextmanager
    async def open(self, context: RunContext) -> AsyncIterator["PostgresRun"]:
        application_name = APPLICATION_NAME.format(job_id=context.job_id, epoch=context.epoch)
        async with contextlib.AsyncExitStack() as stack:
            run = PostgresRun(self._config, context, application_name, stack)
            with translated("the destination"):
                await run.take_epoch()
            yield run


class PostgresRun:
    """The database under one run's epoch."""

    def __init__(
        self,
        config: PostgresDestinationConfig,
        context: RunContext,
        application_name: str,
        stack: contextlib.AsyncExitStack,
    ) -> None:
        self._config = _without_own_name(config)
        self._context = context
        self._application_name = application_name
        self._stack = stack
        self._state = State(config.default_schema or DEFAULT_SCHEMA)
        self._control: asyncpg.Connection[Any] | None = None
        self._idle: list[asyncpg.Connection[Any]] = []
        self._owners: dict[Target, StreamName] = {}

    async def take_epoch(self) -> None:
        """Enter the epoch, end older writers of the job, drop what they staged."""
        connection = await self._controlling()
        await self._state.create(connection)
        await self._state.end_older_writers(connection, self._context)
        await self._state.take_epoch(connection, self._context)
        staged = await connection.fetch(
            "SELECT n.nspname, c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace "
            "WHERE c.relkind = 'r' AND starts_with(c.relname, $1)",
            _staging_prefix(self._context.job_id),
        )
        for row in staged:
            await self._drop_staging((row["nspname"], row["relname"]))

    async def committed(self, plan: StreamPlan) -> Written | None:
        with translated("the destination"):
            return await self._state.marker(await self._controlling(), self._context, self._placed(plan))

    async def prepare(self, table: Table) -> None:
        pg_table = _postgres_table(table)
        target = self._target(table.plan)
        for name in (target.namespace, target.table):
            if not name or len(name.encode()) > IDENTIFIER_BYTES_MAX:
                raise ConnectorRefused(f"{name!r} is not a possible name in PostgreSQL (1 to 63 bytes)")
        if target.table.startswith("_datasync_"):
            raise ConnectorRefused(f"{target}: names that begin with _datasync_ are DataSync's own")
        other = self._owners.setdefault(target, table.plan.stream)
        if other != table.plan.stream:
            raise ConnectorRefused(
                f"the streams {other} and {table.plan.stream} both go to {target}", code="target_shared"
            )
        with translated(f"the destination's table {target}"):
            connection = await self._controlling()
            for column in pg_table.columns:
                await self._refuse_unknown_type(connection, pg_table, column.name, column.type)
            existing = await _existing(connection, target)
            if existing is None:
                return
            if existing["relkind"] not in (b"r", b"p"):
                raise ConnectorRefused(f"the destination has {target}, which is not a table")
            await self._refuse_rows_of_others(connection, target)
            if await _built_on(connection, existing):
                await self._refuse_other_columns(connection, pg_table, target)

    async def write(self, table: Table, progress: Progress) -> Written:
        pg_table = _postgres_table(table)
        target = self._target(table.plan)
        staging = (target.namespace, _staging_name(self._context, target))
        where = f"the destination's table {target}"
        try:
            with translated(where):
                await self._create_staging(pg_table, staging)
            rows = await self._load(pg_table, staging, progress, where)
            progress.loaded()
            with translated(where):
                written = await self._verified(pg_table, staging, rows)
                await self._add_primary_key(pg_table, staging)
                await self._commit(pg_table, target, staging, written)
        except BaseException:
            await self._clean_up(staging)
            raise
        return written

    async def clear(self, plan: StreamPlan) -> None:
        target = self._target(plan)
        with translated(f"the destination's table {target}"):
            connection = await self._controlling()
            existing = await _existing(connection, target)
            async with connection.transaction():
                await connection.execute(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT_SECONDS}s'")
                await self._state.lock_epoch(connection, self._context)
                if existing is not None and await self._state.is_ours(connection, self._context, target):
                    built_on = await _built_on(connection, existing)
                    verb = "TRUNCATE" if built_on else "DROP TABLE"
                    await connection.execute(f"{verb} {quoted(target.namespace, target.table)}")
                await self._state.unmark(connection, target)

    def _target(self, plan: StreamPlan) -> Target:
        return Target(self._config.default_schema or plan.target.namespace, plan.target.table)

    def _placed(self, plan: StreamPlan) -> StreamPlan:
        return replace(plan, target=self._target(plan))

    async def _controlling(self) -> "asyncpg.Connection[Any]":
        """The connection that decides and commits; opened again when it broke."""
        if self._control is None or self._control.is_closed():
            self._control = await self._open_connection()
        return self._control

    async def _open_connection(self) -> "asyncpg.Connection[Any]":
        connection = await connect(
            self._config, application_name=self._application_name, retries=self._config.retry_count
        )
        self._stack.push_async_callback(close, connection)
        return connection

    async def _refuse_unknown_type(
        self, connection: "asyncpg.Connection[Any]", table: PostgresTable, column: str, held: PostgresType
    ) -> None:
        innermost = held.element or held
        if innermost.built_in or innermost.kind == "enum":
            return
        known = await connection.fetchval("SELECT to_regtype($1) IS NOT NULL", quoted(innermost.schema, innermost.name))
        if not known:
            raise ConnectorRefused(
                f"{table.plan.stream}: column {column!r} is of type {held.sql}, which the destination does not have; "
                f"create the type {innermost.schema}.{innermost.name} there or leave the column out",
                code="type_not_held",
            )

    async def _refuse_rows_of_others(self, connection: "asyncpg.Connection[Any]", target: Target) -> None:
        if not await self._state.is_ours(connection, self._context, target) and await _has_rows(connection, target):
            raise ConnectorRefused(
                f"the destination has a table {target} with rows that DataSync did not write: "
                "empty it, drop it or choose another destination table",
                code="table_not_ours",
            )

    async def _refuse_other_columns(
        self, connection: "asyncpg.Connection[Any]", table: PostgresTable, target: Target
    ) -> None:
        rows = await connection.fetch(
            """
            SELECT attname, format_type(atttypid, atttypmod) AS type FROM pg_attribute
            WHERE attrelid = $1::text::regclass AND attnum > 0 AND NOT attisdropped
            """,
            quoted(target.namespace, target.table),
        )
        present = {row["attname"]: row["type"] for row in rows}
        for column in table.columns:
            if column.name not in present:
                raise ConnectorRefused(
                    f"the destination's table {target} lacks the column {column.name!r}, and can't be exchanged for a "
                    "new one because others were built on it (views, keys, indexes, triggers, …): add the column",
                    code="target_differs",
                )
            if (column.type.element or column.type).built_in and present[column.name] != column.type.sql:
                raise ConnectorRefused(
                    f"the destination's table {target} has the column {column.name!r} as {present[column.name]}, the "
                    f"stream as {column.type.sql}; it can't be exchanged for a new one because others were built on it",
                    code="target_differs",
                )

    async def _create_staging(self, table: PostgresTable, staging: tuple[str, str]) -> None:
        connection = await self._controlling()
        await create_schema(connection, staging[0])
        for column in table.columns:
            await self._create_enum(connection, column.type, staging[0])
        columns = ", ".join(f"{quoted(column.name)} {_ddl(column.type, staging[0])}" for column in table.columns)
        await self._drop_staging(staging)
        await connection.execute(f"CREATE TABLE {quoted(*staging)} ({columns}) WITH (autovacuum_enabled = false)")

    async def _create_enum(self, connection: "asyncpg.Connection[Any]", held: PostgresType, schema: str) -> None:
        enum = held.element or held
        if enum.kind != "enum":
            return
        name = quoted(schema, enum.name)
        labels = await connection.fetch(
            "SELECT enumlabel FROM pg_enum WHERE enumtypid = to_regtype($1)::oid ORDER BY enumsortorder", name
        )
        if not await connection.fetchval("SELECT to_regtype($1) IS NOT NULL", name):
            await connection.execute(f"CREATE TYPE {name} AS ENUM ({', '.join(literal(text) for text in enum.labels)})")
            return
        for label in enum.labels:
            if label not in {row["enumlabel"] for row in labels}:
                await connection.execute(f"ALTER TYPE {name} ADD VALUE IF NOT EXISTS {literal(label)}")

    async def _load(self, table: PostgresTable, staging: tuple[str, str], progress: Progress, where: str) -> int:
        waiting = list(reversed(table.parts()))
        binary = all(column.type.same_in_binary for column in table.columns)
        total = 0

        async def work() -> None:
            nonlocal total
            async with self._writer() as connection:
                while waiting:
                    rows = await copy_part(
                        table,
                        waiting.pop(),
                        connection,
                        staging,
                        binary=binary,
                        moved=lambda size: progress.add(bytes_read=size),
                        taken=lambda size: progress.add(bytes_written=size),
                        written_failed=lambda error: failure(error, where),
                    )
                    progress.add(rows_read=rows, rows_written=rows)
                    total += rows

        try:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(min(self._config.max_threads, table.connections_max, len(waiting))):
                    tasks.create_task(work())
        except BaseExceptionGroup as group:
            raise _first(group) from group
        return total

    @contextlib.asynccontextmanager
    async def _writer(self) -> AsyncIterator["asyncpg.Connection[Any]"]:
        connection = self._idle.pop() if self._idle else await self._open_connection()
        try:
            # What the load writes is made durable by the commit that puts it in place.
            await connection.execute("SET synchronous_commit = off")
            yield connection
        except BaseException:
            await close(connection)
            raise
        self._idle.append(connection)

    async def _verified(self, table: PostgresTable, staging: tuple[str, str], rows: int) -> Written:
        if not self._context.verify:
            return Written(rows)
        async with self._writer() as connection:
            verification = await compare(table, connection, staging)
        if verification["source"] != verification["destination"]:
            raise ConnectorUnavailable(
                f"{table.plan.stream}: both ends differ after copying", code="verification_failed"
            )
        return Written(rows, True, verification)

    async def _add_primary_key(self, table: PostgresTable, staging: tuple[str, str]) -> None:
        if not table.primary_key:
            return
        connection = await self._controlling()
        await connection.execute("SET maintenance_work_mem = '256MB'")
        columns = ", ".join(quoted(name) for name in table.primary_key)
        await connection.execute(f"ALTER TABLE {quoted(*staging)} ADD PRIMARY KEY ({columns})")

    async def _commit(self, table: PostgresTable, target: Target, staging: tuple[str, str], written: Written) -> None:
        plan = self._placed(table.plan)
        connection = await self._controlling()
        try:
            async with connection.transaction():
                await connection.execute(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT_SECONDS}s'")
                await self._state.lock_epoch(connection, self._context)
                await self._put_in_place(connection, table, target, staging)
                await self._state.mark(connection, self._context, plan, written)
        except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
            if not connection.is_closed() and isinstance(error, asyncpg.PostgresError):
                raise
            if not await self._was_committed(plan):
                raise

    async def _was_committed(self, plan: StreamPlan) -> bool:
        """After a connection that broke while committing: the epoch's lock waits for that transaction's end."""
        connection = await self._controlling()
        async with connection.transaction():
            await self._state.lock_epoch(connection, self._context)
            return await self._state.marker(connection, self._context, plan) is not None

    async def _put_in_place(
        self,
        connection: "asyncpg.Connection[Any]",
        table: PostgresTable,
        target: Target,
        staging: tuple[str, str],
    ) -> None:
        name, staged = quoted(target.namespace, target.table), quoted(*staging)
        existing = await _existing(connection, target)
        if existing is not None:
            # Somebody may have made or filled the table while the rows were copied; nobody can from here on.
            await connection.execute(f"LOCK TABLE {name} IN ACCESS EXCLUSIVE MODE")
            await self._refuse_rows_of_others(connection, target)
        if existing is not None and await _built_on(connection, existing):
            columns = ", ".join(quoted(column.name) for column in table.columns)
            await connection.execute(f"TRUNCATE {name}")
            await connection.execute(f"INSERT INTO {name} ({columns}) SELECT {columns} FROM {staged}")  # noqa: S608
            await connection.execute(f"DROP TABLE {staged}")
            return
        grants = []
        if existing is not None:
            grants = await _grants(connection, target)
            await connection.execute(f"DROP TABLE {name}")
        await connection.execute(f"ALTER TABLE {staged} RENAME TO {quoted(target.table)}")
        await connection.execute(f"ALTER TABLE {name} RESET (autovacuum_enabled)")
        if table.primary_key:
            await _name_primary_key(connection, target)
        for grant in grants:
            await connection.execute(grant)

    async def _clean_up(self, staging: tuple[str, str]) -> None:
        """Best effort within bounds: what is left is dropped when the job's next run takes its epoch."""
        try:
            async with asyncio.timeout(STAGING_LOCK_TIMEOUT_SECONDS * 2):
                await self._drop_staging(staging)
        except (TimeoutError, OSError, asyncpg.PostgresError, asyncpg.InterfaceError, ConnectorUnavailable) as error:
            self._context.log("warning", f"the staging table {'.'.join(staging)} was left behind: {error}")

    async def _drop_staging(self, staging: tuple[str, str]) -> None:
        connection = await self._controlling()
        if not await connection.fetchval("SELECT to_regclass($1) IS NOT NULL", quoted(*staging)):
            return
        await connection.execute(f"SET lock_timeout = '{STAGING_LOCK_TIMEOUT_SECONDS}s'")
        await connection.execute(f"DROP TABLE IF EXISTS {quoted(*staging)}")
        await connection.execute("SET lock_timeout = 0")


def _without_own_name(config: PostgresDestinationConfig) -> PostgresDestinationConfig:
    """Sessions that write bear our name, by which the next epoch finds and ends them."""
    kept = {
        name: value
        for name, value in config.jdbc_url_params.items()
        if CONNECTION_PARAMETERS[name] != "application_name"
    }
    return config.model_copy(update={"jdbc_url_params": kept})


def _staging_prefix(job_id: int) -> str:
    return f"_datasync_stage_{job_id}_"


def _staging_name(context: RunContext, target: Target) -> str:
    digest = hashlib.sha256(f"{target.namespace}.{target.table}".encode()).hexdigest()[:12]
    return f"{_staging_prefix(context.job_id)}{context.epoch}_{digest}"


def _postgres_table(table: Table) -> PostgresTable:
    if not isinstance(table, PostgresTable):
        raise ConnectorRefused(f"{table.plan.stream}: a PostgreSQL destination takes PostgreSQL sources only so far")
    return table


def _ddl(held: PostgresType, schema: str) -> str:
    """The type in the destination: enums live in the target's schema, everything else is named as at the source."""
    innermost = held.element or held
    if innermost.built_in:
        return held.sql
    suffix = "[]" if held.element is not None else ""
    return quoted(schema if innermost.kind == "enum" else innermost.schema, innermost.name) + suffix


async def _existing(connection: "asyncpg.Connection[Any]", target: Target) -> Any:
    return await connection.fetchrow(
        """
        SELECT c.oid, c.relkind FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE n.nspname = $1 AND c.relname = $2
        """,
        target.namespace,
        target.table,
    )


async def _has_rows(connection: "asyncpg.Connection[Any]", target: Target) -> bool:
    return bool(
        await connection.fetchval(f"SELECT EXISTS (SELECT FROM {quoted(target.namespace, target.table)})")  # noqa: S608
    )


async def _built_on(connection: "asyncpg.Connection[Any]", existing: Any) -> bool:
    """Whether the table has anything that a new one would lack: all but its columns, primary key and grants."""
    return bool(
        await connection.fetchval(
            """
            SELECT c.relkind <> 'r' OR c.relrowsecurity OR c.relhasrules OR c.relhassubclass OR c.relispartition
                OR c.relreplident <> 'd' OR c.reltablespace <> 0 OR c.reloptions IS NOT NULL
                OR c.relowner <> current_user::regrole
                OR EXISTS (SELECT FROM pg_index WHERE indrelid = c.oid AND NOT indisprimary)
                OR EXISTS (SELECT FROM pg_trigger WHERE tgrelid = c.oid)
                OR EXISTS (SELECT FROM pg_policy WHERE polrelid = c.oid)
                OR EXISTS (SELECT FROM pg_publication_rel WHERE prrelid = c.oid)
                OR EXISTS (SELECT FROM pg_attrdef WHERE adrelid = c.oid)
                OR EXISTS (SELECT FROM pg_statistic_ext WHERE stxrelid = c.oid)
                OR EXISTS (SELECT FROM pg_description WHERE objoid = c.oid AND classoid = 'pg_class'::regclass)
                OR EXISTS (SELECT FROM pg_constraint WHERE contype NOT IN ('p', 'n') AND c.oid IN (conrelid, confrelid))
                OR EXISTS (SELECT FROM pg_attribute WHERE attrelid = c.oid AND attacl IS NOT NULL)
                OR EXISTS (SELECT FROM pg_attribute a WHERE attrelid = c.oid AND attnum > 0 AND attnotnull
                           AND NOT EXISTS (SELECT FROM pg_index WHERE indrelid = c.oid AND indisprimary
                                           AND a.attnum = ANY (indkey)))
                OR EXISTS (SELECT FROM pg_depend WHERE refclassid = 'pg_class'::regclass AND refobjid = c.oid
                           AND deptype = 'n')
            FROM pg_class c WHERE c.oid = $1
            """,
            existing["oid"],
        )
    )


async def _grants(connection: "asyncpg.Connection[Any]", target: Target) -> list[str]:
    """The statements that give the roles what they were given on the table."""
    rows = await connection.fetch(
        """
        SELECT a.privilege_type, a.is_grantable,
               CASE WHEN a.grantee = 0 THEN 'PUBLIC' ELSE quote_ident(r.rolname) END AS role
        FROM pg_class c CROSS JOIN LATERAL aclexplode(c.relacl) a LEFT JOIN pg_roles r ON r.oid = a.grantee
        WHERE c.oid = to_regclass($1) AND a.grantee <> c.relowner
        """,
        quoted(target.namespace, target.table),
    )
    return [
        f"GRANT {row['privilege_type']} ON {quoted(target.namespace, target.table)} TO {row['role']}"
        + (" WITH GRANT OPTION" if row["is_grantable"] else "")
        for row in rows
    ]


async def _name_primary_key(connection: "asyncpg.Connection[Any]", target: Target) -> None:
    """``<table>_pkey``, as PostgreSQL would have named it, where that name is free."""
    name = quoted(target.namespace, target.table)
    present = await connection.fetchval(
        "SELECT conname FROM pg_constraint WHERE conrelid = to_regclass($1)::oid AND contype = 'p'", name
    )
    wanted = f"{target.table}_pkey"
    taken = await connection.fetchval("SELECT to_regclass($1) IS NOT NULL", quoted(target.namespace, wanted))
    if len(wanted.encode()) <= IDENTIFIER_BYTES_MAX and not taken:
        await connection.execute(f"ALTER TABLE {name} RENAME CONSTRAINT {quoted(present)} TO {quoted(wanted)}")


@contextlib.asynccontextmanager
async def _rolled_back(connection: "asyncpg.Connection[Any]") -> AsyncIterator[None]:
    transaction = connection.transaction()
    await transaction.start()
    try:
        yield
    finally:
        await transaction.rollback()


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error that ended the group; an error of the writing side is the more telling one of a pair."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
