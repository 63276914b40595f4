"""PostgreSQL as a destination: rows are copied into a staging table, which is published in one transaction."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import asyncpg

from libs.connectors.comparison import Comparison
from libs.connectors.concurrency import share_out
from libs.connectors.postgres import publishing, replacement
from libs.connectors.postgres.config import CONNECTION_PARAMETERS, PostgresDestinationConfig
from libs.connectors.postgres.connection import close, connect, quoted, translated
from libs.connectors.postgres.copying import copy_part
from libs.connectors.postgres.enums import refuse_unfit_enums
from libs.connectors.postgres.failures import failure
from libs.connectors.postgres.lineage import Lineage
from libs.connectors.postgres.publishing import Publication
from libs.connectors.postgres.staging import (
    LOCK_TIMEOUT_SECONDS,
    Relation,
    create_staging,
    drop_staging,
    staging_of,
    sweep,
)
from libs.connectors.postgres.state import APPLICATION_NAME, DEFAULT_SCHEMA, State, create_schema
from libs.connectors.postgres.table import Part, PostgresTable
from libs.connectors.postgres.target import (
    look_up,
    refuse_foreign_rows,
    refuse_names,
    refuse_taken_type_name,
    refuse_unwritable_schema,
)
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
                context.log(
                    "warning",
                    f"the destination's application_name is ignored: DataSync sets it to {application_name!r}",
                )
            run = PostgresRun(self._config, context, application_name, stack)
            with translated("the destination"):
                await run.take_epoch()
            yield run


class PostgresRun:
    """The database opened for one run. One connection prepares and commits, others copy."""

    def __init__(
        self,
        config: PostgresDestinationConfig,
        context: RunContext,
        application_name: str,
        stack: contextlib.AsyncExitStack,
    ) -> None:
        self._config = _without_application_name(config)
        self._context = context
        self._application_name = application_name
        self._stack = stack
        self._state = State(config.default_schema or DEFAULT_SCHEMA)
        self._control: asyncpg.Connection[Any] | None = None
        self._idle: list[asyncpg.Connection[Any]] = []
        self._stream_of: dict[Target, StreamName] = {}
        self._lineage = Lineage()

    async def take_epoch(self) -> None:
        """Record the epoch, end the job's older writers, drop what killed runs staged."""
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
        refuse_names(target)
        self._refuse_second_stream(table.plan.stream, target)
        with translated(f"the destination's table {target}"):
            connection = await self._controlling()
            await refuse_unwritable_schema(connection, target)
            await _refuse_missing_types(connection, pg_table)
            await refuse_unfit_enums(connection, pg_table, target.namespace)
            found = await look_up(connection, self._state, self._context, target)
            await self._lineage.add(connection, pg_table, target, found.oid)
            self._lineage.refuse_own_source(pg_table, target)
            if found.oid is None:
                await refuse_taken_type_name(connection, target)
                return
            await refuse_foreign_rows(connection, self._state, self._context, target, found)
            if found.kept:
                await replacement.refuse_unfit(connection, pg_table, target, found)

    async def write(self, table: Table, progress: Progress) -> Written:
        pg_table = _postgres_table(table)
        target = self._target(table.plan)
        # Again, because streams that were prepared later may read it.
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

    def _refuse_second_stream(self, stream: StreamName, target: Target) -> None:
        other = self._stream_of.setdefault(target, stream)
        if other != stream:
            raise ConnectorRefused(
                f"the streams {other} and {stream} are both written to {target}: give one of them another destination "
                "table",
                code="target_shared",
            )

    async def _controlling(self) -> "asyncpg.Connection[Any]":
        """The connection that prepares and commits; reopened after it was lost."""
        if self._control is None or self._control.is_closed():
            self._control = await self._open_connection()
        return self._control

    async def _open_connection(self) -> "asyncpg.Connection[Any]":
        connection = await connect(
            self._config, application_name=self._application_name, retries=self._config.retry_count
        )
        self._stack.push_async_callback(close, connection)
        return connection

    async def _load(self, table: PostgresTable, staging: Relation, progress: Progress, where: str) -> int:
        binary = all(column.type.same_in_binary for column in table.columns)
        total = 0

        async def copy(parts: Iterator[Part]) -> None:
            nonlocal total
            async with self._writer() as connection:
                for part in parts:
                    rows = await copy_part(
                        table,
                        part,
                        connection,
                        staging,
                        binary=binary,
                        bytes_read=lambda size: progress.add(bytes_read=size),
                        bytes_written=lambda size: progress.add(bytes_written=size),
                        writing_failed=lambda error: failure(error, where),
                    )
                    progress.add(rows_read=rows, rows_written=rows)
                    total += rows

        await share_out(table.parts(), min(self._config.max_threads, table.connections_max), copy)
        return total

    @contextlib.asynccontextmanager
    async def _writer(self) -> AsyncIterator["asyncpg.Connection[Any]"]:
        connection = self._idle.pop() if self._idle else await self._open_connection()
        try:
            # The commit that publishes the rows also makes them durable.
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
        # The source hashes its rows meanwhile, so that the target is not locked for as long.
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

    async def _was_committed(self, plan: StreamPlan) -> Written | None:
        """Read the marker after a lost connection; locking the epoch waits for the end of that transaction."""
        connection = await self._controlling()
        async with connection.transaction():
            await self._state.lock_epoch(connection, self._context)
            return await self._state.marker(connection, self._context, plan)

    async def _primary_key(self, table: PostgresTable) -> tuple[str, ...]:
        if table.primary_key and (await self._lineage.origin(table)).inherited:
            self._context.log(
                "info",
                f"{table.plan.stream}: the target gets no primary key, because tables inherit from the source's table "
                "and a primary key does not apply to their rows",
            )
            return ()
        return table.primary_key

    async def _clean_up(self, staging: Relation) -> None:
        """In bounded time; a table that is left is dropped by a later run."""
        try:
            async with asyncio.timeout(LOCK_TIMEOUT_SECONDS * 2):
                await drop_staging(await self._controlling(), staging)
        except (TimeoutError, OSError, asyncpg.PostgresError, asyncpg.InterfaceError, ConnectorUnavailable) as error:
            self._context.log(
                "warning", f"could not drop the staging table {'.'.join(staging)}; a later run drops it: {error}"
            )


