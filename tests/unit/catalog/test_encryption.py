"""Envelope encryption: what was sealed opens in its place alone, under any key that is still there."""

import base64
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from libs.core.errors import CallOperator
from libs.mongodb.encryption import Keyring, Sealed


def new_key() -> SecretStr:
    return SecretStr(base64.b64encode(os.urandom(32)).decode())


OLD, NEW = new_key(), new_key()
BEFORE = Keyring({"old": OLD})
BOTH = Keyring({"new": NEW, "old": OLD})
AFTER = Keyring({"new": NEW})


@given(st.binary(max_size=200), st.binary(max_size=50))
def test_what_was_encrypted_decrypts(secret: bytes, associated: bytes) -> None:
    assert BOTH.decrypt(BEFORE.encrypt(secret, associated), associated) == secret


def test_equal_secrets_look_different() -> None:
    first, second = BEFORE.encrypt(b"secret", b"a"), BEFORE.encrypt(b"secret", b"a")
    assert first.ciphertext != second.ciphertext
    assert first.wrapped_key != second.wrapped_key
    assert b"secret" not in first.ciphertext


def test_a_secret_opens_nowhere_else() -> None:
    with pytest.raises(CallOperator):
        BEFORE.decrypt(BEFORE.encrypt(b"secret", b"source/1"), b"source/2")


@pytest.mark.parametrize("field", ["wrapped_key", "ciphertext"])
@pytest.mark.parametrize("position", [0, 12, -1])
def test_an_altered_secret_does_not_open(field: str, position: int) -> None:
    sealed = BEFORE.encrypt(b"secret", b"a")
    altered = bytearray(getattr(sealed, field))
    altered[position] ^= 1
    for content in (bytes(altered), b""):
        document = sealed.document() | {field: content}
        with pytest.raises(CallOperator):
            BEFORE.decrypt(Sealed.of(document), b"a")


def test_the_first_key_encrypts_and_all_decrypt() -> None:
    assert BOTH.encrypt(b"secret", b"a").key_id == "new"
    assert BOTH.decrypt(BEFORE.encrypt(b"secret", b"a"), b"a") == b"secret"


def test_a_rewrapped_secret_needs_the_old_key_no_more() -> None:
    sealed = BEFORE.encrypt(b"secret", b"a")
    rewrapped = BOTH.rewrap(sealed)
    assert (rewrapped.key_id, rewrapped.ciphertext) == ("new", sealed.ciphertext)
    assert AFTER.decrypt(rewrapped, b"a") == b"secret"
    assert BOTH.rewrap(rewrapped) == rewrapped


def test_a_missing_key_is_named() -> None:
    with pytest.raises(CallOperator, match="'old'"):
        AFTER.decrypt(BEFORE.encrypt(b"secret", b"a"), b"a")


def test_a_stored_document_reads_back() -> None:
    sealed = BEFORE.encrypt(b"secret", b"a")
    assert Sealed.of(sealed.document()) == sealed


@pytest.mark.parametrize("key", ["", "short", base64.b64encode(b"x" * 31).decode(), "é" * 44])
def test_a_key_that_is_none_is_refused_without_showing_it(key: str) -> None:
    with pytest.raises(ValueError, match="32 bytes") as refusal:
        Keyring({"k1": SecretStr(key)})
    assert not key or key not in str(refusal.value)


def test_no_key_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        Keyring({})
