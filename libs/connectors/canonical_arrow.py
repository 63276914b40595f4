"""Arrow values in their canonical form (``canonical.py``), a column of many rows at a time.

Written after the documentation of PostgreSQL's binary formats, and shares nothing with what decodes a source's rows, so
that a fault there makes a difference here.
"""

import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from libs.connectors.canonical import HASH_MODULUS, Bucket, Fingerprint

# An Arrow array of a type that is only known when it is there, for which the stubs have no functions.
Array: TypeAlias = Any
Digests: TypeAlias = npt.NDArray[np.uint8]

_TEXT, _BYTEA = 25, 17
_OIDS: dict[pa.DataType, int] = {
    pa.bool_(): 16,
    pa.int16(): 21,
    pa.int32(): 23,
    pa.int64(): 20,
    pa.float32(): 700,
    pa.float64(): 701,
    pa.date32(): 1082,
    pa.time64("us"): 1083,
    pa.timestamp("us"): 1114,
    pa.timestamp("us", "UTC"): 1184,
    pa.uuid(): 2950,
    pa.string(): _TEXT,
    pa.binary(): _BYTEA,
}
_DAYS_TO_2000 = 10_957
_MICROSECONDS_TO_2000 = 946_684_800_000_000
_DIGEST_BYTES = 16
_SUFFIX_DIGITS_MAX = 8


def row_bytes(columns: Sequence[Array]) -> pa.BinaryArray:
    """The canonical bytes of each row of these columns."""
    pieces: list[Any] = [pa.scalar(_int32(len(columns)), pa.binary())]
    for column in columns:
        pieces += fields(column, _int32(oid_of(column.type)), as_text)
    return joined(pieces)


def digests(rows: pa.BinaryArray) -> Digests:
    """The MD5 of each value, a line of 16 bytes each."""
    data, offsets = memoryview(_data(rows)), _offsets(rows).tolist()
    found = b"".join(
        hashlib.md5(data[begin:end], usedforsecurity=False).digest() for begin, end in itertools.pairwise(offsets)
    )
    return np.frombuffer(found, np.uint8).reshape(-1, _DIGEST_BYTES)


def fingerprint(keys: Digests, rows: Digests, suffix: str, digits: int) -> Fingerprint:
    """Of rows by the digests of their keys and their own, as ``End.fingerprint``."""
    chosen = ending_with(keys, suffix)
    buckets = _endings(keys[chosen]) & np.uint32(16**digits - 1)
    hashes = hashes_of(rows[chosen])
    names, places = np.unique(buckets, return_inverse=True)
    counts = np.bincount(places, minlength=len(names))
    # Sums of 32-bit halves, which a double holds exactly for two million rows.
    low = np.bincount(places, hashes & np.uint64(0xFFFFFFFF), len(names))
    high = np.bincount(places, hashes >> np.uint64(32), len(names))
    return Fingerprint(
        {
            f"{name:0{digits}x}": Bucket(int(count), (int(upper) * 2**32 + int(lower)) % HASH_MODULUS)
            for name, count, upper, lower in zip(names.tolist(), counts, high, low, strict=True)
        }
    )


def ending_with(keys: Digests, suffix: str) -> npt.NDArray[np.intp]:
    """Where the digests end with these hexadecimal digits."""
    assert len(suffix) <= _SUFFIX_DIGITS_MAX
    if not suffix:
        return np.arange(len(keys))
    return np.flatnonzero((_endings(keys) & np.uint32(16 ** len(suffix) - 1)) == np.uint32(int(suffix, 16)))


def hashes_of(rows: Digests) -> npt.NDArray[np.uint64]:
    """The first 64 bits of each digest."""
    return np.ascontiguousarray(rows[:, :8]).view(">u8")[:, 0].astype(np.uint64)


def _endings(keys: Digests) -> npt.NDArray[np.uint32]:
    return np.ascontiguousarray(keys[:, 12:]).view(">u4")[:, 0].astype(np.uint32)


def oid_of(held: pa.DataType) -> int:
    """PostgreSQL's number of the type that the values are compared as."""
    if pa.types.is_decimal(held):
        return _TEXT
    return _BYTEA if pa.types.is_list(held) else _OIDS[held]


def _int32(value: int) -> bytes:
    return value.to_bytes(4, "big", signed=True)


@dataclass(frozen=True, slots=True)
class DecimalForm:
    """How decimals are written: the OID of the type, and the values of a column in it, of Arrow's string or binary."""

    oid: int
    values: Callable[[Array], Array]


def fields(column: Array, tag: bytes, decimals: DecimalForm) -> list[Array]:
    """What is joined to the tag, the length and the bytes of each value, as the type's ``send`` function has them."""
    if isinstance(column, pa.ListArray):
        return _list(column, tag, decimals)
    if pa.types.is_decimal(column.type):
        column = decimals.values(column)
    if isinstance(column, pa.StringArray | pa.BinaryArray):
        values: Array = column.cast(pa.binary())
        return [_prefix(tag, _lengths(pc.binary_length(values))), _without_nulls(values)]
    return [_fixed(column, tag)]


def _fixed(column: Array, tag: bytes) -> Array:
    values = _values(column)
    layout = np.dtype([("tag", f"V{len(tag)}"), ("length", ">i4"), ("value", values.dtype)])
    encoded_values = np.empty(len(values), layout)
    if tag:
        encoded_values["tag"] = np.void(tag)
    encoded_values["length"] = values.dtype.itemsize
    encoded_values["value"] = values
    encoded = _binary(encoded_values, layout.itemsize)
    if not column.null_count:
        return encoded
    return pc.if_else(column.is_valid(), encoded, pa.scalar(tag + _int32(-1), pa.binary()))


