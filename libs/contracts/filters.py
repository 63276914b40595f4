"""Filters: which rows of a stream move. Two notations are read: OLake's text and its ``filter_config``. Pure."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Operator = Literal["=", "!=", "<", "<=", ">", ">="]
OPERATORS: tuple[Operator, ...] = ("=", "!=", "<", "<=", ">", ">=")
CONDITIONS_MAX = 50
VALUE_CHARACTERS_MAX = 1_000

_OPERATOR = re.compile(r"\s*(>=|<=|!=|<>|=|<|>)")
_COLUMN = re.compile(r'\s*(?:"((?:[^"]|"")+)"|([^\W\d][\w$]*))')
_VALUE = re.compile(r"""\s*(?:"((?:[^"]|"")*)"|'((?:[^']|'')*)'|([^\s"'()]+))""")
_JOINED = re.compile(r"\s+(and|or)\s+", re.IGNORECASE)


class InvalidFilter(Exception):
    """``place`` is the path within the filter, such as ``conditions[0].operator``, or empty."""

    def __init__(self, message: str, place: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.place = place


@dataclass(frozen=True, slots=True)
class Condition:
    """A comparison of a column with a constant.

    Args:
        value: as text, which the source reads as a value of the column's type; None: null, with ``=`` and ``!=`` only.
    """

    column: str
    operator: Operator
    value: str | None


@dataclass(frozen=True, slots=True)
class Filter:
    """Conditions that all hold (``and``), or of which at least one holds (``or``)."""

    operator: Literal["and", "or"]
    conditions: tuple[Condition, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(condition.column for condition in self.conditions)

    def sql(self, condition: Callable[[Condition], str]) -> str:
        """The filter as an SQL condition, in parentheses.

        Args:
            condition: the SQL of one comparison.
        """
        return f"({f' {self.operator.upper()} '.join(condition(item) for item in self.conditions)})"


def parse_filter(text: str) -> Filter | None:
    """Parse ``column operator value``, joined by ``and`` or by ``or``; an empty text is no filter.

    Names and values with other characters than letters, digits and underscores stand in quotation marks, which are
    doubled within them. The word ``null`` is null.

    Raises:
        InvalidFilter: says what was expected, and where.
    """
    if not text.strip():
        return None
    conditions: list[Condition] = []
    operators: set[str] = set()
    place = 0
    while True:
        condition, place = _condition(text, place)
        conditions.append(condition)
        if not text[place:].strip():
            return _filter(operators, conditions)
        joined = _JOINED.match(text, place)
        if joined is None:
            raise InvalidFilter(f"and, or, or the end was expected at character {place + 1}: {_shown(text, place)}")
        operators.add(joined[1].lower())
        place = joined.end()


def filter_of(logical_operator: Any, conditions: Sequence[Any] | None) -> Filter | None:
    """The filter that a ``filter_config`` describes, None if it has no conditions; raises ``InvalidFilter``."""
    if not conditions:
        return None
    operator = str(logical_operator or "and").strip().lower()
    if operator not in ("and", "or"):
        raise InvalidFilter("must be and, or or", "logical_operator")
    parsed = [_given(item, f"conditions[{index}]") for index, item in enumerate(conditions)]
    return _filter({operator}, parsed)


def _filter(operators: set[str], conditions: Sequence[Condition]) -> Filter:
    if len(operators) > 1:
        raise InvalidFilter("and and or can't be mixed in one filter")
    if len(conditions) > CONDITIONS_MAX:
        raise InvalidFilter(f"a filter has at most {CONDITIONS_MAX} conditions")
    return Filter("or" if operators == {"or"} else "and", tuple(conditions))


def _condition(text: str, place: int) -> tuple[Condition, int]:
    column = _COLUMN.match(text, place)
    if column is None:
        raise InvalidFilter(f"a column was expected at character {place + 1}: {_shown(text, place)}")
    name = column[2] or column[1].replace('""', '"')
    operator = _OPERATOR.match(text, column.end())
    if operator is None:
        raise InvalidFilter(f"one of {' '.join(OPERATORS)} was expected after {name!r}: {_shown(text, column.end())}")
    value = _VALUE.match(text, operator.end())
    if value is None:
        raise InvalidFilter(f"a value was expected after {operator[1]}: {_shown(text, operator.end())}")
    double, single, bare = value.groups()
    constant = bare if bare is not None else (double or "").replace('""', '"') + (single or "").replace("''", "'")
    if bare is not None and bare.lower() == "null":
        constant = None
    return _checked(name, "!=" if operator[1] == "<>" else operator[1], constant, ""), value.end()


def _given(item: Any, place: str) -> Condition:
    if not isinstance(item, Mapping):
        raise InvalidFilter("must be an object with column, operator and value", place)
    unknown = sorted(set(item) - {"column", "operator", "value"})
    if unknown:
        raise InvalidFilter("is not a known field", f"{place}.{unknown[0]}")
    column, operator, value = item.get("column"), item.get("operator"), item.get("value")
    if not isinstance(column, str) or not column:
        raise InvalidFilter("must be the name of a column", f"{place}.column")
    if operator not in OPERATORS:
        raise InvalidFilter(f"must be one of {' '.join(OPERATORS)}", f"{place}.operator")
    if "value" not in item:
        raise InvalidFilter("is missing", f"{place}.value")
    if isinstance(value, bool):
        value = "true" if value else "false"
    elif isinstance(value, int | float):
        value = repr(value)
    elif value is not None and not isinstance(value, str):
        raise InvalidFilter("must be a text, a number, a boolean or null", f"{place}.value")
    return _checked(column, operator, value, place)


def _checked(column: str, operator: Any, value: str | None, place: str) -> Condition:
    prefix = f"{place}." if place else ""
    if value is None and operator not in ("=", "!="):
        raise InvalidFilter("null can be compared with = and != only", f"{prefix}value" if place else "")
    if value is not None and (len(value) > VALUE_CHARACTERS_MAX or "\x00" in value):
        raise InvalidFilter(
            f"must have at most {VALUE_CHARACTERS_MAX} characters, without U+0000", f"{prefix}value" if place else ""
        )
    return Condition(column, operator, value)


def _shown(text: str, place: int) -> str:
    return repr(text[place : place + 40].strip()) if text[place:].strip() else "the filter ends there"
