"""The canonical form: what PostgreSQL sends of random values is what Arrow's values are encoded to."""

import asyncio
import json
import struct
import uuid
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import asyncpg
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from libs.connectors.canonical_arrow import digests, fingerprint, row_bytes
from libs.connectors.postgres.arrow import arrow_columns
from libs.connectors.postgres.arrow_form import arrow_form
from libs.connectors.postgres.connection import SESSION_SETTINGS
from libs.connectors.postgres.table import PostgresTable
from libs.connectors.postgres.types import columns_of
from libs.testing.walks import examples
from tests.integration.connectors.moving import plan_of

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)


def decimals(precision: int, scale: int) -> st.SearchStrategy[Decimal]:
    most = 10**precision - 1
    return st.integers(-most, most).map(lambda unscaled: Decimal(f"{unscaled}E-{scale}"))


# By PostgreSQL's type: the values that Arrow takes and how PostgreSQL reads them from text.
TYPES: dict[str, tuple[st.SearchStrategy[Any], Any]] = {
    "boolean": (st.booleans(), str),
    "smallint": (st.integers(-(2**15), 2**15 - 1), str),
    "integer": (st.integers(-(2**31), 2**31 - 1), str),
    "bigint": (st.integers(-(2**63), 2**63 - 1), str),
    "real": (st.floats(width=32), repr),
    "double precision": (st.floats(), repr),
    "numeric(12,2)": (decimals(12, 2), "{:f}".format),
    "numeric(3,3)": (decimals(3, 3), "{:f}".format),
    "numeric(38,20)": (decimals(38, 20), "{:f}".format),
    "numeric(70,30)": (decimals(70, 30), "{:f}".format),
    "numeric(5,-2)": (st.integers(-99_999, 99_999).map(lambda n: Decimal(n * 100)), str),
    "text": (TEXT, str),
    "varchar(30)": (TEXT, str),
    "char(30)": (TEXT.map(lambda text: text.ljust(30)), str),
    "json": (st.recursive(TEXT, lambda inner: st.lists(inner, max_size=3)).map(json.dumps), str),
    "bytea": (st.binary(max_size=30), lambda value: "\\x" + value.hex()),
    "uuid": (st.uuids().map(lambda value: value.bytes), lambda value: str(uuid.UUID(bytes=value))),
    "date": (st.dates(), str),
    "timestamp": (st.datetimes(), str),
    "time": (st.times(), str),
}
ALL_TYPES = [*TYPES, *(f"{name}[]" for name in TYPES)]


class Asked:
    """A connection that is asked for the canonical bytes of texts read as a type."""

    def __init__(self, dsn: str) -> None:
        self._runner = asyncio.Runner()
        self._connection = self._runner.run(asyncpg.connect(dsn, server_settings=SESSION_SETTINGS))
        columns = ", ".join(f'"{index}" {name}' for index, name in enumerate(ALL_TYPES))
        self._runner.run(self._connection.execute(f"CREATE TABLE public.typed ({columns})"))
        self.table = self._runner.run(self._table())
        self.form = arrow_form(self.table)

    async def _table(self) -> PostgresTable:
        oid = await self._connection.fetchval("SELECT 'public.typed'::regclass::oid")
        columns = (await columns_of(self._connection, [oid]))[oid]
        return PostgresTable(None, plan_of("typed"), tuple(columns), (), ())  # type: ignore[arg-type]

    def record_send(self, index: int, texts: list[str | None]) -> list[bytes]:
        query = f"""
            SELECT record_send(ROW({self.form.columns[str(index)]})) AS row
            FROM (SELECT text::{ALL_TYPES[index]} AS "{index}", number
                  FROM unnest($1::text[]) WITH ORDINALITY AS given(text, number)) AS typed ORDER BY number
        """
        return [row["row"] for row in self._runner.run(self._connection.fetch(query, texts))]

    def close(self) -> None:
        self._runner.run(self._connection.close())
        self._runner.close()


@pytest.fixture
def asked(postgres: str) -> Iterator[Asked]:
    async def execute(sql: str) -> None:
        connection = await asyncpg.connect(postgres)
        await connection.execute(sql)
        await connection.close()

    name = f"test_{uuid.uuid4().hex[:10]}"
    asyncio.run(execute(f"CREATE DATABASE {name}"))
    server = Asked(postgres.rsplit("/", 1)[0] + f"/{name}")
    yield server
    server.close()
    asyncio.run(execute(f"DROP DATABASE {name} WITH (FORCE)"))


