"""Publishes a staged table: one transaction with the epoch and the marker, in which readers hardly wait.

A table that is exactly what DataSync made is exchanged for the verified staging; any other is kept, and its rows are
replaced and verified within the transaction while readers go on reading the old ones.

While a session waits for an exclusive lock, PostgreSQL lets nobody else read the table. So locks are requested in
short attempts with growing pauses, and the run's log names who holds them.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import asyncpg

from libs.connectors.comparison import Comparison, DestinationChangesRows, EndsDiffer
from libs.connectors.postgres import kept, ownership
from libs.connectors.postgres.connection import quoted
from libs.connectors.postgres.ownership import Placement
from libs.connectors.postgres.source import PostgresTable
from libs.connectors.postgres.staging import Relation
from libs.connectors.postgres.state import Published, State
from libs.connectors.protocol import ConnectorRefused, ConnectorUnavailable, RunContext, StreamPlan, Target, Written

T = TypeVar("T")

# Copying again costs more than waiting.
PATIENCE_SECONDS = 1800.0
PAUSE_SECONDS_MIN = 0.1
PAUSE_SECONDS_MAX = 10.0
PAUSE_GROWTH = 1.5
TOLD_AGAIN_SECONDS = 60.0
# How long readers may have to wait: in one attempt, and in all attempts together.
READERS_WAIT_SECONDS_MAX = 0.1
READERS_WAIT_SECONDS_IN_ALL = 0.6
READERS_WAIT_SECONDS_MIN = 0.001
# Longer than deadlock_timeout, after which an automatic VACUUM gives way.
WRITERS_WAIT_SECONDS = 3.0
EPOCH_WAIT_SECONDS = 60.0
HOLDERS_NAMED_MAX = 3
IDENTIFIER_BYTES_MAX = 63

_HOLDERS = """
SELECT l.pid, a.usename, a.application_name, a.state, a.backend_type,
       extract(epoch FROM clock_timestamp() - max(a.query_start))::bigint AS query_seconds
FROM pg_locks l LEFT JOIN pg_stat_activity a ON a.pid = l.pid
WHERE l.locktype = 'relation' AND l.relation IN (SELECT to_regclass(name) FROM unnest($1::text[]) name) AND l.granted
  AND l.mode <> ALL ($2::text[])
  AND l.pid IS DISTINCT FROM pg_backend_pid()
  AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
