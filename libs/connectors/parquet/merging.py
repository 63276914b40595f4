"""The next version of a table that stays: rows are appended, or merged by key, by copying on write. Blocking.

A file that holds no row to be replaced or deleted becomes a hard link in the next version. Any other is written anew
without those rows. Rows that are new or differ go into files of their own, so that rows that change again are found in
small files. Whether a file holds a key is read from its key columns, and not even those if the statistics of the first
one exclude it. Small files are joined once there are too many.
"""

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from libs.connectors.canonical_arrow import digests, hashes_of, row_bytes
from libs.connectors.parquet.files import FileSeries, StagedFile
from libs.connectors.parquet.folders import hidden_name
from libs.connectors.parquet.schemas import DELETED_AT_FIELD, fitted
from libs.connectors.protocol import DELETED_AT, Deletes

Flags: TypeAlias = npt.NDArray[np.bool_]
Array: TypeAlias = Any

# A file that has to be copied for one row should not be large.
MERGED_FILE_BYTES_MAX = 64 * 1024 * 1024
SMALL_FILE_BYTES = 8 * 1024 * 1024
SMALL_FILES_MAX = 16
BATCH_ROWS = 65_536
# How many keys are held in memory at a time.
KEYS_AT_ONCE = 2_000_000
_COPIED_SERIES, _CHANGED_SERIES, _JOINED_SERIES = 100, 200, 300


@dataclass(frozen=True, slots=True)
class PresentFile:
    """A file of the current version."""

    name: str
    path: Path
    rows: int
    size_bytes: int


@dataclass(slots=True)
class Counts:
    inserted: int = 0
    updated: int = 0
    deleted: int = 0
    unchanged: int = 0


