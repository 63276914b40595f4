"""A source that speaks Arrow alone goes into every destination."""

import datetime as dt
import decimal
import uuid
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from libs.connectors.protocol import ConnectorRefused, RunContext, StreamPlan, Written
from libs.connectors.states import StreamState
from tests.integration.connectors.memory_source import MemorySource
from tests.integration.connectors.moving import Counts, Lake, Server, context_of, plan_of

D = decimal.Decimal
TYPES: dict[str, Any] = {
    "id": pa.int64(),
    "flag": pa.bool_(),
    "small": pa.uint8(),
    "large": pa.uint64(),
    "half": pa.float16(),
    "real": pa.float64(),
    "exact": pa.decimal128(12, 2),
    "fraction": pa.decimal128(5, 5),
    "wide": pa.decimal256(60, 10),
    "whole": pa.decimal128(5, -2),
    "note": pa.large_string(),
    "kind": pa.dictionary(pa.int8(), pa.string()),
    "raw": pa.binary(),
    "mac": pa.binary(6),
    "key": pa.uuid(),
    "day": pa.date32(),
    "at": pa.timestamp("ms"),
    "seen": pa.timestamp("ns", "Asia/Tokyo"),
    "clock": pa.time32("s"),
    "numbers": pa.list_(pa.int32()),
    "prices": pa.list_(pa.decimal128(8, 2)),
    "words": pa.large_list(pa.string()),
}
FULL = {
    "flag": True,
    "small": 255,
    "large": 2**64 - 1,
    "half": np.float16(1.5),
    "real": 0.1,
    "exact": D("-1234567890.12"),
    "fraction": D("0.00123"),
    "wide": D("12345678901234567890123456789012345678901234567890.0123456789"),
    "whole": D("12300"),
    "note": "tab\t, quote \"', ünï ☃",
    "kind": "a",
    "raw": b"\x00\xff",
    "mac": b"\x00\x01\x02\x03\x04\x05",
    "key": uuid.UUID("a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11").bytes,
    "day": dt.date(2024, 2, 29),
    "at": dt.datetime.fromisoformat("1969-12-31T23:59:59.999"),
    "seen": dt.datetime(2024, 3, 31, 1, 30, 0, 123456, dt.UTC),
    "clock": dt.time(23, 59, 59),
    "numbers": [1, None, -3],
    "prices": [D("1.10"), None, D("-99999.99")],
    "words": ["a", "", None, 'with "quotes"'],
}
EMPTY = {"numbers": [], "prices": [], "words": [], "note": "", "raw": b"", "exact": D("0"), "wide": D("0")}


def memory(types: dict[str, Any]) -> MemorySource:
    return MemorySource(pa.schema([pa.field(name, held) for name, held in types.items()]), ["id"])


async def run(
    source: MemorySource,
    destination: Server | Lake,
    plan: StreamPlan,
    context: RunContext | None = None,
    *,
    deletes: bool = False,
) -> Written:
    async with source.snapshot() as snapshot, destination.destination().open(context or context_of()) as opened:
        state = await opened.state(plan)
        table = await snapshot.table(plan, None if state is None else state.position)
        table = table.without((await opened.prepare(table)).left_out)
        position = None if table.state is None else StreamState(mode=plan.mode, position=table.state)
        return await opened.write(table, Counts(), state=position, keys=table.keys() if deletes else None)


async def test_every_arrow_type_arrives_in_postgres(destination: Server) -> None:
    source = memory(TYPES)
    source.add([{"id": 1} | FULL, {"id": 2}, {"id": 3} | EMPTY])
    written = await run(source, destination, plan_of("everything"))
    assert written.verified is True
    rows = await destination.connection.fetch("SELECT * FROM everything ORDER BY id")
    found = dict(rows[0])
    assert found == {
        **FULL,
        "id": 1,
        "half": 1.5,
        "key": uuid.UUID("a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"),
    }
    assert set(dict(rows[1]).values()) == {2, None}
    assert {name: rows[2][name] for name in EMPTY} == EMPTY
    types = await destination.connection.fetch(
        "SELECT attname, format_type(atttypid, atttypmod) AS type FROM pg_attribute "
        "WHERE attrelid = 'everything'::regclass AND attnum > 0"
    )
    declared = {row["attname"]: row["type"] for row in types}
    assert (declared["large"], declared["whole"], declared["prices"]) == (
        "numeric(20,0)",
        "numeric(7,0)",
        "numeric(8,2)[]",
    )