GROUP BY 1, 2, 3, 4, 5 ORDER BY min(a.query_start) NULLS LAST
"""


class TargetChanged(Exception):
    """The target was replaced or changed since it was looked at."""


_IN_USE = (asyncpg.LockNotAvailableError, asyncpg.DeadlockDetectedError)
_CHANGED = (TargetChanged, asyncpg.DuplicateTableError)


@dataclass(slots=True)
class LockAttempts:
    """Repeats work that locks the target, and the staging table if there is one, until the locks are granted."""

    connection: "asyncpg.Connection[Any]"
    context: RunContext
    target: Target
    staging: Relation | None = None
    _readers_waited_seconds: float = 0.0
    _told_at_seconds: float = 0.0
    _told_pids: tuple[int | None, ...] = ()
    _mode: str = ""

    async def until_granted(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """Run ``attempt`` in a savepoint of the open transaction; repeat it while a lock is not granted.

        Raises:
            ConnectorUnavailable: the locks were not granted within ``PATIENCE_SECONDS``; names who holds them.
        """
        deadline = time.monotonic() + PATIENCE_SECONDS
        pause_seconds = PAUSE_SECONDS_MIN
        while True:
            holders: list[Any] = []
            try:
                async with self.connection.transaction():
                    return await attempt()
            except _CHANGED as error:
                denied: Exception = error
            except _IN_USE as error:
                denied, holders = error, await self._holders()
            if time.monotonic() > deadline:
                raise ConnectorUnavailable(
                    f"the destination's table {self.target} could not be locked in {PATIENCE_SECONDS:g} s; it is in use"
                    f" by {_names(holders) or denied}",
                    code="target_locked",
                ) from denied
            self._tell(holders, pause_seconds)
            await asyncio.sleep(pause_seconds)
            pause_seconds = min(pause_seconds * PAUSE_GROWTH, PAUSE_SECONDS_MAX)

    async def lock_target(self, mode: str, timeout_seconds: float) -> None:
        try:
            await self.lock((self.target.namespace, self.target.table), mode, timeout_seconds)
        except asyncpg.UndefinedTableError as error:
            raise TargetChanged(f"{self.target} was dropped a moment ago") from error

    async def lock_out_readers(self) -> None:
        """Lock ``ACCESS EXCLUSIVE``; while we wait for it, later readers wait as well."""
        left = READERS_WAIT_SECONDS_IN_ALL - self._readers_waited_seconds
        started = time.monotonic()
        try:
            await self.lock_target(
                "ACCESS EXCLUSIVE", max(min(left, READERS_WAIT_SECONDS_MAX), READERS_WAIT_SECONDS_MIN)
            )
        finally:
            self._readers_waited_seconds += time.monotonic() - started
        await self.set_timeout(WRITERS_WAIT_SECONDS)

    async def lock(self, relation: Relation, mode: str, timeout_seconds: float) -> None:
        self._mode = mode
        await self.set_timeout(timeout_seconds)
        await self.connection.execute(f"LOCK TABLE {quoted(*relation)} IN {mode} MODE")

    async def set_timeout(self, timeout_seconds: float) -> None:
        await self.connection.execute(f"SET LOCAL lock_timeout = '{round(timeout_seconds * 1000)}ms'")

    async def _holders(self) -> list[Any]:
        relations = [(self.target.namespace, self.target.table), *([self.staging] if self.staging else [])]
        found: list[Any] = await self.connection.fetch(
            _HOLDERS,
            [quoted(*relation) for relation in relations],
            [] if self._mode == "ACCESS EXCLUSIVE" else ["AccessShareLock", "RowShareLock"],
        )
        return found

    def _tell(self, holders: list[Any], pause_seconds: float) -> None:
        pids = tuple(row["pid"] for row in holders)
        now_seconds = time.monotonic()
        if not pids or (pids == self._told_pids and now_seconds - self._told_at_seconds < TOLD_AGAIN_SECONDS):
            return
        self._told_at_seconds, self._told_pids = now_seconds, pids
        self.context.log(
            "warning",
            f"the destination's table {self.target} is in use by {_names(holders)}: publishing is tried again in "
            f"{pause_seconds:.1f} s, and what was copied is kept",
        )


@dataclass(slots=True)
class Publication:
    """One stream's rows on their way from the staged table to the target.

    Args:
        plan: of the stream, with the target as the destination names it.
        primary_key: empty where the target gets none.
        verify: takes the relation that readers will see, compares it with the source; None when nobody asked for it.
    """

    connection: "asyncpg.Connection[Any]"
    state: State
    context: RunContext
    table: PostgresTable
    plan: StreamPlan
    primary_key: tuple[str, ...]
    staging: Relation
    rows: int
    verify: Callable[[Relation], Awaitable[Comparison]] | None
    _attempts: LockAttempts = field(init=False)
    _keyed: bool = False
    _staging_verified: Written | None = None
    _told: str | None = None

    def __post_init__(self) -> None:
        self._attempts = LockAttempts(self.connection, self.context, self._target, self.staging)

    @property
    def _target(self) -> Target:
        return self.plan.target

    @property
    def _relation(self) -> Relation:
        return self._target.namespace, self._target.table

    async def publish(self) -> Written:
        """Raises ``Fenced`` under a younger epoch, and ``ConnectorRefused`` for a target that can't take the rows."""
        place = await placement(self.connection, self.state, self.context, self._target)
        if not place.kept:
            await self._add_primary_key()
            self._keyed = True
        # Its commit flushes the copied rows to disk; otherwise readers would wait for that in the exchange.
        await self.connection.execute(f"ALTER TABLE {quoted(*self.staging)} RESET (autovacuum_enabled)")
        async with read_committed(self.connection):
            # Nobody can change what is verified from here on.
            await self._attempts.lock(self.staging, "SHARE", EPOCH_WAIT_SECONDS)
            return await self._attempts.until_granted(self._attempt)

    async def _attempt(self) -> Written:
        place = await placement(self.connection, self.state, self.context, self._target)
        if not place.kept:
            self._staging_verified = self._staging_verified or await self._written(self.staging)
        await self._attempts.set_timeout(EPOCH_WAIT_SECONDS)
        await self.state.lock_epoch(self.connection, self.context)
        await self._attempts.lock(self.staging, "ACCESS EXCLUSIVE", WRITERS_WAIT_SECONDS)
        if place.oid is not None:
            # This excludes writers and an automatic VACUUM, but not readers.
            await self._attempts.lock_target("SHARE ROW EXCLUSIVE", WRITERS_WAIT_SECONDS)
            await refuse_rows_of_others(self.connection, self._target, place)
        if place.kept:
            written = await self._replace_rows(place)
        else:
            assert self._staging_verified is not None, "what is exchanged was looked at first"
            await self._exchange(place)
            written = self._staging_verified
        published = await self._published(place)
        await self.state.mark(self.connection, self.context, self.plan, written, published)
        return written

    async def _exchange(self, place: Placement) -> None:
        if not self._keyed:
            await self._add_primary_key()
        granted = None
        if place.oid is not None:
            await self._attempts.lock_out_readers()
            await self._refuse_changed(place)
            granted = await ownership.privileges(self.connection, place.oid)
            await self.connection.execute(f"DROP TABLE {quoted(*self._relation)}")
        try:
            await self.connection.execute(f"ALTER TABLE {quoted(*self.staging)} RENAME TO {quoted(self._target.table)}")
        except asyncpg.UniqueViolationError as error:
            raise TargetChanged(f"{self._target} was made a moment ago") from error
        if self.primary_key:
            await _name_primary_key(self.connection, self._target)
        if granted is not None:
            await ownership.set_privileges(self.connection, self._target, granted)

    async def _replace_rows(self, place: Placement) -> Written:
        await self._refuse_changed(place)
        await kept.refuse_unfit(self.connection, self.table, self._target, place)
        if self._told != place.kept_because:
            self._told = place.kept_because
            message = f"{self._target} is kept and its rows are replaced: {place.kept_because}"
            if place.was_exchanged:
                self.context.log("warning", f"{message}; each run takes much longer by it than by an exchange")
            else:
                self.context.log("info", message)
        await kept.replace_rows(self.connection, self.table, self._target, self.staging, self.rows)
        written = await self._written(self._relation)
        await self.connection.execute(f"DROP TABLE {quoted(*self.staging)}")
        return written

    async def _refuse_changed(self, place: Placement) -> None:
        """Check, under the lock, that the table is still what the decision to keep or exchange it was based on."""
        if await placement(self.connection, self.state, self.context, self._target) != place:
            raise TargetChanged(f"{self._target} was changed a moment ago")

    async def _written(self, relation: Relation) -> Written:
        if self.verify is None:
            return Written(self.rows)
        try:
            comparison = await self.verify(relation)
        except EndsDiffer as error:
            culprits = await kept.changes_rows(self.connection, self._target) if relation == self._relation else None
            if culprits is None:
                raise
            message = f"{error.message}; {self._target} stays as it was, {culprits}"
            raise DestinationChangesRows(message, error.document) from error
        return Written(self.rows, comparison.verified, comparison.document)

    async def _add_primary_key(self) -> None:
        if not self.primary_key:
            return
        await self.connection.execute("SET maintenance_work_mem = '256MB'")
        columns = ", ".join(quoted(name) for name in self.primary_key)
        await self.connection.execute(f"ALTER TABLE {quoted(*self.staging)} ADD PRIMARY KEY ({columns})")

    async def _published(self, place: Placement) -> Published:
        """What the next run compares. Writing to a kept table does not make it ours."""
        columns = tuple(column.name for column in self.table.columns)
        if place.kept:
            return Published(columns, place.published.description if place.published else {})
        found = await ownership.existing(self.connection, self._target)
        return Published(columns, await ownership.describe(self.connection, found["oid"]))


