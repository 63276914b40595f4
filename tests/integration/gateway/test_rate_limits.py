"""Rate limits on a real MongoDB: exact over gateways, told in headers, and no outage without MongoDB."""

import asyncio
import random
import time
from collections import Counter as Tally
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from pydantic import SecretStr

from libs.mongodb.client import ReturnDocument, connect
from libs.service.running import running_service
from libs.testing.servers import Mongod
from services.gateway.app import SERVICE
from services.gateway.config import GatewaySettings
from services.gateway.rate_limits import permits
from services.gateway.rate_limits.counters import Counters, lease_of, update_of
from services.gateway.rate_limits.limiter import RateLimiter
from services.gateway.rate_limits.permits import LeaseRequest, Policy
from tests.integration.gateway.backends import API_KEY, GATEWAY_KEY, Auth, Backend, a_key, echo, started
from tests.unit.gateway.counter_model import Counter

OTHER_KEY = "ds_live_" + "c" * 38
ENTERPRISE_KEY = "ds_live_" + "d" * 38
SOURCES = "/api/v1/project/123/sources"
FAMILIES = {
    "project": ("GET", SOURCES),
    "sync": ("GET", "/api/v1/sync/sync_1"),
    "v2": ("GET", "/api/v2/jobs/1"),
}

# Windows are aligned to the clock: none of this length ends while a test runs.
LONG_SECONDS = 10**7


@dataclass
class Gateways:
    """Starts gateways that share a store and the services behind."""

    auth: Auth
    settings: dict[str, Any]
    stack: AsyncExitStack
    urls: list[str] = field(default_factory=list)

    async def start(self, **settings: Any) -> str:
        """A further gateway's URL."""
        chosen = GatewaySettings(**{**self.settings, **settings})
        running = await self.stack.enter_async_context(running_service(SERVICE, chosen))
        self.urls.append(running.base_url)
        return running.base_url


@asynccontextmanager
async def gateways_on(mongodb_url: str, database_prefix: str) -> AsyncIterator[Gateways]:
    auth = Auth()
    auth.credentials["bearer", OTHER_KEY] = a_key().model_copy(update={"subject": "k-2"})
    auth.credentials["bearer", ENTERPRISE_KEY] = a_key().model_copy(
        update={"subject": "k-3", "rate_class": "enterprise"}
    )
    catalog = Backend("catalog", [web.route("*", "/api/v1/project/{projectid}/sources", echo)])
    jobs = Backend("job_orchestrator", [web.get("/api/v1/sync/{id}", echo), web.get("/api/v2/jobs/{id}", echo)])
    async with started(auth.backend, catalog, jobs), AsyncExitStack() as stack:
        settings = {
            "port": 0,
            "mongodb_url": mongodb_url,
            "database_prefix": database_prefix,
            "auth_url": auth.backend.url,
            "catalog_url": catalog.url,
            "job_orchestrator_url": jobs.url,
            "signing_key": SecretStr(GATEWAY_KEY),
            "shutdown_timeout_seconds": 0.3,
        }
        yield Gateways(auth, settings, stack)


@pytest.fixture
async def gateways(mongod: str, database_prefix: str) -> AsyncIterator[Gateways]:
    async with gateways_on(mongod, database_prefix) as running:
        yield running


@pytest.fixture
async def caller() -> AsyncIterator[aiohttp.ClientSession]:
    """A client without a credential of its own."""
    async with aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as session:
        yield session


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: Any

    @property
    def remaining(self) -> int:
        return int(self.headers["X-RateLimit-Remaining"])

    @property
    def window(self) -> int:
        return int(self.headers["X-RateLimit-Reset"])


async def ask(
    caller: aiohttp.ClientSession, url: str, *, key: str | None = API_KEY, method: str = "GET", **headers: str
) -> Answer:
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    if key is not None:
        sent["Authorization"] = f"Bearer {key}"
    async with caller.request(method, url, headers=sent, json={} if method == "POST" else None) as response:
        return Answer(response.status, dict(response.headers), await response.json(content_type=None))


async def test_three_gateways_admit_exactly_the_limit(gateways: Gateways, caller: aiohttp.ClientSession) -> None:
    urls = [await gateways.start(rate_limit_project_per_minute=300) for _ in range(3)]
    admitted: Tally[int] = Tally()

    async def until_refused_after_the_last(url: str) -> None:
        while True:
            answer = await ask(caller, url + SOURCES)
            assert "X-RateLimit-Mode" not in answer.headers
            if answer.status == 200:
                admitted[answer.window] += 1
                continue
            assert answer.status == 429
            if admitted[answer.window] >= 300:
                return
            await asyncio.sleep(0.05)

    async with asyncio.timeout(60):
        await asyncio.gather(*(until_refused_after_the_last(url) for url in urls for _ in range(4)))
    assert max(admitted.values()) == 300


