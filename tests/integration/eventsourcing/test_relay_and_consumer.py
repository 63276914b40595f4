"""From an owner's commit to a follower's documents, on both event logs, whatever fails in between."""

import asyncio
import signal
import sys
import tracemalloc
from collections.abc import Collection, Sequence
from typing import Any

import pytest

from libs.core.envelope import Envelope
from libs.event_log.kafka import KafkaEventLog
from libs.eventsourcing import parking
from libs.eventsourcing.consumer import intervals
from libs.eventsourcing.parking import Parking, list_parked, request_retry
from libs.process.telemetry import REGISTRY
from libs.suite.child_process import die_with_parent
from libs.testing.followers import Behaviour, Follower, Installation, Owner, history, installation, view_of
from libs.testing.servers import Kafka
from libs.testing.things import TOPIC
from libs.testing.waiting import until


@pytest.fixture(autouse=True)
def quick_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervals, "STOPPED_POLL_SECONDS", 0.05)
    monkeypatch.setattr(intervals, "RETRY_SECONDS", 0.05)
    monkeypatch.setattr(intervals, "WAIT_SECONDS", 0.1)


async def all_views(follower: Follower, count: int, timeout_seconds: float = 30.0) -> None:
    async def arrived() -> bool:
        return len(await follower.views()) == count

    await until(arrived, timeout_seconds)


async def more_views_than(follower: Follower, count: int) -> None:
    async def arrived() -> bool:
        return len(await follower.views()) > count

    await until(arrived)


async def view_is(follower: Follower, identifier: str, versions: list[int]) -> None:
    async def arrived() -> bool:
        view = (await follower.views()).get(identifier)
        return view is not None and view["versions"] == versions

    await until(arrived)


async def made(owner: Owner, count: int, prefix: str = "") -> None:
    async with asyncio.TaskGroup() as group:
        for number in range(count):
            group.create_task(owner.make(f"{prefix}{number}", f"{prefix}name {number}"))


async def test_every_event_is_projected_and_reacted_to_exactly_once(place: Installation) -> None:
    async with place.owner() as owner, place.follower() as follower:
        await made(owner, 300)
        await owner.rename("5", "other")
        await view_is(follower, "5", [1, 2])
        await all_views(follower, 300)
        assert {view["versions"][0] for view in (await follower.views()).values()} == {1}
        assert await follower.echoes() == {str(number): 1 for number in range(300)}
        echo = (await history(follower.store, "echo-5"))[0]
        thing = (await history(owner.store, "thing-5"))[0]
        assert echo.metadata.causation_id == thing.id
        assert (echo.metadata.correlation_id, echo.metadata.project_id) == ("request-1", 7)


async def test_a_restarted_follower_goes_on_where_it_was(place: Installation) -> None:
    async with place.owner() as owner:
        for round_ in range(3):
            writing = asyncio.create_task(made(owner, 100, f"{round_}-"))
            async with place.follower() as follower:
                await more_views_than(follower, round_ * 100)
            await writing
            async with place.follower() as follower:
                await all_views(follower, (round_ + 1) * 100)
        async with place.follower() as follower:
            assert {tuple(view["versions"]) for view in (await follower.views()).values()} == {(1,)}
            assert set((await follower.echoes()).values()) == {1}


async def test_two_active_instances_do_nothing_twice(place: Installation) -> None:
    async with (
        place.owner() as owner,
        place.follower(lease=False) as follower,
        place.follower(lease=False),
    ):
        for round_ in range(5):
            await made(owner, 40, f"{round_}-")
        await all_views(follower, 200)
        assert {tuple(view["versions"]) for view in (await follower.views()).values()} == {(1,)}
        assert set((await follower.echoes()).values()) == {1}


async def test_a_poisonous_message_is_parked_with_its_stream_and_nothing_else_waits(place: Installation) -> None:
    behaviour = Behaviour(refuses={"poison"})
    async with place.owner() as owner, place.follower(behaviour) as follower:
        await owner.make("bad", "poison")
        await made(owner, 20)
        await owner.rename("bad", "antidote")
        await all_views(follower, 20)
        await until(lambda: parked_count_is(follower, 2))
        first, second = await list_parked(follower.store.database)
        assert (first.stream, "no echo of poison" in first.reason) == ("thing-bad", True)
        assert second.reason == "an earlier message of its stream is parked"
        assert "bad" not in await follower.views()

        await request_retry(follower.store.database)
        await until(lambda: first_parked_was_tried(follower, 2))
        behaviour.refuses.clear()
        await request_retry(follower.store.database)
        await view_is(follower, "bad", [1, 2])
        await until(lambda: parked_count_is(follower, 0))
        await owner.rename("bad", "cured")
        await view_is(follower, "bad", [1, 2, 3])
        assert (await follower.echoes())["bad"] == 1


async def parked_count_is(follower: Follower, count: int) -> bool:
    return len(await list_parked(follower.store.database)) == count


async def first_parked_was_tried(follower: Follower, attempts: int) -> bool:
    return (await list_parked(follower.store.database))[0].attempts == attempts