async def placement(
    connection: "asyncpg.Connection[Any]", state: State, context: RunContext, target: Target
) -> Placement:
    """Raises ``TargetShared`` for the target of another job."""
    published = await state.published(connection, context, target)
    found = await ownership.existing(connection, target)
    if found is None:
        return Placement()
    if found["relkind"] not in (b"r", b"p"):
        raise ConnectorRefused(f"the destination has {target}, which is not a table")
    because = await ownership.why_kept(connection, found["oid"], published)
    return Placement(found["oid"], found["relkind"], published, because)


async def refuse_rows_of_others(connection: "asyncpg.Connection[Any]", target: Target, place: Placement) -> None:
    if place.published is not None:
        return
    name = quoted(target.namespace, target.table)
    if await connection.fetchval(f"SELECT EXISTS (SELECT FROM {name})"):  # noqa: S608
        raise ConnectorRefused(
            f"the destination has a table {target} with rows that DataSync did not write: "
            "empty it, drop it or choose another destination table",
            code="table_not_ours",
        )


async def clear(connection: "asyncpg.Connection[Any]", state: State, context: RunContext, target: Target) -> None:
    """Drop the target if it is exactly what DataSync made, else remove the rows that the job wrote."""
    attempts = LockAttempts(connection, context, target)

    async def attempt() -> None:
        place = await placement(connection, state, context, target)
        await attempts.set_timeout(EPOCH_WAIT_SECONDS)
        await state.lock_epoch(connection, context)
        if place.oid is not None and place.published is not None:
            await attempts.lock_target("SHARE ROW EXCLUSIVE", WRITERS_WAIT_SECONDS)
            if not place.kept:
                await attempts.lock_out_readers()
            if await placement(connection, state, context, target) != place:
                raise TargetChanged(f"{target} was changed a moment ago")
            verb = "DELETE FROM" if place.kept else "DROP TABLE"
            await connection.execute(f"{verb} {quoted(target.namespace, target.table)}")
        await state.unmark(connection, target)

    async with read_committed(connection):
        await attempts.until_granted(attempt)


@contextlib.asynccontextmanager
async def read_committed(connection: "asyncpg.Connection[Any]") -> AsyncIterator[None]:
    """A transaction that sees what was committed before it got a lock, whatever the role's default isolation is."""
    async with connection.transaction(isolation="read_committed"):
        yield


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


def _names(holders: list[Any]) -> str:
    return ", ".join(_holder(row) for row in holders[:HOLDERS_NAMED_MAX])


def _holder(row: Any) -> str:
    if row["pid"] is None:
        return "a prepared transaction"
    what = row["backend_type"] if row["backend_type"] not in (None, "client backend") else None
    what = what or f"user {row['usename']}, application {row['application_name']!r}"
    if row["query_seconds"] is None:
        return f"pid {row['pid']} ({what})"
    doing = "its query began" if row["state"] == "active" else f"{row['state']}, its last query began"
    return f"pid {row['pid']} ({what}, {doing} {row['query_seconds']} s ago)"
