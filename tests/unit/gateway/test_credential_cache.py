"""How often auth is asked about a credential, and how soon a revocation takes effect, by a clock of the test's own."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator

import pytest

from libs.contracts.internal import CredentialResolved
from libs.core.errors import RetryLater
from libs.core.principal import Principal
from services.gateway.credential_cache import CACHED_MAX, Credential, CredentialCache

KEY = Credential("bearer", "ds_live_x")
VALID = CredentialResolved(principal=Principal(kind="api_key", subject="k-1", name="ci", scopes=("*",)))
REVOKED = CredentialResolved(principal=None, reason="revoked")


class Auth:
    """Decides when it reads ``resolved``, and replies once ``replies`` is set."""

    def __init__(self) -> None:
        self.now = 0.0
        self.resolved: CredentialResolved | Exception = VALID
        self.requests: Counter[Credential] = Counter()
        self.replies = asyncio.Event()
        self.replies.set()
        self.cache = CredentialCache(self.look_up, lambda: self.now)

    async def look_up(self, credential: Credential) -> CredentialResolved:
        self.requests[credential] += 1
        resolved = self.resolved
        await self.replies.wait()
        if isinstance(resolved, Exception):
            raise resolved
        return resolved

    async def requested(self, times: int) -> None:
        while self.requests[KEY] < times:
            await asyncio.sleep(0)


@pytest.fixture
async def auth() -> AsyncIterator[Auth]:
    found = Auth()
    yield found
    await found.cache.close()


async def test_concurrent_requests_share_one_look_up(auth: Auth) -> None:
    assert await asyncio.gather(*(auth.cache.resolve(KEY) for _ in range(50))) == [VALID] * 50
    assert auth.requests[KEY] == 1


async def test_an_answer_is_used_for_800_ms_from_its_request(auth: Auth) -> None:
    auth.replies.clear()
    waiting = asyncio.create_task(auth.cache.resolve(KEY))
    await auth.requested(1)
    auth.now = 0.3
    auth.replies.set()
    assert await waiting == VALID
    auth.resolved = REVOKED
    auth.now = 0.39
    assert await auth.cache.resolve(KEY) == VALID
    auth.now = 0.81
    assert await auth.cache.resolve(KEY) == REVOKED
    assert auth.requests[KEY] == 2


async def test_a_busy_key_is_refreshed_in_the_background_and_never_waits(auth: Auth) -> None:
    await auth.cache.resolve(KEY)
    auth.replies.clear()
    for auth.now, requests in ((0.1, 1), (0.39, 1), (0.4, 2), (0.5, 2), (0.79, 2)):
        assert await auth.cache.resolve(KEY) == VALID
        await auth.requested(requests)
        assert auth.requests[KEY] == requests


async def test_steady_use_asks_auth_about_twice_a_second(auth: Auth) -> None:
    for step in range(100):
        auth.now = step / 10
        await auth.cache.resolve(KEY)
        await asyncio.sleep(0)
    assert auth.requests[KEY] <= 10 / 0.4 + 1


async def test_a_revoked_key_is_refused_within_a_second_of_steady_use(auth: Auth) -> None:
    await auth.cache.resolve(KEY)
    auth.resolved = REVOKED
    refused_at = None
    for step in range(1, 20):
        auth.now = step / 20
        if await auth.cache.resolve(KEY) == REVOKED:
            refused_at = auth.now
            break
    assert refused_at is not None
    assert refused_at < 1


async def test_a_slow_answer_to_an_earlier_request_does_not_outlive_a_revocation(auth: Auth) -> None:
    auth.replies.clear()
    first = asyncio.create_task(auth.cache.resolve(KEY))
    await auth.requested(1)
    auth.resolved = REVOKED
    auth.now = 0.1
    second = asyncio.create_task(auth.cache.resolve(KEY))
    await asyncio.sleep(0)
    auth.now = 1.2
    auth.replies.set()
    assert await second == REVOKED
    assert await first == VALID


async def test_what_is_forgotten_is_looked_up_again_and_what_was_on_its_way_is_not_kept(auth: Auth) -> None:
    auth.replies.clear()
    on_its_way = asyncio.create_task(auth.cache.resolve(KEY))
    await auth.requested(1)
    auth.cache.forget()
    auth.resolved = REVOKED
    auth.replies.set()
    assert await on_its_way == VALID
    assert await auth.cache.resolve(KEY) == REVOKED


async def test_an_error_reaches_all_that_wait_and_is_not_kept(auth: Auth) -> None:
    auth.resolved = RetryLater("auth is down")
    results = await asyncio.gather(*(auth.cache.resolve(KEY) for _ in range(3)), return_exceptions=True)
    assert {type(result) for result in results} == {RetryLater}
    auth.resolved = VALID
    assert await auth.cache.resolve(KEY) == VALID


async def test_a_request_that_is_cancelled_does_not_end_the_others_look_up(auth: Auth) -> None:
    auth.replies.clear()
    first, second = (asyncio.create_task(auth.cache.resolve(KEY)) for _ in range(2))
    await auth.requested(1)
    first.cancel()
    auth.replies.set()
    assert await second == VALID


async def test_what_was_valid_is_remembered_while_it_is_too_old_to_be_used(auth: Auth) -> None:
    assert not auth.cache.was_valid(KEY)
    await auth.cache.resolve(KEY)
    auth.now = 60.0
    assert auth.cache.was_valid(KEY)


async def test_the_number_of_kept_answers_is_bounded(auth: Auth) -> None:
    others = [Credential("bearer", str(number)) for number in range(CACHED_MAX)]
    for credential in others:
        await auth.cache.resolve(credential)
    await auth.cache.resolve(KEY)
    assert sum(map(auth.cache.was_valid, others)) < CACHED_MAX
    assert auth.cache.was_valid(KEY)
