"""PostgreSQL's ends of a verification: the server hashes the canonical bytes of its rows itself (``canonical.py``).

``record_send`` returns them in one call. It converts text to the client encoding, UTF-8, so that servers of different
encodings return equal bytes for equal text.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import asyncpg

from libs.connectors.canonical import BUCKET_DIGITS, HASH_MODULUS, Bucket, Fingerprint, HashedRow
from libs.connectors.comparison import AFTER_COPYING, Comparison
from libs.connectors.comparison import compare as compare_ends
from libs.connectors.concurrency import share_out
from libs.connectors.postgres.connection import literal, quoted
from libs.connectors.postgres.relations import USED_RELATIONS
from libs.connectors.postgres.table import PostgresTable
from libs.connectors.postgres.types import PostgresType

Connection: TypeAlias = "asyncpg.Connection[Any]"
Expecting: TypeAlias = Awaitable[Fingerprint | None]
Connections: TypeAlias = Callable[[], AbstractAsyncContextManager[Connection]]

# Compared as text, because a copy in text format does not keep all bits of a float.
_HOLDING_FLOATS = frozenset(("float4", "float8", "point", "lseg", "path", "box", "polygon", "line", "circle"))
# Stored sorted by bytes, which depend on the server's encoding.
_SORTED_BY_BYTES = frozenset(("jsonb", "tsvector", "hstore"))


@dataclass(frozen=True, slots=True)
class Form:
    """How a row is hashed.

    Args:
        columns: the SQL expression of each compared column's canonical value, by name.
        key: the columns whose hash selects the bucket.
        shown: the SQL names of the key's columns where they are others.
        not_compared: the reason, by column.
    """

    columns: Mapping[str, str]
    key: tuple[str, ...]
    shown: Mapping[str, str] = field(default_factory=dict)
    not_compared: Mapping[str, str] = field(default_factory=dict)


def wire_forms(table: PostgresTable, encodings: tuple[str, str]) -> tuple[Form, Form]:
    """For the source and the destination, whose servers have these encodings: values as their types send them."""
    not_compared = {
        column.name: f"{column.type.sql} is stored in an order that depends on the server's encoding, and the "
        f"encodings are {encodings[0]} and {encodings[1]}"
        for column in table.columns
        if encodings[0] != encodings[1] and (column.type.element or column.type).name in _SORTED_BY_BYTES
    }
    compared = [column for column in table.columns if column.name not in not_compared]
    key = () if set(table.primary_key) & set(not_compared) else table.primary_key
    here = {column.name: _wire_value(column.type, column.expression) for column in compared}
    there = {column.name: _wire_value(column.type, quoted(column.name)) for column in compared}
    return Form(here, key, source_names(table), not_compared), Form(there, key, {}, not_compared)


def source_names(table: PostgresTable) -> dict[str, str]:
    """The SQL names of the columns at the source, by the target's."""
    return {column.name: quoted(column.source_name) for column in table.columns}


def _wire_value(held: PostgresType, value: str) -> str:
    innermost = held.element or held
    if not innermost.same_in_binary:
        return f"{value}::text"
    plain = of_base_type(held, value)
    if held.element is None and held.name in ("float4", "float8"):
        return one_nan(plain, held.name)
    if innermost.name in _HOLDING_FLOATS:
        return f"{value}::text"
    return plain if held.element is None else array_bytes(plain)


def of_base_type(held: PostgresType, value: str) -> str:
    """Cast a domain to its base type, because ``record_send`` includes the type's OID."""
    return f"{value}::pg_catalog.{quoted((held.element or held).name)}{'[]' if held.element is not None else ''}"


def one_nan(value: str, name: str) -> str:
    """Give every NaN of a ``float4`` or ``float8`` the same bits."""
    return f"CASE WHEN {value} = 'NaN' THEN 'NaN'::{name} ELSE {value} END"


def array_bytes(value: str) -> str:
    """``array_send`` without its null flag, which may be set although the array has no null any more."""
    return f"overlay(array_send({value}) PLACING '\\x00000000'::bytea FROM 5 FOR 4)"


