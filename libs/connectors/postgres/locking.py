"""Locks on a target that others use.

While a session waits for an exclusive lock, every later reader of the table waits behind it. So locks are requested in
short attempts with growing pauses, and the run's log names the sessions that hold conflicting ones.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import asyncpg

from libs.connectors.postgres.connection import quoted
from libs.connectors.postgres.staging import Relation
from libs.connectors.protocol import ConnectorUnavailable, RunContext, Target

T = TypeVar("T")

# To copy the rows again would cost more than to wait.
PATIENCE_SECONDS = 1800.0
PAUSE_SECONDS_MIN = 0.1
PAUSE_SECONDS_MAX = 10.0
PAUSE_GROWTH = 1.5
LOGGED_AGAIN_SECONDS = 60.0
# How long one attempt, and all attempts together, may make readers wait.
READERS_WAIT_SECONDS_MAX = 0.1
READERS_WAIT_SECONDS_TOTAL = 0.6
READERS_WAIT_SECONDS_MIN = 0.001
# Longer than deadlock_timeout, after which autovacuum gives way.
WRITERS_WAIT_SECONDS = 3.0
EPOCH_WAIT_SECONDS = 60.0
HOLDERS_NAMED_MAX = 3

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
    """The target was replaced or changed after it was looked up: the attempt is repeated."""


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
    _logged_at_seconds: float = 0.0
    _logged_pids: tuple[int | None, ...] = ()
    _mode: str = ""

    async def until_granted(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """Run ``attempt`` in a savepoint of the open transaction; repeat it if a lock is not granted.

        Raises:
            ConnectorUnavailable: the locks were not granted within ``PATIENCE_SECONDS``; names their holders.
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
                    f"the destination's table {self.target} could not be locked within {PATIENCE_SECONDS:g} s because "
                    f"it is in use by {_names(holders) or denied}: end that session or run the job when it has ended",
                    code="target_locked",
                ) from denied
            self._log(holders, pause_seconds)
            await asyncio.sleep(pause_seconds)
            pause_seconds = min(pause_seconds * PAUSE_GROWTH, PAUSE_SECONDS_MAX)

    async def lock_target(self, mode: str, timeout_seconds: float) -> None:
        try:
            await self.lock((self.target.namespace, self.target.table), mode, timeout_seconds)
        except asyncpg.UndefinedTableError as error:
            raise TargetChanged(f"{self.target} was dropped a moment ago") from error

    async def lock_out_readers(self) -> None:
        """Lock ``ACCESS EXCLUSIVE``, waiting no longer than readers may be made to wait."""
        left = READERS_WAIT_SECONDS_TOTAL - self._readers_waited_seconds
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

    def _log(self, holders: list[Any], pause_seconds: float) -> None:
        pids = tuple(row["pid"] for row in holders)
        now_seconds = time.monotonic()
        if not pids or (pids == self._logged_pids and now_seconds - self._logged_at_seconds < LOGGED_AGAIN_SECONDS):
            return
        self._logged_at_seconds, self._logged_pids = now_seconds, pids
        self.context.log(
            "warning",
            f"the destination's table {self.target} is in use by {_names(holders)}: publishing is retried in "
            f"{pause_seconds:.1f} s; the copied rows are kept",
        )


@contextlib.asynccontextmanager
async def read_committed(connection: "asyncpg.Connection[Any]") -> AsyncIterator[None]:
    """A transaction that sees what others committed before a lock was granted, whatever the role's default is."""
    async with connection.transaction(isolation="read_committed"):
        yield


def _names(holders: list[Any]) -> str:
    return ", ".join(_holder(row) for row in holders[:HOLDERS_NAMED_MAX])


def _holder(row: Any) -> str:
    if row["pid"] is None:
        return "a prepared transaction"
    what = row["backend_type"] if row["backend_type"] not in (None, "client backend") else None
    what = what or f"user {row['usename']}, application {row['application_name']!r}"
    if row["query_seconds"] is None:
        return f"pid {row['pid']} ({what})"
    state = "query started" if row["state"] == "active" else f"{row['state']}, last query started"
    return f"pid {row['pid']} ({what}, {state} {row['query_seconds']} s ago)"
