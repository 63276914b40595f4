"""A digest of rows in their order that does not depend on how they were cut into batches.

Each column of a row group gives the bytes of its validity, lengths and values; what stands under a null is left out.
Row groups are gathered in 16 buckets, so that a difference says roughly where it is.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

BUCKETS = 16


class Fingerprint:
    """Grows by row groups."""

    def __init__(self) -> None:
        self.rows = 0
        self._groups: list[bytes] = []

    def add(self, group: pa.Table) -> None:
        digest = hashlib.blake2b(digest_size=16)
        for column in group.columns:
            for piece in _pieces(_whole(column)):
                digest.update(piece)
        self.rows += group.num_rows
        self._groups.append(digest.digest())

    @classmethod
    def joined(cls, parts: Sequence["Fingerprint"]) -> "Fingerprint":
        """Of files one after the other."""
        whole = cls()
        for part in parts:
            whole.rows += part.rows
            whole._groups.extend(part._groups)
        return whole

    def buckets(self) -> list[str]:
        digests = [hashlib.blake2b(digest_size=16) for _ in range(min(BUCKETS, len(self._groups)))]
        for index, group in enumerate(self._groups):
            digests[index % BUCKETS].update(group)
        return [digest.hexdigest() for digest in digests]


def fingerprint_of_files(paths: Iterable[Path]) -> Fingerprint:
    """Of Parquet files as they stand on the disk, read a row group at a time."""
    whole = Fingerprint()
    for path in paths:
        with pq.ParquetFile(path) as file:
            for index in range(file.num_row_groups):
                whole.add(file.read_row_group(index, use_threads=False))
    return whole


def _whole(column: "pa.ChunkedArray[Any]") -> "pa.Array[Any]":
    chunks = [chunk.storage if isinstance(chunk, pa.ExtensionArray) else chunk for chunk in column.chunks]
    return pa.concat_arrays(chunks) if chunks else pa.nulls(0)


def _pieces(array: "pa.Array[Any]") -> Iterator[memoryview]:
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    yield _values(array.is_valid().cast(pa.uint8()), 1)
    if array.null_count:
        array = array.drop_null()
    if not len(array):
        return
    if isinstance(array, pa.ListArray):
        yield _values(pc.list_value_length(array), 4)
        yield from _pieces(array.flatten())
    elif isinstance(array, pa.BooleanArray):
        yield _values(array.cast(pa.uint8()), 1)
    elif isinstance(array, pa.StringArray | pa.BinaryArray):
        yield _values(pc.binary_length(array), 4)
        offsets = _buffer(array, 1).cast("i")
        yield _buffer(array, 2)[offsets[array.offset] : offsets[array.offset + len(array)]]
    else:
        yield _values(array, array.type.bit_width // 8)


def _values(array: "pa.Array[Any]", width: int) -> memoryview:
    return _buffer(array, 1)[array.offset * width : (array.offset + len(array)) * width]


def _buffer(array: "pa.Array[Any]", index: int) -> memoryview:
    buffer = array.buffers()[index]
    return memoryview(b"") if buffer is None else memoryview(buffer)
