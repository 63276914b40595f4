"""PostgreSQL's binary COPY into Arrow arrays, a column of many rows at a time.

The length of a field stands before it, so where a row begins is known only after the one before has been walked. To
read columns at once the query selects a random constant first: it is searched for, and every row has to end
where the next one begins, so that data which happens to hold the constant is noticed. The layouts are those of the
types' ``send`` functions and of the documentation of COPY, "Binary Format".
"""

import itertools
import secrets
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

if TYPE_CHECKING:
    Array: TypeAlias = "pa.Array[Any]"
Integers: TypeAlias = npt.NDArray[np.int64]
Flags: TypeAlias = npt.NDArray[np.bool_]

SIGNATURE = b"PGCOPY\n\xff\r\n\0"
TRAILER = b"\xff\xff"
# A decimal of so many digits is an int64; more digits are asked for as text.
DECIMAL_DIGITS_MAX = 18

# No byte of UTF-8, so that few candidates for the marker are found in text.
_MARKER_FIRST = 0xF5
_MARKER_BYTES = 8
_PREFIX_BYTES = 6
_SEARCHED_BYTES = 512 * 1024
# Columns of a fixed length that are read together; the padding is wider, so that reading never runs past the end.
_TOGETHER_MAX = 24
_PADDING_BYTES = 512
_FEW_ARRAYS = 32

_EPOCH_DAYS = 10_957
_EPOCH_MICROSECONDS = _EPOCH_DAYS * 86_400_000_000
_DAY_MICROSECONDS = 86_400_000_000
# 294246-01-01, the last year that begins within an int64 of microseconds: as ``arrow.py`` asks of the server.
_END_MICROSECONDS = 9_223_339_708_800_000_000
_INT32 = np.iinfo(np.int32)
_INT64 = np.iinfo(np.int64)
_NEGATIVE = 0x4000
_BASE_DIGITS = 4

_NUMBERS: dict[pa.DataType, str] = {
    pa.int16(): ">i2",
    pa.int32(): ">i4",
    pa.int64(): ">i8",
    pa.float32(): ">f4",
    pa.float64(): ">f8",
}


class Malformed(Exception):
    """The bytes are not the rows that were asked for."""


class Unheld(Exception):
    """A column has a value that its Arrow type can't hold.

    Args:
        index: of the column.
    """

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(reason)
        self.index = index


class _OutOfRange(Exception):
    pass


def new_marker() -> int:
    """A constant for the first column of a query, an ``int8``."""
    return int.from_bytes(bytes([_MARKER_FIRST]) + secrets.token_bytes(_MARKER_BYTES - 1), "big", signed=True)


def without_header(data: bytes) -> bytes:
    """What follows the header of a COPY."""
    if not data.startswith(SIGNATURE) or len(data) < len(SIGNATURE) + 8:
        raise Malformed("no header")
    (extension_bytes,) = struct.unpack_from(">I", data, len(SIGNATURE) + 4)
    return data[len(SIGNATURE) + 8 + extension_bytes :]