@pytest.mark.randomised
def test_postgres_sends_the_bytes_that_arrow_values_are_encoded_to(asked: Asked) -> None:
    promised = arrow_columns(asked.table)

    @settings(max_examples=examples(300), deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def the_same(data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(ALL_TYPES) - 1))
        name = ALL_TYPES[index]
        scalars, as_text = TYPES[name.removesuffix("[]")]
        one = st.lists(st.none() | scalars, max_size=5) if name.endswith("[]") else scalars
        values = data.draw(st.lists(st.none() | one, min_size=1, max_size=20))
        texts = [_sent(value, as_text) for value in values]
        array = _arrow(values, promised[index].type)
        assert asked.record_send(index, texts) == row_bytes([array]).to_pylist()
        half = len(values) // 2
        assert row_bytes([array[half:]]).to_pylist() == row_bytes([array]).to_pylist()[half:]

    the_same()


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("date", ["4713-01-01 BC", "5874897-12-31", "1999-12-31", "2000-01-01"]),
        ("timestamp", ["4713-01-01 BC", "294245-12-31 23:59:59.999999", "1970-01-01"]),
        ("real", ["NaN", "-0", "Infinity", "-Infinity", "1e-45"]),
        ("double precision", ["NaN", "-0", "Infinity", "-Infinity", "5e-324"]),
        ("numeric(3,3)", ["0.001", "-0.001", "0", "0.999"]),
    ],
)
def test_values_at_the_ends_of_their_types_are_encoded_alike(asked: Asked, name: str, texts: list[str]) -> None:
    index = ALL_TYPES.index(name)
    wanted = arrow_columns(asked.table)[index].type
    if pa.types.is_floating(wanted):
        array: Any = pa.array([float(text) for text in texts], wanted)
    elif pa.types.is_decimal(wanted):
        array = pa.array([Decimal(text) for text in texts], wanted)
    else:
        days = {"4713-01-01 BC": -2_440_550, "5874897-12-31": 2_145_042_905, "1999-12-31": 10_956, "2000-01-01": 10_957}
        moments = {
            "4713-01-01 BC": -2_440_550 * 86_400_000_000,
            "294245-12-31 23:59:59.999999": 9_223_339_708_800_000_000 - 1,
            "1970-01-01": 0,
        }
        known: dict[str, int] = days if name == "date" else moments
        array = pa.array([known[text] for text in texts], pa.int32() if name == "date" else pa.int64()).view(wanted)
    assert asked.record_send(index, list(texts)) == row_bytes([array]).to_pylist()


def test_every_not_a_number_is_the_same_one() -> None:
    patterns = [0x7FF8000000000000, 0xFFF8000000000000, 0x7FF8000000000123]
    bits = pa.py_buffer(struct.pack("<3Q", *patterns))
    array: Any = pa.Array.from_buffers(pa.float64(), 3, [None, bits])
    assert len(set(row_bytes([array]).to_pylist())) == 1


def test_sums_wrap_and_count_what_is_repeated() -> None:
    rows = digests(row_bytes([pa.array(list(range(5_000)) * 2)]))
    keys = digests(row_bytes([pa.array([0] * 10_000)]))
    (bucket,) = fingerprint(keys, rows, "", 2).buckets.values()
    once = fingerprint(keys[:5_000], rows[:5_000], "", 2).total
    assert bucket.rows == 10_000
    assert bucket.hash == sum(int.from_bytes(row[:8].tobytes(), "big") for row in rows) % 2**64
    assert bucket.hash == once.hash * 2 % 2**64
    assert fingerprint(rows, rows, "", 4).total == bucket


def _sent(value: Any, as_text: Any) -> str | None:
    if isinstance(value, list):
        return "{" + ",".join("NULL" if item is None else _quoted(as_text(item)) for item in value) + "}"
    return None if value is None else str(as_text(value))


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _arrow(values: list[Any], wanted: pa.DataType) -> Any:
    if wanted == pa.uuid():
        return pa.ExtensionArray.from_storage(pa.uuid(), pa.array(values, pa.binary(16)))
    if pa.types.is_list(wanted) and wanted.value_type == pa.uuid():
        stored: Any = pa.array(values, pa.list_(pa.binary(16)))
        return stored.cast(wanted)
    return pa.array(values, wanted)
