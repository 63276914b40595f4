"""Password hashes."""

from collections.abc import Iterator

import pytest

from libs.core.errors import RetryLater
from services.auth.passwords import WAITING_MAX, Passwords


@pytest.fixture
def passwords() -> Iterator[Passwords]:
    passwords = Passwords()
    yield passwords
    passwords.close()


async def test_only_the_right_password_is_verified(passwords: Passwords) -> None:
    stored = await passwords.hash("pässword \N{LOCK} with spaces")
    assert stored.startswith("$argon2id$")
    assert "word" not in stored
    assert await passwords.verify(stored, "pässword \N{LOCK} with spaces")
    assert not await passwords.verify(stored, "password")


async def test_an_account_that_is_not_there_has_no_right_password(passwords: Passwords) -> None:
    assert not await passwords.verify(None, "password")


async def test_a_damaged_hash_verifies_nothing(passwords: Passwords) -> None:
    assert not await passwords.verify("not a hash", "password")


async def test_a_queue_of_logins_has_an_end(passwords: Passwords, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passwords, "_waiting", WAITING_MAX)
    with pytest.raises(RetryLater):
        await passwords.hash("password")
