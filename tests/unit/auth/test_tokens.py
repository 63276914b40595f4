"""The texts that callers hold."""

from hypothesis import given
from hypothesis import strategies as st

from services.auth.credentials import without_scheme
from services.auth.tokens import is_api_key, is_session_token, new_api_key, new_session_token, shown_prefix, token_hash


def test_new_tokens_are_well_formed_and_differ() -> None:
    keys = {new_api_key() for _ in range(50)}
    assert len(keys) == 50
    assert all(is_api_key(key) and not is_session_token(key) for key in keys)
    assert is_session_token(new_session_token())


@given(st.integers(min_value=8, max_value=45), st.sampled_from("0aZ~é"))
def test_a_mistyped_key_is_told_from_a_real_one(place: int, typed: str) -> None:
    key = new_api_key()
    mistyped = key[:place] + typed + key[place + 1 :]
    assert is_api_key(mistyped) == (mistyped == key)


@given(st.text())
def test_no_text_breaks_the_checks(text: str) -> None:
    assert not is_api_key("ds_live_" + text[:30])
    assert not is_session_token(text)
    assert len(token_hash(text)) == 64


def test_lists_show_four_characters_of_a_key() -> None:
    key = new_api_key()
    assert shown_prefix(key) == key[:12]


def test_a_key_may_come_with_and_without_the_bearer_scheme() -> None:
    assert without_scheme("Bearer ds_live_x") == "ds_live_x"
    assert without_scheme("bearer  ds_live_x ") == "ds_live_x"
    assert without_scheme("ds_live_x") == "ds_live_x"
    assert without_scheme("Basic abc") == "Basic abc"
