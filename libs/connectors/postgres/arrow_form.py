"""The canonical values of a PostgreSQL table for a destination that holds Arrow values."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from libs.connectors.postgres.arrow import arrow_columns, unholdable_by_policy
from libs.connectors.postgres.table import PostgresTable
from libs.connectors.postgres.types import Column, PostgresType
from libs.connectors.postgres.verification import Form, array_bytes, of_base_type, one_nan, source_names


def arrow_form(table: PostgresTable) -> Form:
    """Each value as the Arrow type that the stream promises (``canonical.py``), its policy applied."""
    unholdable = unholdable_by_policy(table)
    values: dict[str, str] = {}
    for column, promised in zip(table.columns, arrow_columns(table), strict=True):
        value = _value(column, promised.type)
        if table.plan.policies.get(column.source_name) == "null" and column.name in unholdable:
            value = f"CASE WHEN {unholdable[column.name]} THEN NULL ELSE {value} END"
        values[column.name] = value
    return Form(values, table.primary_key, source_names(table))


def canonical_values(columns: Sequence[Column], promised: Sequence[pa.DataType]) -> dict[str, str]:
    """The SQL expression of each column's canonical value, as the Arrow type that it was written from."""
    return {column.name: _value(column, held) for column, held in zip(columns, promised, strict=True)}


def _value(column: Column, promised: Any) -> str:
    value, held = column.expression, column.type
    if not pa.types.is_list(promised):
        return _scalar(held, value, promised)
    assert held.element is not None
    inner = promised.value_type
    if held.element.name == "bpchar" or pa.types.is_floating(inner):
        items = f"ARRAY(SELECT {_scalar(held.element, 'item', inner)} FROM unnest({value}) AS item)"  # noqa: S608
        return array_bytes(f"CASE WHEN {value} IS NOT NULL THEN {items} END")
    return array_bytes(f"{value}::text[]" if _as_text(inner) else of_base_type(held, value))


def _scalar(held: PostgresType, value: str, promised: pa.DataType) -> str:
    if _as_text(promised):
        # A cast to text takes the blanks off the end of a character(n).
        return f"bpcharout({value})::text" if held.built_in and held.name == "bpchar" else f"{value}::text"
    plain = of_base_type(held, value)
    return one_nan(plain, held.name) if pa.types.is_floating(promised) else plain


def _as_text(promised: pa.DataType) -> bool:
    return pa.types.is_string(promised) or pa.types.is_decimal(promised)
