"""What stays true while the store or the event log is gone."""

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack

import aiohttp
import pytest
from pydantic import SecretStr

from libs.service.running import running_service
from libs.testing.servers import Kafka, Mongod, ServerUnavailable
from libs.testing.urls import url_settings
from services.gateway.app import SERVICE as GATEWAY
from services.gateway.config import GatewaySettings
from tests.integration.auth.auth_service import GATEWAY_KEY, Answer, Auth, Gateway


@pytest.fixture
async def fallible() -> AsyncIterator[tuple[Auth, Mongod]]:
    """Auth on a mongod of its own."""
    with Mongod() as mongod:
        async with AsyncExitStack() as stack:
            yield Auth(mongod.url, "faults_", stack), mongod


async def issue(gateway: Gateway, credential: str) -> Answer:
    return await gateway.call("POST", "/api/v2/keys", {"name": "ci"}, credential=credential)


async def test_what_was_answered_survives_a_killed_store(fallible: tuple[Auth, Mongod]) -> None:
    auth, mongod = fallible
    gateway = await auth.start()
    assert (await gateway.sign_up()).status == 200
    session = await gateway.session_of()
    kept, revoked = (await issue(gateway, session)).body, (await issue(gateway, session)).body
    await gateway.call("DELETE", f"/api/v2/keys/{revoked['id']}", credential=session)
    mongod.kill()
    refused = await gateway.log_in()
    assert (refused.status, refused.body["success"]) == (503, False)
    assert int(refused.headers["Retry-After"]) >= 1
    mongod.start()
    assert (await gateway.resolve(session)).principal is not None
    assert (await gateway.resolve(kept["secret"])).principal is not None
    assert (await gateway.resolve(revoked["secret"])).reason == "revoked"
    assert (await gateway.sign_up()).status == 409


@pytest.fixture
def fallible_kafka() -> Iterator[Kafka]:
    """A Kafka of the test's own; skipped where Java or Maven is missing."""
    server = Kafka()
    try:
        server.start()
        yield server
    except ServerUnavailable as missing:
        pytest.skip(f"no Kafka: {missing}")
    finally:
        server.remove()


@pytest.mark.kafka
async def test_a_key_revoked_while_kafka_is_stopped_is_refused_within_a_second(
    auth: Auth, fallible_kafka: Kafka
) -> None:
    """Through the real gateway, which remembers an answer of auth for less than that."""
    direct = await auth.start(kafka_bootstrap_servers=fallible_kafka.bootstrap_servers)
    await direct.sign_up()
    session = await direct.session_of()
    key = (await issue(direct, session)).body
    fallible_kafka.kill()
    settings = GatewaySettings(
        port=0, **url_settings(auth=direct.service.base_url), signing_key=SecretStr(GATEWAY_KEY), rate_limits=False
    )
    async with running_service(GATEWAY, settings) as public, aiohttp.ClientSession(public.base_url) as client:
        opened = {"Authorization": f"Bearer {key['secret']}"}
        async with client.get("/auth", headers=opened) as answer:
            assert answer.status == 200
        by_session = {"Authorization": f"Bearer {session}"}
        async with client.delete(f"/api/v2/keys/{key['id']}", headers=by_session) as answer:
            assert answer.status == 200
        revoked_at = time.monotonic()
        while time.monotonic() < revoked_at + 1:
            async with client.get("/auth", headers=opened) as answer:
                if answer.status == 401:
                    return
    pytest.fail("the key was still good a second after its revocation")
