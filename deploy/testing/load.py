"""Load on a gateway that counts what failed: creations and reads of sync records until SIGTERM or the time is up.

``load.py URL SECONDS [CLIENTS]`` with API_KEY in the environment. A read that failed is repeated, as HTTP allows, and
fails when the third attempt fails; a creation is sent once, except where the connection was never made. Prints one line
of JSON: how often each outcome occurred.
"""

import asyncio
import json
import os
import signal
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping

import aiohttp

PAUSE_SECONDS = 0.02
ATTEMPTS_MAX = 3
# Records of earlier loads have other names.
RUN = uuid.uuid4().hex


async def main(url: str, seconds: float, clients: int) -> None:
    stop_at = time.monotonic() + seconds
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    outcomes: Counter[str] = Counter()
    headers = {"Authorization": "Bearer " + os.environ["API_KEY"]}
    async with (
        aiohttp.ClientSession(url, headers=headers, timeout=aiohttp.ClientTimeout(total=30)) as session,
        asyncio.TaskGroup() as group,
    ):
        for client in range(clients):
            group.create_task(send(session, client, outcomes, lambda: stop.is_set() or time.monotonic() > stop_at))
    print(json.dumps(outcomes), flush=True)


async def send(
    session: aiohttp.ClientSession, client: int, outcomes: Counter[str], is_over: Callable[[], bool]
) -> None:
    number = 0
    while not is_over():
        number += 1
        record = {
            "developerId": f"load-{RUN}-{client}",
            "resourceType": "LOAD",
            "resourceKey": str(number),
            "data": {"number": number},
        }
        outcomes["POST " + await create(session, record)] += 1
        outcomes["GET " + await read(session)] += 1
        await asyncio.sleep(PAUSE_SECONDS)


async def create(session: aiohttp.ClientSession, record: Mapping[str, object]) -> str:
    while True:
        try:
            async with session.post("/api/v1/sync/records", json=record) as response:
                await response.read()
                return str(response.status)
        except aiohttp.ClientConnectorError:
            await asyncio.sleep(PAUSE_SECONDS)
        except (aiohttp.ClientError, TimeoutError) as error:
            return type(error).__name__


async def read(session: aiohttp.ClientSession) -> str:
    outcome = ""
    for _ in range(ATTEMPTS_MAX):
        try:
            async with session.get("/api/v1/sync/records?limit=1") as response:
                await response.read()
                outcome = str(response.status)
                if response.status < 500:
                    break
        except (aiohttp.ClientError, TimeoutError) as error:
            outcome = type(error).__name__
        await asyncio.sleep(PAUSE_SECONDS)
    return outcome


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 4))
