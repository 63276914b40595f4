"""Publishes a staged table: one transaction puts its rows in place, checks the epoch and records the marker.

A table that is swapped (``target.py``) is verified before it is swapped, so that readers wait for the swap alone. The
rows of a table that is kept are replaced and verified within the transaction, and readers see the old rows until it
commits.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import asyncpg

from libs.connectors.comparison import Comparison, DestinationChangesRows, EndsDiffer
from libs.connectors.postgres import description, replacement
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
from libs.connectors.postgres.target import (
    IDENTIFIER_BYTES_MAX,
    TargetTable,
    look_up,
    privileges,
    refuse_foreign_rows,
    relation_at,
    set_privileges,
)
from libs.connectors.protocol import RunContext, StreamPlan, Target, Written
from libs.connectors.schema_changes import SchemaChange
from libs.connectors.states import StreamState


@dataclass(slots=True)
class Publication:
    """One stream's rows on their way from the staging table to the target.

    Args:
        plan: the stream's, with the target as the destination's configuration places it.
        primary_key: empty if the target gets none.
        position: committed with the rows.
        verify: compares a relation with the source; None if no verification was requested.
    """

    connection: "asyncpg.Connection[Any]"
    state: State
    context: RunContext
    incoming: Incoming
    plan: StreamPlan
    primary_key: tuple[str, ...]
    staging: Relation
    rows: int
    position: StreamState | None
    verify: Callable[[Relation], Awaitable[Comparison]] | None
    _attempts: LockAttempts = field(init=False)
    _keyed: bool = False
    _staging_verified: Written | None = None
    _logged: str | None = None

    def __post_init__(self) -> None:
        self._attempts = LockAttempts(self.connection, self.context, self._target, self.staging)

    @property
    def _target(self) -> Target:
        return self.plan.target

    @property
    def _relation(self) -> Relation:
        return self._target.namespace, self._target.table

    async def publish(self) -> Written:
        """Raises ``Fenced`` under a higher epoch, and ``ConnectorRefused`` for a target that can't take the rows."""
        found = await look_up(self.connection, self.state, self.context, self._target)
        if not found.kept:
            await self._add_primary_key()
            self._keyed = True
        # This commit flushes the copied rows to disk. Without it, readers would wait for that during the swap.
        await self.connection.execute(f"ALTER TABLE {quoted(*self.staging)} RESET (autovacuum_enabled)")
        async with read_committed(self.connection):
            # From here on nobody can change what is verified.
            await self._attempts.lock(self.staging, "SHARE", EPOCH_WAIT_SECONDS)
            return await self._attempts.until_granted(self._attempt)

    async def _attempt(self) -> Written:
        found = await look_up(self.connection, self.state, self.context, self._target)
        if not found.kept:
            self._staging_verified = self._staging_verified or await self._verified(self.staging)
        await self._attempts.set_timeout(EPOCH_WAIT_SECONDS)
        await self.state.lock_epoch(self.connection, self.context)
        await self._attempts.lock(self.staging, "ACCESS EXCLUSIVE", WRITERS_WAIT_SECONDS)
        if found.oid is not None:
            # Excludes writers and autovacuum, but not readers.
            await self._attempts.lock_target("SHARE ROW EXCLUSIVE", WRITERS_WAIT_SECONDS)
            await self._refuse_changed(found)
            await refuse_foreign_rows(self.connection, self.state, self.context, self._target, found)
        if found.kept:
            written = await self._replace_rows(found)
        else:
            assert self._staging_verified is not None, "the staging table is verified before it is swapped in"
            await self._swap(found)
            written = self._staging_verified
        published = await self._published(found)
        await self.state.mark(self.connection, self.context, self.plan, written, published, self.position)
        return written

    async def _swap(self, found: TargetTable) -> None:
        if not self._keyed:
            await self._add_primary_key()
        granted = None
        if found.oid is not None:
            await self._attempts.lock_out_readers()
            await self._refuse_changed(found)
            granted = await privileges(self.connection, found.oid)
            await self.connection.execute(f"DROP TABLE {quoted(*self._relation)}")
        try:
            await self.connection.execute(f"ALTER TABLE {quoted(*self.staging)} RENAME TO {quoted(self._target.table)}")
        except asyncpg.UniqueViolationError as error:
            raise TargetChanged(f"{self._target} was created a moment ago") from error
        if self.primary_key:
            await _name_primary_key(self.connection, self._target)
        if granted is not None:
            await set_privileges(self.connection, self._target, granted)

    async def _replace_rows(self, found: TargetTable) -> Written:
        columns = self.incoming.columns
        changes = (await reconciled(self.connection, self.plan, columns, self._target, found)).changes
        await replacement.refuse_unfit(self.connection, columns, self._target, found, changing(changes))
        self._log_kept(found)
        if changes:
            await self._attempts.lock_out_readers()
        await apply_changes(self.connection, self._target, columns, changes)
        await replacement.replace_rows(self.connection, columns, self._target, self.staging, self.rows)
        written = await self._verified(self._relation)
        await self.connection.execute(f"DROP TABLE {quoted(*self.staging)}")
        return written

    def _log_kept(self, found: TargetTable) -> None:
        if self._logged == found.kept_because:
            return
        self._logged = found.kept_because
        message = f"{self._target} is kept and its rows are replaced: {found.kept_because}"
        if found.was_swapped:
            self.context.log("warning", f"{message}; this takes much longer than to swap the table, in every run")
        else:
            self.context.log("info", message)

    async def _refuse_changed(self, found: TargetTable) -> None:
        """Check, under the lock, that the table is still the one for which swapping or keeping was decided."""
        if await look_up(self.connection, self.state, self.context, self._target) != found:
            raise TargetChanged(f"{self._target} was changed a moment ago")

    async def _verified(self, relation: Relation) -> Written:
        if self.verify is None:
            return Written(self.rows, inserted=self.rows)
        try:
            comparison = await self.verify(relation)
        except EndsDiffer as error:
            culprits = (
                await replacement.changes_rows(self.connection, self._target) if relation == self._relation else None
            )
            if culprits is None:
                raise
            message = (
                f"{error.message}; {self._target} is left as it was: {culprits} may change rows as they are written"
            )
            raise DestinationChangesRows(message, error.document) from error
        return Written(self.rows, inserted=self.rows, verified=comparison.verified, verification=comparison.document)

    async def _add_primary_key(self) -> None:
        if not self.primary_key:
            return
        await self.connection.execute("SET maintenance_work_mem = '256MB'")
        columns = ", ".join(quoted(name) for name in self.primary_key)
        await self.connection.execute(f"ALTER TABLE {quoted(*self.staging)} ADD PRIMARY KEY ({columns})")

    async def _published(self, found: TargetTable) -> Published:
        """What the next run compares; writing to a kept table does not make it DataSync's own."""
        columns = tuple(column.name for column in self.incoming.columns)
        if found.kept:
            return Published(columns, found.published.description if found.published else {})
        swapped_in = await relation_at(self.connection, self._target)
        return Published(columns, await description.describe(self.connection, swapped_in["oid"]))


