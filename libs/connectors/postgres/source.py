"""PostgreSQL as a source: one exported snapshot for a run, tables read in ranges of pages by several connections."""

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import asyncpg

from libs.connectors.postgres.config import PostgresSourceConfig
from libs.connectors.postgres.connection import CONNECT_TIMEOUT_SECONDS, connect, failure, quoted, translated
from libs.connectors.postgres.discovery import discover, primary_keys
from libs.connectors.postgres.types import Column, columns_of
from libs.connectors.protocol import CatalogEntry, ConnectorRefused, ConnectorUnavailable, StreamPlan

if TYPE_CHECKING:
    import pyarrow

    from libs.connectors.canonical import SourceEnd
    from libs.connectors.postgres.binary import RowBuffer

PAGE_BYTES = 8192
PART_PAGES_MIN = 2_048
PART_PAGES_MAX = 131_072
PARTS_PER_CONNECTION = 8
LOCK_TIMEOUT_SECONDS = 30
# Older servers read the whole table for every range of pages.
TID_RANGE_SCAN_VERSION = (14,)


@dataclass(frozen=True, slots=True)
class Part:
    """A range of a relation's pages: from ``first_page`` up to, not including, ``end_page`` (None: to the end)."""

    relation: str
    first_page: int | None = None
    end_page: int | None = None
    only: bool = False

    @property
    def from_clause(self) -> str:
        conditions = []
        if self.first_page is not None:
            conditions.append(f"ctid >= '({self.first_page},0)'")
        if self.end_page is not None:
            conditions.append(f"ctid < '({self.end_page},0)'")
        where = f" WHERE {' AND '.join(conditions)}" if conditions else ""
        return f"FROM {'ONLY ' if self.only else ''}{self.relation}{where}"


class PostgresSource:
    def __init__(self, config: PostgresSourceConfig) -> None:
        self._config = config

    async def check(self) -> None:
        connection = await connect(self._config, application_name="datasync check")
        try:
            with translated("the source"):
                await connection.fetchval(
                    "SELECT count(*) FROM pg_namespace WHERE has_schema_privilege(oid, 'USAGE')",
                    timeout=CONNECT_TIMEOUT_SECONDS,
                )
                missing = await connection.fetch(
                    "SELECT name FROM unnest($1::text[]) AS name WHERE to_regnamespace(quote_ident(name)) IS NULL",
                    list(self._config.schemas),
                )
        finally:
            await close(connection)
        if missing:
            raise ConnectorRefused(f"schemas: the database has no schema {missing[0]['name']!r}")

    async def discover(self) -> list[CatalogEntry]:
        connection = await connect(self._config, application_name="datasync discover")
        try:
            with translated("the source"):
                return await discover(connection, self._config.schemas)
        finally:
            await close(connection)

    @contextlib.asynccontextmanager
    async def snapshot(self) -> AsyncIterator["PostgresSnapshot"]:
        holder = await connect(self._config, application_name="datasync snapshot", retries=self._config.retry_count)
        try:
            with translated("the source"):
                await holder.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
                exported = await holder.fetchval("SELECT pg_export_snapshot()")
            async with contextlib.AsyncExitStack() as stack:
                yield PostgresSnapshot(self._config, holder, exported, stack)
        finally:
            await close(holder)


