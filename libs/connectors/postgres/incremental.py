"""Which rows of a table an incremental run reads, and how far it has read then.

Without a cursor, rows are found by ``xmin``, the transaction that wrote them. A run reads the rows of every transaction
that was not over when the former snapshot was taken: exact for inserts and updates, at the cost of a sequential scan.

With a cursor, a run reads the rows whose cursor is at least the former run's mark. Rows with times are committed later
than their time says. So the mark stays behind the greatest value: at the start of the oldest transaction that was open
just before the snapshot, at most ``OPEN_SECONDS_MAX`` back; where that can't be seen, ``LAG_SECONDS`` back.

Rows between the mark and what was seen are read twice. A keyed merge does not mind. Where rows are appended, the state
holds their hashes, and those rows are skipped.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import asyncpg
from pydantic import BaseModel, ConfigDict, ValidationError

from libs.connectors.postgres.connection import literal, quoted
from libs.connectors.postgres.table import Leaf, Rows
from libs.connectors.postgres.types import Column
from libs.connectors.protocol import ConnectorRefused, ConnectorUnavailable, StreamPlan

LAG_SECONDS = 300.0
OPEN_SECONDS_MAX = 3_600.0
# How many rows between the mark and the greatest value a state can name.
SEEN_MAX = 10_000
# Transaction numbers are reused after 2**32; a state that is half as old can't be compared any more.
_TRANSACTIONS_MAX = 2**31 - 10_000_000

_MEMBERS = """
    WITH RECURSIVE members AS (
        SELECT $1::oid AS oid UNION SELECT inhrelid FROM pg_inherits JOIN members ON inhparent = members.oid
    )
    SELECT array_agg(oid) FROM members
"""
_TIMES = frozenset(("date", "timestamp", "timestamptz"))
_NUMBERS = frozenset(("int2", "int4", "int8", "numeric"))
CURSOR_TYPES = _TIMES | _NUMBERS | frozenset(("text", "varchar", "bpchar", "uuid", "oid"))


@dataclass(frozen=True, slots=True)
class OpenTransactions:
    """What was seen of the database's transactions just before a snapshot was taken.

    Args:
        asked_at: the server's time of the question, as text.
        age_seconds: how long ago the oldest open one had begun.
        hidden: why others may be open that were not seen; None if none can be.
    """

    asked_at: str
    age_seconds: float
    hidden: str | None


async def open_transactions(connection: "asyncpg.Connection[Any]") -> OpenTransactions:
    """Ask before the snapshot is taken: whatever begins later has a later time than this."""
    row = await connection.fetchrow(
        """
        SELECT clock_timestamp()::text AS asked_at,
               coalesce(extract(epoch FROM clock_timestamp() - min(xact_start)), 0)::float8 AS age_seconds,
               count(*) FILTER (WHERE query = '<insufficient privilege>') AS hidden,
               pg_is_in_recovery() AS standby,
               EXISTS (SELECT FROM pg_prepared_xacts WHERE database = current_database()) AS prepared
        FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()
        """
    )
    assert row is not None, "an aggregate without groups has one row"
    hidden = None
    if row["standby"]:
        hidden = "the source is a standby, which does not show its primary's transactions"
    elif row["hidden"]:
        hidden = "the role does not see the transactions of other roles (grant it pg_read_all_stats)"
    elif row["prepared"]:
        hidden = "there are prepared transactions, which do not show when they began"
    return OpenTransactions(row["asked_at"], max(0.0, row["age_seconds"]), hidden)


class Position(BaseModel):
    """``Table.state`` of this source.

    Args:
        kind: how the rows are found.
        column: the cursor and its fallback, joined by a colon; empty for ``xmin``.
        columns: by name, the type of each column that was read, with the labels of an enum.
        members: the OIDs of the table and of all its partitions or children.
        mark: the cursor's text or the transaction's number that the next run reads from; None if there was no row.
        seen: the hashes of rows from the mark on that were read already; only where rows are appended.
        cluster, timeline: the server's identity, which transaction numbers belong to.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    version: Literal[1] = 1
    kind: Literal["cursor", "xmin"]
    column: str = ""
    columns: dict[str, list[str]]
    members: list[int]
    mark: str | None = None
    seen: list[str] = []
    cluster: str = ""
    timeline: int = 0


