"""Binary COPY into Arrow: what a server would send is read back, and what it would not is refused."""

import struct
import uuid
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from libs.connectors.postgres.binary import (
    DECIMAL_DIGITS_MAX,
    SIGNATURE,
    TRAILER,
    Malformed,
    RowBuffer,
    Unheld,
    decode,
    new_marker,
    without_header,
)
from libs.testing.walks import examples

MARKER = new_marker()
INTEGER = struct.Struct(">i")
NULL = INTEGER.pack(-1)
NAN = struct.pack(">hhHh", 0, 0, 0xC000, 0)

TYPES: dict[pa.DataType, st.SearchStrategy[Any]] = {
    pa.int16(): st.integers(-(2**15), 2**15 - 1),
    pa.int32(): st.integers(-(2**31), 2**31 - 1),
    pa.int64(): st.integers(-(2**63), 2**63 - 1),
    pa.float64(): st.floats(allow_nan=False),
    pa.bool_(): st.booleans(),
    pa.string(): st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])),
    pa.binary(): st.binary(),
    pa.uuid(): st.uuids(),
    pa.decimal128(12, 2): st.decimals(-(10**10) + 1, 10**10 - 1, places=2),
    pa.decimal128(18, 0): st.decimals(-(10**18) + 1, 10**18 - 1, places=0),
    pa.decimal128(18, 18): st.decimals(Decimal("-0.9"), Decimal("0.9"), places=18),
    pa.decimal128(30, 5): st.decimals(-(10**20), 10**20, places=5),
}


@pytest.mark.randomised
def test_a_table_of_every_type_is_read_back() -> None:
    @settings(max_examples=examples(60), deadline=None)
    @given(st.data())
    def reads_back(data: st.DataObject) -> None:
        types = data.draw(st.lists(st.sampled_from([*TYPES, *map(pa.list_, TYPES)]), min_size=1, max_size=5))
        rows = data.draw(st.lists(st.tuples(*(_values(wanted) for wanted in types)), min_size=1, max_size=40))
        arrays = decode(_buffer(rows, types), types, MARKER)
        assert [array.type for array in arrays] == types
        for array in arrays:
            array.validate(full=True)
        assert list(zip(*(array.to_pylist() for array in arrays), strict=True)) == rows

    reads_back()


def test_arrays_of_very_different_lengths_are_read_back() -> None:
    rows = [([None if item % 7 == 0 else "x" * (item % 5) for item in range(row * row % 500)],) for row in range(200)]
    (array,) = decode(_buffer(rows, [pa.list_(pa.string())]), [pa.list_(pa.string())], MARKER)
    assert array.to_pylist() == [row[0] for row in rows]


@pytest.mark.parametrize(
    ("wanted", "value"),
    [
        (pa.decimal128(12, 2), NAN),
        (pa.decimal128(30, 2), b"NaN"),
        (pa.date32(), struct.pack(">i", 2**31 - 1)),
        (pa.date32(), struct.pack(">i", -(2**31))),
        (pa.timestamp("us"), struct.pack(">q", 2**63 - 1)),
        (pa.timestamp("us", "UTC"), struct.pack(">q", -(2**63))),
        (pa.timestamp("us"), struct.pack(">q", 2**63 - 946_684_800_000_000)),
        (pa.time64("us"), struct.pack(">q", 86_400_000_000)),
        (pa.list_(pa.int32()), struct.pack(">iii", 2, 0, 23)),
    ],
)
def test_a_value_that_arrow_lacks_is_refused_with_its_column(wanted: pa.DataType, value: bytes) -> None:
    with pytest.raises(Unheld) as refused:
        decode(_filled(_row([INTEGER.pack(4) + bytes(4), _field(value)])), [pa.int32(), wanted], MARKER)
    assert refused.value.index == 1


@pytest.mark.parametrize("position", [0, 1])
def test_data_that_holds_the_marker_is_noticed(position: int) -> None:
    forged = _row([_field(b"x")])
    rows = [_row([_field(b"x" * 40)]) for _ in range(2)]
    rows[position] = _row([_field(b"before" + forged + b"after")])
    with pytest.raises(Malformed):
        decode(_filled(*rows), [pa.binary()], MARKER)