def changing(changes: Sequence[SchemaChange]) -> frozenset[str]:
    """The columns that are about to change, so that they need not fit yet."""
    return frozenset(change.column for change in changes if change.kind != "dropped")


async def clear(connection: "asyncpg.Connection[Any]", state: State, context: RunContext, target: Target) -> None:
    """Drop a table that would be swapped; delete the rows of one that is kept."""
    attempts = LockAttempts(connection, context, target)

    async def attempt() -> None:
        found = await look_up(connection, state, context, target)
        await attempts.set_timeout(EPOCH_WAIT_SECONDS)
        await state.lock_epoch(connection, context)
        if found.oid is not None and found.published is not None:
            await attempts.lock_target("SHARE ROW EXCLUSIVE", WRITERS_WAIT_SECONDS)
            if not found.kept:
                await attempts.lock_out_readers()
            if await look_up(connection, state, context, target) != found:
                raise TargetChanged(f"{target} was changed a moment ago")
            verb = "DELETE FROM" if found.kept else "DROP TABLE"
            await connection.execute(f"{verb} {quoted(target.namespace, target.table)}")
        await state.unmark(connection, target)

    async with read_committed(connection):
        await attempts.until_granted(attempt)


async def _name_primary_key(connection: "asyncpg.Connection[Any]", target: Target) -> None:
    """Name the constraint ``<table>_pkey``, as PostgreSQL would, if that name is free."""
    name = quoted(target.namespace, target.table)
    present = await connection.fetchval(
        "SELECT conname FROM pg_constraint WHERE conrelid = to_regclass($1)::oid AND contype = 'p'", name
    )
    wanted = f"{target.table}_pkey"
    taken = await connection.fetchval("SELECT to_regclass($1) IS NOT NULL", quoted(target.namespace, wanted))
    if len(wanted.encode()) <= IDENTIFIER_BYTES_MAX and not taken:
        await connection.execute(f"ALTER TABLE {name} RENAME CONSTRAINT {quoted(present)} TO {quoted(wanted)}")