class PostgresEnd:
    """Rows that a server hashes.

    Args:
        sources: FROM clauses that together return every row once; up to ``connections_max`` are read concurrently.
        connections: lends a connection.
    """

    def __init__(self, form: Form, sources: Sequence[str], connections: Connections, connections_max: int = 1) -> None:
        self._form = form
        self._sources = sources
        self._connections = connections
        self._connections_max = connections_max

    async def fingerprint(self, suffix: str = "", digits: int = BUCKET_DIGITS) -> Fingerprint:
        question = f"""
            SELECT right(key_hash, {digits}) AS bucket, count(*) AS rows,
                   sum(('x' || left(row_hash, 16))::bit(64)::bigint)::text AS hash
            FROM ({{rows}}) AS hashed GROUP BY 1
        """  # noqa: S608
        found = await self._ask(question, suffix)
        return Fingerprint.joined(
            Fingerprint({row["bucket"]: Bucket(row["rows"], int(row["hash"]) % HASH_MODULUS) for row in part})
            for part in found
        )

    async def rows(self, suffix: str, rows_max: int) -> list[HashedRow]:
        found = await self._ask(
            f"SELECT key_hash, left(row_hash, 16) AS hash, key FROM ({{rows}}) AS hashed LIMIT {rows_max}",  # noqa: S608
            suffix,
        )
        rows = [HashedRow(row["key_hash"], int(row["hash"], 16), tuple(json.loads(row["key"]))) for row in _flat(found)]
        return rows[:rows_max]

    async def _ask(self, question: str, suffix: str) -> list[Any]:
        """The answer for each of the FROM clauses."""
        answers: list[Any] = []

        async def ask(sources: Iterator[str]) -> None:
            async with self._connections() as connection:
                for source in sources:
                    answer = await connection.fetch(question.format(rows=self._hashed(source, suffix)))
                    answers.append(answer)

        await share_out(self._sources, self._connections_max, ask)
        return answers

    def _hashed(self, source: str, suffix: str) -> str:
        names = self._form.key
        row_hash = f"md5(record_send(ROW({', '.join(self._form.columns.values())})))"
        key_hash = f"md5(record_send(ROW({', '.join(self._form.columns[name] for name in names)})))"
        texts = ", ".join(f"{self._form.shown.get(name, quoted(name))}::text" for name in names)
        key = f"json_build_array({texts})::text"
        if names:
            rows = f"SELECT {key_hash} AS key_hash, {row_hash} AS row_hash, {key} AS key {source}"
        else:
            # OFFSET 0 keeps the planner from computing the hash for each use.
            hashes = f"SELECT {row_hash} AS row_hash {source} OFFSET 0"
            rows = f"SELECT row_hash AS key_hash, row_hash, '[]' AS key FROM ({hashes}) AS rows"  # noqa: S608
        if not suffix:
            return rows
        return f"SELECT * FROM ({rows}) AS all_rows WHERE right(key_hash, {len(suffix)}) = {literal(suffix)}"  # noqa: S608


class PostgresSourceEnd(PostgresEnd):
    """A table in the run's snapshot."""

    def __init__(self, table: PostgresTable, form: Form) -> None:
        super().__init__(form, [part.from_clause for part in table.parts()], self._reader, table.connections_max)
        self._table = table

    @property
    def columns(self) -> Sequence[str]:
        return tuple(self._form.columns)

    @property
    def columns_not_compared(self) -> Mapping[str, str]:
        return self._form.not_compared

    @property
    def key(self) -> Sequence[str]:
        return self._form.key

    async def why_never_comparable(self) -> str | None:
        volatile = (await self._nature())["volatile"]
        if volatile is None:
            return None
        return (
            f"the stream is a view that uses the volatile function {volatile}, so each read may return other rows "
            "(declare the function STABLE or IMMUTABLE if it is)"
        )

    async def why_different(self) -> str | None:
        nature = await self._nature()
        if nature["foreign"]:
            return "the stream reads foreign tables, which are not part of the run's snapshot"
        return "the stream is a view that depends on the current time" if nature["by_time"] else None

    async def _nature(self) -> Any:
        async with self._reader() as connection:
            oid = await connection.fetchval("SELECT to_regclass($1)::oid", quoted(*self._table.name))
            return await connection.fetchrow(_NATURE, oid)

    @asynccontextmanager
    async def _reader(self) -> AsyncGenerator[Connection, None]:
        try:
            async with self._table.snapshot.reader() as connection, _unsorted(connection):
                yield connection
        except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
            raise self._table.failed(error) from error