def _values(column: Array) -> npt.NDArray[Any]:
    """Values of one length in network byte order; anything where they are null."""
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    held = column.type
    if pa.types.is_boolean(held):
        return _numbers(column.cast(pa.uint8()), "u1")
    if pa.types.is_fixed_size_binary(held):
        return _numbers(column, f"V{held.byte_width}")
    if pa.types.is_date32(held):
        return (_numbers(column, "i4") - np.int32(_DAYS_TO_2000)).astype(">i4")
    if pa.types.is_timestamp(held):
        return (_numbers(column, "i8") - _MICROSECONDS_TO_2000).astype(">i8")
    if pa.types.is_floating(held):
        values = _numbers(column, f"f{held.bit_width // 8}")
        return np.where(np.isnan(values), values.dtype.type(np.nan), values).astype(values.dtype.newbyteorder(">"))
    return _numbers(column, f"i{held.bit_width // 8}").astype(f">i{held.bit_width // 8}")


def _numbers(column: Array, layout: str) -> npt.NDArray[Any]:
    buffer = column.buffers()[1]
    dtype = np.dtype(layout)
    values: npt.NDArray[Any] = np.zeros(len(column), dtype)
    if buffer is not None and len(column):
        values = np.frombuffer(buffer, dtype, len(column), column.offset * dtype.itemsize)
    return values


def decimal_text(column: Array) -> Array:
    """As ``numeric_out`` writes them; Arrow's own text of a small fraction has an exponent."""
    held: Any = column.type
    unscaled_type = pa.decimal128(held.precision, 0) if held.bit_width == 128 else pa.decimal256(held.precision, 0)
    unscaled = pa.Array.from_buffers(unscaled_type, len(column), column.buffers(), offset=column.offset)
    text: Any = unscaled.cast(pa.string())
    if held.scale == 0:
        return text
    negative = pc.starts_with(text, "-")
    digits = pc.utf8_lpad(pc.utf8_ltrim(text, "-"), held.scale + 1, "0")
    return pc.binary_join_element_wise(
        pc.if_else(negative, "-", ""),
        pc.utf8_slice_codeunits(digits, 0, -held.scale),
        ".",
        pc.utf8_slice_codeunits(digits, -held.scale),
        "",
    )


def _list(column: Any, tag: bytes, decimals: DecimalForm) -> list[Array]:
    """As ``array_send``: dimensions, flag, the element's type; per dimension its length and first index; elements."""
    items = column.flatten()
    elements = joined(fields(items, b"", decimals))
    inner = column.type.value_type
    oid = decimals.oid if pa.types.is_decimal(inner) else oid_of(inner)
    counts = _lengths(pc.list_value_length(column))
    present = np.maximum(counts, 0)
    ends = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(present, out=ends[1:])
    offsets = _offsets(elements)[ends]
    buffers = [None, pa.py_buffer(offsets.data), pa.py_buffer(_data(elements))]
    bodies = pa.Array.from_buffers(pa.binary(), len(counts), buffers)
    headers = np.empty(len(counts), [(name, ">i4") for name in ("dimensions", "flags", "type", "length", "first")])
    headers["dimensions"], headers["flags"], headers["type"] = 1, 0, oid
    headers["length"], headers["first"] = present, 1
    empty = _int32(0) * 2 + _int32(oid)
    shapes = pc.if_else(pa.array(present > 0), _binary(headers, 20), pa.scalar(empty, pa.binary()))
    shapes = pc.if_else(pa.array(counts >= 0), shapes, pa.scalar(b"", pa.binary()))
    sizes = np.where(present > 0, 20, 12) + np.diff(offsets)
    return [_prefix(tag, np.where(counts < 0, -1, sizes)), shapes, bodies]


def _prefix(tag: bytes, lengths: npt.NDArray[Any]) -> Array:
    prefixes = np.empty(len(lengths), [("tag", f"V{len(tag)}"), ("length", ">i4")])
    if tag:
        prefixes["tag"] = np.void(tag)
    prefixes["length"] = lengths
    return _binary(prefixes, len(tag) + 4)


def _offsets(values: Array) -> npt.NDArray[np.int32]:
    """Where each value begins in ``_data``, and where the last one ends."""
    buffer = values.buffers()[1]
    if buffer is None:
        return np.zeros(1, np.int32)
    return np.frombuffer(buffer, np.int32, len(values) + 1, values.offset * 4)


def _data(values: Array) -> Any:
    buffer = values.buffers()[2]
    return b"" if buffer is None else buffer


def _lengths(lengths: Any) -> npt.NDArray[np.int32]:
    found: npt.NDArray[np.int32] = lengths.fill_null(-1).to_numpy(zero_copy_only=False)
    return found


def _without_nulls(values: Array) -> Array:
    return values.fill_null(b"") if values.null_count else values


def _binary(values: npt.NDArray[Any], size_bytes: int) -> Array:
    offsets = np.arange(len(values) + 1, dtype=np.int32) * np.int32(size_bytes)
    buffers = [None, pa.py_buffer(offsets.data), pa.py_buffer(values.tobytes())]
    return pa.Array.from_buffers(pa.binary(), len(values), buffers)


def joined(pieces: Sequence[Any]) -> pa.BinaryArray:
    """The values of all pieces one after the other, row by row; a piece may be a constant."""
    return pc.binary_join_element_wise(*pieces, pa.scalar(b"", pa.binary()))  # type: ignore[no-any-return]


as_text = DecimalForm(_TEXT, decimal_text)
