"""PostgreSQL as a destination: rows are copied into a staging table, which is published in one transaction."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import asyncpg

from libs.connectors.comparison import Comparison, no_target, why_not_comparable
from libs.connectors.concurrency import share_out
from libs.connectors.postgres import publishing, replacement
from libs.connectors.postgres.columns import reconciled
from libs.connectors.postgres.config import CONNECTION_PARAMETERS, PostgresDestinationConfig
from libs.connectors.postgres.connection import close, connect, quoted, translated
from libs.connectors.postgres.enums import refuse_unfit_enums
from libs.connectors.postgres.failures import failure
from libs.connectors.postgres.incoming import Incoming, incoming_of
from libs.connectors.postgres.lineage import Lineage
from libs.connectors.postgres.merging import Addition, refuse_without_key
from libs.connectors.postgres.publishing import Publication, changing
from libs.connectors.postgres.staging import (
    LOCK_TIMEOUT_SECONDS,
    Relation,
    create_staging,
    drop_staging,
    staging_of,
    sweep,
)
from libs.connectors.postgres.state import APPLICATION_NAME, DEFAULT_SCHEMA, State, create_schema
from libs.connectors.postgres.target import (
    TargetTable,
    look_up,
    refuse_foreign_rows,
    refuse_names,
    refuse_taken_type_name,
    refuse_unwritable_schema,
    relation_at,
)
from libs.connectors.protocol import (
    ConnectorRefused,
    ConnectorUnavailable,
    Preparation,
    Progress,
    RunContext,
    StreamName,
    StreamPlan,
    Table,
    Target,
    Uncounted,
    Written,
)
from libs.connectors.states import StreamState

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
    """The database opened for one run. Each stream has a connection that prepares and commits; others copy."""

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
        self._controls: dict[StreamName | None, asyncpg.Connection[Any]] = {}
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

    async def state(self, plan: StreamPlan) -> StreamState | None:
        target = self._target(plan)
        with translated(f"the destination's table {target}"):
            connection = await self._controlling()
            if await relation_at(connection, target) is None:
                return None
            return await self._state.position(connection, self._context, self._placed(plan))

    async def prepare(self, table: Table) -> Preparation:
        incoming = incoming_of(table)
        plan, target = self._placed(table.plan), self._target(table.plan)
        refuse_names(target)
        self._refuse_second_stream(plan.stream, target)
        with translated(f"the destination's table {target}"):
            connection = await self._controlling()
            await refuse_unwritable_schema(connection, target)
            await _refuse_missing_types(connection, incoming)
            await refuse_unfit_enums(connection, incoming.columns, target.namespace)
            found = await look_up(connection, self._state, self._context, target)
            if incoming.origin is not None:
                await self._lineage.add(connection, incoming.origin, target, found.oid)
                self._lineage.refuse_own_source(incoming.origin, target)
            if plan.disposition == "merge":
                await refuse_without_key(connection, plan, await self._primary_key(incoming), target, found)
            if found.oid is None:
                await refuse_taken_type_name(connection, target)
                return Preparation()
            return await self._prepare_for(connection, incoming, plan, found)

    async def _prepare_for(
        self, connection: "asyncpg.Connection[Any]", incoming: Incoming, plan: StreamPlan, found: TargetTable
    ) -> Preparation:
        """Check a target that exists."""
        target = plan.target
        await refuse_foreign_rows(connection, self._state, self._context, target, found)
        result = await reconciled(connection, plan, incoming.columns, target, found)
        columns = [column for column in incoming.columns if column.name not in result.left_out]
        if plan.disposition != "replace":
            await replacement.refuse_unfit_to_add(connection, columns, target, found, changing(result.changes))
        elif found.kept:
            await replacement.refuse_unfit(connection, columns, target, found, changing(result.changes))
        return Preparation(True, result.changes, result.left_out)

    async def write(
        self, table: Table, progress: Progress, *, state: StreamState | None = None, keys: Table | None = None
    ) -> Written:
        incoming, target = incoming_of(table), self._target(table.plan)
        if incoming.origin is not None:
            # Again, because streams that were prepared later may read it.
            self._lineage.refuse_own_source(incoming.origin, target)
        staging, key_staging = staging_of(self._context, target), staging_of(self._context, target, "keys")
        where = f"the destination's table {target}"
        stream = table.plan.stream
        try:
            rows = await self._stage(incoming, staging, progress, where)
            if keys is not None:
                await self._stage(incoming_of(keys), key_staging, Uncounted(progress), where)
            progress.loaded()
            with translated(where):
                changed = await incoming.values_changed()
                written = await self._commit(incoming, state, staging, rows, None if keys is None else key_staging)
                return replace(written, values_changed=changed)
        except BaseException:
            await self._clean_up(stream, staging, *([] if keys is None else [key_staging]))
            raise
        finally:
            self._release(stream)

    async def compare(self, table: Table) -> Comparison:
        incoming, target = incoming_of(table), self._target(table.plan)
        relation = (target.namespace, target.table)
        with translated(f"the destination's table {target}"):
            connection = await self._controlling()
            await self._state.published(connection, self._context, target)
            if await relation_at(connection, target) is None:
                return no_target(target)
            async with connection.transaction(isolation="repeatable_read", readonly=True):
                return await incoming.compare(connection, relation, circumstances="")

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

    async def _controlling(self, stream: StreamName | None = None) -> "asyncpg.Connection[Any]":
        """The connection that prepares and, for a stream, commits; reopened after it was lost."""
        control = self._controls.get(stream)
        if control is None or control.is_closed():
            control = self._controls[stream] = self._idle.pop() if self._idle else await self._open_connection()
        return control

    def _release(self, stream: StreamName) -> None:
        control = self._controls.pop(stream, None)
        if control is not None and not control.is_closed() and not control.is_in_transaction():
            self._idle.append(control)

    async def _open_connection(self) -> "asyncpg.Connection[Any]":
        connection = await connect(
            self._config, application_name=self._application_name, retries=self._config.retry_count
        )
        self._stack.push_async_callback(close, connection)
        return connection

    async def _stage(self, incoming: Incoming, staging: Relation, progress: Progress, where: str) -> int:
        """Copy the rows into a new staging table; returns their number."""
        with translated(where):
            await create_staging(await self._controlling(incoming.plan.stream), incoming.columns, staging)
        total = 0

        async def copy(parts: Iterator[Any]) -> None:
            nonlocal total
            async with self._writer() as connection:
                for part in parts:
                    rows = await incoming.copy(part, connection, staging, progress, lambda error: failure(error, where))
                    progress.add(rows_read=rows, rows_written=rows)
                    total += rows

        await share_out(incoming.parts(), min(self._config.max_threads, incoming.connections_max), copy)
        return total

    @contextlib.asynccontextmanager
    async def _writer(self) -> AsyncIterator["asyncpg.Connection[Any]"]:
        connection = self._idle.pop() if self._idle else await self._open_connection()
        try:
            # The commit that publishes the rows also makes them durable.
            await connection.execute("SET synchronous_commit = off")
            yield connection
            await connection.execute("RESET synchronous_commit")
        except BaseException:
            await close(connection)
            raise
        self._idle.append(connection)

    async def _commit(
        self,
        incoming: Incoming,
        position: StreamState | None,
        staging: Relation,
        rows: int,
        keys: Relation | None,
    ) -> Written:
        plan = self._placed(incoming.plan)
        connection = await self._controlling(plan.stream)
        found = await look_up(connection, self._state, self._context, plan.target)
        if plan.disposition == "replace" or found.oid is None:
            return await self._publish(connection, incoming, plan, staging, rows, position)
        return await self._add(connection, incoming, plan, staging, rows, position, keys)

    async def _publish(
        self,
        connection: "asyncpg.Connection[Any]",
        incoming: Incoming,
        plan: StreamPlan,
        staging: Relation,
        rows: int,
        position: StreamState | None,
    ) -> Written:
        """Put the staged rows in the place of the target, which may not exist yet."""
        publication = Publication(
            connection=connection,
            state=self._state,
            context=self._context,
            incoming=incoming,
            plan=plan,
            primary_key=() if plan.disposition == "append" else await self._primary_key(incoming),
            staging=staging,
            rows=rows,
            position=position,
            verify=None,
        )
        if not self._context.verify:
            return await self._committed_by(connection, plan, publication.publish)
        # The source hashes its rows meanwhile, so that the target is not locked for as long.
        async with incoming.expecting(connection) as expecting:
            publication.verify = partial(incoming.compare, connection, expecting=expecting)
            return await self._committed_by(connection, plan, publication.publish)

    async def _add(
        self,
        connection: "asyncpg.Connection[Any]",
        incoming: Incoming,
        plan: StreamPlan,
        staging: Relation,
        rows: int,
        position: StreamState | None,
        keys: Relation | None,
    ) -> Written:
        """Append the staged rows to the target, or merge them into it."""
        verify, reason = None, None
        if self._context.verify:
            reason = why_not_comparable(plan, is_complete=keys is not None)
            verify = None if reason else partial(incoming.compare, connection)
        addition = Addition(
            connection=connection,
            state=self._state,
            context=self._context,
            incoming=incoming,
            plan=plan,
            staging=staging,
            rows=rows,
            position=position,
            keys=keys,
            verify=verify,
        )
        written = await self._committed_by(connection, plan, addition.commit)
        return replace(written, verification={"comparable": False, "reason": reason}) if reason else written

    async def _committed_by(
        self,
        connection: "asyncpg.Connection[Any]",
        plan: StreamPlan,
        commit: Callable[[], Awaitable[Written]],
    ) -> Written:
        try:
            return await commit()
        except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
            if not connection.is_closed() and isinstance(error, asyncpg.PostgresError):
                raise
            written = await self._was_committed(plan)
            if written is None:
                raise
            return written

    async def _was_committed(self, plan: StreamPlan) -> Written | None:
        """Read the marker after a lost connection; locking the epoch waits for the end of that transaction."""
        connection = await self._controlling(plan.stream)
        async with connection.transaction():
            await self._state.lock_epoch(connection, self._context)
            return await self._state.marker(connection, self._context, plan)

    async def _primary_key(self, incoming: Incoming) -> tuple[str, ...]:
        is_inherited = incoming.origin is not None and (await self._lineage.origin(incoming.origin)).inherited
        if incoming.primary_key and is_inherited:
            self._context.log(
                "info",
                f"{incoming.plan.stream}: the target gets no primary key, because tables inherit from the source's "
                "table and a primary key does not apply to their rows",
            )
            return ()
        return incoming.primary_key

    async def _clean_up(self, stream: StreamName, *relations: Relation) -> None:
        """In bounded time; a table that is left is dropped by a later run."""
        for relation in relations:
            try:
                async with asyncio.timeout(LOCK_TIMEOUT_SECONDS * 2):
                    await drop_staging(await self._controlling(stream), relation)
            except (
                TimeoutError,
                OSError,
                asyncpg.PostgresError,
                asyncpg.InterfaceError,
                ConnectorUnavailable,
            ) as error:
                self._context.log(
                    "warning",
                    f"could not drop the staging table {'.'.join(relation)}; a later run drops it: {error}",
                )


def _without_application_name(config: PostgresDestinationConfig) -> PostgresDestinationConfig:
    """The next epoch finds and ends a writer's sessions by the application name that DataSync sets."""
    others = {
        name: value
        for name, value in config.jdbc_url_params.items()
        if CONNECTION_PARAMETERS[name] != "application_name"
    }
    return config.model_copy(update={"jdbc_url_params": others})


async def _refuse_missing_types(connection: "asyncpg.Connection[Any]", incoming: Incoming) -> None:
    for column in incoming.columns:
        innermost = column.type.element or column.type
        if innermost.built_in or innermost.kind == "enum":
            continue
        name = quoted(innermost.schema, innermost.name)
        if not await connection.fetchval("SELECT to_regtype($1) IS NOT NULL", name):
            raise ConnectorRefused(
                f"{incoming.plan.stream}: column {column.name!r} is of type {column.type.sql}, which the destination "
                f"does not have: create the type {innermost.schema}.{innermost.name} there or leave the column out",
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
