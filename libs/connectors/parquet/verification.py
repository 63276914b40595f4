"""Parquet's end of a verification: the staged files are read back, and their rows hashed in canonical form."""

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from libs.connectors.canonical import BUCKET_DIGITS, Fingerprint, HashedRow
from libs.connectors.canonical_arrow import Digests, digests, ending_with, fingerprint, hashes_of, row_bytes
from libs.connectors.protocol import ConnectorUnavailable

# Few enough for a batch and its canonical bytes to stay in the processor's cache.
BATCH_ROWS = 8_192


class ParquetEnd:
    """The files of a table.

    Args:
        schema: the schema that they must have.
        columns: the compared columns.
        key: the columns whose hash selects the bucket.
    """

    def __init__(self, paths: Sequence[Path], schema: pa.Schema, columns: Sequence[str], key: Sequence[str]) -> None:
        self._paths = paths
        self._schema = schema
        self._columns = columns
        self._key = key

    async def fingerprint(self, suffix: str = "", digits: int = BUCKET_DIGITS) -> Fingerprint:
        return await asyncio.to_thread(self._fingerprint, suffix, digits)

    async def rows(self, suffix: str, rows_max: int) -> list[HashedRow]:
        return await asyncio.to_thread(self._rows, suffix, rows_max)

    def _fingerprint(self, suffix: str, digits: int) -> Fingerprint:
        return Fingerprint.joined(fingerprint(keys, rows, suffix, digits) for _, keys, rows in self._hashed())

    def _rows(self, suffix: str, rows_max: int) -> list[HashedRow]:
        found: list[HashedRow] = []
        for batch, keys, rows in self._hashed():
            chosen = ending_with(keys, suffix)
            shown = [[_shown(value) for value in batch.column(name).take(chosen)] for name in self._key]
            texts = zip(*shown, strict=True) if shown else iter([()] * len(chosen))
            for place, row_hash, key in zip(chosen, hashes_of(rows[chosen]).tolist(), texts, strict=True):
                found.append(HashedRow(keys[place].tobytes().hex(), row_hash, key))
            if len(found) >= rows_max:
                break
        return found[:rows_max]

    def _hashed(self) -> Iterator[tuple[pa.RecordBatch, Digests, Digests]]:
        """Batches, the digests of their keys, and the digests of their rows."""
        for path in self._paths:
            with pq.ParquetFile(path) as file:
                if not file.schema_arrow.equals(self._schema):
                    raise ConnectorUnavailable(
                        f"{path} does not have the columns that were written", code="verification_failed"
                    )
                for batch in file.iter_batches(BATCH_ROWS, columns=list(self._columns), use_threads=False):
                    rows = digests(row_bytes([batch.column(name) for name in self._columns]))
                    if not self._key:
                        yield batch, rows, rows
                        continue
                    yield batch, digests(row_bytes([batch.column(name) for name in self._key])), rows


def _shown(value: "pa.Scalar[Any]") -> str:
    try:
        return str(value.as_py())
    except (OverflowError, ValueError):
        return str(value)