class PostgresSnapshot:
    """One moment of the database, held open by one connection and shared by the others.

    Attributes:
        row_buffers: those that no COPY fills at the moment.
    """

    def __init__(
        self,
        config: PostgresSourceConfig,
        holder: "asyncpg.Connection[Any]",
        exported: str,
        stack: contextlib.AsyncExitStack,
    ) -> None:
        self.config = config
        self.holder = holder
        self.exported = exported
        self._stack = stack
        self._idle: list[asyncpg.Connection[Any]] = []
        self.row_buffers: list[RowBuffer] = []

    async def table(self, plan: StreamPlan) -> "PostgresTable":
        with translated(f"the source's table {plan.stream}"):
            relation = await self.holder.fetchrow(
                """
                SELECT c.oid, c.relkind, c.relhassubclass, c.relpages, c.reltuples, a.amname, n.nspname, c.relname,
                       has_table_privilege(c.oid, 'SELECT') AS lockable
                FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace LEFT JOIN pg_am a ON a.oid = c.relam
                WHERE n.nspname = $1 AND c.relname = $2 AND c.relkind IN ('r', 'p', 'v', 'm', 'f')
                """,
                plan.stream.namespace,
                plan.stream.name,
            )
            # pg_class is read as of the snapshot, where a table that was dropped a moment ago still stands.
            if relation is None or not await self._still_there(relation["oid"]):
                raise gone(plan)
            await self._hold(relation)
            columns = (await columns_of(self.holder, [relation["oid"]]))[relation["oid"]]
            keys = (await primary_keys(self.holder, [relation["oid"]]))[relation["oid"]]
            leaves = await self._leaves(relation)
        chosen = _choose(plan, columns)
        names = {column.name for column in chosen}
        return PostgresTable(
            snapshot=self,
            plan=plan,
            columns=tuple(chosen),
            primary_key=tuple(keys) if names.issuperset(keys) else (),
            rows_estimated=_estimate(leaves),
            leaves=tuple(leaves),
        )

    async def is_usable(self) -> bool:
        try:
            await self.holder.fetchval("SELECT 1", timeout=CONNECT_TIMEOUT_SECONDS)
        except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
            return False
        return True

    @contextlib.asynccontextmanager
    async def reader(self) -> AsyncIterator["asyncpg.Connection[Any]"]:
        """A connection that sees the snapshot, one of ``max_threads``; broken ones are not used again."""
        connection = self._idle.pop() if self._idle else await self._open_reader()
        try:
            yield connection
        except BaseException:
            # Closing, unlike cutting off, has the server end a query that is still running and holds locks.
            await close(connection)
            raise
        self._idle.append(connection)

    async def _open_reader(self) -> "asyncpg.Connection[Any]":
        connection = await connect(self.config, application_name="datasync read", retries=self.config.retry_count)
        self._stack.push_async_callback(close, connection)
        with translated("the source"):
            await connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
            try:
                await connection.execute(f"SET TRANSACTION SNAPSHOT '{self.exported}'")
            except asyncpg.PostgresError as error:
                raise snapshot_lost(error) from error
        return connection

    async def _still_there(self, oid: int) -> bool:
        # System functions look at the newest catalogue, not at the snapshot's.
        return await self.holder.fetchval("SELECT pg_table_is_visible($1) IS NOT NULL", oid) is True

    async def _hold(self, relation: Any) -> None:
        """Keep the table from being dropped or truncated, which no snapshot survives, as pg_dump does."""
        if relation["relkind"] in (b"r", b"p") and relation["lockable"]:
            await self.holder.execute(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT_SECONDS}s'")
            await self.holder.execute(
                f"LOCK TABLE {quoted(relation['nspname'], relation['relname'])} IN ACCESS SHARE MODE"
            )

    async def _leaves(self, relation: Any) -> list["Leaf"]:
        if relation["relkind"] == "p":
            rows = await self.holder.fetch(
                """
                SELECT c.oid, c.relkind, false AS relhassubclass, c.relpages, c.reltuples, a.amname, n.nspname,
                       c.relname
                FROM pg_partition_tree($1::oid::regclass) t JOIN pg_class c ON c.oid = t.relid
                JOIN pg_namespace n ON n.oid = c.relnamespace LEFT JOIN pg_am a ON a.oid = c.relam WHERE t.isleaf
                """,
                relation["oid"],
            )
        else:
            rows = [relation]
        leaves = []
        ranges = self.holder.get_server_version() >= TID_RANGE_SCAN_VERSION
        for row in rows:
            by_page = (
                ranges and row["relkind"] in (b"r", b"m") and not row["relhassubclass"] and row["amname"] == "heap"
            )
            size = (
                await self.holder.fetchval("SELECT pg_relation_size($1::oid::regclass)", row["oid"]) if by_page else 0
            )
            pages = (size or 0) // PAGE_BYTES
            rows_estimated = _rows_estimated(row["reltuples"], row["relpages"], pages)
            leaves.append(Leaf(quoted(row["nspname"], row["relname"]), by_page, pages, rows_estimated))
        return leaves


@dataclass(frozen=True, slots=True)
class Leaf:
    """A relation that holds rows: the table itself, or one partition."""

    relation: str
    by_page: bool
    pages: int
    rows_estimated: int | None


