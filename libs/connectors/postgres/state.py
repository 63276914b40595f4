"""What DataSync records in the destination database.

``_datasync_state`` has a row for each job with its epoch, which every commit locks and compares, so that a fenced
worker can't commit. ``_datasync_streams`` has the marker of each stream's last commit, written in that commit.
"""

import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import asyncpg

from libs.connectors.postgres.connection import quoted
from libs.connectors.protocol import Fenced, RunContext, StreamPlan, Target, Written
from libs.connectors.states import StreamState

DEFAULT_SCHEMA = "_datasync"
CREATION_WAIT_SECONDS = 60
# "datasync" as the key of an advisory lock.
_CREATION_LOCK = int.from_bytes(b"datasync", "big")
APPLICATION_NAME = "datasync write job {job_id} epoch {epoch}"
_ADDED_COLUMNS = (
    *(("project_id", "bigint"), ("published_json", "text"), ("counts_json", "text"), ("state_json", "text")),
)
_COUNTS = ("inserted", "updated", "deleted", "unchanged")


@dataclass(frozen=True, slots=True)
class Published:
    """What a run recorded of its target.

    Args:
        columns: the columns that it wrote.
        description: of the table as DataSync created it (``description.py``); empty if DataSync did not create it, None
            if the marker does not record it.
    """

    columns: tuple[str, ...] = ()
    description: dict[str, str] | None = None


