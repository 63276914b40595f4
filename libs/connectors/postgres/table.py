"""A table in a run's snapshot: its columns, which rows are read, in which ranges of pages, and in which formats."""

import contextlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import asyncpg

from libs.connectors.postgres.connection import literal, quoted
from libs.connectors.postgres.failures import failure, hidden_by_row_security
from libs.connectors.postgres.types import Column
from libs.connectors.protocol import ConnectorRefused, StreamPlan
from libs.contracts.filters import Condition

if TYPE_CHECKING:
    import pyarrow

    from libs.connectors.canonical import SourceEnd
    from libs.connectors.postgres.snapshot import PostgresSnapshot

PART_PAGES_MIN = 2_048
PART_PAGES_MAX = 131_072
PARTS_PER_CONNECTION = 8
# A ``PostgresTable`` itself: whoever asks for it reads its rows with COPY, each column in its ``type``.
POSTGRES_WIRE = "postgres"


@dataclass(frozen=True, slots=True)
class Leaf:
    """A relation that holds rows: the table itself or one partition.

    Args:
        oid: the relation's, which tells a partition from one that was attached under its name since.
        by_page: may be read in ranges of pages.
    """

    oid: int
    relation: str
    by_page: bool
    pages: int
    rows_estimated: int | None


@dataclass(frozen=True, slots=True)
class Part:
    """A range of a relation's pages: ``first_page`` up to and excluding ``end_page``; None is unbounded.

    Args:
        only: excludes tables that inherit from the relation.
        conditions: SQL conditions that the rows meet.
    """

    relation: str
    first_page: int | None = None
    end_page: int | None = None
    only: bool = False
    conditions: tuple[str, ...] = ()

    @property
    def from_clause(self) -> str:
        conditions = list(self.conditions)
        if self.first_page is not None:
            conditions.append(f"ctid >= '({self.first_page},0)'")
        if self.end_page is not None:
            conditions.append(f"ctid < '({self.end_page},0)'")
        where = f" WHERE {' AND '.join(conditions)}" if conditions else ""
        return f"FROM {'ONLY ' if self.only else ''}{self.relation}{where}"


@dataclass(frozen=True, slots=True)
class Rows:
    """Which rows are read.

    Args:
        matching: the SQL condition of the stream's filter; None for all rows.
        changed: the SQL condition of the rows that changed since a state; None to read all of them.
        whole: the relations that ``changed`` does not apply to, because the state does not know them.
        by_page: whether ``changed`` is looked for in ranges of pages rather than with an index.
    """

    matching: str | None = None
    changed: str | None = None
    whole: frozenset[int] = frozenset()
    by_page: bool = True

    def conditions(self, oid: int) -> tuple[str, ...]:
        changed = None if oid in self.whole else self.changed
        return tuple(condition for condition in (self.matching, changed) if condition is not None)

    def is_indexed(self, oid: int) -> bool:
        return not self.by_page and self.changed is not None and oid not in self.whole


