"""The columns of a table of Parquet files against the stream's."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from libs.connectors.protocol import DELETED_AT, StreamPlan
from libs.connectors.schema_changes import Reconciled, reconcile

DELETED_AT_FIELD = pa.field(DELETED_AT, pa.timestamp("us", "UTC"))
_WIDER: dict[pa.DataType, Sequence[pa.DataType]] = {
    pa.int16(): (pa.int32(), pa.int64(), pa.float32(), pa.float64()),
    pa.int32(): (pa.int64(), pa.float64()),
    pa.float32(): (pa.float64(),),
    pa.date32(): (pa.timestamp("us"),),
}
_INTEGER_DIGITS = {pa.int16(): 5, pa.int32(): 10, pa.int64(): 19}


def reconciled(plan: StreamPlan, present: pa.Schema, wanted: pa.Schema) -> Reconciled:
    """What has to change about a table's columns; raises ``SchemaChanged`` for what the policy does not allow."""
    types = {str(field.type): field.type for field in (*present, *wanted)}
    return reconcile(
        plan.stream,
        present={field.name: str(field.type) for field in present if field.name != DELETED_AT},
        wanted={field.name: str(field.type) for field in wanted},
        policy=plan.schema_policy,
        widens=lambda before, after: widens(types[before], types[after]),
        replaced=plan.disposition == "replace",
    )


def merged_schema(plan: StreamPlan, present: pa.Schema, wanted: pa.Schema) -> pa.Schema:
    """The columns of a table that stays: its own, in the stream's types, and those that are new."""
    fields = {field.name: field for field in present if field.name != DELETED_AT} | {
        field.name: field for field in wanted
    }
    return pa.schema([*fields.values(), *([DELETED_AT_FIELD] if plan.deletes == "soft" else [])])


def fitted(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """The rows with the columns of a schema: cast to wider types, null where there is no such column."""
    if batch.schema.equals(schema):
        return batch
    columns: list[Any] = []
    for field in schema:
        place = batch.schema.get_field_index(field.name)
        if place < 0:
            columns.append(pa.nulls(batch.num_rows, field.type))
        else:
            column = batch.column(place)
            columns.append(column if column.type == field.type else column.cast(field.type))
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def widens(before: pa.DataType, after: pa.DataType) -> bool:
    """Whether every value of one type is a value of the other."""
    if isinstance(before, pa.ListType) and isinstance(after, pa.ListType):
        return widens(before.value_type, after.value_type)
    if after in _WIDER.get(before, ()):
        return True
    if not pa.types.is_decimal(after):
        return False
    wider: Any = after
    if pa.types.is_decimal(before):
        narrower: Any = before
        digits = narrower.precision - narrower.scale
        return bool(wider.scale >= narrower.scale and wider.precision - wider.scale >= digits)
    return before in _INTEGER_DIGITS and bool(wider.precision - wider.scale >= _INTEGER_DIGITS[before])