@dataclass(frozen=True, slots=True)
class PostgresTable:
    """A table in the snapshot; ``select`` is what its rows are read by, in any format."""

    snapshot: PostgresSnapshot
    plan: StreamPlan
    columns: tuple[Column, ...]
    primary_key: tuple[str, ...]
    rows_estimated: int | None
    leaves: tuple[Leaf, ...]

    @property
    def connections_max(self) -> int:
        return self.snapshot.config.max_threads

    def parts(self) -> Sequence[Part]:
        return [part for leaf in self.leaves for part in _cut(leaf, self.connections_max)]

    def select(self, part: Part) -> str:
        """The query of one part's rows, every column as it is."""
        return f"SELECT {', '.join(quoted(column.name) for column in self.columns)} {part.from_clause}"

    @property
    def arrow_schema(self) -> "pyarrow.Schema":
        from libs.connectors.postgres.arrow import arrow_columns, schema_of  # noqa: PLC0415

        return schema_of(arrow_columns(self))

    async def batches(self, part: Part) -> AsyncGenerator["pyarrow.RecordBatch", None]:
        from libs.connectors.postgres.arrow import read  # noqa: PLC0415

        async with contextlib.aclosing(read(self, part)) as batches:
            async for batch in batches:
                yield batch

    def comparable(self) -> "SourceEnd":
        from libs.connectors.postgres.arrow_form import arrow_form  # noqa: PLC0415
        from libs.connectors.postgres.verification import PostgresSourceEnd  # noqa: PLC0415

        return PostgresSourceEnd(self, arrow_form(self))

    async def values_changed(self) -> dict[str, int]:
        from libs.connectors.postgres.arrow import unholdable_by_policy  # noqa: PLC0415

        conditions = unholdable_by_policy(self)
        if not conditions:
            return {}
        counts = ", ".join(f"count(*) FILTER (WHERE {condition})" for condition in conditions.values())
        try:
            async with self.snapshot.reader() as connection:
                found = await connection.fetchrow(f"SELECT {counts} FROM {quoted(*self.name)}")  # noqa: S608
        except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
            raise self.failed(error) from error
        assert found is not None
        return dict(zip(conditions, found, strict=True))

    @property
    def name(self) -> tuple[str, str]:
        return self.plan.stream.namespace, self.plan.stream.name

    def failed(self, error: BaseException) -> Exception:
        """The reading side's error, naming the table."""
        if isinstance(error, asyncpg.UndefinedTableError):
            return gone(self.plan)
        return failure(error, f"reading {self.plan.stream} from the source")


def gone(plan: StreamPlan) -> ConnectorRefused:
    return ConnectorRefused(
        f"the source has no table {plan.stream}: it was dropped or renamed since its streams were discovered",
        code="table_missing",
    )


def snapshot_lost(error: Exception) -> ConnectorUnavailable:
    """The connection that held the snapshot is gone: what is not committed is read again, in another."""
    return ConnectorUnavailable(f"the source's snapshot was lost: {error}", code="snapshot_lost")


async def close(connection: "asyncpg.Connection[Any]") -> None:
    """Close in bounded time, whatever state the connection is in."""
    try:
        await connection.close(timeout=2)
    except (TimeoutError, OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
        connection.terminate()


def _choose(plan: StreamPlan, columns: list[Column]) -> list[Column]:
    if plan.columns is None:
        chosen = [column for column in columns if column.name not in plan.left_out]
    else:
        missing = sorted(set(plan.columns) - {column.name for column in columns})
        if missing:
            raise ConnectorRefused(
                f"the source's table {plan.stream} has no column {missing[0]!r}", code="column_missing"
            )
        chosen = [column for column in columns if column.name in plan.columns]
    unknown = sorted(set(plan.policies) - {column.name for column in chosen})
    if unknown:
        raise ConnectorRefused(f"{plan.stream}: a value policy names {unknown[0]!r}, which is not a chosen column")
    if not chosen:
        raise ConnectorRefused(f"the source's table {plan.stream} has no columns to read", code="no_columns")
    return chosen


def _cut(leaf: Leaf, connections: int) -> list[Part]:
    only = leaf.by_page
    if leaf.pages <= PART_PAGES_MIN:
        return [Part(leaf.relation, only=only)]
    size = min(max(leaf.pages // (connections * PARTS_PER_CONNECTION), PART_PAGES_MIN), PART_PAGES_MAX)
    starts = list(range(0, leaf.pages, size))
    # The last range is open: pages that were added after the size was taken may hold rows of the snapshot.
    return [Part(leaf.relation, start, end, only) for start, end in zip(starts, [*starts[1:], None], strict=True)]


def _rows_estimated(tuples: float, pages_then: int, pages_now: int) -> int | None:
    if tuples < 0:
        return None
    return round(tuples / pages_then * pages_now) if pages_then and pages_now else round(tuples)


def _estimate(leaves: Sequence[Leaf]) -> int | None:
    estimates = [leaf.rows_estimated for leaf in leaves]
    return None if None in estimates or not estimates else sum(item for item in estimates if item is not None)