@dataclass(slots=True)
class NextVersion:
    """Builds the next version of a table in a folder.

    Args:
        folder: the folder of the next version.
        schema: the columns that all of its files get.
        present: the files of the current version.
        staged: the files of the rows that were read, in the folder already.

    Attributes:
        files: those of the next version.
    """

    folder: Path
    schema: pa.Schema
    present: Sequence[PresentFile]
    staged: Sequence[StagedFile]
    counts: Counts = field(default_factory=Counts)
    files: list[StagedFile] = field(default_factory=list)
    _series: Iterator[int] = field(default_factory=lambda: itertools.count(_COPIED_SERIES))

    def append(self) -> None:
        """Keep all rows, and add those that were read."""
        for file in self.present:
            self._keep(file)
        for staged in self.staged:
            self._take_over(staged)
            self.counts.inserted += staged.rows
        self._join_small_files()

    def merge(self, key: Sequence[str], keys: Sequence[Path] | None, deletes: Deletes | None, now: datetime) -> None:
        """Insert and update by key.

        Args:
            keys: files with the keys of all of the source's rows; None: no row is deleted.
            now: marks rows as deleted.
        """
        changes = [_Changes(file.path, key, self.schema) for file in self.staged]
        replaced = [self._rows_replaced(file, key, changes) for file in self.present]
        known = None if keys is None else _Keys(keys, key)
        marks = deletes == "soft"
        for file, gone in zip(self.present, replaced, strict=True):
            deleted = self._rows_deleted(file, key, known, gone, only_unmarked=marks)
            self.counts.deleted += int(deleted.sum())
            if not gone.any() and not deleted.any() and schema_of(file.path).equals(self.schema):
                self._link(file)
            else:
                self._copy(file, gone if marks else gone | deleted, deleted if marks else None, now)
        self._write_changes(changes)
        self._join_small_files()

    def _rows_replaced(self, file: PresentFile, key: Sequence[str], changes: Sequence["_Changes"]) -> Flags:
        """The rows of a file that a row which was read replaces, because it differs."""
        replaced = np.zeros(file.rows, np.bool_)
        for change in changes:
            if not change.may_be_in(file.path):
                continue
            start = 0
            for batch in self._keys_in(file, key):
                found = change.places_of(batch, key)
                rows = np.flatnonzero(found >= 0)
                if len(rows):
                    self._compare(file, change, start, rows, found[rows], replaced)
                start += batch.num_rows
        return replaced

    def _compare(
        self,
        file: PresentFile,
        change: "_Changes",
        start: int,
        rows: npt.NDArray[np.intp],
        places: npt.NDArray[np.int64],
        replaced: Flags,
    ) -> None:
        there = fitted(_rows_at(file.path, start + rows), self.schema)
        differs = _hashes(there, change.columns) != change.hashes[places]
        change.carry(places, there)
        if DELETED_AT in self.schema.names:
            differs |= there.column(DELETED_AT).is_valid().to_numpy(zero_copy_only=False)
        replaced[start + rows[differs]] = True
        change.known[places] = True
        change.equal[places[~differs]] = True
        self.counts.updated += int(differs.sum())
        self.counts.unchanged += int((~differs).sum())

    def _rows_deleted(
        self, file: PresentFile, key: Sequence[str], known: "_Keys | None", replaced: Flags, *, only_unmarked: bool
    ) -> Flags:
        """The rows of a file that the source no longer has."""
        if known is None or not file.rows:
            return np.zeros(file.rows, np.bool_)
        missing = np.ones(file.rows, np.bool_)
        for values in known.some():
            start = 0
            for batch in self._keys_in(file, key):
                is_known: Array = pc.is_in(_keys_of(batch, key), value_set=values)
                found = is_known.to_numpy(zero_copy_only=False)
                missing[start : start + batch.num_rows] &= ~found
                start += batch.num_rows
        if only_unmarked and DELETED_AT in schema_of(file.path).names:
            marks = pa.concat_arrays([batch.column(0) for batch in _batches(file.path, [DELETED_AT])])
            missing &= ~marks.is_valid().to_numpy(zero_copy_only=False)
        return missing & ~replaced

    def _keys_in(self, file: PresentFile, key: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """The key columns of a file, in the types of the next version."""
        schema = pa.schema([self.schema.field(name) for name in key])
        return (fitted(batch, schema) for batch in _batches(file.path, key))

    def _keep(self, file: PresentFile) -> None:
        if schema_of(file.path).equals(self.schema):
            self._link(file)
        else:
            self._copy(file, np.zeros(file.rows, np.bool_), None, None)

    def _link(self, file: PresentFile) -> None:
        path = self.folder / hidden_name(file.name)
        os.link(file.path, path)
        self.files.append(StagedFile(file.name, path, file.rows, file.size_bytes))

    def _copy(self, file: PresentFile, left_out: Flags, marked: Flags | None, now: datetime | None) -> None:
        """Write a file anew without some of its rows, and with some marked as deleted."""
        series = self._new_series()
        start = 0
        for batch in _batches(file.path):
            rows = fitted(batch, self.schema)
            end = start + batch.num_rows
            if marked is not None and marked[start:end].any():
                rows = _marked(rows, marked[start:end], now)
            kept = pa.array(~left_out[start:end])
            rows = rows.filter(kept) if left_out[start:end].any() else rows
            if rows.num_rows:
                series.write([rows])
            start = end
        self._finish(series)

    def _write_changes(self, changes: Sequence["_Changes"]) -> None:
        """The rows that are new or differ; a file of which all are becomes one of the version as it is."""
        for staged, change in zip(self.staged, changes, strict=True):
            self.counts.inserted += int((~change.known).sum())
            if not change.equal.any() and schema_of(staged.path).equals(self.schema) and staged.rows:
                self._take_over(staged)
                continue
            series = self._new_series()
            start = 0
            for batch in _batches(staged.path):
                wanted = ~change.equal[start : start + batch.num_rows]
                start += batch.num_rows
                if wanted.any():
                    rows = change.with_carried(fitted(batch, self.schema), start - batch.num_rows)
                    series.write([rows.filter(pa.array(wanted))])
            self._finish(series)
            staged.path.unlink()

    def _take_over(self, staged: StagedFile) -> None:
        """Make a staged file one of the version."""
        if staged.rows:
            self.files.append(staged)
        else:
            staged.path.unlink()

    def _join_small_files(self) -> None:
        small = [file for file in self.files if file.size_bytes < SMALL_FILE_BYTES]
        if len(small) > SMALL_FILES_MAX:
            series = self._new_series()
            for file in small:
                for batch in _batches(file.path):
                    series.write([batch])
            self.files = [file for file in self.files if file not in small]
            self._finish(series)
            for file in small:
                file.path.unlink()
        if not self.files:
            series = self._new_series()
            series.write([])
            self._finish(series)

    def _new_series(self) -> FileSeries:
        return FileSeries(self.folder, next(self._series), self.schema, MERGED_FILE_BYTES_MAX)

    def _finish(self, series: FileSeries) -> None:
        series.close()
        self.files += series.files


class _Changes:
    """The rows of a staged file, by key.

    Attributes:
        columns: those that were read. Rows that are replaced keep their values of the table's others.
        hashes: of the rows.
        known: which keys the table has.
        equal: which rows the table has as they are.
    """

    def __init__(self, path: Path, key: Sequence[str], schema: pa.Schema) -> None:
        keys: list[Array] = []
        hashes: list[npt.NDArray[np.uint64]] = []
        firsts: list[Array] = []
        for batch in _batches(path):
            keys.append(_keys_of(batch, key))
            firsts.append(_sortable(batch.column(key[0])))
            hashes.append(_hashes(fitted(batch, schema), batch.schema.names))
        self._keys: Array = pa.concat_arrays(keys) if keys else pa.array([], pa.binary())
        self._bounds = _bounds_of(firsts)
        self._first = key[0]
        self.columns = schema_of(path).names
        self._others = [name for name in schema.names if name not in (*self.columns, DELETED_AT)]
        self._carried: list[tuple[npt.NDArray[np.int64], pa.RecordBatch]] = []
        self.hashes = np.concatenate(hashes) if hashes else np.zeros(0, np.uint64)
        self.known = np.zeros(len(self._keys), np.bool_)
        self.equal = np.zeros(len(self._keys), np.bool_)

    def may_be_in(self, path: Path) -> bool:
        """False if the file's statistics exclude every key."""
        if self._bounds is None:
            return False
        there = _statistics(path, self._first)
        if there is None:
            return True
        low, high = self._bounds
        return bool(low <= there[1] and high >= there[0])

    def places_of(self, batch: pa.RecordBatch, key: Sequence[str]) -> npt.NDArray[np.int64]:
        """For each row the place of the row of the same key here, -1 where there is none."""
        places: Array = pc.index_in(_keys_of(batch, key), value_set=self._keys)
        found: npt.NDArray[np.int64] = places.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
        return found

    def carry(self, places: npt.NDArray[np.int64], rows: pa.RecordBatch) -> None:
        """Remember the table's values of columns that were not read, for the rows at these places."""
        if self._others:
            self._carried.append((places, rows.select(self._others)))

    def with_carried(self, rows: pa.RecordBatch, start: int) -> pa.RecordBatch:
        """The rows from this place on, with the values that they keep."""
        if not self._carried:
            return rows
        places = np.concatenate([places for places, _ in self._carried])
        indices = np.full(len(self.known), -1, np.int64)
        indices[places] = np.arange(len(places))
        chosen = indices[start : start + rows.num_rows]
        wanted: Array = pa.array(chosen, mask=chosen < 0)
        values = pa.Table.from_batches([batch for _, batch in self._carried]).combine_chunks()
        for name in self._others:
            place = rows.schema.get_field_index(name)
            kept: Array = values.column(name).take(wanted)
            rows = rows.set_column(place, rows.schema.field(name), kept.combine_chunks())
        return rows


class _Keys:
    """The keys of all of the source's rows, of which some are in memory at a time."""

    def __init__(self, paths: Sequence[Path], key: Sequence[str]) -> None:
        self._paths = paths
        self._key = key

    def some(self) -> Iterator[Array]:
        gathered: list[Array] = []
        for batch in itertools.chain.from_iterable(_batches(path, self._key) for path in self._paths):
            gathered.append(_keys_of(batch, self._key))
            if sum(map(len, gathered)) >= KEYS_AT_ONCE:
                yield pa.concat_arrays(gathered)
                gathered = []
        yield pa.concat_arrays(gathered) if gathered else pa.array([], pa.binary())


def _keys_of(batch: pa.RecordBatch, key: Sequence[str]) -> Array:
    return row_bytes([batch.column(name) for name in key])


def _hashes(batch: pa.RecordBatch, names: Sequence[str]) -> npt.NDArray[np.uint64]:
    return hashes_of(digests(row_bytes([batch.column(name) for name in names])))


def _batches(path: Path, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(path) as file:
        names = None if columns is None else list(columns)
        yield from file.iter_batches(BATCH_ROWS, columns=names, use_threads=False)


def _rows_at(path: Path, places: npt.NDArray[np.intp]) -> pa.RecordBatch:
    """Some rows of a file, of which only the row groups that hold them are read."""
    found: list[pa.RecordBatch] = []
    with pq.ParquetFile(path) as file:
        start = 0
        for group in range(file.num_row_groups):
            end = start + file.metadata.row_group(group).num_rows
            inside = places[(places >= start) & (places < end)] - start
            if len(inside):
                wanted: Array = pa.array(inside)
                rows = file.read_row_group(group, use_threads=False).take(wanted)
                found += rows.combine_chunks().to_batches()
            start = end
        schema = file.schema_arrow
    return pa.Table.from_batches(found, schema).combine_chunks().to_batches()[0]


def _marked(rows: pa.RecordBatch, marked: Flags, now: datetime | None) -> pa.RecordBatch:
    place = rows.schema.get_field_index(DELETED_AT)
    marks = pc.if_else(pa.array(marked), pa.scalar(now, DELETED_AT_FIELD.type), rows.column(place))
    return rows.set_column(place, DELETED_AT_FIELD, marks)


def schema_of(path: Path) -> pa.Schema:
    """The columns of a file."""
    with pq.ParquetFile(path) as file:
        return file.schema_arrow


def _statistics(path: Path, column: str) -> tuple[Any, Any] | None:
    """The least and the greatest value of a column, None where the file does not say."""
    with pq.ParquetFile(path) as file:
        place = file.schema_arrow.get_field_index(column)
        if place < 0 or not _is_sortable(file.schema_arrow.field(column).type):
            return None
        bounds: list[tuple[Any, Any]] = []
        for group in range(file.num_row_groups):
            statistics = _column_of(file.metadata.row_group(group), column)
            if statistics is None or not statistics.has_min_max:
                return None
            bounds.append((statistics.min, statistics.max))
    return (min(low for low, _ in bounds), max(high for _, high in bounds)) if bounds else None


def _column_of(group: Any, column: str) -> Any:
    return next(
        (found.statistics for found in map(group.column, range(group.num_columns)) if found.path_in_schema == column),
        None,
    )


def _is_sortable(kind: pa.DataType) -> bool:
    """Whether Parquet's bounds of the type compare as its values do in Python."""
    return pa.types.is_integer(kind) or pa.types.is_string(kind)


def _sortable(column: Array) -> Array:
    return column if _is_sortable(column.type) else None


def _bounds_of(columns: Iterable[Array]) -> tuple[Any, Any] | None:
    """The least and the greatest value, None without any; of a type that has no bounds, everything lies within."""
    found = list(columns)
    if not any(column is None or len(column) for column in found):
        return None
    if any(column is None for column in found):
        return _Everything(), _Everything()
    bounds: list[Any] = [pc.min_max(column).as_py() for column in found if len(column)]
    return min(item["min"] for item in bounds), max(item["max"] for item in bounds)


class _Everything:
    """Compares as less and as greater than any value."""

    def __le__(self, other: object) -> bool:
        return True

    def __ge__(self, other: object) -> bool:
        return True
