"""A stream on its way into PostgreSQL: its columns as PostgreSQL has them, and how its rows are copied and compared."""

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import asyncpg

from libs.connectors.comparison import AFTER_COPYING, Comparison
from libs.connectors.postgres.copying import copy_part
from libs.connectors.postgres.staging import Relation
from libs.connectors.postgres.table import POSTGRES_WIRE, PostgresTable
from libs.connectors.postgres.types import Column
from libs.connectors.postgres.verification import Expecting, compare, source_fingerprint
from libs.connectors.protocol import Progress, StreamPlan, Table

TableT = TypeVar("TableT", bound=Table)


class Incoming(Protocol):
    """What a PostgreSQL destination needs of a stream.

    Attributes:
        origin: the table, if it is one of a PostgreSQL, which may be the destination's own.
    """

    @property
    def plan(self) -> StreamPlan: ...

    @property
    def columns(self) -> tuple[Column, ...]: ...

    @property
    def primary_key(self) -> tuple[str, ...]: ...

    @property
    def origin(self) -> PostgresTable | None: ...

    @property
    def connections_max(self) -> int: ...

    def parts(self) -> Sequence[Any]: ...

    async def copy(
        self,
        part: Any,
        connection: "asyncpg.Connection[Any]",
        into: Relation,
        progress: Progress,
        writing_failed: Callable[[BaseException], Exception],
    ) -> int:
        """Copy one part's rows into a table; returns their number."""

    async def compare(
        self,
        connection: "asyncpg.Connection[Any]",
        relation: Relation,
        expecting: Expecting | None = None,
        circumstances: str = AFTER_COPYING,
    ) -> Comparison:
        """Compare all of the stream's rows with a relation's; raises ``EndsDiffer``."""

    def expecting(self, connection: "asyncpg.Connection[Any]") -> AbstractAsyncContextManager[Expecting | None]:
        """Take the source's fingerprint in the background, where it is not the same for all destinations."""

    async def values_changed(self) -> dict[str, int]:
        """How many values the policies changed, by column."""


@dataclass(frozen=True, slots=True)
class OfTable(Generic[TableT]):
    """What is the same for every table of a source."""

    table: TableT

    @property
    def plan(self) -> StreamPlan:
        return self.table.plan

    @property
    def primary_key(self) -> tuple[str, ...]:
        return self.table.primary_key

    @property
    def connections_max(self) -> int:
        return self.table.connections_max

    def parts(self) -> Sequence[Any]:
        return self.table.parts()


@dataclass(frozen=True, slots=True)
class WireIncoming(OfTable[PostgresTable]):
    """A table of another PostgreSQL, whose bytes are passed on."""

    @property
    def columns(self) -> tuple[Column, ...]:
        return self.table.columns

    @property
    def origin(self) -> PostgresTable | None:
        return self.table

    async def copy(
        self,
        part: Any,
        connection: "asyncpg.Connection[Any]",
        into: Relation,
        progress: Progress,
        writing_failed: Callable[[BaseException], Exception],
    ) -> int:
        return await copy_part(
            self.table,
            part,
            connection,
            into,
            binary=all(column.type.same_in_binary for column in self.columns),
            bytes_read=lambda size: progress.add(bytes_read=size),
            bytes_written=lambda size: progress.add(bytes_written=size),
            writing_failed=writing_failed,
        )

    async def compare(
        self,
        connection: "asyncpg.Connection[Any]",
        relation: Relation,
        expecting: Expecting | None = None,
        circumstances: str = AFTER_COPYING,
    ) -> Comparison:
        return await compare(self.table.all_rows(), connection, relation, expecting, circumstances)

    def expecting(self, connection: "asyncpg.Connection[Any]") -> AbstractAsyncContextManager[Expecting | None]:
        return source_fingerprint(self.table.all_rows(), connection)

    async def values_changed(self) -> dict[str, int]:
        return {}


def incoming_of(table: Table) -> Incoming:
    """The table as PostgreSQL's own, if the source speaks its wire format, and else as Arrow's record batches."""
    native = table.wire(POSTGRES_WIRE)
    if native is not None:
        return WireIncoming(native)
    from libs.connectors.postgres.arrow_incoming import ArrowIncoming  # noqa: PLC0415

    return ArrowIncoming.of(table)
