"""A table in a run's snapshot: its columns, the ranges of pages it is read in, and its rows in each format."""

import contextlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import asyncpg

from libs.connectors.postgres.connection import quoted
from libs.connectors.postgres.failures import failure, hidden_by_row_security
from libs.connectors.postgres.types import Column
from libs.connectors.protocol import ConnectorRefused, StreamPlan

if TYPE_CHECKING:
    import pyarrow

    from libs.connectors.canonical import SourceEnd
    from libs.connectors.postgres.snapshot import PostgresSnapshot

PART_PAGES_MIN = 2_048
PART_PAGES_MAX = 131_072
PARTS_PER_CONNECTION = 8


@dataclass(frozen=True, slots=True)
class Leaf:
    """A relation that holds rows: the table itself or one partition.

    Args:
        by_page: may be read in ranges of pages.
    """

    relation: str
    by_page: bool
    pages: int
    rows_estimated: int | None


@dataclass(frozen=True, slots=True)
class Part:
    """A range of a relation's pages: ``first_page`` up to and excluding ``end_page``; None is unbounded.

    Args:
        only: excludes tables that inherit from the relation.
    """

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


@dataclass(frozen=True, slots=True)
class PostgresTable:
    """A table in the snapshot; what needs pyarrow is imported when it is used, as a copy between servers needs none."""

    snapshot: "PostgresSnapshot"
    plan: StreamPlan
    columns: tuple[Column, ...]
    primary_key: tuple[str, ...]
    leaves: tuple[Leaf, ...]
    warnings: tuple[str, ...] = ()

    @property
    def name(self) -> tuple[str, str]:
        return self.plan.stream.namespace, self.plan.stream.name

    @property
    def rows_estimated(self) -> int | None:
        estimates = [leaf.rows_estimated for leaf in self.leaves if leaf.rows_estimated is not None]
        return sum(estimates) if estimates and len(estimates) == len(self.leaves) else None

    @property
    def connections_max(self) -> int:
        return self.snapshot.config.max_threads

    def parts(self) -> Sequence[Part]:
        return [part for leaf in self.leaves for part in _cut(leaf, self.connections_max)]

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
    return tuple(chosen)


def _cut(leaf: Leaf, connections: int) -> list[Part]:
    only = leaf.by_page
    if leaf.pages <= PART_PAGES_MIN:
        return [Part(leaf.relation, only=only)]
    size = min(max(leaf.pages // (connections * PARTS_PER_CONNECTION), PART_PAGES_MIN), PART_PAGES_MAX)
    starts = list(range(0, leaf.pages, size))
    # The last range is unbounded: pages that were added after the size was taken may hold rows of the snapshot.
    return [Part(leaf.relation, start, end, only) for start, end in zip(starts, [*starts[1:], None], strict=True)]