@dataclass(frozen=True, slots=True)
class Reading:
    """What a run reads of a table.

    Args:
        position: what the next run reads from.
    """

    rows: Rows
    position: Position
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Stream:
    """A stream in the snapshot, on a connection that sees it."""

    connection: "asyncpg.Connection[Any]"
    plan: StreamPlan
    relation: Any
    columns: Sequence[Column]
    leaves: Sequence[Leaf]
    members: frozenset[int]
    matching: str | None

    @property
    def name(self) -> str:
        return quoted(self.relation["nspname"], self.relation["relname"])

    @property
    def appends(self) -> bool:
        return self.plan.disposition == "append"

    @property
    def known_columns(self) -> dict[str, list[str]]:
        return {column.source_name: [column.declared, *column.type.labels] for column in self.columns}

    @property
    def row(self) -> str:
        return f"ROW({', '.join(column.expression for column in self.columns)})"

    def where(self, *conditions: str | None) -> str:
        given = [condition for condition in (self.matching, *conditions) if condition]
        return f"FROM {self.name}" + (f" WHERE {' AND '.join(given)}" if given else "")


async def incremental_reading(
    connection: "asyncpg.Connection[Any]",
    plan: StreamPlan,
    relation: Any,
    columns: Sequence[Column],
    every_column: Sequence[Column],
    leaves: Sequence[Leaf],
    matching: str | None,
    state: str | None,
    transactions: OpenTransactions,
) -> Reading:
    """Decide what to read.

    Args:
        relation: as ``relations.lock_relation`` returns it.
        columns: those that are read.
        every_column: those that the table has.
        state: the former ``Position`` as JSON.

    Raises:
        ConnectorRefused: the table has no such cursor, or no ``xmin``.
    """
    members = await connection.fetchval(_MEMBERS, relation["oid"])
    stream = _Stream(connection, plan, relation, columns, leaves, frozenset(members), matching)
    former = _parsed(state)
    if plan.cursor is None:
        return await _by_transaction(stream, former)
    return await _by_cursor(stream, former, every_column, transactions)


def _parsed(state: str | None) -> Position | None:
    """None also for a state of a later version, which leads to reading all rows."""
    if state is None:
        return None
    try:
        return Position.model_validate_json(state)
    except ValidationError:
        return None


def _outdated(stream: _Stream, former: Position, kind: str, column: str) -> str | None:
    """Why the former position does not tell which rows changed, None if it does."""
    if (former.kind, former.column) != (kind, column):
        return "the cursor is another one"
    for name, described in stream.known_columns.items():
        if name not in former.columns:
            return f"the column {name} is new"
        declared, *labels = former.columns[name]
        if declared != described[0]:
            return f"the type of the column {name} changed from {declared} to {described[0]}"
        if not set(labels) <= set(described[1:]):
            return f"the labels of the column {name} changed"
    if stream.relation["oid"] not in former.members:
        return "the table was created anew"
    if {leaf.oid for leaf in stream.leaves} <= set(former.members) < stream.members | set(former.members):
        # They are not read one by one, but through the table.
        return "the table has new partitions or children"
    return None


def _rows(stream: _Stream, former: Position | None, changed: str | None, seen_hash: str, *, by_page: bool) -> Rows:
    """The rows that changed; all rows of relations that the former position does not know."""
    if former is None or changed is None:
        return Rows(stream.matching)
    whole = frozenset(leaf.oid for leaf in stream.leaves) - set(former.members)
    if former.seen and stream.appends:
        hashes = ",".join(former.seen)
        changed = f"({changed}) AND NOT ({seen_hash} = ANY ('{{{hashes}}}'::text[]))"
    return Rows(stream.matching, changed, whole, by_page)


def _all_again(stream: _Stream, reason: str) -> str:
    return f"{stream.plan.stream}: all rows are read again: {reason}"


# By transaction


async def _by_transaction(stream: _Stream, former: Position | None) -> Reading:
    await _refuse_without_xmin(stream)
    row = await stream.connection.fetchrow(
        "SELECT txid_snapshot_xmin(s) AS oldest, txid_snapshot_xmax(s) AS next FROM txid_current_snapshot() AS s"
    )
    assert row is not None, "a function that is no set returns one row"
    cluster, timeline = await _server(stream.connection)
    warnings: tuple[str, ...] = ()
    changed = None
    if former is not None and former.mark is not None:
        age = row["next"] - int(former.mark)
        reason = _outdated(stream, former, "xmin", "")
        if (former.cluster, former.timeline) != (cluster, timeline):
            reason = reason or "the server is another one, or was restored or promoted since"
        elif not 0 <= age < _TRANSACTIONS_MAX:
            reason = reason or "too many transactions lie between"
        if reason is None:
            changed = _written_since(int(former.mark), row["next"])
        else:
            warnings = (_all_again(stream, reason),)
    seen = await _seen(stream, _written_since(row["oldest"], row["next"]), _xmin_hash(stream))
    if seen is None:
        raise ConnectorUnavailable(
            f"{stream.plan.stream}: transactions are open for so long that more than {SEEN_MAX} rows were written "
            "since the oldest began, which an appending run would append twice: it is tried again",
            code="transactions_open",
        )
    position = Position(
        kind="xmin",
        columns=stream.known_columns,
        members=sorted(stream.members),
        mark=str(row["oldest"]),
        seen=seen,
        cluster=cluster,
        timeline=timeline,
    )
    return Reading(_rows(stream, former, changed, _xmin_hash(stream), by_page=True), position, warnings)


