"""A process with the name of one that died: it takes over that one's locks and leases at once."""

import asyncio
import gc
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from libs.eventsourcing.event_store import EventStore
from libs.mongodb.client import Client, ConnectionFailure, Document, OperationFailure, SyncDatabase, connect
from libs.mongodb.leases import Leases
from libs.mongodb.pipelined import PipelinedRoundTrips, PipelinedTransactions
from libs.mongodb.round_trips import RoundTrips
from libs.testing.things import THING


class OneWriter(PipelinedRoundTrips):
    """The test has the writer's transactions, too."""

    def __init__(self, database: SyncDatabase[Document]) -> None:
        super().__init__(database)
        self._transactions = PipelinedTransactions(self)

    def transactions(self) -> PipelinedTransactions:
        return self._transactions


class Process:
    """A process of the service under the given name."""

    def __init__(self, client: Client, database: str, name: str) -> None:
        self.store = EventStore(client, database, instance=name, round_trips=self._round_trips)

    def _round_trips(self, database: SyncDatabase[Document]) -> RoundTrips:
        round_trips = OneWriter(database)
        self.transactions = round_trips.transactions()
        return round_trips


OpenProcess = Callable[[str], Awaitable[Process]]


@pytest.fixture
async def process(mongod: str, database_prefix: str) -> AsyncIterator[OpenProcess]:
    """Starts a process with that name."""
    client = connect(mongod)

    async def started(name: str) -> Process:
        process = Process(client, f"{database_prefix}things", name)
        await process.store.open([THING.collection], {})
        return process

    yield started
    client.close()


async def left_open(process: OpenProcess) -> Process:
    """A process ``first`` that ends in the middle of a transaction."""
    first = await process("first")
    first.transactions.begin()
    first.transactions.run([{"insert": "secrets", "documents": [{"_id": "half"}]}])
    return first


async def test_a_successor_aborts_the_transaction_that_was_left_open(process: OpenProcess) -> None:
    left = await left_open(process)
    await process("first")
    with pytest.raises(OperationFailure):
        left.transactions.commit()
    await left.store.database["secrets"].insert_one({"_id": "half"})


@pytest.mark.parametrize("name", ["second", ""])
async def test_another_process_leaves_it_alone(process: OpenProcess, name: str) -> None:
    left = await left_open(process)
    await process(name)
    left.transactions.commit()
    assert await left.store.database["secrets"].find_one({"_id": "half"}) is not None


async def test_an_error_of_work_that_is_being_cancelled_is_retrieved(process: OpenProcess) -> None:
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    begun = asyncio.Event()

    async def work() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            raise ConnectionFailure("the store is away")

    leading = asyncio.create_task(
        Leases((await process("first")).store.database["leases"]).run_while_leader("relay", work)
    )
    await begun.wait()
    leading.cancel()
    await asyncio.wait({leading})
    assert leading.cancelled()
    del leading
    gc.collect()
    await asyncio.sleep(0)
    assert complaints == []


async def test_a_lease_passes_to_the_successor_and_to_no_other_process(process: OpenProcess) -> None:
    leases = (await process("first")).store.database["leases"]
    assert await Leases(leases, holder="first").acquire("relay")
    assert not await Leases(leases, holder="second").acquire("relay")
    assert not await Leases(leases).acquire("relay")
    assert await Leases(leases, holder="first").acquire("relay")


async def test_a_lease_whose_acquisition_was_cancelled_is_free(process: OpenProcess) -> None:
    leases = (await process("first")).store.database["leases"]

    async def work() -> None:
        await asyncio.Event().wait()

    for number in range(30):
        name = f"lease-{number}"
        acquiring = asyncio.create_task(Leases(leases).run_while_leader(name, work))
        # Cancelled after each of the first steps of the event loop, before and after the server granted it.
        for _ in range(number):
            await asyncio.sleep(0)
        acquiring.cancel()
        await asyncio.wait({acquiring})
        assert await Leases(leases).acquire(name), f"cancelled after {number} steps"