@dataclass(frozen=True, slots=True)
class State:
    """The two tables in their schema."""

    schema: str

    @property
    def _jobs(self) -> str:
        return quoted(self.schema, "_datasync_state")

    @property
    def _streams(self) -> str:
        return quoted(self.schema, "_datasync_streams")

    async def create(self, connection: "asyncpg.Connection[Any]") -> None:
        await create_schema(connection, self.schema)
        if not await connection.fetchval("SELECT to_regclass($1) IS NOT NULL", self._streams):
            async with one_at_a_time(connection):
                await self._create_tables(connection)
        await self._add_columns(connection)

    async def _create_tables(self, connection: "asyncpg.Connection[Any]") -> None:
        await connection.execute(
            f"""
            CREATE TABLE IF NOT EXISTS {self._jobs} (
                job_id bigint PRIMARY KEY, epoch bigint NOT NULL, run_id text NOT NULL, taken_at timestamptz NOT NULL
            );
            CREATE TABLE IF NOT EXISTS {self._streams} (
                job_id bigint, namespace text, name text, target_schema text NOT NULL, target_table text NOT NULL,
                run_id text NOT NULL, epoch bigint NOT NULL, row_count bigint NOT NULL, verified boolean,
                verification_json text, committed_at timestamptz NOT NULL, project_id bigint, published_json text,
                counts_json text, state_json text,
                PRIMARY KEY (job_id, namespace, name)
            )
            """
        )

    async def _add_columns(self, connection: "asyncpg.Connection[Any]") -> None:
        """Tables of earlier versions lack these columns."""
        known = await connection.fetchval(
            "SELECT array_agg(attname::text) FROM pg_attribute WHERE attrelid = to_regclass($1) AND attnum > 0",
            self._streams,
        )
        for name, kind in _ADDED_COLUMNS:
            if name not in known:
                await connection.execute(f"ALTER TABLE {self._streams} ADD COLUMN IF NOT EXISTS {name} {kind}")

    async def take_epoch(self, connection: "asyncpg.Connection[Any]", context: RunContext) -> None:
        """Record the run's epoch; raises ``Fenced`` if a higher one is recorded."""
        taken = await connection.fetchval(
            f"""
            INSERT INTO {self._jobs} AS held VALUES ($1, $2, $3, now())
            ON CONFLICT (job_id) DO UPDATE SET epoch = $2, run_id = $3, taken_at = now() WHERE held.epoch <= $2
            RETURNING epoch
            """,  # noqa: S608
            context.job_id,
            context.epoch,
            context.run_id,
        )
        if taken is None:
            raise Fenced(
                context,
                await connection.fetchval(f"SELECT epoch FROM {self._jobs} WHERE job_id = $1", context.job_id),  # noqa: S608
            )

    async def lock_epoch(self, connection: "asyncpg.Connection[Any]", context: RunContext) -> None:
        """Lock the job's row until the transaction ends; raises ``Fenced`` unless it has the run's epoch."""
        epoch = await connection.fetchval(
            f"SELECT epoch FROM {self._jobs} WHERE job_id = $1 FOR UPDATE",  # noqa: S608
            context.job_id,
        )
        if epoch != context.epoch:
            raise Fenced(context, epoch)

    async def marker(
        self, connection: "asyncpg.Connection[Any]", context: RunContext, plan: StreamPlan
    ) -> Written | None:
        """What this run has committed for the stream into this target, which may not be the job's former one."""
        row = await connection.fetchrow(
            f"""
            SELECT row_count, verified, verification_json, counts_json FROM {self._streams}
            WHERE job_id = $1 AND namespace = $2 AND name = $3 AND run_id = $4
              AND target_schema = $5 AND target_table = $6
            """,  # noqa: S608
            context.job_id,
            plan.stream.namespace,
            plan.stream.name,
            context.run_id,
            plan.target.namespace,
            plan.target.table,
        )
        if row is None:
            return None
        verification = row["verification_json"]
        # Earlier versions replaced all rows.
        counts = json.loads(row["counts_json"]) if row["counts_json"] else {"inserted": row["row_count"]}
        return Written(
            row["row_count"],
            verified=row["verified"],
            verification=None if verification is None else json.loads(verification),
            **{name: counts.get(name, 0) for name in _COUNTS},
        )

    async def position(
        self, connection: "asyncpg.Connection[Any]", context: RunContext, plan: StreamPlan
    ) -> StreamState | None:
        """The state that the job's last commit of the stream into this target recorded, None if it recorded none."""
        text = await connection.fetchval(
            f"""
            SELECT state_json FROM {self._streams}
            WHERE job_id = $1 AND namespace = $2 AND name = $3 AND target_schema = $4 AND target_table = $5
            """,  # noqa: S608
            context.job_id,
            plan.stream.namespace,
            plan.stream.name,
            plan.target.namespace,
            plan.target.table,
        )
        return None if text is None else StreamState.read(text)

    async def mark(
        self,
        connection: "asyncpg.Connection[Any]",
        context: RunContext,
        plan: StreamPlan,
        written: Written,
        published: Published,
        position: StreamState | None,
    ) -> None:
        values = {
            "job_id": context.job_id,
            "namespace": plan.stream.namespace,
            "name": plan.stream.name,
            "target_schema": plan.target.namespace,
            "target_table": plan.target.table,
            "run_id": context.run_id,
            "epoch": context.epoch,
            "row_count": written.rows,
            "verified": written.verified,
            "verification_json": None if written.verification is None else json.dumps(written.verification),
            "project_id": context.project_id,
            "published_json": json.dumps({"columns": published.columns, "description": published.description}),
            "counts_json": json.dumps({name: getattr(written, name) for name in _COUNTS}),
            "state_json": None if position is None else position.model_dump_json(),
        }
        places = ", ".join(f"${place}" for place in range(1, len(values) + 1))
        replaced = ", ".join(f"{name} = excluded.{name}" for name in list(values)[3:])
        await connection.execute(
            f"""
            INSERT INTO {self._streams} ({", ".join(values)}, committed_at) VALUES ({places}, clock_timestamp())
            ON CONFLICT (job_id, namespace, name) DO UPDATE SET {replaced}, committed_at = excluded.committed_at
            """,  # noqa: S608
            *values.values(),
        )

    async def unmark(self, connection: "asyncpg.Connection[Any]", target: Target) -> None:
        await connection.execute(
            f"DELETE FROM {self._streams} WHERE target_schema = $1 AND target_table = $2",  # noqa: S608
            target.namespace,
            target.table,
        )

    async def published(
        self, connection: "asyncpg.Connection[Any]", context: RunContext, target: Target
    ) -> Published | None:
        """What the last run that wrote the target recorded, None if none did; raises ``TargetShared``."""
        row = await connection.fetchrow(
            f"""
            SELECT job_id, project_id, published_json FROM {self._streams}
            WHERE target_schema = $1 AND target_table = $2 ORDER BY committed_at DESC LIMIT 1
            """,  # noqa: S608
            target.namespace,
            target.table,
        )
        if row is None:
            return None
        context.require_ownership(str(target), row["job_id"], row["project_id"])
        recorded = json.loads(row["published_json"] or "{}")
        return Published(tuple(recorded.get("columns", ())), recorded.get("description"))

    async def end_older_writers(self, connection: "asyncpg.Connection[Any]", context: RunContext) -> None:
        """Terminate the sessions of the job's lower epochs: a paused worker would hold its locks indefinitely."""
        await connection.execute(
            """
            SELECT pg_terminate_backend(pid) FROM pg_stat_activity
            WHERE usename = current_user AND datname = current_database() AND pid <> pg_backend_pid()
              AND application_name ~ $1 AND substring(application_name from '[0-9]+$')::bigint < $2
            """,
            "^" + APPLICATION_NAME.format(job_id=context.job_id, epoch="[0-9]+$"),
            context.epoch,
        )


async def create_schema(connection: "asyncpg.Connection[Any]", schema: str) -> None:
    """Create the schema if it does not exist; CREATE SCHEMA IF NOT EXISTS needs its privilege even if it does."""
    if not await connection.fetchval("SELECT EXISTS (SELECT FROM pg_namespace WHERE nspname = $1)", schema):
        async with one_at_a_time(connection):
            await connection.execute(f"CREATE SCHEMA IF NOT EXISTS {quoted(schema)}")


@contextlib.asynccontextmanager
async def one_at_a_time(connection: "asyncpg.Connection[Any]") -> AsyncIterator[None]:
    """A transaction that excludes other runs: concurrent CREATE statements fail even with IF NOT EXISTS."""
    async with connection.transaction():
        await connection.execute(f"SET LOCAL lock_timeout = '{CREATION_WAIT_SECONDS}s'")
        await connection.execute(f"SELECT pg_advisory_xact_lock({_CREATION_LOCK})")
        yield
