"""Arrow record batches as PostgreSQL's binary COPY, a column of many rows at a time.

A field of COPY is the length of a value and what its type's ``send`` function returns, which are the canonical bytes of
a value as well (``canonical_arrow.py``); only decimals differ, which COPY sends as ``numeric`` and not as text.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from libs.connectors.canonical_arrow import DecimalForm, fields, joined
from libs.connectors.postgres.binary import SIGNATURE, TRAILER
from libs.connectors.postgres.types import Column, PostgresType
from libs.connectors.protocol import ConnectorRefused, Policy, StreamPlan

HEADER = SIGNATURE + bytes(8)
SLICE_BYTES = 1024 * 1024

_NUMERIC_OID = 1700
_BASE_DIGITS = 4
_NEGATIVE = 0x4000
# PostgreSQL documentation, table 8.9: 4713 BC to 294276 AD, in microseconds since 1970; dates end with 5874897 AD.
_FIRST_DAY = -2_440_588
_END_DAY = 2_145_031_949
_FIRST_MICROSECOND = _FIRST_DAY * 86_400_000_000

_TYPES: dict[pa.DataType, PostgresType] = {
    arrow: PostgresType(oid, -1, sql, "pg_catalog", name, "scalar")
    for arrow, oid, sql, name in (
        (pa.bool_(), 16, "boolean", "bool"),
        (pa.int16(), 21, "smallint", "int2"),
        (pa.int32(), 23, "integer", "int4"),
        (pa.int64(), 20, "bigint", "int8"),
        (pa.float32(), 700, "real", "float4"),
        (pa.float64(), 701, "double precision", "float8"),
        (pa.string(), 25, "text", "text"),
        (pa.binary(), 17, "bytea", "bytea"),
        (pa.uuid(), 2950, "uuid", "uuid"),
        (pa.date32(), 1082, "date", "date"),
        (pa.time64("us"), 1083, "time without time zone", "time"),
        (pa.timestamp("us"), 1114, "timestamp without time zone", "timestamp"),
        (pa.timestamp("us", "UTC"), 1184, "timestamp with time zone", "timestamptz"),
    )
}


def columns_of(schema: pa.Schema) -> tuple[Column, ...]:
    """The columns of a schema of exchanged types (``arrow_types.py``) as PostgreSQL has them."""
    return tuple(_column(field.name, postgres_type(field.type)) for field in schema)


def _column(name: str, held: PostgresType) -> Column:
    return Column(name, held.sql, True, held)


def postgres_type(held: pa.DataType) -> PostgresType:
    """The PostgreSQL type of an exchanged type."""
    if isinstance(held, pa.ListType):
        element = postgres_type(held.value_type)
        return PostgresType(0, -1, f"{element.sql}[]", "pg_catalog", f"_{element.name}", "array", element=element)
    if pa.types.is_decimal(held):
        decimal: Any = held
        modifier = (decimal.precision << 16 | decimal.scale & 0x7FF) + 4
        sql = f"numeric({decimal.precision},{decimal.scale})"
        return PostgresType(_NUMERIC_OID, modifier, sql, "pg_catalog", "numeric", "scalar")
    return _TYPES[held]


def encode(batch: pa.RecordBatch) -> Iterator[memoryview]:
    """The rows of a batch of exchanged types as COPY has them, in pieces; without ``HEADER`` and ``TRAILER``."""
    if not batch.num_rows or not batch.num_columns:
        return
    rows = max(1, batch.num_rows * SLICE_BYTES // max(1, batch.nbytes))
    for start in range(0, batch.num_rows, rows):
        yield _encoded(batch.slice(start, rows))


def _encoded(batch: pa.RecordBatch) -> memoryview:
    pieces: list[Any] = [pa.scalar(batch.num_columns.to_bytes(2, "big"), pa.binary())]
    for column in batch.columns:
        pieces += fields(column, b"", AS_NUMERIC)
    encoded: Any = joined(pieces)
    offsets = np.frombuffer(encoded.buffers()[1], np.int32, len(encoded) + 1, encoded.offset * 4)
    return memoryview(encoded.buffers()[2])[int(offsets[0]) : int(offsets[-1])]


def _numeric(column: Any) -> Any:
    """``numeric_send``: the number of digits to the base 10,000, weight, sign, scale, digits."""
    precision, scale = column.type.precision, column.type.scale
    unscaled = pa.decimal128(precision, 0) if column.type.bit_width == 128 else pa.decimal256(precision, 0)
    numbers = pa.Array.from_buffers(unscaled, len(column), column.buffers(), offset=column.offset)
    numbers_text: Any = numbers.cast(pa.string())
    text = numbers_text.fill_null("0")
    negative = pc.starts_with(text, "-").to_numpy(zero_copy_only=False)
    whole = -(-(precision - scale) // _BASE_DIGITS)
    fraction = -(-scale // _BASE_DIGITS)
    text = pc.utf8_ltrim(text, "-")
    text = pc.utf8_lpad(text, whole * _BASE_DIGITS + scale, "0")
    text = pc.utf8_rpad(text, (whole + fraction) * _BASE_DIGITS, "0")
    groups = whole + fraction
    start = text.buffers()[1] and np.frombuffer(text.buffers()[1], np.int32, 1, text.offset * 4)[0]
    digits = np.frombuffer(text.buffers()[2], np.uint8, len(text) * groups * _BASE_DIGITS, int(start or 0))
    digits = digits.reshape(len(text), groups, _BASE_DIGITS) - ord("0")
    encoded = np.empty(len(text), np.dtype([("head", ">i2", 4), ("digits", ">i2", groups)]))
    encoded["head"][:, 0], encoded["head"][:, 1] = groups, whole - 1
    encoded["head"][:, 2], encoded["head"][:, 3] = np.where(negative, _NEGATIVE, 0), scale
    encoded["digits"] = digits.astype(np.int16) @ np.array([1000, 100, 10, 1], np.int16)
    size = encoded.dtype.itemsize
    offsets = np.arange(len(text) + 1, dtype=np.int32) * np.int32(size)
    buffers = [None, pa.py_buffer(offsets.data), pa.py_buffer(encoded.tobytes())]
    values: Any = pa.Array.from_buffers(pa.binary(), len(text), buffers)
    return pc.if_else(column.is_valid(), values, pa.scalar(None, pa.binary())) if column.null_count else values


AS_NUMERIC = DecimalForm(_NUMERIC_OID, _numeric)


def held(plan: StreamPlan, batch: pa.RecordBatch) -> tuple[pa.RecordBatch, dict[str, int]]:
    """The rows without the values that PostgreSQL can't hold, by policy, and the number of those by column.

    Raises:
        ConnectorRefused: such a value is in a column whose policy is ``fail`` or, since its type stays, ``text``.
    """
    columns, changed = [], {}
    sources = {plan.renamed(name): name for name in plan.policies}
    for field, column in zip(batch.schema, batch.columns, strict=True):
        bad = _unholdable(column)
        count = 0 if bad is None else pc.sum(bad).as_py() or 0
        if count:
            policy: Policy = plan.policies.get(sources.get(field.name, field.name), "fail")
            if policy != "null":
                raise ConnectorRefused(
                    f"{plan.stream}: column {field.name!r} has a value that PostgreSQL can't hold "
                    f"({_reason(column.type)}); choose the policy null for the column, or leave it out",
                    code="value_not_held",
                )
            column = pc.if_else(bad, pa.scalar(None, column.type), column)
            changed[field.name] = count
        columns.append(column)
    return (pa.RecordBatch.from_arrays(columns, schema=batch.schema) if changed else batch), changed


def _unholdable(column: Any) -> Any:
    """Where values can't be held, None for a type whose values all can."""
    kind = column.type
    compare: Any = pc
    if pa.types.is_string(kind):
        found = compare.match_substring(column, "\x00")
    elif pa.types.is_date32(kind):
        days = column.cast(pa.int32())
        found = compare.or_(compare.less(days, _FIRST_DAY), compare.greater_equal(days, _END_DAY))
    elif pa.types.is_timestamp(kind):
        found = compare.less(column.cast(pa.int64()), _FIRST_MICROSECOND)
    elif isinstance(kind, pa.ListType):
        inner = _unholdable(column.values)
        if inner is None or not (pc.any(inner).as_py() or False):
            return None
        lists = pa.ListArray.from_arrays(column.offsets, inner.fill_null(False))
        found = pa.array([any(items) if items else False for items in lists.to_pylist()])
    else:
        return None
    return found.fill_null(False)


def _reason(kind: pa.DataType) -> str:
    return "it is out of PostgreSQL's range" if pa.types.is_temporal(kind) else "a text contains U+0000"


__all__ = ["AS_NUMERIC", "HEADER", "TRAILER", "columns_of", "encode", "held", "postgres_type"]
