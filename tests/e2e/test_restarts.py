"""A service that ends comes back without a request having been refused: connections wait for it."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import aiohttp
import pytest

from libs.core.ids import uuid7
from libs.testing.rest import READS, Rest, rest
from libs.testing.suite import Suite
from tests.e2e.stores import database

READERS = 4
WRITERS = 6
BACK_SECONDS_MAX = 60.0


@pytest.fixture(scope="module")
def restarted_suite() -> Iterator[Suite]:
    """A suite whose services the tests end."""
    with Suite() as suite:
        yield suite


@asynccontextmanager
async def load(api: Rest, service: str) -> AsyncIterator[dict[str, str]]:
    """Reads that must not fail, and writes that are repeated until they are acknowledged, while the block runs.

    Yields the ids of the records that were made, by their keys.
    """
    stop, made = asyncio.Event(), dict[str, str]()
    async with asyncio.TaskGroup() as tasks:
        for _ in range(READERS):
            tasks.create_task(read_until_told(api, READS[service], stop, may_be_cut=service == "gateway"))
        for _ in range(WRITERS):
            tasks.create_task(write_until_told(api, stop, made))
        try:
            yield made
        finally:
            stop.set()


async def read_until_told(api: Rest, path: str, stop: asyncio.Event, *, may_be_cut: bool) -> None:
    while not stop.is_set():
        try:
            answer = await api.answer("GET", path)
        except aiohttp.ClientError:
            # Only what the dead gateway had begun to answer may end like this.
            assert may_be_cut
            answer = await api.answer("GET", path)
        assert answer.status == 200, answer
        await asyncio.sleep(0.01)


async def write_until_told(api: Rest, stop: asyncio.Event, made: dict[str, str]) -> None:
    while not stop.is_set():
        key = uuid7()
        made[key] = await written(api, key)


async def written(api: Rest, key: str) -> str:
    record: dict[str, Any] = {
        "developerId": "restarts",
        "resourceType": "FEATURE_FLAG_STATE",
        "resourceKey": key,
        "data": {},
    }
    async with asyncio.timeout(BACK_SECONDS_MAX):
        while True:
            with suppress(aiohttp.ClientError):
                answer = await api.answer("POST", "/api/v1/sync/records", record, headers={"Idempotency-Key": key})
                if answer.status == 201:
                    identifier: str = answer.body["id"]
                    return identifier
                assert answer.status >= 500 or "running" in str(answer.body), answer
            await asyncio.sleep(0.05)


async def is_ready_again(suite: Suite, service: str, before: int) -> None:
    async with asyncio.timeout(BACK_SECONDS_MAX), aiohttp.ClientSession() as session:
        while suite.processes().get(service, before) == before:
            await asyncio.sleep(0.01)
        while True:
            with suppress(aiohttp.ClientError):
                async with session.get(f"{suite.url_of(service)}/readyz") as answer:
                    if answer.status == 200:
                        return
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "stopped"])
@pytest.mark.parametrize("service", READS)
async def test_requests_wait_for_a_service_that_comes_back(
    restarted_suite: Suite, service: str, number: signal.Signals
) -> None:
    suite = restarted_suite
    async with rest(suite.base_url, api_key=suite.api_key) as api:
        async with load(api, service) as made:
            while len(made) < WRITERS:
                await asyncio.sleep(0.01)
            before = suite.processes()[service]
            os.kill(before, number)
            await is_ready_again(suite, service, before)
            after = len(made)
            while len(made) < after + WRITERS:
                await asyncio.sleep(0.01)
        with database(suite, "record_sync") as stored:
            found = stored["events"].distinct("data", {"type": {"$regex": "[Cc]reated"}})
        assert all(sum(key in data for data in found) == 1 for key in list(made)[:WRITERS])
