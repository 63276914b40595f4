"""How long after an acknowledged commit a follower has projected the event and reacted to it, durably.

At 1,000 events/s, on both logs. The baseline is the plain way: a durable insert a command, a change stream, and a
durable insert for each change in its order, without positions, offsets or anything done exactly once. It is measured at
100 events/s, as it falls behind without bound at 1,000.
"""

import asyncio
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from typing import Any

from libs.core.envelope import Envelope
from libs.core.ids import uuid7
from libs.mongodb.client import connect
from libs.service.running import tune_interpreter
from libs.testing.followers import installation
from libs.testing.servers import Kafka, Mongod, ServerUnavailable

EVENTS_PER_SECOND = 1_000
PLAIN_EVENTS_PER_SECOND = 100
SECONDS = 8.0
WARM_UP_SECONDS = 2.0
BURST_SECONDS = 0.01


async def run() -> list[dict[str, Any]]:
    """Two results per log: p50 and p99."""
    tune_interpreter()
    with Mongod() as mongod:
        baseline = await _plain(mongod.url)
        results = _results("embedded", await _lags(mongod.url, "embedded_", None), baseline)
        try:
            with Kafka() as kafka:
                lags = await _lags(mongod.url, "kafka_", kafka.bootstrap_servers)
                results += _results("kafka", lags, baseline)
        except ServerUnavailable as missing:
            print(f"  kafka: {missing}", file=sys.stderr)
    return results


async def _lags(mongodb_url: str, prefix: str, bootstrap_servers: str | None) -> list[float]:
    """Seconds from the owner's commit to the follower's, event by event."""
    committed: dict[str, float] = {}
    followed: dict[str, float] = {}

    def owner_committed(envelopes: Sequence[Envelope]) -> None:
        committed.update(dict.fromkeys((envelope.id for envelope in envelopes), time.perf_counter()))

    def follower_committed(envelopes: Sequence[Envelope]) -> None:
        followed.update(dict.fromkeys(_causes(envelopes), time.perf_counter()))

    async with AsyncExitStack() as stack:
        place = await stack.enter_async_context(installation(mongodb_url, prefix, bootstrap_servers))
        owner = await stack.enter_async_context(place.owner())
        follower = await stack.enter_async_context(place.follower())
        owner.commands.on_commit(owner_committed)
        follower.commands.on_commit(follower_committed)
        await _at_a_steady_rate(lambda: owner.make(name := uuid7(), name), WARM_UP_SECONDS)
        warm = set(committed)
        await _at_a_steady_rate(lambda: owner.make(name := uuid7(), name), SECONDS)
        async with asyncio.timeout(30):
            while len(followed) < len(committed):
                await asyncio.sleep(0.1)
    return [followed[cause] - committed[cause] for cause in followed if cause not in warm]


def _causes(envelopes: Sequence[Envelope]) -> list[str]:
    return [cause for envelope in envelopes if (cause := envelope.metadata.causation_id) is not None]


async def _at_a_steady_rate(call: Callable[[], Any], seconds: float, per_second: int = EVENTS_PER_SECOND) -> None:
    begin = time.perf_counter()
    begun = 0
    async with asyncio.TaskGroup() as group:
        while (elapsed := time.perf_counter() - begin) < seconds:
            while begun < elapsed * per_second:
                group.create_task(call())
                begun += 1
            await asyncio.sleep(BURST_SECONDS)


async def _plain(mongodb_url: str) -> list[float]:
    """What one would write first: an insert a command, a change stream, and an insert an event in its order."""
    client = connect(mongodb_url)
    things, views = client["plain"]["things"], client["plain"]["views"]
    committed: dict[str, float] = {}
    lags: dict[str, float] = {}

    async def command() -> None:
        name = uuid7()
        await things.insert_one({"_id": name, "name": name})
        committed[name] = time.perf_counter()

    async def follow() -> None:
        async with things.watch(max_await_time_ms=500) as changes:
            async for change in changes:
                name = change["documentKey"]["_id"]
                await views.insert_one({"_id": name, "name": name})
                lags[name] = time.perf_counter()

    try:
        await things.insert_one({"_id": "first"})
        following = asyncio.create_task(follow())
        await _at_a_steady_rate(command, WARM_UP_SECONDS, PLAIN_EVENTS_PER_SECOND)
        warm = set(committed)
        await _at_a_steady_rate(command, SECONDS, PLAIN_EVENTS_PER_SECOND)
        async with asyncio.timeout(60):
            while len(lags.keys() & committed.keys()) < len(committed) - 1:
                await asyncio.sleep(0.1)
        following.cancel()
        await asyncio.wait({following})
    finally:
        client.close()
    return [lags[name] - committed[name] for name in lags.keys() & committed.keys() if name not in warm]


def _results(name: str, lags: list[float], baseline: list[float]) -> list[dict[str, Any]]:
    results = []
    for label, share in (("p50", 0.5), ("p99", 0.99)):
        ours_ms, plain_ms = _percentile_ms(lags, share), _percentile_ms(baseline, share)
        results.append(
            {
                "benchmark": "lag",
                "case": f"{name} {label}",
                "value": round(ours_ms, 2),
                "unit": f"ms at {EVENTS_PER_SECOND}/s",
                "baseline": f"insert, change stream, insert at {PLAIN_EVENTS_PER_SECOND}/s: {plain_ms:.2f} ms",
                "ratio": round(plain_ms / ours_ms, 2),
            }
        )
    return results


def _percentile_ms(lags: list[float], share: float) -> float:
    return sorted(lags)[int(share * (len(lags) - 1))] * 1000