class RowBuffer:
    """Bytes of whole rows, in memory that is used again.

    Args:
        capacity_bytes: what it holds without growing.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self.data = bytearray(capacity_bytes + _PADDING_BYTES)
        self.length_bytes = 0

    @property
    def capacity_bytes(self) -> int:
        return len(self.data) - _PADDING_BYTES

    def append(self, piece: bytes) -> None:
        end = self.length_bytes + len(piece)
        if end > self.capacity_bytes:
            grown = bytearray(end + _PADDING_BYTES)
            grown[: self.length_bytes] = memoryview(self.data)[: self.length_bytes]
            self.data = grown
        self.data[self.length_bytes : end] = piece
        self.length_bytes = end

    def cut_trailer(self) -> None:
        """Take the end of a COPY off."""
        if not self.data.endswith(TRAILER, 0, self.length_bytes):
            raise Malformed("no trailer")
        self.length_bytes -= len(TRAILER)

    def clear(self) -> None:
        self.length_bytes = 0


def decode(rows: RowBuffer, types: Sequence[pa.DataType], marker: int) -> list["Array"]:
    """The columns of whole rows, without the marker's.

    Args:
        types: of the columns after the marker's; decimals of more than ``DECIMAL_DIGITS_MAX`` digits come as text.

    Raises:
        Unheld: a value is infinite, not a number or out of range.
        Malformed: these are not such rows.
    """
    source = _Bytes(rows)
    begins = source.rows(len(types) + 1, marker)
    at = begins + (_PREFIX_BYTES + _MARKER_BYTES)
    arrays: list[Array] = []
    try:
        for together in _groups(types):
            block = source.block(at, together)
            if block is not None:
                arrays.extend(_fixed(block[f"value{index}"], None, wanted) for index, wanted in enumerate(together))
                at = at + block.dtype.itemsize
                continue
            for wanted in together:
                fields = source.fields(at)
                arrays.append(_array(source, fields, wanted))
                at = fields.ends
    except (_OutOfRange, pa.ArrowInvalid) as error:
        # Also of a group, those before the culprit have been added.
        raise Unheld(len(arrays), str(error)) from None
    except IndexError:
        raise Malformed("a field runs over the end") from None
    if not np.array_equal(at[:-1], begins[1:]) or at[-1] != source.length:
        raise Malformed("a row does not end where the next one begins")
    return arrays


@dataclass(frozen=True, slots=True)
class _Fields:
    """Where values stand.

    Args:
        at: their first bytes.
        lengths: in bytes, 0 for null.
        nulls: absent when there are none.
    """

    at: Integers
    lengths: Integers
    nulls: Flags | None

    @property
    def ends(self) -> Integers:
        return self.at + self.lengths

    def expect(self, size_bytes: int) -> None:
        if self.nulls is None:
            right = (self.lengths == size_bytes).all()
        else:
            right = (self.nulls | (self.lengths == size_bytes)).all()
        if not right:
            raise Malformed(f"a value is not {size_bytes} bytes long")

    def array(self, wanted: pa.DataType, *buffers: Any, values: "Array | None" = None) -> "Array":
        """The Arrow array over its buffers but for the first, which tells the nulls; of a list over its values too."""
        return _array_over(wanted, len(self.at), self.nulls, *buffers, values=values)


class _Bytes:
    """Bytes that are read from at many places at once."""

    def __init__(self, rows: RowBuffer) -> None:
        self.length = rows.length_bytes
        self.padded = memoryview(rows.data)[: self.length + _PADDING_BYTES]

    def gather(self, layout: Any, at: Integers) -> npt.NDArray[Any]:
        """What is laid out like that at every place."""
        dtype = np.dtype(layout)
        everywhere: npt.NDArray[Any] = np.ndarray(
            (len(self.padded) - dtype.itemsize + 1,), dtype, self.padded, strides=(1,)
        )
        return everywhere[at]

    def rows(self, fields: int, marker: int) -> Integers:
        """Where each row begins."""
        searched = np.frombuffer(self.padded, np.uint8, max(self.length - _MARKER_BYTES + 1, 0))
        found = [np.empty(0, np.int64)]
        for start in range(0, len(searched), _SEARCHED_BYTES):
            candidates = np.flatnonzero(searched[start : start + _SEARCHED_BYTES] == _MARKER_FIRST) + start
            found.append(candidates[self.gather(">i8", candidates) == marker])
        begins = np.concatenate(found) - _PREFIX_BYTES
        if not len(begins) or begins[0] != 0 or (self.gather(">i2", begins) != fields).any():
            raise Malformed("rows that do not begin as they should")
        return begins

    def block(self, at: Integers, types: Sequence[pa.DataType]) -> npt.NDArray[Any] | None:
        """Columns of fixed lengths with their lengths, read at once; None where they are not, or some are null."""
        layouts = [layout for layout in map(_layout, types) if layout is not None]
        if len(layouts) < len(types):
            return None
        pairs = [[(f"length{index}", ">i4"), (f"value{index}", layout)] for index, layout in enumerate(layouts)]
        dtype = np.dtype(list(itertools.chain.from_iterable(pairs)))
        # As bytes of no type they are gathered much faster than as a structure.
        block = self.gather(f"V{dtype.itemsize}", at).view(dtype)
        for index in range(len(types)):
            if (block[f"length{index}"] != dtype[f"value{index}"].itemsize).any():
                return None
        return block

    def fields(self, at: Integers) -> _Fields:
        """The values whose lengths stand at these places."""
        lengths = self.gather(">i4", at).astype(np.int64)
        nulls = lengths < 0
        if not nulls.any():
            return _Fields(at + 4, lengths, None)
        lengths[nulls] = 0
        return _Fields(at + 4, lengths, nulls)


def _groups(types: Sequence[pa.DataType]) -> Iterator[list[pa.DataType]]:
    """Neighbours of fixed lengths together, every other column alone."""
    for fixed, neighbours in itertools.groupby(types, lambda wanted: _layout(wanted) is not None):
        while together := list(itertools.islice(neighbours, _TOGETHER_MAX if fixed else 1)):
            yield together


def _layout(wanted: pa.DataType) -> str | None:
    """How a value is laid out where all are of one length."""
    if wanted == pa.uuid():
        return "V16"
    if pa.types.is_boolean(wanted):
        return ">u1"
    if pa.types.is_temporal(wanted):
        return f">i{wanted.bit_width // 8}"
    return _NUMBERS.get(wanted)


def _array_over(
    wanted: pa.DataType, count: int, nulls: Flags | None, *buffers: Any, values: "Array | None" = None
) -> "Array":
    valid: Any = None if nulls is None else np.packbits(~nulls, bitorder="little")
    null_count = 0 if nulls is None else int(nulls.sum())
    children = None if values is None else [values]
    wrapped = [None if buffer is None else pa.py_buffer(buffer) for buffer in (valid, *buffers)]
    return pa.Array.from_buffers(wanted, count, wrapped, null_count, children=children)


def _array(source: _Bytes, fields: _Fields, wanted: pa.DataType) -> "Array":
    layout = _layout(wanted)
    if layout is not None:
        fields.expect(np.dtype(layout).itemsize)
        return _fixed(source.gather(layout, fields.at), fields.nulls, wanted)
    if isinstance(wanted, pa.ListType):
        return _list(source, fields, wanted)
    if not pa.types.is_decimal(wanted):
        return _text(source, fields, wanted)
    if wanted.precision > DECIMAL_DIGITS_MAX:
        return _text(source, fields, pa.string()).cast(wanted)
    return _decimal(source, fields, wanted)


def _fixed(sent: npt.NDArray[Any], nulls: Flags | None, wanted: pa.DataType) -> "Array":
    """Values of one length, as they were sent; whatever stands at a null becomes zero."""
    values = np.ascontiguousarray(sent.astype(sent.dtype.newbyteorder("="), copy=False))
    if nulls is not None:
        values[nulls] = np.zeros((), values.dtype)
    if pa.types.is_boolean(wanted):
        values = np.packbits(values != 0, bitorder="little")
    elif pa.types.is_temporal(wanted):
        values = _since_1970(values, wanted)
    if wanted == pa.uuid():
        return pa.ExtensionArray.from_storage(wanted, _array_over(pa.binary(16), len(sent), nulls, values))
    return _array_over(wanted, len(sent), nulls, values)


def _since_1970(values: npt.NDArray[Any], wanted: pa.DataType) -> npt.NDArray[Any]:
    """Days or microseconds as Arrow counts them; PostgreSQL's days begin with 2000 (times of a day are the same)."""
    least, most = values.min(initial=0), values.max(initial=0)
    if pa.types.is_date32(wanted):
        if least == _INT32.min or most == _INT32.max:
            raise _OutOfRange("an infinite date")
        return values + np.int32(_EPOCH_DAYS)
    if pa.types.is_time64(wanted):
        if most >= _DAY_MICROSECONDS:
            raise _OutOfRange("the time 24:00")
        return values
    if least == _INT64.min or most >= _END_MICROSECONDS - _EPOCH_MICROSECONDS:
        raise _OutOfRange("an infinite time, or one after the year 294245")
    return values + _EPOCH_MICROSECONDS