async def test_random_rows_arrive_in_postgres(destination: Server) -> None:
    generator = np.random.default_rng(7)
    source = memory({"id": pa.int64(), "n": pa.decimal128(30, 7), "t": pa.string(), "f": pa.float64()})
    count = 20_000
    unscaled = [
        int(value) * 10 ** int(shift)
        for value, shift in zip(
            generator.integers(-(2**62), 2**62, count), generator.integers(0, 11, count), strict=True
        )
    ]
    numbers: list[Any] = [None if index % 17 == 0 else D(value).scaleb(-7) for index, value in enumerate(unscaled)]
    texts = ["☃" * int(size) for size in generator.integers(0, 300, count)]
    floats = generator.standard_normal(count)
    batch = pa.RecordBatch.from_arrays(
        [
            pa.array(range(count), pa.int64()),
            pa.array(numbers, pa.decimal128(30, 7)),
            pa.array(texts),
            pa.array(floats),
        ],
        schema=source.schema,
    )
    source.rows = [batch.slice(3, 9_000), batch.slice(9_003, 0), batch.slice(9_003)]
    written = await run(source, destination, plan_of("t"))
    assert (written.rows, written.verified) == (count - 3, True)
    rows = await destination.connection.fetch("SELECT * FROM t ORDER BY id")
    assert [row["n"] for row in rows] == numbers[3:]
    assert [row["t"] for row in rows] == texts[3:]
    assert [row["f"] for row in rows] == floats[3:].tolist()


@pytest.mark.parametrize(
    ("kind", "value", "reason"),
    [
        (pa.string(), "a\x00b", "U\\+0000"),
        (pa.list_(pa.string()), ["a\x00b"], "U\\+0000"),
        (pa.date32(), -(2**30), "range"),
        (pa.timestamp("us"), -(2**62), "range"),
        (pa.timestamp("ns"), 1, "can't hold"),
    ],
)
async def test_a_value_that_postgres_cannot_hold_is_refused_by_column(
    destination: Server, kind: Any, value: Any, reason: str
) -> None:
    source = memory({"id": pa.int64(), "odd": kind})
    source.rows.append(
        pa.RecordBatch.from_arrays([pa.array([1], pa.int64()), pa.array([value], kind)], schema=source.schema)
    )
    with pytest.raises(ConnectorRefused, match=f"'odd'.*{reason}") as refused:
        await run(source, destination, plan_of("t"))
    assert refused.value.code == "value_not_held"
    assert await destination.tables() == []


async def test_such_values_become_null_by_policy_and_are_counted(destination: Server) -> None:
    source = memory({"id": pa.int64(), "odd": pa.string()})
    source.add([{"id": 1, "odd": "a\x00b"}, {"id": 2, "odd": "fine"}])
    written = await run(source, destination, plan_of("t", policies={"odd": "null"}), context_of(verify=False))
    assert written.values_changed == {"odd": 1}
    assert await destination.rows("t") == ["(1,)", "(2,fine)"]


async def test_a_type_that_no_destination_has_is_refused_by_column(destination: Server) -> None:
    source = memory({"id": pa.int64(), "odd": pa.map_(pa.string(), pa.int64())})
    with pytest.raises(ConnectorRefused, match="'odd' is of the type map") as refused:
        await run(source, destination, plan_of("t"))
    assert refused.value.code == "type_not_held"


async def test_changes_are_merged_into_postgres(destination: Server) -> None:
    source = memory({"id": pa.int64(), "note": pa.string()})
    plan = replace(plan_of("t"), mode="incremental", disposition="merge", deletes="hard")
    source.add([{"id": 1, "note": "a"}, {"id": 2, "note": "b"}])
    await run(source, destination, plan)
    source.add([{"id": 2, "note": "B"}, {"id": 3, "note": "c"}])
    written = await run(source, destination, plan, context_of("run-2", 2, verify=False))
    assert (written.inserted, written.updated) == (1, 1)
    assert await destination.rows("t") == ["(1,a)", "(2,B)", "(3,c)"]
