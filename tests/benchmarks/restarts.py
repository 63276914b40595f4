"""How long the suite takes to start, and a service that was killed to be ready again, under reads and writes.

Reads that fail meanwhile are counted: there should be none, since connections queue while a service comes back.
"""

import asyncio
import os
import signal
import time
from contextlib import suppress
from typing import Any

import aiohttp

from libs.contracts.services import SERVICES
from libs.core.ids import uuid7
from libs.testing.rest import READS, Rest, rest
from libs.testing.suite import Suite

READERS = 4
WRITERS = 8
PAUSE_SECONDS = 0.01
WARM_UP_SECONDS = 1.0
READY_SECONDS_MAX = 60.0


async def run() -> list[dict[str, Any]]:
    """The start, and two results per service."""
    started_at = time.perf_counter()
    with Suite() as suite:
        results = [_result("start", time.perf_counter() - started_at, "s until ready")]
        async with rest(suite.base_url, api_key=suite.api_key) as api:
            for service in (service.name for service in SERVICES):
                seconds, failures = await _killed(suite, api, service)
                results.append(_result(f"{service} killed", seconds, "s until ready"))
                results.append(_result(f"{service} killed", failures, "failed reads"))
    return results


async def _killed(suite: Suite, api: Rest, service: str) -> tuple[float, int]:
    failures: list[str] = []
    load = [asyncio.create_task(_read(api, READS[service], failures)) for _ in range(READERS)]
    load += [asyncio.create_task(_write(api)) for _ in range(WRITERS)]
    await asyncio.sleep(WARM_UP_SECONDS)
    killed_at = time.perf_counter()
    os.kill(suite.processes()[service], signal.SIGKILL)
    await _ready(suite.url_of(service))
    seconds = time.perf_counter() - killed_at
    await asyncio.sleep(WARM_UP_SECONDS)
    for task in load:
        task.cancel()
    await asyncio.gather(*load, return_exceptions=True)
    return seconds, len(failures)


async def _ready(url: str) -> None:
    async with asyncio.timeout(READY_SECONDS_MAX), aiohttp.ClientSession() as session:
        while True:
            try:
                async with session.get(f"{url}/readyz") as answer:
                    if answer.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(PAUSE_SECONDS)


async def _read(api: Rest, path: str, failures: list[str]) -> None:
    while True:
        try:
            answer = await api.answer("GET", path)
            if answer.status != 200:
                failures.append(str(answer.status))
        except (aiohttp.ClientError, TimeoutError) as error:
            failures.append(type(error).__name__)
        await asyncio.sleep(PAUSE_SECONDS)


async def _write(api: Rest) -> None:
    """What was under way in the killed process fails, so nothing is said of writes."""
    while True:
        record = {"developerId": "d", "resourceType": "FEATURE_FLAG_STATE", "resourceKey": uuid7(), "data": {}}
        with suppress(aiohttp.ClientError, TimeoutError):
            await api.answer("POST", "/api/v1/sync/records", record)
        await asyncio.sleep(PAUSE_SECONDS)


def _result(case: str, value: float, unit: str) -> dict[str, Any]:
    return {"benchmark": "restarts", "case": case, "value": value, "unit": unit, "baseline": "", "ratio": None}