def test_rows_that_are_cut_or_of_another_shape_are_noticed() -> None:
    whole = _row([_field(b"abc")]) + _row([_field(b"defg")])
    for end in range(len(whole)):
        if end != len(whole) // 2 or whole[:end] != _row([_field(b"abc")]):
            with pytest.raises(Malformed):
                decode(_filled(whole[:end]), [pa.string()], MARKER)
    with pytest.raises(Malformed):
        decode(_filled(whole), [pa.string(), pa.string()], MARKER)
    with pytest.raises(Malformed):
        decode(_filled(whole), [pa.int64()], MARKER)


def test_a_buffer_that_is_used_again_shows_nothing_of_before() -> None:
    rows = RowBuffer(64)
    rows.append(_row([_field(b"a" * 500)]))
    assert decode(rows, [pa.string()], MARKER)[0].to_pylist() == ["a" * 500]
    rows.clear()
    rows.append(_row([_field(b"b")]))
    rows.append(_row([NULL]) + TRAILER)
    rows.cut_trailer()
    assert decode(rows, [pa.string()], MARKER)[0].to_pylist() == ["b", None]
    rows.clear()
    rows.append(_row([_field(b"b")]))
    with pytest.raises(Malformed):
        rows.cut_trailer()


def test_a_header_is_taken_off_whatever_its_extension() -> None:
    assert without_header(SIGNATURE + bytes(8) + b"rows") == b"rows"
    assert without_header(SIGNATURE + bytes(4) + INTEGER.pack(3) + b"extrows") == b"rows"
    with pytest.raises(Malformed):
        without_header(b"id,note\n1,x\n")


def _values(wanted: pa.DataType) -> st.SearchStrategy[Any]:
    if isinstance(wanted, pa.ListType):
        return st.none() | st.lists(_values(wanted.value_type), max_size=6)
    return st.none() | TYPES[wanted]


def _buffer(rows: Sequence[Sequence[Any]], types: Sequence[pa.DataType]) -> RowBuffer:
    return _filled(*(_row([_sent(value, wanted) for value, wanted in zip(row, types, strict=True)]) for row in rows))


def _filled(*pieces: bytes) -> RowBuffer:
    rows = RowBuffer(0)
    for piece in pieces:
        rows.append(piece)
    return rows


def _row(fields: Sequence[bytes]) -> bytes:
    return struct.pack(">hiq", len(fields) + 1, 8, MARKER) + b"".join(fields)


def _field(content: bytes) -> bytes:
    return INTEGER.pack(len(content)) + content


def _sent(value: Any, wanted: pa.DataType) -> bytes:
    """The field as a server sends it, its length before it."""
    if value is None:
        return NULL
    if isinstance(wanted, pa.ListType):
        items = b"".join(_sent(item, wanted.value_type) for item in value)
        shape = struct.pack(">ii", len(value), 1) if value else b""
        return _field(struct.pack(">iii", bool(value), None in value, 0) + shape + items)
    match value:
        case bool():
            return _field(bytes([value]))
        case int():
            return _field(value.to_bytes(wanted.bit_width // 8, "big", signed=True))
        case float():
            return _field(struct.pack(">d", value))
        case str():
            return _field(value.encode())
        case uuid.UUID():
            return _field(value.bytes)
        case Decimal():
            as_text = pa.types.is_decimal(wanted) and wanted.precision > DECIMAL_DIGITS_MAX
            return _field(f"{value:f}".encode() if as_text else _numeric(value))
        case _:
            return _field(value)


def _numeric(value: Decimal) -> bytes:
    """Digits to the base of 10,000 without zeros at either end, as ``numeric_send`` has them."""
    whole, _, fraction = f"{abs(value):f}".partition(".")
    whole = whole.zfill(-(-len(whole) // 4) * 4)
    text = whole + fraction.ljust(-(-len(fraction) // 4) * 4, "0")
    digits = [int(text[index : index + 4]) for index in range(0, len(text), 4)]
    weight = len(whole) // 4 - 1
    while digits and digits[0] == 0:
        digits, weight = digits[1:], weight - 1
    while digits and digits[-1] == 0:
        digits.pop()
    sign = 0x4000 if value < 0 and digits else 0
    return struct.pack(">hhHh", len(digits), weight if digits else 0, sign, len(fraction)) + struct.pack(
        f">{len(digits)}h", *digits
    )
