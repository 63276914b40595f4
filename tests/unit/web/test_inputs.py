"""Names and ids as requests give them."""

import pytest

from libs.web.entities import number
from libs.web.inputs import canonical_name


@pytest.mark.parametrize(
    ("text", "name"), [("flights", "flights"), ("  a b ", "a b"), ("e\u0301", "\u00e9"), ("n" * 255, "n" * 255)]
)
def test_a_name_is_trimmed_and_composed(text: str, name: str) -> None:
    assert canonical_name(text) == name


@pytest.mark.parametrize("text", ["", " ", "n" * 256, "a\tb", "a\u202eb", "a\x7fb"])
def test_a_name_that_nobody_could_read_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must"):
        canonical_name(text)


@pytest.mark.parametrize(
    ("text", "identifier"),
    [("42", 42), ("1", 1), (str(2**53), 2**53), (str(2**53 + 1), None), ("9" * 5000, None), ("+1", None), ("٣", None)],
)
def test_an_id_is_a_number_that_every_json_reader_keeps(text: str, identifier: int | None) -> None:
    assert number(text) == identifier