@dataclass(frozen=True, slots=True)
class PostgresTable:
    """A table in the snapshot; what needs pyarrow is imported when it is used, as a copy between servers needs none."""

    snapshot: "PostgresSnapshot"
    plan: StreamPlan
    columns: tuple[Column, ...]
    primary_key: tuple[str, ...]
    leaves: tuple[Leaf, ...]
    warnings: tuple[str, ...] = ()
    rows: Rows = field(default_factory=Rows)
    state: str | None = None

    @property
    def is_whole(self) -> bool:
        return self.rows.changed is None

    @property
    def name(self) -> tuple[str, str]:
        return self.plan.stream.namespace, self.plan.stream.name

    @property
    def rows_estimated(self) -> int | None:
        if self.rows.changed is not None or self.rows.matching is not None:
            return None
        estimates = [leaf.rows_estimated for leaf in self.leaves if leaf.rows_estimated is not None]
        return sum(estimates) if estimates and len(estimates) == len(self.leaves) else None

    @property
    def connections_max(self) -> int:
        return self.snapshot.config.max_threads

    def parts(self) -> Sequence[Part]:
        return [part for leaf in self.leaves for part in _cut(leaf, self.connections_max, self.rows)]

    def wire(self, wire_format: str) -> "PostgresTable | None":
        return self if wire_format == POSTGRES_WIRE else None

    def without(self, columns: frozenset[str]) -> "PostgresTable":
        return replace(self, columns=tuple(column for column in self.columns if column.name not in columns))

    def all_rows(self) -> "PostgresTable":
        """The rows of the stream, whatever the state is."""
        return replace(self, rows=replace(self.rows, changed=None))

    def keys(self) -> "PostgresTable":
        key = tuple(column for column in self.columns if column.name in self.primary_key)
        return replace(self.all_rows(), columns=key)

    def select(self, part: Part) -> str:
        """The query of one part's rows, every column in its ``type``."""
        return f"{select_list(self.columns)} {part.from_clause}"

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

        every = self.all_rows()
        return PostgresSourceEnd(every, arrow_form(every))

    async def values_changed(self) -> dict[str, int]:
        from libs.connectors.postgres.arrow import unholdable_by_policy  # noqa: PLC0415

        conditions = unholdable_by_policy(self)
        if not conditions:
            return {}
        counts = ", ".join(f"count(*) FILTER (WHERE {condition})" for condition in conditions.values())
        try:
            async with self.snapshot.reader() as connection:
                found = await connection.fetchrow(f"SELECT {counts} {self._from_clause()}")
        except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
            raise self.failed(error) from error
        assert found is not None
        return dict(zip(conditions, found, strict=True))

    def _from_clause(self) -> str:
        if not self.rows.whole:
            return Part(quoted(*self.name), conditions=self.rows.conditions(0)).from_clause
        parts = " UNION ALL ".join(f"SELECT * {part.from_clause}" for part in self.parts())
        return f"FROM ({parts}) AS parts"

    def failed(self, error: BaseException) -> Exception:
        """The error of a query on this table, which it names."""
        return reading_failed(error, self.plan)


def reading_failed(error: BaseException, plan: StreamPlan) -> Exception:
    failed = failure(error, f"reading {plan.stream} from the source")
    if hidden_by_row_security(error):
        return ConnectorRefused(
            f"{failed.message}, or set row_security: filtered in the source's configuration to copy only the rows that "
            "the role may see",
            code=failed.code,
        )
    return failed


def select_list(columns: Sequence[Column]) -> str:
    return f"SELECT {', '.join(column.expression for column in columns)}"


def chosen_columns(plan: StreamPlan, columns: list[Column]) -> tuple[Column, ...]:
    """The columns that the plan chooses; raises ``ConnectorRefused`` naming one that does not exist."""
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
    return _renamed(plan, chosen)


def filter_condition(plan: StreamPlan, columns: Sequence[Column]) -> str | None:
    """The plan's filter as an SQL condition; raises ``ConnectorRefused`` naming a column that does not exist."""
    if plan.row_filter is None:
        return None
    known: dict[str, Column] = {column.source_name: column for column in columns}
    missing = [name for name in plan.row_filter.columns if name not in known]
    if missing:
        raise ConnectorRefused(
            f"the source's table {plan.stream} has no column {missing[0]!r}, which the filter names",
            code="column_missing",
        )

    def compared(condition: Condition) -> str:
        column = quoted(condition.column)
        if condition.value is None:
            return f"{column} IS {'NOT ' if condition.operator == '!=' else ''}NULL"
        return f"{column} {condition.operator} {literal(condition.value)}::{known[condition.column].declared}"

    return plan.row_filter.sql(compared)


def _renamed(plan: StreamPlan, columns: Sequence[Column]) -> tuple[Column, ...]:
    taken: dict[str, str] = {}
    for column in columns:
        other = taken.setdefault(plan.renamed(column.name), column.name)
        if other != column.name:
            raise ConnectorRefused(
                f"{plan.stream}: the columns {other!r} and {column.name!r} are both named "
                f"{plan.renamed(column.name)!r} at the destination: give one of them another destination_column_name"
            )
    return tuple(replace(column, name=plan.renamed(column.name), source=column.name) for column in columns)


def _cut(leaf: Leaf, connections: int, rows: Rows) -> list[Part]:
    only, conditions = leaf.by_page, rows.conditions(leaf.oid)
    if leaf.pages <= PART_PAGES_MIN or rows.is_indexed(leaf.oid):
        return [Part(leaf.relation, only=only, conditions=conditions)]
    size = min(max(leaf.pages // (connections * PARTS_PER_CONNECTION), PART_PAGES_MIN), PART_PAGES_MAX)
    starts = list(range(0, leaf.pages, size))
    # The last range is unbounded: pages that were added after the size was taken may hold rows of the snapshot.
    return [
        Part(leaf.relation, start, end, only, conditions)
        for start, end in zip(starts, [*starts[1:], None], strict=True)
    ]
