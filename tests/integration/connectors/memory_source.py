"""A source of its own: Arrow record batches in memory, which knows nothing of any destination."""

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from libs.connectors.arrow_end import ArrowSourceEnd
from libs.connectors.canonical import SourceEnd
from libs.connectors.protocol import CatalogEntry, StreamPlan


@dataclass(frozen=True)
class MemoryTable:
    """The rows of ``batches``, of which those from ``start`` on changed."""

    plan: StreamPlan
    rows: "tuple[pa.RecordBatch, ...]"
    schema: pa.Schema
    primary_key: tuple[str, ...] = ()
    start: int = 0
    state: str | None = None
    rows_estimated: int | None = None
    warnings: tuple[str, ...] = ()
    connections_max: int = 2

    @property
    def is_whole(self) -> bool:
        return self.start == 0

    @property
    def arrow_schema(self) -> pa.Schema:
        return self.schema

    def parts(self) -> Sequence[Any]:
        return range(self.start, len(self.rows))

    async def batches(self, part: Any) -> AsyncGenerator[pa.RecordBatch, None]:
        yield self.rows[part].select(self.schema.names)

    def wire(self, wire_format: str) -> None:
        return None

    def without(self, columns: frozenset[str]) -> "MemoryTable":
        kept = [name for name in self.schema.names if name not in columns]
        return replace(self, schema=pa.schema([self.schema.field(name) for name in kept]))

    def keys(self) -> "MemoryTable":
        return replace(self.without(frozenset(self.schema.names) - set(self.primary_key)), start=0)

    def comparable(self) -> SourceEnd:
        return ArrowSourceEnd(replace(self, start=0))

    async def values_changed(self) -> dict[str, int]:
        return {}


class MemorySource:
    """One table, to which batches are added; its state is the number of batches that were read."""

    def __init__(self, schema: pa.Schema, key: Sequence[str] = ()) -> None:
        self.schema = schema
        self.key = tuple(key)
        self.rows: list[pa.RecordBatch] = []

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        self.rows.append(pa.RecordBatch.from_pylist(list(rows), schema=self.schema))

    async def check(self) -> Sequence[str]:
        return ()

    async def discover(self) -> list[CatalogEntry]:
        return []

    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator["MemorySource"]:
        yield self

    async def is_usable(self) -> bool:
        return True

    async def table(self, plan: StreamPlan, state: str | None = None) -> MemoryTable:
        incremental = plan.mode == "incremental"
        return MemoryTable(
            plan,
            tuple(self.rows),
            self.schema,
            plan.key or self.key,
            int(state or 0),
            str(len(self.rows)) if incremental else None,
        )
