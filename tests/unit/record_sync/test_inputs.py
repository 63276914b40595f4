"""How free-form JSON is kept: its values as they were sent, in one form."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.record_sync.inputs import compact
from services.record_sync.records import record_id_of

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ('{ "a" : 1.10 }', '{"a":1.10}'),
        ('{"a": 1E+2, "b": -0.0}', '{"a":1E+2,"b":-0.0}'),
        ('{"a": 0.12345678901234567890123456789}', '{"a":0.12345678901234567890123456789}'),
        ('{"\\u00e9": "\\u0041\\/\\n\\ud83d\\ude00"}', '{"é":"A/\\n😀"}'),
        ('{"a": "\\\\", "b": "\\"x\\""}', '{"a":"\\\\","b":"\\"x\\""}'),
        ("{}", "{}"),
    ],
)
def test_numbers_stay_and_white_space_and_needless_escapes_go(text: str, kept: str) -> None:
    assert compact(text.encode()) == kept


@given(JSON, st.booleans(), st.sampled_from([None, 1]))
def test_a_kept_text_means_what_was_sent(value: object, ascii_only: bool, indent: int | None) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    try:
        body = text.encode()
    except UnicodeEncodeError:
        return
    kept = compact(body)
    assert json.loads(kept) == value
    assert compact(kept.encode()) == kept


@pytest.mark.parametrize(
    ("text", "identifier"),
    [
        ("0192f0a0-0000-7000-8000-00000000000A", "0192f0a0-0000-7000-8000-00000000000a"),
        ("0192f0a0000070008000000000000000", None),
        ("{0192f0a0-0000-7000-8000-000000000000}", None),
        ("changes", None),
        ("", None),
    ],
)
def test_an_id_is_a_uuid_in_its_usual_form(text: str, identifier: str | None) -> None:
    assert record_id_of(text) == identifier
