"""Arrow arrays that are written as binary COPY are what a real PostgreSQL reads."""

import datetime as dt
import decimal
import struct
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from libs.connectors.arrow_types import normalised, normalised_schema
from libs.connectors.postgres.arrow import arrow_type
from libs.connectors.postgres.arrow_copy import HEADER, TRAILER, columns_of, encode, held, postgres_type
from libs.connectors.protocol import ConnectorRefused
from libs.testing.walks import Walk
from tests.integration.connectors.moving import Server, plan_of

D = decimal.Decimal
# More than one piece of COPY.
ROWS = 10_000
DAY_MICROSECONDS = 86_400_000_000
BEFORE_1970 = dt.datetime.fromisoformat("1969-12-31T23:59:59")
LATE = dt.datetime.fromisoformat("2200-02-28T01:02:03")
EXACT = decimal.Context(prec=80)


def _signed(bits: int) -> list[int | None]:
    return [-(2 ** (bits - 1)), None, 0, -1, 2 ** (bits - 1) - 1]


def _digits(precision: int, scale: int) -> list[D | None]:
    most = D(10**precision - 1).scaleb(-scale, EXACT)
    return [most, None, D(0), D(-1).scaleb(-scale, EXACT), most.copy_negate()]


def _zoned(values: list[dt.datetime | None]) -> list[dt.datetime | None]:
    return [None if value is None else value.replace(tzinfo=dt.UTC) for value in values]


EXTREMES: dict[str, tuple[Any, list[Any]]] = {
    "bool": (pa.bool_(), [True, None, False, False, True]),
    **{f"int{bits}": (getattr(pa, f"int{bits}")(), _signed(bits)) for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": (getattr(pa, f"uint{bits}")(), [0, None, 2**bits - 1]) for bits in (8, 16, 32, 64)},
    "float16": (pa.float16(), [np.float16(1.5), None, np.float16(65504), np.float16("-inf")]),
    "float32": (pa.float32(), [float("inf"), None, -0.0, 1.5]),
    "float64": (pa.float64(), [float("-inf"), None, 5e-324, 1.7976931348623157e308]),
    **{
        f"decimal128_{precision}_{scale}": (pa.decimal128(precision, scale), _digits(precision, scale))
        for precision, scale in ((1, 0), (4, 4), (5, 2), (18, 18), (38, 0), (38, 19), (38, 38))
    },
    **{
        f"decimal256_{precision}_{scale}": (pa.decimal256(precision, scale), _digits(precision, scale))
        for precision, scale in ((60, 10), (76, 0), (76, 76))
    },
    "decimal_of_hundreds": (pa.decimal128(5, -2), [D(12300), None, D(-9999900)]),
    "string": (pa.string(), ["a", "", None, "☃" * 300]),
    "large_string": (pa.large_string(), ["a", "", None, "é"]),
    "string_view": (pa.string_view(), ["a", "", None, "longer than is held inline"]),
    "binary": (pa.binary(), [b"\x00\xff", b"", None]),
    "large_binary": (pa.large_binary(), [b"\x00\xff", b"", None]),
    "binary_view": (pa.binary_view(), [b"\x00", None, b"x" * 40]),
    "fixed_size_binary": (pa.binary(3), [b"abc", None, b"\x00\x00\x00"]),
    "uuid": (pa.uuid(), [uuid.UUID(int=2**128 - 1).bytes, None, uuid.UUID(int=0).bytes]),
    "date32": (pa.date32(), [dt.date.min, None, dt.date(1969, 12, 31), dt.date.max]),
    "date64": (pa.date64(), [dt.date.min, None, dt.date.max]),
    **{f"timestamp_{unit}": (pa.timestamp(unit), [BEFORE_1970, None, LATE]) for unit in ("s", "ms", "us", "ns")},
    **{
        f"timestamp_{unit}_zoned": (pa.timestamp(unit, "Asia/Tokyo"), _zoned([BEFORE_1970, None, LATE]))
        for unit in ("s", "ms", "us", "ns")
    },
    "time32_s": (pa.time32("s"), [dt.time(0), None, dt.time(23, 59, 59)]),
    "time32_ms": (pa.time32("ms"), [dt.time(0), None, dt.time(23, 59, 59, 999_000)]),
    "time64_us": (pa.time64("us"), [dt.time(0), None, dt.time.max]),
    "time64_ns": (pa.time64("ns"), [dt.time(0), None, dt.time.max]),
    "dictionary": (pa.dictionary(pa.int8(), pa.string()), ["a", None, "b", "a"]),
    "dictionary_of_large": (pa.dictionary(pa.int32(), pa.large_string()), ["a", None, "b", "a"]),
    "list": (pa.list_(pa.int32()), [[1, None], None, [], [3]]),
    "list_of_bool": (pa.list_(pa.bool_()), [[True, None], None, [], [False]]),
    "list_of_decimal": (pa.list_(pa.decimal128(8, 2)), [[D("1.10"), None], None, []]),
    "large_list": (pa.large_list(pa.string()), [["a", None], None, [], [""]]),
    "fixed_size_list": (pa.list_(pa.int32(), 2), [[1, None], None, [3, 4]]),
    "null": (pa.null(), [None, None, None]),
}
RANDOM: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    "bool": (pa.bool_(), lambda random: random.random() < 0.5),
    "int64": (pa.int64(), lambda random: random.randrange(-(2**63), 2**63)),
    "uint64": (pa.uint64(), lambda random: random.randrange(2**64)),
    "float64": (pa.float64(), lambda random: random.gauss(0, 1) * 10 ** random.randrange(-300, 300)),
    "decimal": (pa.decimal128(12, 5), lambda random: D(random.randrange(-(10**12) + 1, 10**12)).scaleb(-5)),
    "wide": (pa.decimal256(60, 7), lambda random: D(random.randrange(10**60)).scaleb(-7, EXACT)),
    "string": (pa.string(), lambda random: "aé☃🙂"[random.randrange(4)] * random.randrange(40)),
    "binary": (pa.large_binary(), lambda random: random.randbytes(random.randrange(60))),
    "date": (pa.date32(), lambda random: dt.date.fromordinal(random.randrange(1, dt.date.max.toordinal() + 1))),
    "timestamp": (pa.timestamp("us"), lambda random: LATE - dt.timedelta(microseconds=random.randrange(6 * 10**16))),
    "list": (pa.list_(pa.int16()), lambda random: [random.randrange(-9, 9) for _ in range(random.randrange(5))]),
}