async def _server(connection: "asyncpg.Connection[Any]") -> tuple[str, int]:
    """The system identifier and the timeline; empty and 0 where the role may not read them."""
    readable = await connection.fetchval(
        "SELECT has_function_privilege('pg_control_system()', 'EXECUTE') "
        "AND has_function_privilege('pg_control_checkpoint()', 'EXECUTE')"
    )
    if not readable:
        return "", 0
    row = await connection.fetchrow(
        "SELECT system_identifier::text AS cluster, timeline_id AS timeline "
        "FROM pg_control_system(), pg_control_checkpoint()"
    )
    assert row is not None, "each function returns one row"
    return row["cluster"], row["timeline"]


def _written_since(transaction: int, next_transaction: int) -> str:
    """The condition of rows that were written by this transaction or a later one; a row knows the lower 32 bits."""
    return (
        f"(xmin::text::bigint - {transaction % 2**32} + {2**32}) % {2**32} BETWEEN 0 AND "
        f"{max(0, next_transaction - transaction)}"
    )


def _xmin_hash(stream: _Stream) -> str:
    return f"md5(xmin::text || {stream.row}::text)"


async def _refuse_without_xmin(stream: _Stream) -> None:
    relation = stream.relation
    reason = None
    if relation["relkind"] not in (b"r", b"p"):
        reason = "it is not a table"
    elif not relation["readable"]:
        reason = "the role may not read whole rows of it (grant it SELECT on the table)"
    else:
        foreign = await stream.connection.fetchval(
            """
            SELECT min(c.oid::regclass::text) FROM pg_class c LEFT JOIN pg_am a ON a.oid = c.relam
            WHERE c.oid = ANY($1::oid[]) AND NOT (c.relkind = 'p' OR (c.relkind = 'r' AND a.amname = 'heap'))
            """,
            list(stream.members),
        )
        if foreign is not None:
            reason = f"{foreign} is not an ordinary table"
    if reason is not None:
        raise ConnectorRefused(
            f"{stream.plan.stream}: rows that changed can't be found without a cursor, because {reason}: choose a "
            "cursor_field, or the mode full_refresh",
            code="cursor_needed",
        )


# By cursor


async def _by_cursor(
    stream: _Stream, former: Position | None, every_column: Sequence[Column], transactions: OpenTransactions
) -> Reading:
    plan = stream.plan
    names = [name for name in (plan.cursor, plan.cursor_fallback) if name]
    cursors = [_cursor(plan, name, every_column) for name in names]
    held = cursors[0].type
    if any(cursor.type.sql != held.sql for cursor in cursors):
        raise ConnectorRefused(
            f"{plan.stream}: the cursor {names[0]!r} and its fallback {names[1]!r} are of different types",
            code="cursor_unfit",
        )
    expressions = [quoted(cursor.source_name) for cursor in cursors]
    cursor = expressions[0] if len(expressions) == 1 else f"coalesce({', '.join(expressions)})"
    column = ":".join(names)
    reason = None if former is None else _outdated(stream, former, "cursor", column)
    is_known = former is not None and former.mark is not None and reason is None
    warnings = [] if reason is None else [_all_again(stream, reason)]
    changed = None
    if is_known:
        assert former is not None
        assert former.mark is not None
        changed = f"{cursor} >= {literal(former.mark)}::{held.sql}"
        if plan.nulls == "always":
            changed = f"({changed} OR {cursor} IS NULL)"
    mark, seen, told = await _mark(stream, cursor, held, transactions)
    warnings += told
    matching = stream.matching
    if plan.nulls == "never":
        matching = " AND ".join(filter(None, (matching, f"{cursor} IS NOT NULL")))
    by_page = not await _is_indexed(stream, [item.source_name for item in cursors])
    rows = _rows(stream, former, changed, _row_hash(stream), by_page=by_page)
    rows = Rows(matching, rows.changed, rows.whole, rows.by_page)
    position = Position(
        kind="cursor",
        column=column,
        columns=stream.known_columns,
        members=sorted(stream.members),
        mark=mark,
        seen=seen,
    )
    return Reading(rows, position, tuple(warnings))


def _cursor(plan: StreamPlan, name: str, columns: Sequence[Column]) -> Column:
    found = next((column for column in columns if column.source_name == name), None)
    if found is None:
        raise ConnectorRefused(f"the source's table {plan.stream} has no column {name!r}", code="column_missing")
    if not is_cursor(found):
        raise ConnectorRefused(
            f"{plan.stream}: the column {name!r} of type {found.declared} can't be a cursor: its values have no order "
            f"that a run could continue in; choose a number, a date, a time, a text or a UUID",
            code="cursor_unfit",
        )
    return found


