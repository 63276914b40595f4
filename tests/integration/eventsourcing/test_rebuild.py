"""Rebuilds while a service runs: they find and correct what differs, and lose nothing."""

import asyncio
import sys
import threading
import tracemalloc
from collections.abc import Mapping
from contextlib import nullcontext

import pytest

from libs.core.errors import FixRequest
from libs.eventsourcing import batch_writer
from libs.eventsourcing import relay as relay_module
from libs.eventsourcing.consumer import intervals
from libs.eventsourcing.offsets import Checkpoint, stored_checkpoints
from libs.eventsourcing.parking import list_parked, request_retry
from libs.eventsourcing.rebuild import Rebuild, RebuildFailed, TopicRepair, bounds
from libs.eventsourcing.rebuild import lease as lease_module
from libs.eventsourcing.rebuild.message_buffer import Due, MessageBuffer
from libs.eventsourcing.rebuild.snapshot import Snapshot
from libs.eventsourcing.stops import require_at_rest
from libs.mongodb.client import Client, ClientSession, Collection, connect
from libs.mongodb.leases import Leases
from libs.process.settings import ServiceSettings
from libs.process.telemetry import REGISTRY
from libs.service.definition import ServiceDefinition
from libs.service.operations import restored
from libs.service.repair import RepairReport, renew_identity, repair_topic
from libs.service.running import running_service
from libs.suite.child_process import die_with_parent
from libs.testing.followers import ECHO, PROJECT, Behaviour, Follower, Installation, Owner, installation
from libs.testing.things import THING, TOPIC, DiscardThing


@pytest.fixture(autouse=True)
def quick_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_module, "STOPPED_POLL_SECONDS", 0.05)
    monkeypatch.setattr(intervals, "STOPPED_POLL_SECONDS", 0.05)
    monkeypatch.setattr(intervals, "RETRY_SECONDS", 0.05)
    monkeypatch.setattr(intervals, "WAIT_SECONDS", 0.1)


def of_owner(place: Installation, owner: Owner) -> Rebuild:
    return Rebuild(owner.store, place.open_log("rebuild"), aggregates=[THING])


def of_follower(place: Installation, follower: Follower, behaviour: Behaviour) -> Rebuild:
    log = place.open_log("rebuild")
    return Rebuild(follower.store, log, aggregates=[ECHO], projections=[behaviour.projection()])


async def collections_of(owner: Owner) -> set[str]:
    return {name for name in await owner.store.database.list_collection_names() if name.startswith("things")}


async def test_ten_rebuilds_under_a_stream_of_creations_lose_nothing(embedded: Installation) -> None:
    async with embedded.owner() as owner:
        made: list[str] = []
        done = asyncio.Event()

        async def create(client: int) -> None:
            number = 0
            while not done.is_set():
                name = f"{client}-{number}"
                await owner.make(name, name)
                if number % 3 == 0:
                    await owner.rename(name, f"{name} renamed")
                made.append(name)
                number += 1

        async with asyncio.TaskGroup() as group:
            for client in range(16):
                group.create_task(create(client))
            for _ in range(10):
                report = await of_owner(embedded, owner).run(grace_seconds=0)
                assert report.is_equal, report
            done.set()
        assert len(await collections_of(owner)) == 1
        documents = {
            item["_id"]: item async for item in owner.store.database[owner.store.live_collection("things")].find()
        }
        assert set(documents) == set(made)
        report = await of_owner(embedded, owner).run(swap=False)
        assert report.is_equal
        assert report.collections[0].rebuilt_count == len(made) > 100


async def test_a_comparison_names_what_differs_and_changes_nothing(embedded: Installation) -> None:
    async with embedded.owner() as owner:
        for number in range(5):
            await owner.make(str(number), f"thing {number}")
        things = owner.store.database["things"]
        await things.update_one({"_id": "2"}, {"$set": {"state.name": "forged"}})
        await things.delete_one({"_id": "4"})
        report = await of_owner(embedded, owner).run(swap=False)
        assert (report.position, report.is_equal, report.swapped) == (5, False, False)
        [found] = report.collections
        assert (found.live_count, found.rebuilt_count, found.different) == (4, 5, ("2", "4"))
        assert await collections_of(owner) == {"things"}