async def test_a_gateway_replaces_one_of_its_name_that_died(
    gateways: Gateways, mongod: str, database_prefix: str
) -> None:
    client = connect(mongod)
    try:
        for name, known in (("gateway-1", 1), ("gateway-1", 1), ("gateway-2", 2)):
            await gateways.start(instance=name)
            assert await client[f"{database_prefix}gateway"]["gateways"].count_documents({}) == known
    finally:
        client.close()


async def test_a_gateway_alone_counts_down_by_one(gateways: Gateways, caller: aiohttp.ClientSession) -> None:
    url = await gateways.start()
    answers = [await ask(caller, url + SOURCES) for _ in range(6)]
    if len({answer.window for answer in answers}) == 1:
        assert [answer.remaining for answer in answers] == [999, 998, 997, 996, 995, 994]


@pytest.mark.parametrize(
    ("family", "policy", "limit", "period_seconds"),
    [("project", "project", 1000, 60), ("sync", "sync", 1000, 60), ("v2", "v2-standard", 1000, 3600)],
)
async def test_every_answer_says_what_is_left(
    gateways: Gateways, caller: aiohttp.ClientSession, family: str, policy: str, limit: int, period_seconds: int
) -> None:
    url = await gateways.start()
    method, path = FAMILIES[family]
    answer = await ask(caller, url + path, method=method)
    headers = answer.headers
    assert answer.status == 200
    assert (headers["X-RateLimit-Limit"], answer.remaining) == (str(limit), limit - 1)
    assert answer.window % period_seconds == 0
    assert 0 < answer.window - time.time() <= period_seconds
    assert headers["RateLimit-Policy"] == f'"{policy}";q={limit};w={period_seconds}'
    reset_seconds = int(headers["RateLimit"].removeprefix(f'"{policy}";r={limit - 1};t='))
    assert abs(reset_seconds - (answer.window - time.time())) <= 2
    assert "X-RateLimit-Mode" not in headers


async def test_an_enterprise_key_has_its_own_limit(gateways: Gateways, caller: aiohttp.ClientSession) -> None:
    url = await gateways.start()
    answer = await ask(caller, url + FAMILIES["v2"][1], key=ENTERPRISE_KEY)
    assert (answer.headers["X-RateLimit-Limit"], answer.remaining) == ("10000", 9999)


async def test_an_error_says_what_is_left_too(gateways: Gateways, caller: aiohttp.ClientSession) -> None:
    url = await gateways.start()
    answer = await ask(caller, url + SOURCES + "/nowhere", method="POST", Origin="http://localhost:8000")
    assert answer.status == 404
    assert answer.remaining == 999
    exposed = answer.headers["Access-Control-Expose-Headers"]
    assert all(f"X-RateLimit-{name}" in exposed for name in ("Limit", "Remaining", "Reset", "Mode"))


async def test_over_the_limit_is_429_in_the_familys_shape(gateways: Gateways, caller: aiohttp.ClientSession) -> None:
    url = await gateways.start(
        rate_limit_project_per_minute=1, rate_limit_sync_per_minute=1, rate_limit_v2_standard_per_hour=1
    )
    refused = {}
    for family, (method, path) in FAMILIES.items():
        while (answer := await ask(caller, url + path, method=method)).status != 429:
            pass
        assert answer.remaining == 0
        assert 0 <= answer.window - time.time() <= int(answer.headers["Retry-After"]) <= 3600
        refused[family] = answer.body
    assert (refused["project"]["success"], refused["project"]["code"]) == (False, "rate_limited")
    assert refused["v2"].keys() == {"error", "message", "code"}
    assert (refused["v2"]["error"], refused["v2"]["code"]) == ("Too Many Requests", "rate_limited")
    assert (refused["sync"]["status"], refused["sync"]["code"]) == (429, "rate_limited")
    assert refused["sync"]["request_id"]


async def test_each_key_has_limits_of_its_own(gateways: Gateways, caller: aiohttp.ClientSession) -> None:
    url = await gateways.start(rate_limit_project_per_minute=1)
    while (await ask(caller, url + SOURCES)).status != 429:
        pass
    assert (await ask(caller, url + SOURCES, key=OTHER_KEY)).status == 200


async def test_health_and_preflights_are_not_limited(gateways: Gateways, caller: aiohttp.ClientSession) -> None:
    url = await gateways.start(rate_limit_address_per_minute=1)
    for _ in range(5):
        for method, path in (("GET", "/healthz"), ("GET", "/docs"), ("OPTIONS", SOURCES)):
            async with caller.request(method, url + path) as response:
                assert response.status in (200, 204)
                assert "X-RateLimit-Limit" not in response.headers


