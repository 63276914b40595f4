"""PostgreSQL as a source: the connection test, discovery, and the snapshot that a run reads from."""

import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

import asyncpg

from libs.connectors.postgres.config import PostgresSourceConfig
from libs.connectors.postgres.connection import CONNECT_TIMEOUT_SECONDS, close, connect, translated
from libs.connectors.postgres.discovery import discover
from libs.connectors.postgres.incremental import open_transactions
from libs.connectors.postgres.snapshot import PostgresSnapshot
from libs.connectors.protocol import CatalogEntry, ConnectorRefused


class PostgresSource:
    def __init__(self, config: PostgresSourceConfig) -> None:
        self._config = config

    async def check(self) -> Sequence[str]:
        async with self._connected("datasync check") as connection:
            await connection.fetchval(
                "SELECT count(*) FROM pg_namespace WHERE has_schema_privilege(oid, 'USAGE')",
                timeout=CONNECT_TIMEOUT_SECONDS,
            )
            await _refuse_missing_schemas(connection, self._config.schemas)
        return ()

    async def discover(self) -> list[CatalogEntry]:
        async with self._connected("datasync discover") as connection:
            await _refuse_missing_schemas(connection, self._config.schemas)
            return await discover(connection, self._config.schemas)

    @contextlib.asynccontextmanager
    async def snapshot(self) -> AsyncIterator[PostgresSnapshot]:
        holder = await connect(self._config, application_name="datasync snapshot", retries=self._config.retry_count)
        try:
            with translated("the source"):
                transactions = await open_transactions(holder)
                # Started through the driver: transactions within it become savepoints, so that an error does not abort
                # the snapshot's transaction.
                await holder.transaction(isolation="repeatable_read", readonly=True).start()
                exported = await holder.fetchval("SELECT pg_export_snapshot()")
            async with contextlib.AsyncExitStack() as stack:
                yield PostgresSnapshot(self._config, holder, exported, stack, transactions)
        finally:
            await close(holder)

    @contextlib.asynccontextmanager
    async def _connected(self, application_name: str) -> AsyncIterator["asyncpg.Connection[Any]"]:
        connection = await connect(self._config, application_name=application_name)
        try:
            with translated("the source"):
                yield connection
        finally:
            await close(connection)


async def _refuse_missing_schemas(connection: "asyncpg.Connection[Any]", schemas: Sequence[str]) -> None:
    missing = await connection.fetchval(
        "SELECT name FROM unnest($1::text[]) AS name WHERE to_regnamespace(quote_ident(name)) IS NULL LIMIT 1",
        list(schemas),
    )
    if missing is not None:
        raise ConnectorRefused(f"schemas: the database has no schema {missing!r}")