async def test_what_an_earlier_version_did_not_write_is_no_difference(embedded: Installation) -> None:
    async with embedded.owner() as owner:
        await owner.make("1", "lamp")
        things = owner.store.database["things"]
        await things.update_one({"_id": "1"}, {"$unset": {"time": 1, "state.deleted": 1}})
        assert (await of_owner(embedded, owner).run(swap=False)).is_equal
        await things.update_one({"_id": "1"}, {"$unset": {"state": 1}})
        assert not (await of_owner(embedded, owner).run(swap=False)).is_equal


async def test_a_swap_corrects_what_differs_and_commands_go_on(embedded: Installation) -> None:
    async with embedded.owner() as owner:
        await owner.make("1", "lamp")
        await owner.store.database["things"].delete_one({"_id": "1"})
        report = await of_owner(embedded, owner).run(grace_seconds=0)
        assert report.swapped
        assert (await owner.rename("1", "torch")).version == 2
        assert (await of_owner(embedded, owner).run(swap=False)).is_equal


async def test_a_followers_documents_are_rebuilt_from_the_log(place: Installation) -> None:
    behaviour = Behaviour()
    async with place.owner() as owner, place.follower(behaviour) as follower:
        writing = asyncio.create_task(_write(owner))
        while len(await follower.views()) < 50:
            await asyncio.sleep(0.02)
        report = await of_follower(place, follower, behaviour).run(grace_seconds=0)
        assert report.is_equal, report
        count = await writing
        while len(await follower.views()) < count:
            await asyncio.sleep(0.02)
        assert {tuple(view["versions"]) for view in (await follower.views()).values()} == {(1,)}
        assert (await of_follower(place, follower, behaviour).run(swap=False)).is_equal


async def _write(owner: Owner) -> int:
    for number in range(300):
        await owner.make(str(number), f"thing {number}")
    return 300


