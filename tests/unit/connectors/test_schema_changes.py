"""Reconciling columns: what each policy does with each change."""

import pytest

from libs.connectors.postgres.columns import widens
from libs.connectors.protocol import SchemaPolicy, StreamName
from libs.connectors.schema_changes import Reconciled, SchemaChange, SchemaChanged, reconcile

STREAM = StreamName("public", "t")
PRESENT = {"id": "integer", "note": "text", "gone": "date"}
WANTED = {"id": "bigint", "note": "text", "fresh": "text"}


def reconciled(wanted: dict[str, str], policy: SchemaPolicy, *, replaced: bool = False) -> Reconciled:
    return reconcile(STREAM, present=PRESENT, wanted=wanted, policy=policy, widens=widens, replaced=replaced)


def test_under_evolve_columns_are_added_widened_and_kept() -> None:
    assert reconciled(WANTED, "evolve").changes == (
        SchemaChange("fresh", "added", None, "text"),
        SchemaChange("id", "widened", "integer", "bigint"),
        SchemaChange("gone", "dropped", "date", None),
    )


def test_a_type_that_does_not_hold_the_former_values_is_refused_unless_all_rows_are_replaced() -> None:
    with pytest.raises(SchemaChanged, match=r"public\.t: column id changes from integer to smallint"):
        reconciled(PRESENT | {"id": "smallint"}, "evolve")
    (change,) = reconciled(PRESENT | {"id": "smallint"}, "evolve", replaced=True).changes
    assert change == SchemaChange("id", "changed", "integer", "smallint")


@pytest.mark.parametrize(
    "wanted", [PRESENT | {"fresh": "text"}, PRESENT | {"id": "bigint"}, {"id": "integer", "note": "text"}]
)
def test_under_freeze_every_change_is_refused(wanted: dict[str, str]) -> None:
    with pytest.raises(SchemaChanged, match="schema_policy is freeze"):
        reconciled(wanted, "freeze")
    assert reconciled(PRESENT, "freeze") == Reconciled()


def test_under_ignore_new_columns_are_left_out_and_dropped_ones_stay() -> None:
    assert reconciled({"id": "integer", "fresh": "text"}, "ignore") == Reconciled((), frozenset({"fresh"}))
    with pytest.raises(SchemaChanged, match="schema_policy is ignore"):
        reconciled(WANTED, "ignore")


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("smallint", "integer", True),
        ("integer", "smallint", False),
        ("integer", "numeric", True),
        ("integer", "numeric(10,0)", True),
        ("integer", "numeric(9,0)", False),
        ("bigint", "numeric(21,2)", True),
        ("bigint", "double precision", False),
        ("integer", "double precision", True),
        ("real", "double precision", True),
        ("numeric(10,2)", "numeric(12,2)", True),
        ("numeric(10,2)", "numeric(12,4)", True),
        ("numeric(10,2)", "numeric(12,5)", False),
        ("numeric(10,2)", "numeric", True),
        ("numeric", "numeric(10,2)", False),
        ("character varying(10)", "character varying(20)", True),
        ("character varying(20)", "character varying(10)", False),
        ("character varying(20)", "character varying", True),
        ("character varying(20)", "text", True),
        ("text", "character varying(20)", False),
        ("character(3)", "character(5)", False),
        ("bit(3)", "bit(5)", False),
        ("timestamp(3) without time zone", "timestamp without time zone", True),
        ("timestamp(3) without time zone", "timestamp(6) without time zone", True),
        ("timestamp without time zone", "timestamp with time zone", False),
        ("date", "timestamp without time zone", True),
        ("integer[]", "bigint[]", True),
        ("integer[]", "bigint", False),
        ("text", "jsonb", False),
        ("other.mood", "text", False),
    ],
)
def test_what_is_wider(before: str, after: str, expected: bool) -> None:
    assert widens(before, after) is expected
