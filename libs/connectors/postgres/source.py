"""PostgreSQL as a source: one exported snapshot for a run, tables read in ranges of pages by several connections."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import asyncpg

from libs.connectors.memory import give_back_free_memory
from libs.connectors.postgres.config import PostgresSourceConfig
from libs.connectors.postgres.connection import CONNECT_TIMEOUT_SECONDS, connect, quoted, translated
from libs.connectors.postgres.discovery import discover, primary_keys
from libs.connectors.postgres.failures import failure, hidden_by_row_security, message_of, sqlstate_of
from libs.connectors.postgres.types import Column, columns_of
from libs.connectors.protocol import CatalogEntry, ConnectorRefused, ConnectorUnavailable, StreamPlan

if TYPE_CHECKING:
    import pyarrow

    from libs.connectors.canonical import SourceEnd
    from libs.connectors.postgres.binary import RowBuffer

PAGE_BYTES = 8192
LONG_ROW_BYTES = 8 * 1024 * 1024
COPY_HEADER_BYTES = 19
PART_PAGES_MIN = 2_048
PART_PAGES_MAX = 131_072
PARTS_PER_CONNECTION = 8
LOCK_TIMEOUT_SECONDS = 30.0
ROLLBACK_TIMEOUT_SECONDS = 5
# SQLSTATEs of lost and refused connections.
_CONNECTION_LOST = ("57P", "080")
# Older servers read the whole table for every range of pages.
TID_RANGE_SCAN_VERSION = (14,)


class LongRowsTurn:
    """One reader's turn: from its start, or from a long row, until its next short row.

    Few rows of many megabytes fit into memory: the driver may hold three at once, the last one, the pieces of the next
    and the row assembled from them. So no reader starts while another one has such rows.
    """

    def __init__(self, lock: asyncio.Lock) -> None:
        self._lock = lock
        self._mine = False

    async def begin(self) -> None:
        if not self._mine:
            await self._lock.acquire()
            self._mine = True

    async def arrived(self, size_bytes: int) -> bool:
        """Wait for the turn if the row is long, else end the turn; returns whether it is long."""
        if size_bytes < LONG_ROW_BYTES:
            # The header of a COPY comes before the first row and says nothing about its size.
            if size_bytes > COPY_HEADER_BYTES:
                self.end()
            return False
        give_back_free_memory()
        await self.begin()
        return True

    def end(self) -> None:
        if self._mine:
            self._mine = False
            self._lock.release()


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

    async def check(self) -> Sequence[str]:
        connection = await connect(self._config, application_name="datasync check")
        try:
            with translated("the source"):
                await connection.fetchval(
                    "SELECT count(*) FROM pg_namespace WHERE has_schema_privilege(oid, 'USAGE')",
                    timeout=CONNECT_TIMEOUT_SECONDS,
                )
                await _refuse_missing_schemas(connection, self._config.schemas)
        finally:
            await close(connection)
        return ()

    async def discover(self) -> list[CatalogEntry]:
        connection = await connect(self._config, application_name="datasync discover")
        try:
            with translated("the source"):
                await _refuse_missing_schemas(connection, self._config.schemas)
                return await discover(connection, self._config.schemas)
        finally:
            await close(connection)

    @contextlib.asynccontextmanager
    async def snapshot(self) -> AsyncIterator["PostgresSnapshot"]:
        holder = await connect(self._config, application_name="datasync snapshot", retries=self._config.retry_count)
        try:
            with translated("the source"):
                # The driver's own transaction, in which others nest, so that a failing statement does not end it.
                await holder.transaction(isolation="repeatable_read", readonly=True).start()
                exported = await holder.fetchval("SELECT pg_export_snapshot()")
            async with contextlib.AsyncExitStack() as stack:
                yield PostgresSnapshot(self._config, holder, exported, stack)
        finally:
            await close(holder)


class PostgresSnapshot:
    """One moment of the database, held open by one connection, which reads too, and shared by the others.

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
        self.exported = exported
        self._holder = holder
        self._holding = asyncio.Lock()
        self._readers = asyncio.Semaphore(config.max_threads)
        self._stack = stack
        self._idle: list[asyncpg.Connection[Any]] = []
        self.row_buffers: list[RowBuffer] = []
        self._long_rows = asyncio.Lock()

    @property
    def server_encoding(self) -> str:
        encoding: str = self._holder.get_settings().server_encoding
        return encoding

    async def table(self, plan: StreamPlan) -> "PostgresTable":
        where = f"the source's table {plan.stream}"
        with translated(where):
            async with self._readers, self._held() as holder:
                relation = await self._relation(holder, plan)
                columns = (await columns_of(holder, [relation["oid"]]))[relation["oid"]]
                keys = (await primary_keys(holder, [relation["oid"]]))[relation["oid"]]
                chosen = _choose(plan, columns)
                warnings = await self._try_to_read(holder, plan, chosen)
                await _refuse_remade(holder, plan, relation["oid"])
                leaves = await _leaves(holder, relation)
        names = {column.name for column in chosen}
        return PostgresTable(
            snapshot=self,
            plan=plan,
            columns=tuple(chosen),
            primary_key=tuple(keys) if names.issuperset(keys) else (),
            rows_estimated=_estimate(leaves),
            leaves=tuple(leaves),
            warnings=warnings,
        )

    async def is_usable(self) -> bool:
        try:
            async with self._held() as holder:
                await holder.fetchval("SELECT 1", timeout=CONNECT_TIMEOUT_SECONDS)
        except (ConnectorUnavailable, asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
            return False
        return True

    @contextlib.asynccontextmanager
    async def reader(self) -> AsyncIterator["asyncpg.Connection[Any]"]:
        """A connection that sees the snapshot, one of ``max_threads``; broken ones are not used again."""
        async with self._readers:
            if not self._holding.locked():
                async with self._held() as holder:
                    yield holder
                return
            connection = self._idle.pop() if self._idle else await self._open_reader()
            try:
                yield connection
            except BaseException:
                # Closing, unlike cutting off, has the server end a query that is still running and holds locks.
                await close(connection)
                raise
            self._idle.append(connection)

    @contextlib.asynccontextmanager
    async def long_rows(self) -> AsyncIterator[LongRowsTurn]:
        """The turn of a reader, which calls ``arrived`` for every row."""
        turn = LongRowsTurn(self._long_rows)
        try:
            await turn.begin()
            yield turn
        finally:
            turn.end()

    @contextlib.asynccontextmanager
    async def _held(self) -> AsyncIterator["asyncpg.Connection[Any]"]:
        """The connection that holds the snapshot, in a savepoint, so that the snapshot survives errors."""
        async with self._holding:
            try:
                nested = self._holder.transaction()
                await nested.start()
                try:
                    yield self._holder
                except BaseException:
                    await self._roll_back(nested)
                    raise
                await nested.commit()
            except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
                if self._holder.is_closed() or sqlstate_of(error)[:3] in _CONNECTION_LOST:
                    raise snapshot_lost(error) from error
                raise

    async def _roll_back(self, nested: "asyncpg.transaction.Transaction") -> None:
        """In bounded time: if the server does not even end a query, the snapshot is given up."""
        try:
            async with asyncio.timeout(ROLLBACK_TIMEOUT_SECONDS):
                await nested.rollback()
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
                raise snapshot_lost(error) from error
        return connection

    async def _relation(self, holder: "asyncpg.Connection[Any]", plan: StreamPlan) -> Any:
        """The table's row of the catalogue, the table held."""
        relation = await holder.fetchrow(
            """
            SELECT c.oid, c.relkind, c.relhassubclass, c.relpages, c.reltuples, a.amname, n.nspname, c.relname,
                   has_table_privilege(c.oid, 'SELECT') AS readable
            FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace LEFT JOIN pg_am a ON a.oid = c.relam
            WHERE n.nspname = $1 AND c.relname = $2 AND c.relkind IN ('r', 'p', 'v', 'm', 'f')
            """,
            plan.stream.namespace,
            plan.stream.name,
        )
        # pg_class is read as of the snapshot, where a table that was dropped a moment ago still stands; functions look
        # at the newest catalogue.
        if relation is None or not await holder.fetchval("SELECT pg_table_is_visible($1) IS NOT NULL", relation["oid"]):
            raise gone(plan)
        await holder.execute(f"SET LOCAL lock_timeout = '{round(LOCK_TIMEOUT_SECONDS * 1000)}ms'")
        # Keep the table from being dropped or truncated, which no snapshot survives, as pg_dump does.
        if relation["relkind"] in (b"r", b"p") and relation["readable"]:
            await holder.execute(f"LOCK TABLE {_name(relation)} IN ACCESS SHARE MODE")
        return relation

    async def _try_to_read(
        self, holder: "asyncpg.Connection[Any]", plan: StreamPlan, columns: Sequence[Column]
    ) -> tuple[str, ...]:
        """Read without rows, so that missing rights, policies and unpopulated views are found before the first row.

        Returns:
            The warnings.
        """
        probe = f"{_select(columns)} FROM {quoted(plan.stream.namespace, plan.stream.name)} LIMIT 0"
        try:
            async with holder.transaction():
                await holder.execute(f"SET LOCAL row_security = off; {probe}")
        except asyncpg.PostgresError as error:
            if not hidden_by_row_security(error) or self.config.row_security != "filtered":
                raise _read_failed(error, plan) from error
        else:
            await holder.execute(f"SET LOCAL row_security = {self.config.session_settings()['row_security']}")
            return ()
        try:
            await holder.execute(probe)
        except asyncpg.PostgresError as error:
            raise _read_failed(error, plan) from error
        return (
            f"{plan.stream}: row-level security is applied: only the rows that the role {self.config.username!r} may "
            "see are read, as the source's configuration (row_security: filtered) allows",
        )


# The beginning of a query about all relations that a stream reads, through views down to their tables, as of the
# snapshot; functions look at the newest catalogue. The rows of a materialised view are stored. $1 is the stream's OID.
USED_RELATIONS = """
    WITH RECURSIVE used(oid, kind) AS (
        SELECT oid, relkind FROM pg_class WHERE oid = $1
        UNION
        SELECT c.oid, c.relkind FROM used CROSS JOIN LATERAL (
            SELECT d.refobjid AS oid FROM pg_rewrite r JOIN pg_depend d
                ON d.classid = 'pg_rewrite'::regclass AND d.objid = r.oid AND d.refclassid = 'pg_class'::regclass
            WHERE r.ev_class = used.oid AND used.kind = 'v'
            UNION ALL SELECT inhrelid FROM pg_inherits WHERE inhparent = used.oid
        ) AS next JOIN pg_class c ON c.oid = next.oid
    ),
"""
_REMADE = f"""
    {USED_RELATIONS}
    partitions_then AS (
        SELECT inhrelid AS oid FROM pg_inherits JOIN used ON inhparent = used.oid WHERE used.kind = 'p'
    ),
    partitions_now AS (
        SELECT t.relid::oid AS oid FROM used CROSS JOIN LATERAL pg_partition_tree(used.oid) t
        WHERE used.kind = 'p' AND t.relid <> used.oid
    )
    SELECT min(c.oid::regclass::text) FROM pg_class c WHERE
        c.oid IN (SELECT oid FROM used WHERE kind = 'r')
            AND c.relfilenode <> 0 AND c.relfilenode IS DISTINCT FROM pg_relation_filenode(c.oid)
        OR (c.oid IN (SELECT oid FROM partitions_then)) <> (c.oid IN (SELECT oid FROM partitions_now))
"""  # noqa: S608


async def _refuse_remade(connection: "asyncpg.Connection[Any]", plan: StreamPlan, oid: int) -> None:
    """Refuse what was truncated, rewritten, attached or detached between the snapshot and its lock.

    The snapshot sees nothing in files that were made after it, and no partition that is not one any more.
    """
    remade = await connection.fetchval(_REMADE, oid)
    if remade is not None:
        raise ConnectorUnavailable(
            f"{plan.stream}: {remade} was truncated, rewritten, attached or detached while the run began, so that the "
            "run's snapshot does not have its rows",
            code="source_changed",
        )


async def _leaves(connection: "asyncpg.Connection[Any]", relation: Any) -> list["Leaf"]:
    """What holds the table's rows; a partitioned table that has to be read by itself is its own only one."""
    rows = [relation]
    if relation["relkind"] == b"p":
        found = await connection.fetch(
            """
            SELECT c.oid, c.relkind, false AS relhassubclass, c.relpages, c.reltuples, a.amname, n.nspname, c.relname,
                   true AS readable,
                   has_schema_privilege(n.oid, 'USAGE') AND has_table_privilege(c.oid, 'SELECT')
                   AND NOT row_security_active(c.oid) AND NOT row_security_active($1::oid) AS same_alone
            FROM pg_partition_tree($1::oid::regclass) t JOIN pg_class c ON c.oid = t.relid
            JOIN pg_namespace n ON n.oid = c.relnamespace LEFT JOIN pg_am a ON a.oid = c.relam WHERE t.isleaf
            """,
            relation["oid"],
        )
        # Rights and policies of the partitioned table count when it is read, its partitions' own when they are.
        rows = found if all(row["same_alone"] for row in found) else rows
    return [await _leaf(connection, row) for row in rows]


async def _leaf(connection: "asyncpg.Connection[Any]", row: Any) -> "Leaf":
    by_page = (
        connection.get_server_version() >= TID_RANGE_SCAN_VERSION
        and row["relkind"] in (b"r", b"m")
        and not row["relhassubclass"]
        and row["amname"] == "heap"
        # Rights to columns alone do not include the place of a row.
        and row["readable"]
    )
    size = await connection.fetchval("SELECT pg_relation_size($1::oid::regclass)", row["oid"]) if by_page else 0
    pages = (size or 0) // PAGE_BYTES
    return Leaf(_name(row), by_page, pages, _rows_estimated(row["reltuples"], row["relpages"], pages))


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
    warnings: tuple[str, ...] = ()

    @property
    def connections_max(self) -> int:
        return self.snapshot.config.max_threads

    def parts(self) -> Sequence[Part]:
        return [part for leaf in self.leaves for part in _cut(leaf, self.connections_max)]

    def select(self, part: Part) -> str:
        """The query of one part's rows, every column in its ``type``."""
        return f"{_select(self.columns)} {part.from_clause}"

    @property
    def arrow_schema(self) -> "pyarrow.Schema":
        from libs.connectors.postgres.arrow import arrow_columns, schema_of  # noqa: PLC0415

        return schema_of(arrow_columns(self))

    async def batches(self, part: Part) -> AsyncGenerator["pyarrow.RecordBatch", None]:
        from libs.connectors.postgres.arrow import read  # noqa: PLC0415

        async with contextlib.aclosing(read(self, part)) as batches:
            async for batch in batches:
                yield batch
                del batch

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
        return _read_failed(error, self.plan)


def _read_failed(error: BaseException, plan: StreamPlan) -> Exception:
    failed = failure(error, f"reading {plan.stream} from the source")
    if hidden_by_row_security(error):
        return ConnectorRefused(
            f"{failed.message}, or set row_security: filtered in the source's configuration to copy only the rows that "
            "the role may see",
            code=failed.code,
        )
    return failed


async def _refuse_missing_schemas(connection: "asyncpg.Connection[Any]", schemas: Sequence[str]) -> None:
    missing = await connection.fetchval(
        "SELECT name FROM unnest($1::text[]) AS name WHERE to_regnamespace(quote_ident(name)) IS NULL LIMIT 1",
        list(schemas),
    )
    if missing is not None:
        raise ConnectorRefused(f"schemas: the database has no schema {missing!r}")


def gone(plan: StreamPlan) -> ConnectorRefused:
    return ConnectorRefused(
        f"the source has no table {plan.stream}: it was dropped or renamed since its streams were discovered",
        code="table_missing",
    )


def snapshot_lost(error: Exception) -> ConnectorUnavailable:
    """The connection that held the snapshot is gone: what is not committed is read again, in another."""
    return ConnectorUnavailable(f"the source's snapshot was lost: {message_of(error)}", code="snapshot_lost")


async def close(connection: "asyncpg.Connection[Any]") -> None:
    """Close in bounded time, whatever state the connection is in."""
    try:
        await connection.close(timeout=2)
    except (TimeoutError, OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
        connection.terminate()


def _name(relation: Any) -> str:
    return quoted(relation["nspname"], relation["relname"])


def _select(columns: Sequence[Column]) -> str:
    return f"SELECT {', '.join(column.expression for column in columns)}"


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
