"""Adds staged rows to a table that stays: appended, or merged by key. One transaction, as ``publishing.py`` has it.

A merge updates the rows whose bytes differ, inserts those that the table lacks and, if the keys of all of the source's
rows were staged too, deletes or marks the others. Readers see the former rows until it commits.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import asyncpg

from libs.connectors.comparison import Comparison
from libs.connectors.postgres import description
from libs.connectors.postgres.columns import apply_changes, reconciled
from libs.connectors.postgres.connection import quoted
from libs.connectors.postgres.incoming import Incoming
from libs.connectors.postgres.locking import (
    EPOCH_WAIT_SECONDS,
    WRITERS_WAIT_SECONDS,
    LockAttempts,
    TargetChanged,
    read_committed,
)
from libs.connectors.postgres.staging import Relation
from libs.connectors.postgres.state import Published, State
from libs.connectors.postgres.target import TargetTable, look_up, refuse_foreign_rows
from libs.connectors.protocol import DELETED_AT, ConnectorRefused, RunContext, StreamPlan, Target, Written
from libs.connectors.states import StreamState

# A merge of less than this part of the table looks each row up by the index.
FEW = 20
UNIQUE_KEY = """
    SELECT EXISTS (
        SELECT FROM pg_index i CROSS JOIN LATERAL (
            SELECT array_agg(a.attname::text) AS names FROM pg_attribute a
            WHERE a.attrelid = i.indrelid AND a.attnum = ANY ((i.indkey::int2[])[0:i.indnkeyatts - 1])
        ) AS key
        WHERE i.indrelid = $1 AND i.indisunique AND i.indisvalid AND i.indpred IS NULL AND i.indexprs IS NULL
            AND i.indnkeyatts = cardinality($2::text[]) AND $2::text[] @> key.names
    )