def _text(source: _Bytes, fields: _Fields, wanted: pa.DataType) -> "Array":
    """Strings or bytes: what lies between two values is taken for a value too, and then left out."""
    count = len(fields.at)
    if not count:
        return pa.array([], wanted)
    offsets = np.empty(2 * count, np.int32)
    offsets[0::2] = fields.at
    offsets[1::2] = fields.ends
    alternating = _array_over(wanted, 2 * count - 1, None, offsets, source.padded)
    values = alternating.take(np.arange(0, 2 * count, 2, dtype=np.int32))
    return values if fields.nulls is None else fields.array(wanted, *values.buffers()[1:])


def _decimal(source: _Bytes, fields: _Fields, wanted: Any) -> "Array":
    """``numeric``: digits to the base of 10,000, the first of them worth 10,000 to the power of the weight."""
    whole = -(-(wanted.precision - wanted.scale) // _BASE_DIGITS)
    fraction = -(-wanted.scale // _BASE_DIGITS)
    layout = [("count", ">i2"), ("weight", ">i2"), ("sign", ">u2"), ("scale", ">i2")]
    digits_at = fields.at + 8
    parts = source.gather(np.dtype(layout), fields.at)
    counts, weights = parts["count"].astype(np.int64), parts["weight"].astype(np.int64)
    if fields.nulls is not None:
        counts[fields.nulls] = 0
    some = counts > 0
    signs = np.where(fields.lengths > 0, parts["sign"], 0)
    if ((signs != 0) & (signs != _NEGATIVE)).any():
        raise _OutOfRange("not a number, or infinite")
    if (weights[some] >= whole).any() or (counts - weights > fraction + 1)[some].any():
        raise _OutOfRange(f"more digits than {wanted} has")
    # By how much a digit counts, from the lowest that the type has; below one it is a divisor. Past the end it is 0.
    powers = [_BASE_DIGITS * (index - fraction) + wanted.scale for index in range(whole + fraction)]
    factors = np.array([*(10 ** max(power, 0) for power in powers), 0], np.int64)
    divisors = np.array([*(10 ** max(-power, 0) for power in powers), 1], np.int64)
    values = np.zeros(len(counts), np.int64)
    for number in range(int(counts.max(initial=0))):
        place = np.where(number < counts, weights + (fraction - number), len(powers))
        digits = source.gather(">i2", digits_at + 2 * number) * factors[place]
        values += digits // divisors[place] if powers[0] < 0 else digits
    np.negative(values, out=values, where=signs == _NEGATIVE)
    words = np.empty((len(values), 2), np.int64)
    words[:, 0] = values
    words[:, 1] = values >> 63
    return fields.array(wanted, words)


def _list(source: _Bytes, fields: _Fields, wanted: "pa.ListType[Any]") -> "Array":
    """Arrays of at most one dimension that is counted from 1."""
    some = fields.lengths > 0
    dimensions = np.where(some, source.gather(">i4", fields.at), 0)
    if (dimensions > 1).any():
        raise _OutOfRange("an array of several dimensions")
    filled = dimensions == 1
    counts = np.where(filled, source.gather(">i4", fields.at + 12), 0).astype(np.int64)
    if (source.gather(">i4", fields.at[filled] + 16) != 1).any():
        raise _OutOfRange("an array that does not begin at 1")
    elements = source.fields(_element_places(source, fields.at + 20, counts))
    last = np.cumsum(counts)[filled] - 1
    if not np.array_equal(elements.ends[last], fields.ends[filled]):
        raise Malformed("an array does not end with its last element")
    values = _array(source, elements, wanted.value_type)
    offsets = np.zeros(len(counts) + 1, np.int32)
    np.cumsum(counts, out=offsets[1:])
    return fields.array(wanted, offsets, values=values)


def _element_places(source: _Bytes, at: Integers, counts: Integers) -> Integers:
    """Where the length of every element stands: walked in step over all arrays, and alone over the last long ones."""
    begins = np.cumsum(counts) - counts
    places = np.empty(int(counts.sum()), np.int64)
    step = 0
    walked = np.flatnonzero(counts)
    while len(walked) > _FEW_ARRAYS:
        here = at[walked]
        places[begins[walked] + step] = here
        at[walked] = here + 4 + np.maximum(source.gather(">i4", here), 0)
        step += 1
        walked = walked[counts[walked] > step]
    length_at = struct.Struct(">i").unpack_from
    for index in walked.tolist():
        place = int(at[index])
        for number in range(int(begins[index]) + step, int(begins[index] + counts[index])):
            places[number] = place
            place += 4 + max(length_at(source.padded, place)[0], 0)
    return places
