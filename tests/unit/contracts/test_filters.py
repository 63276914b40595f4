"""Filters in both notations."""

from typing import Any

import pytest

from libs.contracts.filters import Condition, Filter, InvalidFilter, filter_of, parse_filter


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", None),
        ("  ", None),
        ("id > 5", Filter("and", (Condition("id", ">", "5"),))),
        ("id>=-5.5", Filter("and", (Condition("id", ">=", "-5.5"),))),
        ('"a b" = "x ""y"""', Filter("and", (Condition("a b", "=", 'x "y"'),))),
        ("name = 'it''s'", Filter("and", (Condition("name", "=", "it's"),))),
        ("a != null", Filter("and", (Condition("a", "!=", None),))),
        ('a = "null"', Filter("and", (Condition("a", "=", "null"),))),
        ('a = ""', Filter("and", (Condition("a", "=", ""),))),
        ("a <> 1 OR b < 2 or c <= 3", None),
        ("at >= 2024-01-01T00:00:00Z and x = 1", None),
    ],
)
def test_a_text_is_parsed(text: str, expected: Filter | None) -> None:
    found = parse_filter(text)
    if expected is not None or not text.strip():
        assert found == expected
    else:
        assert found is not None
        assert len(found.conditions) == text.count(" or ") + text.count(" OR ") + text.count(" and ") + 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("> 5", "a column was expected at character 1"),
        ("id", "was expected after 'id'"),
        ("id ~ 5", "was expected after 'id'"),
        ("id >", "a value was expected after >"),
        ("id > 5 id < 6", "and, or, or the end was expected at character 7"),
        ("a = 1 and b = 2 or c = 3", "can't be mixed"),
        ("a > null", "null can be compared"),
        ("a = 1; drop table x", "and, or, or the end was expected"),
        (" and ".join(["a = 1"] * 51), "at most 50"),
    ],
)
def test_what_can_not_be_parsed_is_refused_with_its_place(text: str, message: str) -> None:
    with pytest.raises(InvalidFilter, match=message):
        parse_filter(text)


@pytest.mark.parametrize(
    ("operator", "conditions", "place"),
    [
        ("xor", [{"column": "a", "operator": "=", "value": 1}], "logical_operator"),
        ("and", ["a"], "conditions[0]"),
        (
            "and",
            [{"column": "a", "operator": "=", "value": 1}, {"column": "", "operator": "=", "value": 1}],
            "conditions[1].column",
        ),
        ("and", [{"column": "a", "operator": "like", "value": 1}], "conditions[0].operator"),
        ("and", [{"column": "a", "operator": "="}], "conditions[0].value"),
        ("and", [{"column": "a", "operator": "=", "value": [1]}], "conditions[0].value"),
        ("and", [{"column": "a", "operator": "<", "value": None}], "conditions[0].value"),
        ("and", [{"column": "a", "operator": "=", "value": 1, "cast": 2}], "conditions[0].cast"),
    ],
)
def test_an_object_is_refused_by_its_place(operator: str, conditions: list[Any], place: str) -> None:
    with pytest.raises(InvalidFilter) as refused:
        filter_of(operator, conditions)
    assert refused.value.place == place


def test_values_of_an_object_become_text() -> None:
    given = [{"column": "a", "operator": "=", "value": value} for value in (True, 5, 1.5, "x", None)]
    found = filter_of("OR", given)
    assert found is not None
    assert [condition.value for condition in found.conditions] == ["true", "5", "1.5", "x", None]
    assert found.operator == "or"
    assert filter_of("and", []) is None


def test_a_filter_is_written_in_parentheses() -> None:
    found = parse_filter("a = 1 or b = 2")
    assert found is not None
    assert found.sql(lambda item: f"{item.column}{item.operator}{item.value}") == "(a=1 OR b=2)"