"""


@dataclass(slots=True)
class Addition:
    """One stream's rows on their way from the staging table into a target that stays.

    Args:
        plan: the stream's, with the target as the destination's configuration places it.
        keys: the relation that holds the keys of all of the source's rows; None if no row is deleted.
        verify: compares the target with the source; None if it is not to be verified.
    """

    connection: "asyncpg.Connection[Any]"
    state: State
    context: RunContext
    incoming: Incoming
    plan: StreamPlan
    staging: Relation
    rows: int
    position: StreamState | None
    keys: Relation | None = None
    verify: Callable[[Relation], Awaitable[Comparison]] | None = None
    _attempts: LockAttempts = field(init=False)

    def __post_init__(self) -> None:
        self._attempts = LockAttempts(self.connection, self.context, self._target, self.staging)

    @property
    def _target(self) -> Target:
        return self.plan.target

    @property
    def _relation(self) -> Relation:
        return self._target.namespace, self._target.table

    @property
    def _name(self) -> str:
        return quoted(*self._relation)

    async def commit(self) -> Written:
        """Raises ``Fenced`` under a higher epoch, and ``ConnectorRefused`` for a target that can't take the rows."""
        for relation in (self.staging, self.keys):
            if relation is not None:
                await self.connection.execute(f"ANALYZE {quoted(*relation)}")
        async with read_committed(self.connection):
            return await self._attempts.until_granted(self._attempt)

    async def _attempt(self) -> Written:
        found = await look_up(self.connection, self.state, self.context, self._target)
        if found.oid is None:
            raise TargetChanged(f"{self._target} was dropped a moment ago")
        await self._attempts.set_timeout(EPOCH_WAIT_SECONDS)
        await self.state.lock_epoch(self.connection, self.context)
        # Excludes writers, but not readers.
        await self._attempts.lock_target("SHARE ROW EXCLUSIVE", WRITERS_WAIT_SECONDS)
        if await look_up(self.connection, self.state, self.context, self._target) != found:
            raise TargetChanged(f"{self._target} was changed a moment ago")
        await refuse_foreign_rows(self.connection, self.state, self.context, self._target, found)
        await self._change_columns(found)
        # With this setting PostgreSQL rejects the statements if a policy would hide rows.
        await self.connection.execute("SET LOCAL row_security = off")
        await self.connection.execute("SET CONSTRAINTS ALL DEFERRED")
        written = await (self._append() if self.plan.disposition == "append" else self._merge(found.oid))
        await self.connection.execute("SET CONSTRAINTS ALL IMMEDIATE")
        if self.verify is not None:
            comparison = await self.verify(self._relation)
            written = replace(written, verified=comparison.verified, verification=comparison.document)
        for relation in (self.staging, self.keys):
            if relation is not None:
                await self.connection.execute(f"DROP TABLE {quoted(*relation)}")
        await self.state.mark(
            self.connection, self.context, self.plan, written, await self._published(found), self.position
        )
        return written

    async def _change_columns(self, found: TargetTable) -> None:
        changes = (await reconciled(self.connection, self.plan, self.incoming.columns, self._target, found)).changes
        soft = self.plan.deletes == "soft" and not await self.connection.fetchval(
            "SELECT EXISTS (SELECT FROM pg_attribute WHERE attrelid = $1 AND attname = $2 AND NOT attisdropped)",
            found.oid,
            DELETED_AT,
        )
        if changes or soft:
            await self._attempts.lock_out_readers()
        await apply_changes(self.connection, self._target, self.incoming.columns, changes)
        if soft:
            await self.connection.execute(f"ALTER TABLE {self._name} ADD COLUMN {quoted(DELETED_AT)} timestamptz")

    async def _append(self) -> Written:
        inserted = await self._insert(f"SELECT {self._columns()} FROM {quoted(*self.staging)}")  # noqa: S608
        return Written(self.rows, inserted=inserted)

    async def _merge(self, oid: int) -> Written:
        # Without statistics of a table that was just written, the planner would read all of it for a few rows.
        few = await self.connection.fetchval(
            "SELECT pg_table_size(to_regclass($1)) * $2 < pg_table_size($3::oid::regclass)",
            quoted(*self.staging),
            FEW,
            oid,
        )
        if few:
            await self.connection.execute("SET LOCAL enable_hashjoin = off; SET LOCAL enable_mergejoin = off")
        updated = await self._update()
        inserted = await self._insert(
            f"SELECT {self._columns()} FROM {quoted(*self.staging)} AS s "  # noqa: S608
            f"WHERE NOT EXISTS (SELECT FROM {self._name} AS t WHERE {self._same_key('t', 's')})"
        )
        if few:
            await self.connection.execute("SET LOCAL enable_hashjoin = on; SET LOCAL enable_mergejoin = on")
        deleted = 0 if self.keys is None else await self._delete(self.keys)
        unchanged = max(0, self.rows - updated - inserted)
        return Written(self.rows, inserted=inserted, updated=updated, deleted=deleted, unchanged=unchanged)

    async def _insert(self, query: str) -> int:
        return _count(
            await self.connection.execute(
                f"INSERT INTO {self._name} ({self._columns()}) OVERRIDING SYSTEM VALUE {query}"
            )
        )

    async def _update(self) -> int:
        """Update the rows that differ in any byte: equality would miss that 1.0 became 1.00."""
        others = [column.name for column in self.incoming.columns if column.name not in self.incoming.primary_key]
        assignments = [f"{quoted(name)} = s.{quoted(name)}" for name in others]
        here = ", ".join(f"t.{quoted(name)}" for name in others)
        there = ", ".join(f"s.{quoted(name)}" for name in others)
        differs = [f"record_image_ne(ROW({here}), ROW({there}))"] if others else []
        if self.plan.deletes == "soft":
            assignments.append(f"{quoted(DELETED_AT)} = NULL")
            differs.append(f"t.{quoted(DELETED_AT)} IS NOT NULL")
        if not assignments:
            return 0
        return _count(
            await self.connection.execute(
                f"UPDATE {self._name} AS t SET {', '.join(assignments)} FROM {quoted(*self.staging)} AS s "  # noqa: S608
                f"WHERE {self._same_key('t', 's')} AND ({' OR '.join(differs)})"
            )
        )

    async def _delete(self, keys: Relation) -> int:
        missing = f"NOT EXISTS (SELECT FROM {quoted(*keys)} AS k WHERE {self._same_key('t', 'k')})"
        if self.plan.deletes == "hard":
            return _count(await self.connection.execute(f"DELETE FROM {self._name} AS t WHERE {missing}"))  # noqa: S608
        marked = quoted(DELETED_AT)
        return _count(
            await self.connection.execute(
                f"UPDATE {self._name} AS t SET {marked} = now() WHERE t.{marked} IS NULL AND {missing}"  # noqa: S608
            )
        )

    def _columns(self) -> str:
        return ", ".join(quoted(column.name) for column in self.incoming.columns)

    def _same_key(self, one: str, other: str) -> str:
        return " AND ".join(f"{one}.{quoted(name)} = {other}.{quoted(name)}" for name in self.incoming.primary_key)

    async def _published(self, found: TargetTable) -> Published:
        columns = tuple(column.name for column in self.incoming.columns)
        if found.kept:
            return Published(columns, found.published.description if found.published else {})
        assert found.oid is not None, "the target exists"
        return Published(columns, await description.describe(self.connection, found.oid))


async def refuse_without_key(
    connection: "asyncpg.Connection[Any]", plan: StreamPlan, key: Sequence[str], target: Target, found: TargetTable
) -> None:
    """Refuse a merge that can't tell which row is which."""
    if not key:
        raise ConnectorRefused(
            f"{plan.stream}: rows can't be merged, because the stream has no primary key among its columns: name one "
            "with primary_key, select append_mode, or choose the mode full_refresh",
            code="key_needed",
        )
    if found.oid is not None and not await connection.fetchval(UNIQUE_KEY, found.oid, list(key)):
        raise ConnectorRefused(
            f"the destination's table {target} has no unique index on ({', '.join(key)}), by which rows are merged: "
            "add one, or clear the stream's destination to load it again",
            code="key_needed",
        )


def _count(status: str) -> int:
    """The number in a command tag such as ``UPDATE 42``."""
    return int(status.rsplit(" ", 1)[1])