_NATURE = f"""
    {USED_RELATIONS}
    definitions AS (
        SELECT r.ev_action::text AS tree FROM used JOIN pg_rewrite r ON r.ev_class = used.oid WHERE used.kind = 'v'
    ),
    functions AS (
        SELECT DISTINCT p.oid, p.proname, p.provolatile FROM definitions
        CROSS JOIN regexp_matches(tree, ':(?:op)?funcid ([0-9]+)', 'g') AS number
        JOIN pg_proc p ON p.oid = number[1]::oid
    )
    SELECT EXISTS (SELECT FROM used WHERE kind = 'f') AS foreign,
        (SELECT min(oid::regprocedure::text) FROM functions WHERE provolatile = 'v') AS volatile,
        EXISTS (SELECT FROM functions WHERE proname IN ('now', 'transaction_timestamp', 'statement_timestamp'))
            OR EXISTS (SELECT FROM definitions WHERE tree ~ '{{SQLVALUEFUNCTION :op [0-8] ') AS by_time
"""  # noqa: S608


@asynccontextmanager
async def _unsorted(connection: Connection) -> AsyncIterator[None]:
    """Force hash aggregation: the planner expects one group per row and would sort all rows, on disk."""
    await connection.execute("SET enable_sort = off")
    yield
    await connection.execute("RESET enable_sort")


def _flat(parts: Sequence[Any]) -> list[Any]:
    return [row for part in parts for row in part]


async def compare(
    table: PostgresTable,
    destination: Connection,
    relation: tuple[str, str],
    expecting: Expecting | None = None,
    circumstances: str = AFTER_COPYING,
) -> Comparison:
    """Compare a table of the source with a relation of the destination.

    Args:
        destination: the only connection that reads the destination, as it may be within a transaction.
        expecting: the source's fingerprint, if it is being taken already (``source_fingerprint``).
        circumstances: as in ``comparison.compare``.

    Raises:
        EndsDiffer: names the buckets and keys that differ.
    """

    here, there = wire_forms(table, _encodings(table, destination))
    end = one_end(there, destination, relation)
    source = PostgresSourceEnd(table, here)
    return await compare_ends(table.plan.stream, source, end, expecting, circumstances=circumstances)


def one_end(form: Form, connection: Connection, relation: tuple[str, str]) -> PostgresEnd:
    """A relation that is read on one connection."""

    @asynccontextmanager
    async def connections() -> AsyncGenerator[Connection, None]:
        async with _unsorted(connection):
            yield connection

    return PostgresEnd(form, [f"FROM {quoted(*relation)}"], connections)


@asynccontextmanager
async def source_fingerprint(table: PostgresTable, destination: Connection) -> AsyncGenerator[Expecting, None]:
    """Take the source's fingerprint in the background; its result is None if the stream is not comparable."""

    async def taken() -> Fingerprint | None:
        here, _ = wire_forms(table, _encodings(table, destination))
        source = PostgresSourceEnd(table, here)
        return None if await source.why_never_comparable() is not None else await source.fingerprint()

    task = asyncio.create_task(taken())
    try:
        yield task
    finally:
        task.cancel()
        # Its error is raised where the result is awaited. Here an error of the destination takes precedence.
        await asyncio.gather(task, return_exceptions=True)


def _encodings(table: PostgresTable, destination: Connection) -> tuple[str, str]:
    return table.snapshot.server_encoding, destination.get_settings().server_encoding
