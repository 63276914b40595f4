"""Readiness names the part of a service that does not work, immediately and no other."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
import structlog
from aiohttp import web

from libs.core.decider import Reaction
from libs.mongodb.client import PyMongoError, connect
from libs.mongodb.leases import Leases
from libs.process.settings import ServiceSettings
from libs.service.background import BackgroundTasks
from libs.service.definition import ServiceContext, ServiceDefinition
from libs.service.running import running_service
from libs.testing.servers import Mongod
from libs.testing.things import THING
from libs.testing.waiting import until


@asynccontextmanager
async def start(_: ServiceContext[ServiceSettings]) -> AsyncIterator[Sequence[web.AbstractRouteDef]]:
    yield []


THINGS = ServiceDefinition(name="things", settings=ServiceSettings, aggregates=(THING,), start=start)


FOLLOWING = ServiceDefinition(
    name="follower",
    settings=ServiceSettings,
    aggregates=(THING,),
    reactions=(Reaction("datasync.catalog.v1", lambda _: ()),),
    start=start,
)


async def checks(base_url: str) -> dict[str, Any]:
    """The messages of the failing checks; the reply must come within the gateway's limit, whatever hangs."""
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=0.9)) as session,
        session.get(f"{base_url}/readyz") as response,
    ):
        answer = await response.json()
        return {name: found["message"] for name, found in answer["checks"].items() if not found["ready"]}


async def test_a_hung_store_is_named_within_seconds_and_nothing_else_is_blamed() -> None:
    with Mongod() as mongod:
        async with running_service(THINGS, ServiceSettings(mongodb_url=mongod.url)) as service:
            assert await checks(service.base_url) == {}
            mongod.pause()

            async def store_is_named() -> bool:
                found = await checks(service.base_url)
                return found.keys() == {"store"} and "has not answered for" in found["store"]

            async def is_ready() -> bool:
                return await checks(service.base_url) == {}

            try:
                await until(store_is_named, 8)
            finally:
                mongod.resume()
            await until(is_ready, 15)


async def test_a_task_that_keeps_failing_is_named(mongod: str, database_prefix: str) -> None:
    async def work() -> None:
        raise LookupError("no lamp")

    settings = ServiceSettings(mongodb_url=mongod, database_prefix=database_prefix)
    async with running_service(THINGS, settings) as service:
        service.context.tasks.start("lamplighter", work)

        async def is_named() -> bool:
            found = await checks(service.base_url)
            return "lamplighter keeps failing: LookupError('no lamp')" in found.get("background tasks", "")

        await until(is_named, 10)


async def test_the_error_of_work_that_fails_while_its_lease_cannot_be_renewed_is_raised(
    mongod: str, database_prefix: str
) -> None:
    """Otherwise it would be an exception that was never retrieved, and nobody would know why the work ended."""

    class SilentStore(Leases):
        async def acquire(self, name: str) -> bool:
            if begun.is_set():
                failed.set()
                await asyncio.sleep(0.2)
                raise PyMongoError("no answer")
            return await super().acquire(name)

    begun, failed = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        begun.set()
        await failed.wait()
        raise LookupError("the store does not answer")

    client = connect(mongod)
    try:
        leases = SilentStore(client[f"{database_prefix}things"]["leases"], lease_seconds=0.3)
        with pytest.raises(LookupError):
            await leases.run_while_leader("lamps", work)
    finally:
        client.close()


async def test_work_that_raises_an_error_when_cancelled_is_not_restarted_at_shutdown() -> None:
    async def work() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise LookupError("interrupted") from None

    tasks = BackgroundTasks()
    tasks.start("stubborn", work)
    await asyncio.sleep(0)
    async with asyncio.timeout(5):
        await tasks.close()


async def test_a_service_logs_at_start_which_keys_it_lacks(mongod: str, database_prefix: str) -> None:
    settings = ServiceSettings(mongodb_url=mongod, database_prefix=database_prefix)
    definition = ServiceDefinition(name="catalog", settings=ServiceSettings, aggregates=(THING,), start=start)
    with structlog.testing.capture_logs() as written:
        async with running_service(definition, settings):
            pass
    told = {line["setting"]: line["reason"] for line in written if line["event"] == "key_missing"}
    assert set(told) == {"SIGNING_KEY", "TRUSTED_KEYS"}
    assert "gateway" in told["TRUSTED_KEYS"]


async def test_an_outage_of_the_store_is_a_few_short_warnings() -> None:
    """One for each part that waits for it, without the driver's description of the topology and without a traceback."""
    with Mongod() as mongod, structlog.testing.capture_logs() as written:
        async with running_service(FOLLOWING, ServiceSettings(mongodb_url=mongod.url)) as service:
            assert (await checks(service.base_url)).keys() <= {"signing_key", "trusted_keys"}
            mongod.kill()

            async def store_is_named() -> bool:
                return "store" in await checks(service.base_url)

            await until(store_is_named, 30)
            mongod.start()

            async def is_ready() -> bool:
                return "store" not in await checks(service.base_url)

            await until(is_ready, 60)
    warnings = [line for line in written if line["log_level"] == "warning" and line["event"] != "key_missing"]
    events = [line["event"] for line in warnings]
    assert events.count("head_not_read") == 1
    assert events.count("lease_store_unavailable") <= 1
    assert "head_watch_failed" not in events
    assert len(events) <= 6, events
    assert all("Topology" not in str(line) and "exc_info" not in line for line in warnings), warnings
