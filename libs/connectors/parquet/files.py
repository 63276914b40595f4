"""Writes record batches to Parquet files: row groups of bounded size, compressed with zstd."""

import contextlib
import os
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from libs.connectors.concurrency import in_thread
from libs.connectors.parquet.folders import hidden_name

ROW_GROUP_BYTES = 16 * 1024 * 1024
ROW_GROUP_ROWS_MAX = 131_072
LONG_GROUP_BYTES = 32 * 1024 * 1024
LONG_ROW_BYTES = 4 * 1024 * 1024
FILE_BYTES_MAX = 512 * 1024 * 1024
COMPRESSION_LEVEL = 1
DICTIONARY_SAMPLE_ROWS = 8_192
DICTIONARY_DISTINCT_SHARE_MAX = 0.2


@dataclass(frozen=True, slots=True)
class StagedFile:
    """A staged file: its final name, and its path until it is published."""

    name: str
    path: Path
    rows: int
    size_bytes: int


class FileSeries:
    """Writes one series of files. Blocking.

    Args:
        number: tells the series of one folder apart.
        file_bytes_max: a file that has become larger is closed.

    Attributes:
        files: the finished files.
    """

    def __init__(self, folder: Path, number: int, schema: pa.Schema, file_bytes_max: int = FILE_BYTES_MAX) -> None:
        self._folder = folder
        self._number = number
        self._schema = schema
        self._file_bytes_max = file_bytes_max
        self._writer: pq.ParquetWriter | None = None
        self._for_long_rows = False
        self._name = ""
        self._path = Path()
        self._rows = 0
        self._sequence = 0
        self.files: list[StagedFile] = []

    def write(self, batches: Sequence[pa.RecordBatch]) -> None:
        """Write the rows as one row group; without rows, open a file, which carries the schema."""
        long = any(batch.nbytes > LONG_ROW_BYTES * batch.num_rows for batch in batches)
        if long and not self._for_long_rows:
            self.close()
        if self._writer is None:
            self._writer = self._open(batches, long)
        if not batches:
            return
        rows = pa.Table.from_batches(batches, self._schema)
        self._writer.write_table(rows, row_group_size=rows.num_rows)
        self._rows += rows.num_rows
        # The writer keeps the pages of its last row group in memory until the next one or the end.
        if rows.nbytes >= LONG_GROUP_BYTES or self._path.stat().st_size >= self._file_bytes_max:
            self.close()

    def close(self) -> None:
        """Finish the open file, if there is one."""
        if self._writer is None:
            return
        self._writer.close()
        self._writer = None
        with self._path.open("rb") as file:
            os.fsync(file.fileno())
        size = self._path.stat().st_size
        self.files.append(StagedFile(self._name, self._path, self._rows, size))
        self._rows = 0
        self._sequence += 1

    def abandon(self) -> None:
        """Close a file that was not finished."""
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.close()
            self._writer = None

    def _open(self, batches: Sequence[pa.RecordBatch], long: bool) -> pq.ParquetWriter:
        self._for_long_rows = long
        self._name = f"part-{self._number}-{self._sequence:05d}-{self._folder.name}.parquet"
        self._path = self._folder / hidden_name(self._name)
        return pq.ParquetWriter(
            self._path,
            self._schema,
            compression="zstd",
            compression_level=COMPRESSION_LEVEL,
            # For statistics the writer makes six copies of a long value, and then leaves them out for their size.
            write_statistics=not long,
            use_dictionary=[] if long else repetitive_columns(batches),  # type: ignore[arg-type]
        )


class FileWriter:
    """Gathers batches into row groups, which a thread encodes."""

    def __init__(self, series: FileSeries, pool: Executor) -> None:
        self._series = series
        self._pool = pool
        self._gathered: list[pa.RecordBatch] = []
        self._gathered_bytes = 0
        self._gathered_rows = 0

    @property
    def files(self) -> list[StagedFile]:
        """The finished files."""
        return self._series.files

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, series: FileSeries, pool: Executor) -> AsyncIterator["FileWriter"]:
        writer = cls(series, pool)
        try:
            yield writer
        finally:
            await in_thread(series.abandon, pool)

    async def write(self, batch: pa.RecordBatch) -> None:
        self._gathered.append(batch)
        self._gathered_bytes += batch.nbytes
        self._gathered_rows += batch.num_rows
        if self._gathered_bytes >= ROW_GROUP_BYTES or self._gathered_rows >= ROW_GROUP_ROWS_MAX:
            await self._flush()

    async def finish(self) -> None:
        """Write what is gathered and close; a series without rows still makes one file, which carries the schema."""
        await self._flush()
        await in_thread(self._series.close, self._pool)

    async def _flush(self) -> None:
        gathered, self._gathered = self._gathered, []
        self._gathered_bytes = self._gathered_rows = 0
        await in_thread(lambda: self._series.write(gathered), self._pool)


def repetitive_columns(batches: Sequence[pa.RecordBatch]) -> list[str]:
    """The text and binary columns worth a dictionary, by a sample; for others it costs time and space."""
    if not batches:
        return []
    sample = batches[0].slice(0, DICTIONARY_SAMPLE_ROWS)
    distinct_max = sample.num_rows * DICTIONARY_DISTINCT_SHARE_MAX
    return [
        field.name
        for field, column in zip(sample.schema, sample.columns, strict=True)
        if isinstance(column, pa.StringArray | pa.BinaryArray) and pc.count_distinct(column).as_py() <= distinct_max
    ]