def _array(kind: Any, values: list[Any]) -> Any:
    if isinstance(kind, pa.BaseExtensionType):
        return pa.ExtensionArray.from_storage(kind, pa.array(values, kind.storage_type))
    return pa.array(values, kind)


async def _read_back(server: Server, batch: pa.RecordBatch) -> list[list[Any]]:
    """The columns as PostgreSQL has them once the batch was copied into a table."""
    plan = plan_of("copied")
    schema = normalised_schema(plan.stream, batch.schema)
    rows, _ = held(plan, normalised(plan.stream, batch, schema))
    columns = columns_of(schema)
    declared = ", ".join(f'"{column.name}" {column.type.sql}' for column in columns)
    await server.execute(f"DROP TABLE IF EXISTS copied; CREATE TABLE copied (place serial, {declared})")

    async def copied() -> AsyncIterator[bytes]:
        yield HEADER
        for piece in encode(rows):
            yield bytes(piece)
        yield TRAILER

    names = [column.name for column in columns]
    await server.connection.copy_to_table("copied", columns=names, source=copied(), format="binary")
    found = await server.connection.fetch("SELECT * FROM copied ORDER BY place")
    return [[row[name] for row in found] for name in names]


@pytest.mark.parametrize("name", EXTREMES)
async def test_extremes_and_nulls_arrive(destination: Server, name: str) -> None:
    """As a whole array, as a slice that begins and ends inside, and as no rows at all."""
    array = _array(*EXTREMES[name])
    twice = pa.concat_arrays([array, array])
    for part in (array, twice.slice(1, len(array)), array.slice(1, 0)):
        assert await _read_back(destination, pa.RecordBatch.from_arrays([part], ["value"])) == [part.to_pylist()]


async def test_random_rows_of_a_slice_arrive(destination: Server, walk: Walk) -> None:
    random = walk.random
    for _ in range(walk.rounds(2, 20)):
        nulls = random.random()
        arrays = [
            pa.array([None if random.random() < nulls else make(random) for _ in range(ROWS)], kind)
            for kind, make in RANDOM.values()
        ]
        batch = pa.RecordBatch.from_arrays(arrays, list(RANDOM))
        start = random.randrange(ROWS)
        part = batch.slice(start, random.randrange(1, ROWS - start + 1))
        assert await _read_back(destination, part) == [column.to_pylist() for column in part.columns]


async def test_nan_arrives(destination: Server) -> None:
    batch = pa.RecordBatch.from_arrays([pa.array([float("nan")]), pa.array([1.0])], ["a", "b"])
    [[nan], [one]] = await _read_back(destination, batch)
    assert struct.pack(">d", nan) == struct.pack(">d", float("nan"))
    assert one == 1.0


@pytest.mark.parametrize(
    "kind",
    [
        *(pa.bool_(), pa.int16(), pa.int32(), pa.int64(), pa.float32(), pa.float64(), pa.string(), pa.binary()),
        *(pa.uuid(), pa.date32(), pa.time64("us"), pa.timestamp("us"), pa.timestamp("us", "UTC")),
        *(pa.decimal128(12, 2), pa.decimal128(5, 5), pa.decimal256(60, 10), pa.list_(pa.int32())),
    ],
    ids=str,
)
def test_postgres_type_is_read_as_the_arrow_type_that_it_was_made_for(kind: pa.DataType) -> None:
    assert arrow_type(postgres_type(kind)) == kind


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (pa.array(["a\x00b"]), "U+0000"),
        (pa.array([["a", "\x00"]]), "U+0000"),
        (pa.array([-2_440_589], pa.int32()).cast(pa.date32()), "range"),
        (pa.array([-2_440_588 * DAY_MICROSECONDS - 1]).cast(pa.timestamp("us")), "range"),
    ],
    ids=["text", "text in a list", "date", "timestamp"],
)
def test_value_that_postgres_cannot_hold_is_refused_or_becomes_null(array: Any, reason: str) -> None:
    good = pa.nulls(1, array.type)
    batch = pa.RecordBatch.from_arrays([pa.concat_arrays([good, array])], ["value"])
    with pytest.raises(ConnectorRefused, match=f"'value'.*{reason.replace('+', '.')}") as refused:
        held(plan_of("copied"), batch)
    assert refused.value.code == "value_not_held"
    rows, changed = held(plan_of("copied", policies={"value": "null"}), batch)
    assert rows.column(0).to_pylist() == [None, None]
    assert changed == {"value": 1}


@pytest.mark.parametrize("kind", [pa.timestamp("ns"), pa.timestamp("ns", "UTC"), pa.time64("ns")], ids=str)
def test_digits_below_a_microsecond_are_refused(kind: pa.DataType) -> None:
    batch = pa.RecordBatch.from_arrays([pa.array([1_001], pa.int64()).cast(kind)], ["value"])
    stream = plan_of("copied").stream
    with pytest.raises(ConnectorRefused, match="'value'") as refused:
        normalised(stream, batch, normalised_schema(stream, batch.schema))
    assert refused.value.code == "value_not_held"
