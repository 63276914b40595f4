"""PostgreSQL as a destination: rows are staged by COPY and published in one transaction with epoch and marker."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

import asyncpg

from libs.connectors.comparison import Comparison
from libs.connectors.postgres import kept, publishing
from libs.connectors.postgres.config import CONNECTION_PARAMETERS, PostgresDestinationConfig
from libs.connectors.postgres.connection import connect, quoted, translated
from libs.connectors.postgres.copying import copy_part
from libs.connectors.postgres.failures import failure
from libs.connectors.postgres.lineage import Lineage
from libs.connectors.postgres.publishing import IDENTIFIER_BYTES_MAX, Publication
from libs.connectors.postgres.source import PostgresTable, close
from libs.connectors.postgres.staging import (
    LOCK_TIMEOUT_SECONDS,
    Relation,
    create_staging,
    drop_staging,
    refuse_unfit_enums,
    staging_of,
    sweep,
)
from libs.connectors.postgres.state import APPLICATION_NAME, DEFAULT_SCHEMA, State, create_schema
from libs.connectors.postgres.types import PostgresType
from libs.connectors.postgres.verification import compare, source_fingerprint
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
from libs.core.errors import first_error

SCHEMAS_NAMED_MAX = 5


class PostgresDestination:
    def __init__(self, config: PostgresDestinationConfig) -> None:
        self._config = config

    async def check(self) -> Sequence[str]:
        connection = await connect(self._config, application_name="datasync check")
        schema = self._config.default_schema or DEFAULT_SCHEMA
        try:
            with translated("the destination"):
                async with _rolled_back(connection):
                    await create_schema(connection, schema)
                    await connection.execute(f"CREATE TABLE {quoted(schema, '_datasync_check')} ()")
                return () if self._config.default_schema else await _warnings_of_schemas(connection)
        finally:
            await close(connection)

    @contextlib.asynccontextmanager
    async def open(self, context: RunContext) -> AsyncIterator["PostgresRun"]:
        application_name = APPLICATION_NAME.format(job_id=context.job_id, epoch=context.epoch)
        async with contextlib.AsyncExitStack() as stack:
            if self._config.application_name_given:
                context.log("warning", f"the destination's application_name is not used: ours is {application_name!r}")
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
        self._lineage = Lineage()

    async def take_epoch(self) -> None:
        """Enter the epoch, end older writers of the job, drop what killed runs staged."""
        connection = await self._controlling()
        await self._state.create(connection)
        await self._state.end_older_writers(connection, self._context)
        await self._state.take_epoch(connection, self._context)
        await sweep(connection, self._context)

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
            await _refuse_unwritable_schema(connection, target)
            for column in pg_table.columns:
                await self._refuse_unknown_type(connection, pg_table, column.name, column.type)
            await refuse_unfit_enums(connection, pg_table, target.namespace)
            place = await publishing.placement(connection, self._state, self._context, target)
            await self._lineage.add(connection, pg_table, target, place.oid)
            self._lineage.refuse_own_source(pg_table, target)
            if place.oid is None:
                await _refuse_taken_type_name(connection, target)
                return
            await publishing.refuse_rows_of_others(connection, target, place)
            if place.kept:
                await kept.refuse_unfit(connection, pg_table, target, place)

    async def write(self, table: Table, progress: Progress) -> Written:
        pg_table = _postgres_table(table)
        target = self._target(table.plan)
        # Streams that were prepared later may be read from it.
        self._lineage.refuse_own_source(pg_table, target)
        staging = staging_of(self._context, target)
        where = f"the destination's table {target}"
        try:
            with translated(where):
                await create_staging(await self._controlling(), pg_table, staging)
            rows = await self._load(pg_table, staging, progress, where)
            progress.loaded()
            with translated(where):
                return await self._publish(pg_table, staging, rows)
        except BaseException:
            await self._clean_up(staging)
            raise

    async def clear(self, plan: StreamPlan) -> None:
        target = self._target(plan)
        with translated(f"the destination's table {target}"):
            await publishing.clear(await self._controlling(), self._state, self._context, target)

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
            raise first_error(group) from group
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

    async def _publish(self, table: PostgresTable, staging: Relation, rows: int) -> Written:
        connection = await self._controlling()
        if not self._context.verify:
            return await self._published(connection, table, staging, rows, None)
        # The source hashes its rows meanwhile, so that it is not waited for while the target is locked.
        async with source_fingerprint(table, connection) as expecting:

            async def verify(relation: Relation) -> Comparison:
                return await compare(table, connection, relation, expecting)

            return await self._published(connection, table, staging, rows, verify)

    async def _published(
        self,
        connection: "asyncpg.Connection[Any]",
        table: PostgresTable,
        staging: Relation,
        rows: int,
        verify: Callable[[Relation], Awaitable[Comparison]] | None,
    ) -> Written:
        plan = self._placed(table.plan)
        publication = Publication(
            connection=connection,
            state=self._state,
            context=self._context,
            table=table,
            plan=plan,
            primary_key=await self._primary_key(table),
            staging=staging,
            rows=rows,
            verify=verify,
        )
        try:
            return await publication.publish()
        except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
            if not connection.is_closed() and isinstance(error, asyncpg.PostgresError):
                raise
            written = await self._was_committed(plan)
            if written is None:
                raise
            return written

    async def _primary_key(self, table: PostgresTable) -> tuple[str, ...]:
        if table.primary_key and (await self._lineage.origin(table)).inherited:
            self._context.log(
                "info",
                f"{table.plan.stream}: the primary key is not taken over, for it does not hold for the tables that "
                "inherit from it",
            )
            return ()
        return table.primary_key

    async def _was_committed(self, plan: StreamPlan) -> Written | None:
        """After a connection that broke while committing: the epoch's lock waits for that transaction's end."""
        connection = await self._controlling()
        async with connection.transaction():
            await self._state.lock_epoch(connection, self._context)
            return await self._state.marker(connection, self._context, plan)

    async def _clean_up(self, staging: Relation) -> None:
        """Best effort within bounds: what is left is swept when a run next takes its epoch."""
        try:
            async with asyncio.timeout(LOCK_TIMEOUT_SECONDS * 2):
                await drop_staging(await self._controlling(), staging)
        except (TimeoutError, OSError, asyncpg.PostgresError, asyncpg.InterfaceError, ConnectorUnavailable) as error:
            self._context.log("warning", f"the staging table {'.'.join(staging)} was left behind: {error}")


def _without_own_name(config: PostgresDestinationConfig) -> PostgresDestinationConfig:
    """Sessions that write bear our name, by which the next epoch finds and ends them."""
    kept = {
        name: value
        for name, value in config.jdbc_url_params.items()
        if CONNECTION_PARAMETERS[name] != "application_name"
    }
    return config.model_copy(update={"jdbc_url_params": kept})


def _postgres_table(table: Table) -> PostgresTable:
    if not isinstance(table, PostgresTable):
        raise ConnectorRefused(f"{table.plan.stream}: a PostgreSQL destination takes PostgreSQL sources only so far")
    return table


async def _warnings_of_schemas(connection: "asyncpg.Connection[Any]") -> Sequence[str]:
    """The schemas that no stream can be written to; raises ``ConnectorRefused`` where there is no other."""
    makes_schemas = await connection.fetchval("SELECT has_database_privilege(current_database(), 'CREATE')")
    schemas = await connection.fetch(
        """
        SELECT nspname, has_schema_privilege(oid, 'CREATE') AS writable FROM pg_namespace
        WHERE nspname !~ '^pg_' AND nspname NOT IN ('information_schema', $1) ORDER BY nspname
        """,
        DEFAULT_SCHEMA,
    )
    closed = [row["nspname"] for row in schemas if not row["writable"]]
    if not makes_schemas and len(closed) == len(schemas):
        raise ConnectorRefused(
            "the role may make neither schemas in the database nor tables in those it has: grant it CREATE on one",
            code="permission_denied",
        )
    if not closed:
        return ()
    more = f" and {len(closed) - SCHEMAS_NAMED_MAX} more" if len(closed) > SCHEMAS_NAMED_MAX else ""
    named = ", ".join(closed[:SCHEMAS_NAMED_MAX])
    return [f"the role may not make tables in these schemas, so streams that go there will fail: {named}{more}"]


async def _refuse_unwritable_schema(connection: "asyncpg.Connection[Any]", target: Target) -> None:
    allowed = await connection.fetchval(
        """
        SELECT coalesce((SELECT has_schema_privilege(oid, 'CREATE') FROM pg_namespace WHERE nspname = $1),
                        has_database_privilege(current_database(), 'CREATE'))
        """,
        target.namespace,
    )
    if not allowed:
        raise ConnectorRefused(
            f"the role may not make tables in the destination's schema {target.namespace!r}", code="permission_denied"
        )


async def _refuse_taken_type_name(connection: "asyncpg.Connection[Any]", target: Target) -> None:
    """A table's row type has the table's name. If a table was created just now, the publication decides about it."""
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
        raise ConnectorRefused(f"the destination has a type {target}, so that no table can have that name")


@contextlib.asynccontextmanager
async def _rolled_back(connection: "asyncpg.Connection[Any]") -> AsyncIterator[None]:
    transaction = connection.transaction()
    await transaction.start()
    try:
        yield
    finally:
        await transaction.rollback()
