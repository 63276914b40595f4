"""The Arrow types that connectors exchange: few enough that each destination knows them all.

A source may have others, such as unsigned numbers or times in seconds. ``normalised`` turns them into the next of these
that holds every value, and refuses what would be lost.
"""

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from libs.connectors.protocol import ConnectorRefused, StreamName

_WIDER: dict[pa.DataType, pa.DataType] = {
    pa.int8(): pa.int16(),
    pa.uint8(): pa.int16(),
    pa.uint16(): pa.int32(),
    pa.uint32(): pa.int64(),
    pa.uint64(): pa.decimal128(20, 0),
    pa.float16(): pa.float32(),
    pa.date64(): pa.date32(),
    pa.large_string(): pa.string(),
    pa.string_view(): pa.string(),
    pa.large_binary(): pa.binary(),
    pa.binary_view(): pa.binary(),
    pa.null(): pa.string(),
}
_DECIMAL128_DIGITS, _DECIMAL256_DIGITS = 38, 76
_EXCHANGED = frozenset(
    (
        *(pa.bool_(), pa.int16(), pa.int32(), pa.int64(), pa.float32(), pa.float64(), pa.string(), pa.binary()),
        *(pa.uuid(), pa.date32(), pa.time64("us"), pa.timestamp("us")),
        pa.timestamp("us", "UTC"),
    )
)


def normalised_type(held: pa.DataType) -> pa.DataType | None:
    """The exchanged type of a type's values; None if there is none."""
    if held in _EXCHANGED:
        return held
    if held in _WIDER:
        return _WIDER[held]
    types: Any = pa.types
    if types.is_decimal(held):
        decimal: Any = held
        return _decimal(decimal.precision, decimal.scale)
    if isinstance(held, pa.TimestampType):
        return pa.timestamp("us") if held.tz is None else pa.timestamp("us", "UTC")
    if types.is_time(held):
        return pa.time64("us")
    if types.is_fixed_size_binary(held):
        return pa.binary()
    if types.is_dictionary(held):
        return normalised_type(held.value_type)  # type: ignore[attr-defined]
    if types.is_list(held) or types.is_large_list(held) or types.is_fixed_size_list(held):
        inner = normalised_type(held.value_type)  # type: ignore[attr-defined]
        return None if inner is None or types.is_list(inner) else pa.list_(inner)
    if isinstance(held, pa.BaseExtensionType) and held.extension_name == "arrow.json":
        return pa.string()
    return None


def _decimal(precision: int, scale: int) -> pa.DataType | None:
    """Without a negative scale, and in 128 bits if it fits."""
    if scale < 0:
        precision, scale = precision - scale, 0
    if precision > _DECIMAL256_DIGITS:
        return None
    return pa.decimal128(precision, scale) if precision <= _DECIMAL128_DIGITS else pa.decimal256(precision, scale)


def normalised_schema(stream: StreamName, schema: pa.Schema) -> pa.Schema:
    """The schema in exchanged types; raises ``ConnectorRefused`` naming a column that has none."""
    fields = []
    for field in schema:
        held = normalised_type(field.type)
        if held is None:
            raise ConnectorRefused(
                f"{stream}: column {field.name!r} is of the type {field.type}, which no destination holds: leave the "
                "column out",
                code="type_not_held",
            )
        fields.append(pa.field(field.name, held))
    return pa.schema(fields)


def normalised(stream: StreamName, batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """The rows in the exchanged types of ``schema``; raises ``ConnectorRefused`` for a value that would be cut off."""
    if batch.schema.types == schema.types:
        return batch
    columns = []
    for field, column in zip(schema, batch.columns, strict=True):
        try:
            columns.append(_cast(column, field.type))
        except pa.ArrowInvalid as error:
            raise ConnectorRefused(
                f"{stream}: column {field.name!r} has a value of {column.type} that {field.type} can't hold",
                code="value_not_held",
            ) from error
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _cast(column: Any, wanted: pa.DataType) -> Any:
    if column.type == wanted:
        return column
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if isinstance(column.type, pa.ListType | pa.LargeListType | pa.FixedSizeListType) and isinstance(
        wanted, pa.ListType
    ):
        column = column.cast(pa.list_(column.type.value_type))
        offsets, values = column.offsets, _cast(column.values, wanted.value_type)
        return pa.ListArray.from_arrays(offsets, values, type=wanted, mask=column.is_null())
    return pc.cast(column, wanted)
