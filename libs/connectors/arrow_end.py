"""The end of a comparison for a source that is read as Arrow record batches: its rows are hashed here."""

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from libs.connectors.arrow_types import normalised, normalised_schema
from libs.connectors.canonical import BUCKET_DIGITS, Fingerprint, HashedRow
from libs.connectors.canonical_arrow import digests, ending_with, fingerprint, hashes_of, row_bytes
from libs.connectors.protocol import Table


class ArrowSourceEnd:
    """A table that is read again for each question."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self._schema = normalised_schema(table.plan.stream, table.arrow_schema)

    @property
    def columns(self) -> Sequence[str]:
        return self._schema.names

    @property
    def columns_not_compared(self) -> Mapping[str, str]:
        return {}

    @property
    def key(self) -> Sequence[str]:
        return self._table.primary_key

    async def why_never_comparable(self) -> str | None:
        return None

    async def why_different(self) -> str | None:
        return None

    async def fingerprint(self, suffix: str = "", digits: int = BUCKET_DIGITS) -> Fingerprint:
        found: list[Fingerprint] = []
        for part in self._table.parts():
            async with contextlib.aclosing(self._table.batches(part)) as batches:
                async for batch in batches:
                    _, keys, rows = await asyncio.to_thread(self._hashed, batch)
                    found.append(fingerprint(keys, rows, suffix, digits))
        return Fingerprint.joined(found)

    async def rows(self, suffix: str, rows_max: int) -> list[HashedRow]:
        found: list[HashedRow] = []
        for part in self._table.parts():
            async with contextlib.aclosing(self._table.batches(part)) as batches:
                async for batch in batches:
                    exchanged, keys, rows = await asyncio.to_thread(self._hashed, batch)
                    chosen = ending_with(keys, suffix)
                    hashes = hashes_of(rows[chosen]).tolist()
                    for place, row_hash in zip(chosen.tolist(), hashes, strict=True):
                        key = tuple(str(exchanged.column(name)[place]) for name in self.key)
                        found.append(HashedRow(keys[place].tobytes().hex(), row_hash, key))
                    if len(found) >= rows_max:
                        return found[:rows_max]
        return found

    def _hashed(self, batch: pa.RecordBatch) -> tuple[pa.RecordBatch, Any, Any]:
        exchanged = normalised(self._table.plan.stream, batch, self._schema)
        rows = digests(row_bytes(exchanged.columns))
        keys = digests(row_bytes([exchanged.column(name) for name in self.key])) if self.key else rows
        return exchanged, keys, rows
