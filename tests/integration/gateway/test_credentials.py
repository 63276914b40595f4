"""Who is calling: which credential decides, and what happens when auth changes its mind or is down."""

import asyncio

import aiohttp
import pytest

from libs.core.principal import Principal
from tests.integration.gateway.backends import API_KEY, BOOTSTRAP_KEY, PROJECT, SESSION
from tests.integration.gateway.conftest import Suite

SOURCES = f"/api/v1/project/{PROJECT}/sources"


@pytest.mark.parametrize(
    "authorization",
    [
        f"Bearer {API_KEY}",
        f"bearer   {API_KEY}",
        API_KEY,
        f"Bearer {SESSION}",
        f"Bearer {BOOTSTRAP_KEY}",
        BOOTSTRAP_KEY,
    ],
)
async def test_a_credential_in_authorization_is_taken_with_and_without_its_scheme(
    stranger: aiohttp.ClientSession, authorization: str
) -> None:
    async with stranger.get(SOURCES, headers={"Authorization": authorization}) as response:
        assert response.status == 200
        assert str(PROJECT) in (await response.json())["principal"]["projects"]


async def test_a_call_without_a_credential_is_refused(stranger: aiohttp.ClientSession) -> None:
    async with stranger.get(SOURCES) as response:
        assert response.status == 401
        assert response.headers["WWW-Authenticate"] == 'Bearer realm="datasync"'
        assert (await response.json())["code"] == "unauthenticated"


async def test_an_unknown_credential_is_refused(stranger: aiohttp.ClientSession) -> None:
    async with stranger.get(SOURCES, headers={"Authorization": "Bearer ds_live_wrong"}) as response:
        assert response.status == 401
        assert response.headers["WWW-Authenticate"] == 'Bearer realm="datasync", error="invalid_token"'


async def test_a_session_cookie_decides_over_a_bearer_that_is_none_of_ours(stranger: aiohttp.ClientSession) -> None:
    headers = {"Cookie": f"datasync_session={SESSION}", "Authorization": "Bearer authenticated"}
    async with stranger.get(SOURCES, headers=headers) as response:
        assert response.status == 200
        assert (await response.json())["principal"]["name"] == "ada"


async def test_an_api_key_decides_over_a_session_cookie(stranger: aiohttp.ClientSession) -> None:
    headers = {"Cookie": f"datasync_session={SESSION}", "Authorization": f"Bearer {API_KEY}"}
    async with stranger.get(SOURCES, headers=headers) as response:
        assert (await response.json())["principal"]["name"] == "ci"


async def test_a_bootstrap_key_counts_beside_a_cookie_that_has_ended(stranger: aiohttp.ClientSession) -> None:
    headers = {"Cookie": "datasync_session=ds_sess_old", "Authorization": f"Bearer {BOOTSTRAP_KEY}"}
    async with stranger.get(SOURCES, headers=headers) as response:
        assert (await response.json())["principal"]["name"] == "ci"


async def test_an_api_key_does_not_count_as_a_session(stranger: aiohttp.ClientSession) -> None:
    async with stranger.get(SOURCES, headers={"Cookie": f"datasync_session={API_KEY}"}) as response:
        assert response.status == 401


async def test_concurrent_requests_with_one_credential_ask_auth_once(
    suite: Suite, client: aiohttp.ClientSession
) -> None:
    suite.auth.answers.clear()
    requests = [asyncio.create_task(_status(client)) for _ in range(50)]
    await suite.auth.was_asked(API_KEY)
    suite.auth.answers.set()
    assert set(await asyncio.gather(*requests)) == {200}
    assert suite.auth.asked[API_KEY] == 1


async def test_a_revoked_key_is_refused_in_steady_use(suite: Suite, client: aiohttp.ClientSession) -> None:
    assert await _status(client) == 200
    del suite.auth.credentials["bearer", API_KEY]
    while await _status(client) == 200:
        await asyncio.sleep(0.01)
    assert await _status(client) == 401


async def test_auth_down_is_a_503_and_its_return_is_noticed(suite: Suite, client: aiohttp.ClientSession) -> None:
    await suite.auth.backend.stop()
    async with client.get(SOURCES) as response:
        assert response.status == 503
        assert response.headers["Retry-After"] == "1"
        assert (await response.json())["code"] == "auth_unavailable"
    await suite.auth.backend.start()
    assert await _status(client) == 200


async def test_a_refused_credential_counts_again_once_auth_knows_it(
    suite: Suite, stranger: aiohttp.ClientSession
) -> None:
    fresh = "ds_live_" + "c" * 38
    headers = {"Authorization": f"Bearer {fresh}"}
    async with stranger.get(SOURCES, headers=headers) as response:
        assert response.status == 401
    suite.auth.credentials["bearer", fresh] = Principal(kind="user", subject="2", name="bob", scopes=("*",))
    status = 401
    while status == 401:
        await asyncio.sleep(0.01)
        async with stranger.get(SOURCES, headers=headers) as response:
            status = response.status
    assert status == 200


async def test_a_huge_credential_is_refused_without_asking(suite: Suite, stranger: aiohttp.ClientSession) -> None:
    async with stranger.get(SOURCES, headers={"Authorization": "x" * 4000}) as response:
        assert response.status == 401
    assert not suite.auth.asked


async def _status(client: aiohttp.ClientSession) -> int:
    async with client.get(SOURCES) as response:
        await response.read()
        return response.status
