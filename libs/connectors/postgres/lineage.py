"""Which relations a run reads, so that a run does not write to a table that it reads: it would wait for itself."""

from dataclasses import dataclass, field
from typing import Any

import asyncpg

from libs.connectors.postgres.connection import quoted
from libs.connectors.postgres.table import PostgresTable
from libs.connectors.protocol import ConnectorRefused, StreamName, Target


@dataclass(frozen=True, slots=True)
class Database:
    """The identity of a database, whichever address it is reached by.

    Args:
        cluster: the system identifier, None if the role may not read it.
    """

    cluster: str | None
    started_at: str
    standby: bool
    oid: int

    def same_as(self, other: "Database") -> bool:
        """A standby is its primary; a copy of a cluster's files has the same identifier and is another database."""
        if self.oid != other.oid or self.cluster != other.cluster:
            return False
        return self.started_at == other.started_at or (self.cluster is not None and self.standby != other.standby)


@dataclass(frozen=True, slots=True)
class Origin:
    """What a stream is read from: a table and its children.

    Args:
        inherited: other tables inherit from it, so that its primary key does not apply to all rows.
    """

    database: Database
    relations: frozenset[int]
    inherited: bool


@dataclass(slots=True)
class Lineage:
    """The origins and targets of a run's streams, added as the streams are prepared."""

    _origins: dict[StreamName, Origin] = field(default_factory=dict)
    _targets: dict[Target, tuple[Database, int]] = field(default_factory=dict)

    async def origin(self, table: PostgresTable) -> Origin:
        stream = table.plan.stream
        if stream not in self._origins:
            try:
                async with table.snapshot.reader() as connection:
                    self._origins[stream] = await _origin(connection, table)
            except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
                raise table.failed(error) from error
        return self._origins[stream]

    async def add(
        self, connection: "asyncpg.Connection[Any]", table: PostgresTable, target: Target, oid: int | None
    ) -> None:
        """Add a stream and its target; ``oid`` is None if the target does not exist yet."""
        await self.origin(table)
        if oid is not None:
            self._targets[target] = await _database(connection), oid

    def refuse_own_source(self, table: PostgresTable, target: Target) -> None:
        """Refuse a stream whose target the run reads, and one that reads a target of the run."""
        for stream, origin in self._origins.items():
            for written, (database, relation) in self._targets.items():
                concerned = written == target or stream == table.plan.stream
                if concerned and relation in origin.relations and database.same_as(origin.database):
                    raise ConnectorRefused(
                        f"the destination's table {written} is the table that the stream {stream} is read from: "
                        "choose another destination table",
                        code="target_is_source",
                    )


async def _origin(connection: "asyncpg.Connection[Any]", table: PostgresTable) -> Origin:
    row = await connection.fetchrow(
        """
        WITH RECURSIVE family AS (
            SELECT to_regclass($1)::oid AS oid
            UNION SELECT inhrelid FROM pg_inherits JOIN family ON inhparent = family.oid
        )
        SELECT array_agg(oid) AS relations, (SELECT relkind FROM pg_class WHERE oid = to_regclass($1)) AS kind
        FROM family
        """,
        quoted(*table.name),
    )
    assert row is not None, "an aggregate without groups has one row"
    relations = frozenset(row["relations"])
    return Origin(await _database(connection), relations, row["kind"] == b"r" and len(relations) > 1)


async def _database(connection: "asyncpg.Connection[Any]") -> Database:
    row = await connection.fetchrow(
        """
        SELECT has_function_privilege('pg_control_system()', 'EXECUTE') AS readable, pg_is_in_recovery() AS standby,
               pg_postmaster_start_time()::text AS started_at,
               (SELECT oid FROM pg_database WHERE datname = current_database()) AS oid
        """
    )
    assert row is not None, "a query without FROM has one row"
    cluster = None
    if row["readable"]:
        cluster = await connection.fetchval("SELECT system_identifier::text FROM pg_control_system()")
    return Database(cluster, row["started_at"], row["standby"], row["oid"])