async def test_a_projection_that_fails_parks_only_the_message_at_fault(place: Installation) -> None:
    def apply(document: dict[str, Any] | None, envelope: Envelope) -> dict[str, Any] | None:
        return {"quotient": 1 / 0} if envelope.entity_id == "3" else view_of(document, envelope)

    async with place.owner() as owner:
        await made(owner, 10)
        async with place.follower(Behaviour(apply)) as follower:
            await all_views(follower, 9)
            await until(lambda: parked_count_is(follower, 1))
            [parked] = await list_parked(follower.store.database)
            assert (parked.stream, "ZeroDivisionError" in parked.reason) == ("thing-3", True)
            assert "3" not in await follower.echoes(), "a parked message must have had no effect at all"


async def test_a_consumer_that_fails_at_every_stream_stops_with_an_alarm(
    embedded: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A defect that affects every event would otherwise park them all, and nobody would be alarmed."""

    def apply(document: dict[str, Any] | None, envelope: Envelope) -> dict[str, Any] | None:
        return {"quotient": 1 / divisor} | view_of(document, envelope)

    divisor = 0
    monkeypatch.setattr(parking, "STREAMS_MAX", 5)
    async with embedded.owner() as owner:
        await made(owner, 30)
        async with embedded.follower(Behaviour(apply)) as follower:
            await until(lambda: is_stopped(follower, "5 streams were parked within 60 s"))
            assert REGISTRY.get_sample_value("datasync_consumer_stopped", {"topic": TOPIC}) == 1
            assert len(await list_parked(follower.store.database)) == 5
        divisor = 1
        async with embedded.follower(Behaviour(apply)) as follower:
            await all_views(follower, 25)
            assert not await is_stopped(follower, "parked")
            await request_retry(follower.store.database)
            await all_views(follower, 30)


async def test_a_topic_that_stopped_because_of_its_failures_goes_on_when_repaired(
    embedded: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parking, "STREAMS_MAX", 2)
    behaviour = Behaviour(refuses={f"name {number}" for number in range(4)})
    async with embedded.owner() as owner, embedded.follower(behaviour) as follower:
        await made(owner, 6)
        await until(lambda: is_stopped(follower, "datasync repair"))
        await follower.store.database["offsets"].update_many({}, {"$set": {"offset": 0}})
        await all_views(follower, 2)
        await until(lambda: parked_count_is(follower, 4))
        assert set((await follower.echoes()).values()) == {1}


async def test_a_replaced_store_stops_the_topic_and_names_the_repair(place: Installation) -> None:
    async with place.follower() as follower:
        async with place.owner() as owner:
            await made(owner, 3)
            await all_views(follower, 3)
            await owner.store.database["head"].update_one({"_id": "head"}, {"$set": {"store_id": "another"}})
        async with place.owner() as owner:
            await owner.make("later", "later")
            await until(lambda: is_stopped(follower, "datasync repair"))
        assert len(await follower.views()) == 3


async def is_stopped(follower: Follower, saying: str) -> bool:
    reason = (await follower.health.report())[f"consumer {TOPIC}"]
    return reason is not None and saying in reason


async def test_an_offset_out_of_range_stops_the_topic_until_it_is_repaired(place: Installation) -> None:
    async with place.owner() as owner:
        await made(owner, 3)
        async with place.follower() as follower:
            await all_views(follower, 3)
        offsets = follower.store.database["offsets"]
        before = await offsets.find({}).to_list(None)
        await offsets.update_many({}, {"$inc": {"offset": 1_000}})
        async with place.follower() as follower:
            await until(lambda: is_stopped(follower, "datasync repair"))
            await owner.make("later", "later")
            for document in before:
                await offsets.replace_one({"_id": document["_id"]}, document)
            await all_views(follower, 4)
            assert (await follower.health.report())[f"consumer {TOPIC}"] is None


async def first_occurrences(event_log: Any) -> list[tuple[int, str]]:
    """The positions and ids of a topic's events without repetitions, as a follower recognises them."""
    highest: dict[int, int] = {}
    seen: list[tuple[int, str]] = []
    async with event_log.subscribe(TOPIC, {}) as subscription:
        total = sum((await subscription.end_offsets()).values())
        read = 0
        while read < total:
            batch = await subscription.next_batch(1_000, 5)
            read += len(batch)
            for message in batch:
                if message.position > highest.get(message.partition, 0):
                    highest[message.partition] = message.position
                    seen.append((message.position, message.event_id))
    return sorted(seen)


async def in_store(owner: Owner) -> list[tuple[int, str]]:
    return [(envelope.position, envelope.id) for envelope in (await owner.store.read_after(0, 100_000)).events]


async def relayed(owner: Owner) -> bool:
    stored = await owner.store.database["relay"].find_one({"_id": "relay"})
    return stored is not None and stored["position"] == (await owner.store.head()).position


@pytest.mark.kafka
async def test_several_active_relays_publish_nothing_out_of_order(
    kafka: str, mongod: str, database_prefix: str
) -> None:
    async with installation(mongod, database_prefix, kafka) as place, place.owner(relays=3) as owner:
        for round_ in range(10):
            await made(owner, 30, f"{round_}-")
            await asyncio.gather(
                *[owner.rename(f"{round_}-{number}", f"{round_}-renamed {number}") for number in range(30)]
            )
        await until(lambda: relayed(owner))
        log = place.open_log("test")
        assert await first_occurrences(log) == await in_store(owner)
        await log.close()


@pytest.mark.kafka
async def test_after_a_killed_broker_the_log_holds_what_the_store_holds(
    mongod: str, database_prefix: str, kafka: str
) -> None:
    """``kafka`` is requested only to skip the test where there is none; the test kills a broker of its own."""
    with Kafka() as broker:
        async with (
            installation(mongod, database_prefix, broker.bootstrap_servers) as place,
            place.owner() as owner,
            place.follower() as follower,
        ):
            await made(owner, 50, "before-")
            during: list[str] = []
            stop = asyncio.Event()
            writing = asyncio.create_task(_keep_making(owner, during, stop))
            await grown_by(during, 20)
            await asyncio.to_thread(broker.kill)
            # Commands don't wait for the broker.
            await grown_by(during, 100)
            await asyncio.to_thread(broker.start)
            stop.set()
            await writing
            count = (await owner.store.head()).position
            assert count == len(during) + 50
            # Relay and consumer each find the broker again only after their own time limits.
            await all_views(follower, count, 75)
            await until(lambda: relayed(owner))
            log = KafkaEventLog(broker.bootstrap_servers, "test", f"{database_prefix}.")
            assert await first_occurrences(log) == await in_store(owner)
            await log.close()
            assert {tuple(view["versions"]) for view in (await follower.views()).values()} == {(1,)}


async def _keep_making(owner: Owner, made_names: list[str], stop: asyncio.Event) -> None:
    while not stop.is_set():
        name = f"during-{len(made_names)}"
        await owner.make(name, name)
        made_names.append(name)
        await asyncio.sleep(0)


async def grown_by(items: Sequence[str], count: int) -> None:
    wanted = len(items) + count

    async def grown() -> bool:
        return len(items) >= wanted

    await until(grown)


@pytest.mark.kafka
async def test_a_relay_suspended_past_its_lease_publishes_nothing_out_of_order(
    kafka: str, mongod: str, database_prefix: str
) -> None:
    """Two processes write and relay; the leader is suspended until the other one leads, then that one in its turn."""
    arguments = [mongod, database_prefix, kafka, "1.0"]
    async with installation(mongod, database_prefix, kafka) as place:
        processes = [await _owner_process(*arguments) for _ in range(2)]
        by_holder = {(await _line(process)): process for process in processes}
        database = place.client[f"{database_prefix}things"]
        for _ in range(2):
            leader = await _holder(database["leases"], by_holder)
            await _published_more(database["relay"])
            by_holder[leader].send_signal(signal.SIGSTOP)
            await _holder(database["leases"], by_holder.keys() - {leader})
            await _published_more(database["relay"])
            by_holder[leader].send_signal(signal.SIGCONT)
        for process in processes:
            process.terminate()
        acknowledged = [int(await _line(process)) for process in processes]
        for process in processes:
            assert await process.wait() == 0
        async with place.owner() as owner:
            await until(lambda: relayed(owner))
            stored = await in_store(owner)
            assert len(stored) == sum(acknowledged)
            log = place.open_log("test")
            assert await first_occurrences(log) == stored
            await log.close()


async def _owner_process(*arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "libs.testing.owner_process",
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=None,
        preexec_fn=die_with_parent,
    )


async def _line(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    async with asyncio.timeout(30):
        while "[" in (line := (await process.stdout.readline()).decode()):
            # Log lines begin with their time and level.
            continue
    return line.strip()


async def _holder(leases: Any, among: Collection[str]) -> str:
    async with asyncio.timeout(10):
        while True:
            lease = await leases.find_one({"_id": "relay"})
            if lease is not None and lease["holder"] in among:
                holder: str = lease["holder"]
                return holder
            await asyncio.sleep(0.05)


async def _published_more(relay: Any) -> None:
    """Wait until the position up to which events are published has moved."""

    async def position() -> int:
        stored = await relay.find_one({"_id": "relay"})
        return 0 if stored is None else int(stored["position"])

    before = await position()

    async def moved() -> bool:
        return await position() > before

    await until(moved)


async def test_a_parked_stream_is_read_without_being_held_in_memory(embedded: Installation) -> None:
    async with embedded.follower() as follower:
        collection = follower.store.database["parked"]
        for offset in range(40):
            place = {"topic": TOPIC, "partition": 0, "offset": offset, "position": 40 - offset, "stream": "thing-1"}
            await collection.insert_one(
                {**place, "_id": f"{TOPIC}/0/{offset}", "headers": {}, "value": b"x" * 1_000_000}
            )
        tracemalloc.start()
        try:
            offsets = [
                message.offset async for message in Parking(follower.store.database, TOPIC).messages_of("thing-1")
            ]
            peak_bytes = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert offsets == list(reversed(range(40)))
    assert peak_bytes < 15_000_000
