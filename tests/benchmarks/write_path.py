"""Acknowledged commands per second of the command handler, against a plain insert per request.

Both write durably (majority, journalled) to the same mongod in the same run. Ours loads the state, checks a unique
name, writes event and document under a position without gaps, and has the relay publishing to a real Kafka beside it
(to nowhere where no Java is installed: the result's unit then says so). The baseline is motor's ``insert_one`` of a
document of the same size, one a request. Rounds alternate, and the median of each side is taken.
"""

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from libs.core.clock import SystemClock
from libs.core.envelope import Metadata
from libs.core.ids import uuid7
from libs.event_log.kafka import Brokers, KafkaEventLog, ensure_topics
from libs.eventsourcing.command_handler import CommandHandler
from libs.eventsourcing.event_store import EventStore
from libs.eventsourcing.relay import Relay
from libs.mongodb.client import connect
from libs.mongodb.leases import Leases
from libs.service.running import tune_interpreter
from libs.testing.followers import TOPICS
from libs.testing.servers import Kafka, Mongod, ServerUnavailable
from libs.testing.things import THING, MakeThing

CONCURRENCY = (1, 16, 64, 256)
ROUND_SECONDS = 3.0
ROUNDS = 3
WARM_UP_SECONDS = 1.0
PROJECT = Metadata(actor="bench", project_id=1, correlation_id="bench")

Call = Callable[[], Awaitable[Any]]


async def run() -> list[dict[str, Any]]:
    """One result per concurrency."""
    async with _setting() as (ours, baseline, log_name):
        results = []
        for concurrency in CONCURRENCY:
            rates = await _alternating(ours, baseline, concurrency)
            results.append(_result(concurrency, *rates, log_name))
        return results


@asynccontextmanager
async def _setting() -> AsyncIterator[tuple[Call, Call, str]]:
    tune_interpreter()
    async with AsyncExitStack() as stack:
        mongod = stack.enter_context(Mongod())
        client = connect(mongod.url)
        stack.callback(client.close)
        store = EventStore(client, "bench_things")
        await store.open([THING.collection], {})
        commands = CommandHandler(store, SystemClock(), [THING])
        commands.start()
        stack.push_async_callback(commands.close)
        log_name = await _relay_beside(stack, store, commands)
        plain = client["bench_plain"]["things"]

        async def ours() -> None:
            identifier = uuid7()
            await commands.handle(THING, identifier, MakeThing(identifier), PROJECT)

        async def baseline() -> None:
            identifier = uuid7()
            await plain.insert_one({"_id": identifier, "project_id": 1, "state": {"name": identifier, "renamed": 0}})

        yield ours, baseline, log_name


async def _alternating(ours: Call, baseline: Call, concurrency: int) -> tuple[float, float]:
    for call in (ours, baseline):
        await _rate(call, concurrency, WARM_UP_SECONDS)
    rates: dict[Call, list[float]] = {ours: [], baseline: []}
    for _ in range(ROUNDS):
        for call, measured in rates.items():
            measured.append(await _rate(call, concurrency, ROUND_SECONDS))
    return statistics.median(rates[ours]), statistics.median(rates[baseline])


async def _rate(call: Call, concurrency: int, seconds: float) -> float:
    """Calls per second with ``concurrency`` of them at a time."""
    begin = time.perf_counter()
    done = 0

    async def repeat() -> None:
        nonlocal done
        while time.perf_counter() - begin < seconds:
            await call()
            done += 1

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(repeat())
    return done / (time.perf_counter() - begin)


def _result(concurrency: int, ours: float, baseline: float, log_name: str) -> dict[str, Any]:
    return {
        "benchmark": "write_path",
        "case": str(concurrency),
        "value": round(ours),
        "unit": f"commands/s ({log_name})",
        "baseline": f"motor insert_one per request: {round(baseline)}/s",
        "ratio": round(ours / baseline, 2),
    }


async def _relay_beside(stack: AsyncExitStack, store: EventStore, commands: CommandHandler) -> str:
    """Start a Kafka and the relay that publishes to it; says what it is."""
    try:
        kafka = stack.enter_context(Kafka())
    except ServerUnavailable as missing:
        return f"without relay: {missing}"
    await ensure_topics(Brokers(kafka.bootstrap_servers), topics=TOPICS)
    event_log = KafkaEventLog(kafka.bootstrap_servers, "bench")
    stack.push_async_callback(event_log.close)
    leases = Leases(store.database["leases"])
    relay = Relay(store, event_log, commands)
    task = asyncio.create_task(leases.run_while_leader("relay", relay.run))
    stack.push_async_callback(_cancelled, task)
    return "relay to Kafka running"


async def _cancelled(task: "asyncio.Task[None]") -> None:
    task.cancel()
    await asyncio.wait({task})