def is_cursor(column: Column) -> bool:
    """Whether the column's values have an order, from PostgreSQL itself, that a run can continue in."""
    held = column.type
    return held.built_in and held.kind == "scalar" and held.name in CURSOR_TYPES and not column.cast


def _row_hash(stream: _Stream) -> str:
    return f"md5({stream.row}::text)"


async def _mark(
    stream: _Stream, cursor: str, held: Any, transactions: OpenTransactions
) -> tuple[str | None, list[str], list[str]]:
    """What the next run reads from, as text; the hashes of the rows from there on; warnings."""
    behind, warnings = _seconds_behind(stream, held, transactions)
    finite = None
    if held.name in _TIMES:
        finite = f"isfinite({cursor})"
    elif held.name == "numeric":
        finite = f"{cursor} NOT IN ('NaN', 'Infinity')" if _has_infinity(stream) else f"{cursor} <> 'NaN'"
    query = f"SELECT {cursor} AS value {stream.where(f'{cursor} IS NOT NULL', finite)} ORDER BY 1 DESC LIMIT 1"
    text = "value::text"
    if held.name in _TIMES:
        # Values in the future, by a clock that is ahead, are no reason to skip the present.
        now = f"{literal(transactions.asked_at)}::timestamptz"
        latest = {
            "timestamptz": now,
            "timestamp": f"{now}::timestamp + interval '14 hours'",
            "date": f"{now}::date + 1",
        }
        text = f"(least(value, {latest[held.name]}) - make_interval(secs => {behind!r}))::{held.sql}::text"
    found = await stream.connection.fetchrow(f"SELECT value::text, {text} FROM ({query}) AS greatest")  # noqa: S608
    if found is None:
        return None, [], warnings
    greatest, low = str(found[0]), str(found[1])
    for mark in (low, greatest):
        seen = await _seen(stream, f"{cursor} >= {literal(mark)}::{held.sql}", _row_hash(stream))
        if seen is not None:
            if mark != low:
                warnings.append(
                    f"{stream.plan.stream}: more than {SEEN_MAX} rows were written in the last {behind:g} s, so the "
                    "next run begins at the greatest cursor, and rows that are committed late may be missed"
                )
            return mark, seen, warnings
    raise ConnectorRefused(
        f"{stream.plan.stream}: more than {SEEN_MAX} rows share the greatest value of the cursor, which an appending "
        "run would append twice: leave the cursor out, so that rows are found by transaction, or choose another cursor",
        code="cursor_unfit",
    )


def _has_infinity(stream: _Stream) -> bool:
    return stream.connection.get_server_version() >= (14,)


def _seconds_behind(stream: _Stream, held: Any, transactions: OpenTransactions) -> tuple[float, list[str]]:
    plan = stream.plan
    if held.name not in _TIMES:
        if plan.lag_seconds:
            raise ConnectorRefused(
                f"{plan.stream}: a lag needs a cursor that is a date or a time; {plan.cursor!r} is of type {held.sql}",
                code="cursor_unfit",
            )
        return 0.0, [
            f"{plan.stream}: the cursor {plan.cursor!r} is not a time: a row that is committed after rows with greater "
            "values were read is missed; without a cursor_field, rows are found by transaction and none is missed"
        ]
    lag_seconds = plan.lag_seconds or 0.0
    if transactions.hidden is None:
        return min(transactions.age_seconds, OPEN_SECONDS_MAX) + lag_seconds, []
    if plan.lag_seconds is not None:
        return lag_seconds, []
    return LAG_SECONDS, [
        f"{plan.stream}: the next run begins {LAG_SECONDS:g} s before the greatest cursor, for rows that are "
        f"committed late, because {transactions.hidden}; set lag_seconds if transactions take longer"
    ]


async def _is_indexed(stream: _Stream, columns: Sequence[str]) -> bool:
    if len(columns) != 1:
        return False
    return bool(
        await stream.connection.fetchval(
            """
            SELECT EXISTS (SELECT FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid
                           WHERE i.indrelid = $1 AND a.attname = $2 AND i.indkey[0] = a.attnum AND i.indisvalid
                             AND i.indpred IS NULL)
            """,
            stream.relation["oid"],
            columns[0],
        )
    )


async def _seen(stream: _Stream, condition: str, row_hash: str) -> list[str] | None:
    """The hashes of the rows that meet the condition, where a state needs them; None if there are too many."""
    if not stream.appends:
        return []
    query = f"SELECT {row_hash} AS hash {stream.where(condition)} LIMIT {SEEN_MAX + 1}"
    hashes = [row["hash"] for row in await stream.connection.fetch(query)]
    return None if len(hashes) > SEEN_MAX else hashes