def _without_application_name(config: PostgresDestinationConfig) -> PostgresDestinationConfig:
    """The next epoch finds and ends a writer's sessions by the application name that DataSync sets."""
    others = {
        name: value
        for name, value in config.jdbc_url_params.items()
        if CONNECTION_PARAMETERS[name] != "application_name"
    }
    return config.model_copy(update={"jdbc_url_params": others})


def _postgres_table(table: Table) -> PostgresTable:
    if not isinstance(table, PostgresTable):
        raise ConnectorRefused(f"{table.plan.stream}: a PostgreSQL destination supports PostgreSQL sources only")
    return table


async def _refuse_missing_types(connection: "asyncpg.Connection[Any]", table: PostgresTable) -> None:
    for column in table.columns:
        innermost = column.type.element or column.type
        if innermost.built_in or innermost.kind == "enum":
            continue
        name = quoted(innermost.schema, innermost.name)
        if not await connection.fetchval("SELECT to_regtype($1) IS NOT NULL", name):
            raise ConnectorRefused(
                f"{table.plan.stream}: column {column.name!r} is of type {column.type.sql}, which the destination does "
                f"not have: create the type {innermost.schema}.{innermost.name} there or leave the column out",
                code="type_not_held",
            )


async def _warnings_of_schemas(connection: "asyncpg.Connection[Any]") -> Sequence[str]:
    """The schemas that no stream can be written to; raises ``ConnectorRefused`` if there is no other."""
    creates_schemas = await connection.fetchval("SELECT has_database_privilege(current_database(), 'CREATE')")
    schemas = await connection.fetch(
        """
        SELECT nspname, has_schema_privilege(oid, 'CREATE') AS writable FROM pg_namespace
        WHERE nspname !~ '^pg_' AND nspname NOT IN ('information_schema', $1) ORDER BY nspname
        """,
        DEFAULT_SCHEMA,
    )
    closed = [row["nspname"] for row in schemas if not row["writable"]]
    if not creates_schemas and len(closed) == len(schemas):
        raise ConnectorRefused(
            "the role may create neither schemas in the database nor tables in its schemas: grant it CREATE on one of "
            "them",
            code="permission_denied",
        )
    if not closed:
        return ()
    more = f" and {len(closed) - SCHEMAS_NAMED_MAX} more" if len(closed) > SCHEMAS_NAMED_MAX else ""
    named = ", ".join(closed[:SCHEMAS_NAMED_MAX])
    return [f"the role may not create tables in these schemas, so streams written to them will fail: {named}{more}"]


@contextlib.asynccontextmanager
async def _rolled_back(connection: "asyncpg.Connection[Any]") -> AsyncIterator[None]:
    transaction = connection.transaction()
    await transaction.start()
    try:
        yield
    finally:
        await transaction.rollback()