@pytest.fixture
def small_portions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Makes a rebuild read little at once; returns how many messages were in memory each time some were applied."""
    monkeypatch.setattr(bounds, "BUFFER_BYTES_MAX", 20 * bounds.MESSAGE_OVERHEAD_BYTES)
    monkeypatch.setattr(bounds, "EVENTS_TOGETHER", 10)
    monkeypatch.setattr(bounds, "DOCUMENTS_BYTES_MAX", 300)
    monkeypatch.setattr(bounds, "EVENTS_BYTES_MAX", 100)
    held: list[int] = []
    due = MessageBuffer.due

    def counted(self: MessageBuffer, offsets: Mapping[int, int], snapshot: Snapshot) -> Due:
        held.append(len(self))
        return due(self, offsets, snapshot)

    monkeypatch.setattr(MessageBuffer, "due", counted)
    return held


async def test_a_rebuild_holds_no_more_than_its_portion_of_a_topic(
    place: Installation, small_portions: list[int]
) -> None:
    """Even if the log has much that the follower has not handled."""
    behaviour = Behaviour()
    async with place.owner() as owner:
        for number in range(60):
            await owner.make(str(number), f"thing {number}")
        async with place.follower(behaviour) as follower:
            await until_views(follower, 60)
        for number in range(60):
            await owner.rename(str(number), f"other {number}")
            await owner.make(f"new {number}", f"new {number}")
        await until_published(place, 180)
        report = await of_follower(place, follower, behaviour).run(grace_seconds=0)
        assert report.is_equal, report
        assert {item.name: item.rebuilt_count for item in report.collections} == {"views": 60, "echoes": 60}
        async with place.follower(behaviour) as follower:
            await until_views(follower, 120)
            while (await follower.views())["59"]["versions"] != [1, 2]:
                await asyncio.sleep(0.02)
            report = await of_follower(place, follower, behaviour).run(grace_seconds=0)
            assert report.is_equal, report
            assert {tuple(view["versions"]) for view in (await follower.views()).values()} == {(1,), (1, 2)}
    assert 0 < max(small_portions) < 30


async def until_published(place: Installation, count: int) -> None:
    async with place.open_log("reader").subscribe(TOPIC, {}) as subscription:
        while sum(1 for _ in await subscription.next_batch(1, 1.0)) and (count := count - 1):
            pass
    assert count == 0


async def test_large_documents_are_rebuilt_a_few_at_a_time(embedded: Installation) -> None:
    """Small events of large documents, and many states of one."""
    async with embedded.owner() as owner:
        text = "x" * 700_000
        for number in range(60):
            await owner.make(str(number), f"{number}{text}")
        for number in range(60):
            await owner.commands.handle(THING, str(number), DiscardThing(), PROJECT)
        rebuild = of_owner(embedded, owner)
        tracemalloc.start()
        try:
            report = await rebuild.run(swap=False)
            peak_bytes = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert report.is_equal
        assert peak_bytes < 100_000_000, peak_bytes


async def test_what_is_parked_counts_only_once_it_was_handled(embedded: Installation) -> None:
    behaviour = Behaviour(refuses={"poison"})
    async with embedded.owner() as owner, embedded.follower(behaviour) as follower:
        await owner.make("bad", "poison")
        await owner.make("good", "cure")
        while len(await list_parked(follower.store.database)) < 1 or not await follower.views():
            await asyncio.sleep(0.02)
        report = await of_follower(embedded, follower, behaviour).run(swap=False)
        assert report.is_equal
        assert {item.name: item.rebuilt_count for item in report.collections} == {"views": 1, "echoes": 1}
        behaviour.refuses.clear()
        await request_retry(follower.store.database)
        while len(await follower.views()) < 2:
            await asyncio.sleep(0.02)
        assert (await of_follower(embedded, follower, behaviour).run(swap=False)).is_equal


async def test_a_second_rebuild_at_the_same_time_is_refused(embedded: Installation) -> None:
    async with embedded.owner() as owner:
        await owner.make("1", "lamp")
        first = asyncio.create_task(of_owner(embedded, owner).run(grace_seconds=0.5))
        while not await owner.store.database["leases"].find_one({"_id": "rebuild"}):
            await asyncio.sleep(0.01)
        with pytest.raises(RebuildFailed, match="another rebuild"):
            await of_owner(embedded, owner).run()
        assert (await first).swapped


async def take_lease(owner: Owner) -> None:
    """What another rebuild does after the lease has expired."""
    await owner.store.database["leases"].update_one({"_id": "rebuild"}, {"$set": {"holder": "another"}})


async def overtake(owner: Owner) -> None:
    """What another rebuild does at its beginning."""
    await take_lease(owner)
    for name in await collections_of(owner):
        if "__rebuilt_" in name:
            await owner.store.database.drop_collection(name)


async def test_a_rebuild_that_lost_its_lease_before_the_swap_changes_nothing(embedded: Installation) -> None:
    class Overtaken(Rebuild):
        async def swap(self) -> None:
            await overtake(owner)
            await super().swap()

    async with embedded.owner() as owner:
        for number in range(5):
            await owner.make(str(number), f"thing {number}")
        with pytest.raises(RebuildFailed, match="lease"):
            await Overtaken(owner.store, embedded.open_log("rebuild"), aggregates=[THING]).run(grace_seconds=0)
        assert await owner.store.database[owner.store.live_collection("things")].count_documents({}) == 5
        assert await collections_of(owner) == {"things"}


async def test_a_comparison_that_lost_its_lease_reports_nothing(embedded: Installation) -> None:
    class Overtaken(Rebuild):
        async def catch_up(self) -> None:
            await super().catch_up()
            await overtake(owner)

    async with embedded.owner() as owner:
        await owner.make("1", "lamp")
        with pytest.raises(RebuildFailed, match="lease"):
            await Overtaken(owner.store, embedded.open_log("rebuild"), aggregates=[THING]).run(swap=False)


async def test_a_rebuild_ends_as_soon_as_its_lease_is_lost(
    embedded: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Endless(Rebuild):
        async def catch_up(self) -> None:
            await take_lease(owner)
            await asyncio.Event().wait()

    monkeypatch.setattr(lease_module, "LEASE_SECONDS", 0.3)
    async with embedded.owner() as owner:
        await owner.make("1", "lamp")
        async with asyncio.timeout(5):
            with pytest.raises(RebuildFailed, match="lease"):
                await Endless(owner.store, embedded.open_log("rebuild"), aggregates=[THING]).run()
        assert await collections_of(owner) == {"things"}


async def test_a_rebuild_that_is_killed_in_its_swap_makes_writers_wait_and_refuses_none(
    embedded: Installation, mongod: str, database_prefix: str
) -> None:
    arguments = ["-m", "libs.testing.rebuild_process", mongod, database_prefix]
    async with embedded.owner() as owner:
        for number in range(5):
            await owner.make(str(number), f"thing {number}")
        process = await asyncio.create_subprocess_exec(
            sys.executable, *arguments, stdout=asyncio.subprocess.PIPE, preexec_fn=die_with_parent
        )
        assert process.stdout is not None
        async with asyncio.timeout(30):
            while b"holding" not in await process.stdout.readline():
                pass
        process.kill()
        await process.wait()
        assert (await owner.make("5", "thing 5")).version == 1
        await owner.store.database["leases"].delete_one({"_id": "rebuild"})
        report = await of_owner(embedded, owner).run(grace_seconds=0)
        assert (report.is_equal, report.collections[0].rebuilt_count) == (True, 6)
        assert len(await collections_of(owner)) == 1


async def test_a_swap_that_blocks_writes_for_too_long_is_aborted_and_repeated(
    embedded: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, written = threading.Event(), threading.Event()

    class Slow(Rebuild):
        def finish(self, session: ClientSession) -> None:
            super().finish(session)
            held.set()
            assert written.wait(30)

    monkeypatch.setattr(batch_writer, "SWAP_SECONDS_MAX", 0.2)
    async with embedded.owner() as owner:
        await owner.make("1", "lamp")
        rebuilding = asyncio.create_task(
            Slow(owner.store, embedded.open_log("rebuild"), aggregates=[THING]).run(grace_seconds=0)
        )
        assert await asyncio.to_thread(held.wait, 30)
        assert (await owner.make("2", "torch")).version == 1
        written.set()
        assert (await rebuilding).swapped
        assert (await owner.rename("2", "candle")).version == 2
        report = await of_owner(embedded, owner).run(swap=False)
        assert (report.is_equal, report.collections[0].rebuilt_count) == (True, 2)
        assert await owner.store.database["writers"].count_documents({}) == 0


async def repair(
    place: Installation, follower: Follower, behaviour: Behaviour, *, has_projections: bool = True
) -> RepairReport:
    definition = ServiceDefinition(
        name="follower",
        settings=ServiceSettings,
        start=lambda _: nullcontext(()),
        aggregates=(ECHO,),
        projections=(behaviour.projection(),) if has_projections else (),
        reactions=(behaviour.reaction(),),
    )
    return await repair_topic(definition, follower.store, place.open_log("operator"), TOPIC, grace_seconds=0)


async def test_lost_offsets_are_repaired_without_doing_anything_twice(place: Installation) -> None:
    behaviour = Behaviour()
    async with place.owner() as owner:
        await owner.make("1", "lamp")
        async with place.follower(behaviour) as follower:
            await until_views(follower, 1)
        await follower.store.database["offsets"].update_many({}, {"$inc": {"offset": 1_000}})
        async with place.follower(behaviour) as follower:
            await until_stopped(follower)
            await owner.make("2", "torch")
            repaired = await repair(place, follower, behaviour)
            assert repaired.rebuild is None
            await until_views(follower, 2)
            assert await follower.echoes() == {"1": 1, "2": 1}
            assert {tuple(view["versions"]) for view in (await follower.views()).values()} == {(1,)}


async def test_a_topic_that_is_not_stopped_is_left_as_it_is(place: Installation) -> None:
    behaviour = Behaviour()
    async with place.owner() as owner, place.follower(behaviour) as follower:
        await owner.make("1", "lamp")
        await until_views(follower, 1)
        before = await stored_checkpoints(follower.store, TOPIC)
        repaired = await repair(place, follower, behaviour)
        assert "there is nothing to repair" in repaired.action
        assert repaired.rebuild is None
        assert await stored_checkpoints(follower.store, TOPIC) == before


async def test_a_running_service_is_not_told_that_its_store_was_restored(mongod: str, database_prefix: str) -> None:
    """Every follower would stop with an alarm."""
    definition = ServiceDefinition(
        name="things", settings=ServiceSettings, start=lambda _: nullcontext(()), aggregates=(THING,)
    )
    settings = ServiceSettings(mongodb_url=mongod, database_prefix=database_prefix)
    async with running_service(definition, settings) as service:
        store = service.context.store
        before = (await store.head()).store_id
        # A lease that is only just acquired would not be released.
        await until_renewed(store.database["leases"], "presence")
        with pytest.raises(FixRequest, match="Stop the service first"):
            await restored(definition, settings)
        assert (await store.head()).store_id == before
    await restored(definition, settings)
    client: Client = connect(mongod)
    head = await client[f"{database_prefix}things"]["head"].find_one({"_id": "head"})
    client.close()
    assert head is not None
    assert head["store_id"] != before


async def test_after_the_owners_store_was_replaced_the_projections_follow_the_new_one(embedded: Installation) -> None:
    behaviour = Behaviour()
    async with embedded.follower(behaviour) as follower:
        async with embedded.owner() as owner:
            await owner.make("1", "lamp")
            await owner.make("2", "torch")
            await until_views(follower, 2)
            await owner.store.client.drop_database(owner.store.database.name)
        async with embedded.owner() as owner:
            await owner.make("3", "candle")
            await until_stopped(follower)
            repaired = await repair(embedded, follower, behaviour)
            assert repaired.rebuild is not None
            assert set(await follower.views()) == {"3"}
            await owner.make("4", "match")
            await until_views(follower, 2)
            assert set(await follower.views()) == {"3", "4"}


async def test_a_topic_that_only_causes_reactions_is_repaired_too(embedded: Installation) -> None:
    behaviour = Behaviour()
    async with embedded.follower(behaviour) as follower:
        async with embedded.owner() as owner:
            await owner.make("1", "lamp")
            await until_views(follower, 1)
            await owner.store.client.drop_database(owner.store.database.name)
        async with embedded.owner() as owner:
            await owner.make("2", "torch")
            await until_stopped(follower)
            await repair(embedded, follower, behaviour, has_projections=False)
            await owner.make("3", "candle")
            while "3" not in await follower.echoes():
                await asyncio.sleep(0.02)
            assert set(await follower.echoes()) == {"1", "3"}


async def test_a_repair_of_a_topic_whose_offsets_changed_meanwhile_changes_nothing(embedded: Installation) -> None:
    behaviour = Behaviour()
    async with embedded.owner() as owner, embedded.follower(behaviour) as follower:
        await owner.make("1", "lamp")
        await until_views(follower, 1)
        before = await stored_checkpoints(follower.store, TOPIC)
        outdated = TopicRepair(stored={0: Checkpoint(1, 1, "another")}, replaced_by={0: Checkpoint(1, 1, "another")})
        rebuild = Rebuild(
            follower.store,
            embedded.open_log("operator"),
            projections=[behaviour.projection()],
            repairs={TOPIC: outdated},
        )
        with pytest.raises(RebuildFailed, match="meanwhile"):
            await rebuild.run(grace_seconds=0)
        assert await stored_checkpoints(follower.store, TOPIC) == before
        assert set(await follower.views()) == {"1"}


async def test_a_repair_reads_the_topic_in_portions_too(embedded: Installation, small_portions: list[int]) -> None:
    behaviour = Behaviour()
    async with embedded.follower(behaviour) as follower:
        async with embedded.owner() as owner:
            for number in range(50):
                await owner.make(str(number), f"thing {number}")
            await until_views(follower, 50)
            await owner.store.client.drop_database(owner.store.database.name)
        async with embedded.owner() as owner:
            for number in range(100, 160):
                await owner.make(str(number), f"thing {number}")
            await until_stopped(follower)
            await repair(embedded, follower, behaviour)
            assert set(await follower.views()) == {str(number) for number in range(100, 160)}
    assert 0 < max(small_portions) < 30


@pytest.mark.kafka
async def test_a_store_restored_from_a_backup_publishes_nothing_until_the_operator_says_so(
    mongod: str, database_prefix: str, kafka: str
) -> None:
    """Otherwise its new events would have positions that every follower has handled, and takes for repetitions."""
    behaviour = Behaviour()
    async with installation(mongod, database_prefix, kafka) as place, place.follower(behaviour) as follower:
        async with place.owner() as owner:
            for number in range(1, 6):
                await owner.make(str(number), f"thing {number}")
            await until_views(follower, 5)
        await restore_to(3, owner)
        async with place.owner() as owner:
            await owner.make("later", "later")
            while REGISTRY.get_sample_value("datasync_relay_stopped") != 1:
                await asyncio.sleep(0.02)
            assert "later" not in await follower.views()
            [relay] = owner.relays
            assert "datasync restored" in (await relay.reason_to_be_stopped() or "")
            assert await Leases(owner.store.database["leases"]).acquire("presence")
            await require_at_rest(owner.store)
            await renew_identity(owner.store)
            await until_stopped(follower)
            await repair(place, follower, behaviour)
            await until_views(follower, 4)
            assert set(await follower.views()) == {"1", "2", "3", "later"}
            await owner.make("last", "last")
            await until_views(follower, 5)
            assert await relay.reason_to_be_stopped() is None


@pytest.mark.kafka
async def test_a_restored_store_is_accepted_although_the_log_has_later_events_that_it_lost(
    mongod: str, database_prefix: str, kafka: str
) -> None:
    """The lost ones are the latest of the topic until the restored store has written a new one."""
    behaviour = Behaviour()
    async with installation(mongod, database_prefix, kafka) as place, place.follower(behaviour) as follower:
        async with place.owner() as owner:
            for number in range(1, 6):
                await owner.make(str(number), f"thing {number}")
            await until_views(follower, 5)
        await restore_to(3, owner)
        await renew_identity(owner.store)
        async with place.owner() as owner:
            await until_stopped(follower)
            await repair(place, follower, behaviour)
            assert set(await follower.views()) == {"1", "2", "3"}
            await owner.make("last", "last")
            await until_views(follower, 4)


async def restore_to(position: int, owner: Owner) -> None:
    """Leave in the store what a backup of that moment would contain."""
    database = owner.store.database
    lost = await database["events"].distinct("stream", {"position": {"$gt": position}})
    await database["events"].delete_many({"position": {"$gt": position}})
    await database["things"].delete_many({"_id": {"$in": [stream.removeprefix("thing-") for stream in lost]}})
    await database["head"].update_one({"_id": "head"}, {"$set": {"position": position}})
    await database["relay"].update_one({"_id": "relay"}, {"$set": {"position": position}})


async def until_renewed(leases: Collection, name: str) -> None:
    first: object = None
    while True:
        lease = await leases.find_one({"_id": name})
        expires_at = None if lease is None else lease.get("expires_at")
        if first is not None and expires_at != first:
            return
        first = expires_at
        await asyncio.sleep(0.05)


async def until_views(follower: Follower, count: int) -> None:
    while len(await follower.views()) != count:
        await asyncio.sleep(0.02)


async def until_stopped(follower: Follower) -> None:
    while (await follower.health.report())[f"consumer {TOPIC}"] is None:
        await asyncio.sleep(0.02)
