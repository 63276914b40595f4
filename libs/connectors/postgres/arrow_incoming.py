"""A stream of any source on its way into PostgreSQL: its record batches are written as binary COPY."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any

import asyncpg
import pyarrow as pa

from libs.connectors.arrow_types import normalised, normalised_schema
from libs.connectors.comparison import AFTER_COPYING, Comparison
from libs.connectors.comparison import compare as compare_ends
from libs.connectors.postgres.arrow_copy import HEADER, TRAILER, columns_of, encode, held
from libs.connectors.postgres.arrow_form import canonical_values
from libs.connectors.postgres.connection import DRIVER_ERRORS
from libs.connectors.postgres.copying import unless_lost
from libs.connectors.postgres.incoming import OfTable
from libs.connectors.postgres.staging import Relation
from libs.connectors.postgres.table import PostgresTable
from libs.connectors.postgres.types import Column
from libs.connectors.postgres.verification import Expecting, Form, one_end
from libs.connectors.protocol import Progress, Table


@dataclass(frozen=True, slots=True)
class ArrowIncoming(OfTable[Table]):
    """A table of any source.

    Args:
        schema: of the rows in exchanged types.
        changed: how many values a policy changed, by column.
    """

    schema: pa.Schema
    columns: tuple[Column, ...]
    changed: "Counter[str]" = field(default_factory=Counter)

    @classmethod
    def of(cls, table: Table) -> "ArrowIncoming":
        schema = normalised_schema(table.plan.stream, table.arrow_schema)
        return cls(table, schema, columns_of(schema))

    @property
    def origin(self) -> PostgresTable | None:
        return None

    async def copy(
        self,
        part: Any,
        connection: "asyncpg.Connection[Any]",
        into: Relation,
        progress: Progress,
        writing_failed: Callable[[BaseException], Exception],
    ) -> int:
        rows = _Rows(self, part, progress)
        try:
            copying = connection.copy_to_table(
                into[1],
                schema_name=into[0],
                columns=[column.name for column in self.columns],
                source=rows.copied(),
                format="binary",
            )
            status = await unless_lost(connection, copying)
        except DRIVER_ERRORS as error:
            raise writing_failed(error) from error
        written = int(status.rsplit(" ", 1)[1])
        assert written == rows.count, "the server reports the number of rows that were sent"
        return written

    async def compare(
        self,
        connection: "asyncpg.Connection[Any]",
        relation: Relation,
        expecting: Expecting | None = None,
        circumstances: str = AFTER_COPYING,
    ) -> Comparison:
        source = self.table.comparable()
        values = canonical_values(self.columns, self.schema.types)
        form = Form({name: values[name] for name in source.columns}, tuple(source.key))
        there = one_end(form, connection, relation)
        return await compare_ends(self.plan.stream, source, there, expecting, circumstances=circumstances)

    def expecting(self, connection: "asyncpg.Connection[Any]") -> AbstractAsyncContextManager[Expecting | None]:
        return contextlib.nullcontext()

    async def values_changed(self) -> dict[str, int]:
        changed = self.changed + Counter(await self.table.values_changed())
        return dict(changed)


class _Rows:
    """The rows of one part.

    Attributes:
        count: the number of rows that were sent.
    """

    def __init__(self, incoming: ArrowIncoming, part: Any, progress: Progress) -> None:
        self.count = 0
        self._incoming = incoming
        self._part = part
        self._progress = progress

    async def copied(self) -> AsyncIterator[bytes]:
        """As COPY has them; an error of the source is raised as it is."""
        yield HEADER
        async with contextlib.aclosing(self._incoming.table.batches(self._part)) as batches:
            async for batch in batches:
                self._progress.add(bytes_read=batch.nbytes)
                for piece in await asyncio.to_thread(self._encoded, batch):
                    yield piece  # type: ignore[misc]
                    self._progress.add(bytes_written=len(piece))
                self.count += batch.num_rows
                del batch
        yield TRAILER

    def _encoded(self, batch: pa.RecordBatch) -> list[memoryview]:
        exchanged = normalised(self._incoming.plan.stream, batch, self._incoming.schema)
        rows, changed = held(self._incoming.plan, exchanged)
        self._incoming.changed.update(changed)
        return list(encode(rows))
