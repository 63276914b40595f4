"""One exported snapshot for a whole run, shared by several connections (``pg_export_snapshot``)."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

import asyncpg

from libs.connectors.postgres.config import PostgresSourceConfig
from libs.connectors.postgres.connection import CONNECT_TIMEOUT_SECONDS, close, connect, quoted, translated
from libs.connectors.postgres.discovery import primary_keys
from libs.connectors.postgres.failures import hidden_by_row_security, message_of, sqlstate_of
from libs.connectors.postgres.incremental import OpenTransactions, incremental_reading
from libs.connectors.postgres.long_rows import LongRowsTurn
from libs.connectors.postgres.relations import leaves_of, lock_relation, refuse_changed
from libs.connectors.postgres.table import (
    Part,
    PostgresTable,
    Rows,
    chosen_columns,
    filter_condition,
    reading_failed,
    select_list,
)
from libs.connectors.postgres.types import Column, columns_of
from libs.connectors.protocol import ConnectorRefused, ConnectorUnavailable, StreamPlan

if TYPE_CHECKING:
    from libs.connectors.postgres.binary import RowBuffer

ROLLBACK_TIMEOUT_SECONDS = 5
# SQLSTATEs that begin so are of lost and terminated connections.
_CONNECTION_LOST = ("57P", "080")


class PostgresSnapshot:
    """The database at one moment: one connection holds the snapshot and reads, further ones import it.

    Attributes:
        row_buffers: buffers that no COPY is using, for reuse.
    """

    def __init__(
        self,
        config: PostgresSourceConfig,
        holder: "asyncpg.Connection[Any]",
        exported: str,
        stack: contextlib.AsyncExitStack,
        transactions: OpenTransactions,
    ) -> None:
        self.config = config
        self.exported = exported
        self._holder = holder
        self._holding = asyncio.Lock()
        self._readers = asyncio.Semaphore(config.max_threads)
        self._stack = stack
        self._transactions = transactions
        self._idle: list[asyncpg.Connection[Any]] = []
        self.row_buffers: list[RowBuffer] = []
        self._long_rows = asyncio.Lock()

    @property
    def server_encoding(self) -> str:
        encoding: str = self._holder.get_settings().server_encoding
        return encoding

    async def table(self, plan: StreamPlan, state: str | None = None) -> PostgresTable:
        with translated(f"the source's table {plan.stream}"):
            async with self._readers, self._held() as holder:
                relation = await lock_relation(holder, plan)
                oid = relation["oid"]
                every_column = (await columns_of(holder, [oid]))[oid]
                columns = chosen_columns(plan, every_column)
                key = plan.key or tuple((await primary_keys(holder, [oid]))[oid])
                matching = filter_condition(plan, every_column)
                warnings = await self._try_to_read(holder, plan, columns, matching)
                await refuse_changed(holder, plan, oid)
                leaves = await leaves_of(holder, relation)
                rows, position = Rows(matching), None
                if plan.mode == "incremental":
                    reading = await incremental_reading(
                        holder, plan, relation, columns, every_column, leaves, matching, state, self._transactions
                    )
                    rows, position = reading.rows, reading.position.model_dump_json()
                    warnings += reading.warnings
        return PostgresTable(self, plan, columns, _key(plan, key, columns), leaves, warnings, rows, position)

    async def is_usable(self) -> bool:
        try:
            async with self._held() as holder:
                await holder.fetchval("SELECT 1", timeout=CONNECT_TIMEOUT_SECONDS)
        except (ConnectorUnavailable, asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
            return False
        return True

    @contextlib.asynccontextmanager
    async def reader(self) -> AsyncIterator["asyncpg.Connection[Any]"]:
        """A connection that sees the snapshot, one of ``max_threads``; it is not reused after an error."""
        async with self._readers:
            if not self._holding.locked():
                async with self._held() as holder:
                    yield holder
                return
            connection = self._idle.pop() if self._idle else await self._open_reader()
            try:
                yield connection
            except BaseException:
                # Closed, not terminated: the server then cancels a running query, which would keep its locks.
                await close(connection)
                raise
            self._idle.append(connection)

    @contextlib.asynccontextmanager
    async def long_rows(self) -> AsyncIterator[LongRowsTurn]:
        """The turn of one reader, which calls ``arrived`` for every row."""
        turn = LongRowsTurn(self._long_rows)
        try:
            await turn.begin()
            yield turn
        finally:
            turn.end()

    @contextlib.asynccontextmanager
    async def _held(self) -> AsyncIterator["asyncpg.Connection[Any]"]:
        """The connection that holds the snapshot, in a savepoint, so that an error does not end the snapshot."""
        async with self._holding:
            try:
                savepoint = self._holder.transaction()
                await savepoint.start()
                try:
                    yield self._holder
                except BaseException:
                    await self._roll_back(savepoint)
                    raise
                await savepoint.commit()
            except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
                if self._holder.is_closed() or sqlstate_of(error)[:3] in _CONNECTION_LOST:
                    raise _snapshot_lost(error) from error
                raise

    async def _roll_back(self, savepoint: "asyncpg.transaction.Transaction") -> None:
        """In bounded time: if the server does not respond, the snapshot is given up."""
        try:
            async with asyncio.timeout(ROLLBACK_TIMEOUT_SECONDS):
                await savepoint.rollback()
        except (TimeoutError, OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            self._holder.terminate()

    async def _open_reader(self) -> "asyncpg.Connection[Any]":
        connection = await connect(self.config, application_name="datasync read", retries=self.config.retry_count)
        self._stack.push_async_callback(close, connection)
        with translated("the source"):
            await connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
            try:
                await connection.execute(f"SET TRANSACTION SNAPSHOT '{self.exported}'")
            except asyncpg.PostgresError as error:
                raise _snapshot_lost(error) from error
        return connection

    async def _try_to_read(
        self, holder: "asyncpg.Connection[Any]", plan: StreamPlan, columns: Sequence[Column], matching: str | None
    ) -> tuple[str, ...]:
        """Run the query without rows: missing privileges, policies and unpopulated views fail before the first row.

        Returns:
            Warnings.
        """
        table = quoted(plan.stream.namespace, plan.stream.name)
        probe = f"{select_list(columns)} {Part(table, conditions=(matching,) if matching else ()).from_clause} LIMIT 0"
        try:
            async with holder.transaction():
                await holder.execute(f"SET LOCAL row_security = off; {probe}")
        except asyncpg.PostgresError as error:
            if not hidden_by_row_security(error) or self.config.row_security != "filtered":
                raise reading_failed(error, plan) from error
        else:
            await holder.execute(f"SET LOCAL row_security = {self.config.session_settings()['row_security']}")
            return ()
        try:
            await holder.execute(probe)
        except asyncpg.PostgresError as error:
            raise reading_failed(error, plan) from error
        return (
            f"{plan.stream}: row-level security applies: only the rows that the role {self.config.username!r} may see "
            "are read, as the source's configuration (row_security: filtered) allows",
        )


def _key(plan: StreamPlan, key: Sequence[str], columns: Sequence[Column]) -> tuple[str, ...]:
    """The key under the target's names; a key that the plan names has to be read."""
    names = {column.source_name: column.name for column in columns}
    if plan.key and (missing := [name for name in key if name not in names]):
        raise ConnectorRefused(f"{plan.stream}: the key names {missing[0]!r}, which is not a chosen column")
    return tuple(names[name] for name in key) if names.keys() >= set(key) else ()


def _snapshot_lost(error: Exception) -> ConnectorUnavailable:
    """A new snapshot is of another moment, so uncommitted streams are read again from the start."""
    return ConnectorUnavailable(f"the source's snapshot was lost: {message_of(error)}", code="snapshot_lost")