async def test_limits_that_are_turned_off_add_no_headers(gateways: Gateways, caller: aiohttp.ClientSession) -> None:
    for settings in ({"rate_limits": False}, {"rate_limit_project_per_minute": 0}):
        url = await gateways.start(**settings)
        answer = await ask(caller, url + SOURCES)
        assert answer.status == 200
        assert "RateLimit" not in answer.headers


async def test_logins_are_limited_by_address(gateways: Gateways, caller: aiohttp.ClientSession) -> None:
    url = await gateways.start(rate_limit_address_per_minute=3)
    answers = [await ask(caller, url + "/login", key=None, method="POST") for _ in range(8)]
    assert answers[0].headers["RateLimit-Policy"] == '"address";q=3;w=60'
    admitted = Tally(answer.window for answer in answers if answer.status == 200)
    assert max(admitted.values()) == 3
    assert answers[-1].status == 429 or len(admitted) == 2


async def test_bad_keys_are_limited_by_address_and_a_good_one_in_use_is_not(
    gateways: Gateways, caller: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(permits, "LEASE_MS", 60_000)
    url = await gateways.start(rate_limit_address_per_minute=3)
    assert (await ask(caller, url + SOURCES)).status == 200
    while (answer := await ask(caller, url + SOURCES, key="ds_live_guessed")).status == 401:
        assert answer.headers["RateLimit-Policy"].startswith('"address"')
    assert answer.status == 429
    asked = gateways.auth.asked.total()
    statuses = [(await ask(caller, url + SOURCES, key=f"ds_live_{number}")).status for number in range(5)]
    if 401 not in statuses:
        assert statuses == [429] * 5
        assert gateways.auth.asked.total() == asked, "guesses over the limit are not looked at"
    assert (await ask(caller, url + SOURCES)).status == 200


async def test_a_forwarded_address_is_used_from_trusted_proxies_only(
    gateways: Gateways, caller: aiohttp.ClientSession
) -> None:
    distrusting = await gateways.start(rate_limit_address_per_minute=1)
    trusting = await gateways.start(rate_limit_address_per_minute=1, trusted_proxies="127.0.0.0/8")

    async def statuses(url: str) -> list[int]:
        return [
            (await ask(caller, url + "/login", key=None, method="POST", X_Forwarded_For=f"198.51.100.{n}")).status
            for n in range(4)
        ]

    assert 429 in await statuses(distrusting)
    assert await statuses(trusting) == [200] * 4
    answer = await ask(caller, trusting + "/login", key=None, method="POST", X_Forwarded_For="10.1.1.1, 198.51.100.9")
    assert answer.body["headers"]["x-datasync-client-address"] == "198.51.100.9"


async def test_without_mongodb_each_gateway_admits_its_part_and_says_so(
    database_prefix: str, caller: aiohttp.ClientSession
) -> None:
    with Mongod() as store:
        async with gateways_on(store.url, database_prefix) as gateways:
            urls = [await gateways.start(rate_limit_project_per_minute=30) for _ in range(3)]
            for _ in range(3):
                for url in urls:
                    assert "X-RateLimit-Mode" not in (await ask(caller, url + SOURCES)).headers
            await _until_all_know_of_each_other(store.url, database_prefix, len(urls))
            store.kill()
            admitted: Tally[tuple[str, int]] = Tally()
            for url in urls:
                answers = [await ask(caller, url + SOURCES, key=OTHER_KEY) for _ in range(15)]
                assert all(answer.headers["X-RateLimit-Mode"] == "local" for answer in answers)
                assert {answer.status for answer in answers} <= {200, 429}
                admitted.update((url, answer.window) for answer in answers if answer.status == 200)
            assert max(admitted.values()) == 10
            store.start()
            for url in urls:
                while "X-RateLimit-Mode" in (await ask(caller, url + SOURCES)).headers:
                    await asyncio.sleep(0.1)


async def _until_all_know_of_each_other(mongodb_url: str, database_prefix: str, count: int) -> None:
    """Each counts the others right after it announces itself: two announcements after the last arrival are enough."""
    client = connect(mongodb_url)
    present = client[f"{database_prefix}gateway"]["gateways"]

    async def seen() -> dict[str, datetime]:
        return {document["_id"]: document["seen_at"] async for document in present.find()}

    while len(arrived := await seen()) < count:
        await asyncio.sleep(0.05)
    for _ in range(2):
        last = max(arrived.values())
        while min((arrived := await seen()).values()) <= last:
            await asyncio.sleep(0.05)
    client.close()


async def test_a_gateway_starts_without_mongodb(database_prefix: str, caller: aiohttp.ClientSession) -> None:
    async with gateways_on("mongodb://127.0.0.1:1/?replicaSet=datasync", database_prefix) as gateways:
        url = await gateways.start()
        answer = await ask(caller, url + SOURCES)
        assert (answer.status, answer.headers["X-RateLimit-Mode"]) == (200, "local")


@pytest.fixture
async def limiters(mongod: str, database_prefix: str) -> AsyncIterator[list[RateLimiter]]:
    """Those of three gateways on one database, without the gateways around them."""
    async with AsyncExitStack() as stack:
        found = []
        for number in range(3):
            client = connect(mongod)
            stack.callback(client.close)
            found.append(RateLimiter(client[f"{database_prefix}gateway"], f"g{number}"))
            await found[-1].open()
            running = asyncio.create_task(found[-1].run())
            stack.callback(running.cancel)
        yield found


async def test_every_window_admits_exactly_the_limit(limiters: list[RateLimiter]) -> None:
    """Windows of three seconds follow one another while three gateways are kept busy."""
    policy = Policy("p", 200, 3)
    admitted: Tally[int] = Tally()

    async def one(limiter: RateLimiter) -> None:
        while len(admitted) < 4:
            verdict = await limiter.admit(policy, "s")
            admitted[verdict.reset_seconds] += verdict.admitted
            await asyncio.sleep(0 if verdict.admitted else 0.02)

    await asyncio.gather(*(one(limiter) for limiter in limiters for _ in range(4)))
    first, *whole, last = sorted(admitted)
    assert [admitted[window] for window in whole] == [200] * len(whole)
    assert max(admitted[first], admitted[last]) <= 200


async def test_remaining_tells_what_another_gateway_admitted_once_the_lease_is_renewed(
    limiters: list[RateLimiter],
) -> None:
    policy = Policy("p", 2000, LONG_SECONDS)
    verdict = await limiters[0].admit(policy, "s")
    for _ in range(20):
        await limiters[1].admit(policy, "s")
    admitted = 21
    while verdict.remaining > policy.limit - admitted:
        verdict = await limiters[0].admit(policy, "s")
        admitted += 1
        await asyncio.sleep(0.01)


async def test_idle_permits_can_be_used_elsewhere(limiters: list[RateLimiter]) -> None:
    policy = Policy("p", 64, LONG_SECONDS)
    assert (await limiters[0].admit(policy, "s")).admitted
    admitted = 0
    while admitted < 63:
        admitted += (await limiters[1].admit(policy, "s")).admitted
        await asyncio.sleep(0.01)
    assert not (await limiters[2].admit(policy, "s")).admitted


async def test_a_gateway_that_ends_gives_back_at_once(limiters: list[RateLimiter]) -> None:
    policy = Policy("p", 64, LONG_SECONDS)
    assert (await limiters[0].admit(policy, "s")).admitted
    await limiters[0].close()
    assert sum([(await limiters[1].admit(policy, "s")).admitted for _ in range(70)]) == 63


async def test_the_stored_counter_follows_the_model(mongod: str, database_prefix: str) -> None:
    """Random requests at given times, on the real MongoDB and on the model."""
    client = connect(mongod)
    collection = client[f"{database_prefix}gateway"]["rate_limits"]
    chance = random.Random(20)
    for round_number in range(30):
        policy = Policy("p", chance.choice([1, 5, 40, 1000, 10**11]), 4)
        model, now_ms = Counter(policy), 1_000_000_000_000
        for _ in range(25):
            now_ms += chance.choice([0, 1, 200, 900, 2500, -300])
            request = LeaseRequest(
                chance.choice([model.window_ms, model.window_ms, -1]),
                chance.randint(0, min(model.taken, 5)),
                chance.randint(0, 3),
                wants_permits=chance.random() < 0.8,
            )
            document = await collection.find_one_and_update(
                {"_id": round_number},
                update_of(policy, request, datetime.fromtimestamp(now_ms / 1000, UTC)),
                upsert=True,
                return_document=ReturnDocument.AFTER,
            )
            assert lease_of(policy, document) == model.lease(request, now_ms)
    client.close()


async def test_gateways_that_meet_a_new_subject_at_once_share_one_counter(mongod: str, database_prefix: str) -> None:
    client = connect(mongod)
    counters, policy = Counters(client[f"{database_prefix}gateway"]["rate_limits"]), Policy("p", 100, LONG_SECONDS)
    for number in range(20):
        request = LeaseRequest(-1, unused=0)
        leases = await asyncio.gather(*(counters.lease(policy, f"s{number}", request) for _ in range(8)))
        assert min(lease.left for lease in leases) == policy.limit - sum(lease.permits for lease in leases)
    client.close()
