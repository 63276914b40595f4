"""A service that was told to stop serves on for a while, so that whoever still sends requests to it loses none."""

import asyncio

import aiohttp

from libs.process.settings import ServiceSettings
from libs.service.running import running_service
from libs.testing.waiting import until
from tests.integration.service.test_readiness import THINGS

DELAY_SECONDS = 2.0


async def test_a_service_that_drains_is_not_ready_and_closes_each_connection_with_its_response(
    mongod: str, database_prefix: str
) -> None:
    settings = ServiceSettings(
        mongodb_url=mongod, database_prefix=database_prefix, shutdown_delay_seconds=DELAY_SECONDS
    )
    stop = asyncio.Event()
    started: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def run() -> None:
        async with running_service(THINGS, settings) as service:
            started.set_result(service.base_url)
            await stop.wait()

    running = asyncio.create_task(run())
    url = await started
    async with aiohttp.ClientSession() as session:

        async def ask(path: str) -> tuple[int, str | None]:
            async with session.get(url + path) as response:
                await response.read()
                return response.status, response.headers.get("Connection")

        assert await ask("/readyz") == (200, None)
        stop.set()

        async def is_draining() -> bool:
            return await ask("/readyz") == (503, "close")

        await until(is_draining)
        # Also on a new connection, and for as long as the delay lasts.
        assert await ask("/healthz") == (200, "close")
    await running
