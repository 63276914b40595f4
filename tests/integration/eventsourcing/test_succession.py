"""A process that takes the name of one that died: what that one held is its own at once."""

import asyncio
import gc
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from libs.eventsourcing.event_store import EventStore
from libs.mongodb.client import ConnectionFailure, OperationFailure, connect
from libs.mongodb.leases import Leases
from libs.testing.things import THING

OpenStore = Callable[[str], EventStore]


@pytest.fixture
async def store_of(mongod: str, database_prefix: str) -> AsyncIterator[OpenStore]:
    """Makes the store as the process of that name has it."""
    client = connect(mongod)
    yield lambda instance: EventStore(client, f"{database_prefix}things", instance=instance)
    client.close()


async def left_open(store_of: OpenStore) -> EventStore:
    """The store of a process ``first`` that ends in the middle of a transaction."""
    store = store_of("first")
    await store.open([THING.collection], {})
    store._transactions.begin()
    store._transactions.run([{"insert": "secrets", "documents": [{"_id": "half"}]}])
    return store


async def test_a_successor_ends_the_transaction_that_was_left_open(store_of: OpenStore) -> None:
    left = await left_open(store_of)
    await store_of("first").open([THING.collection], {})
    with pytest.raises(OperationFailure):
        left._transactions.commit()
    await left.database["secrets"].insert_one({"_id": "half"})


@pytest.mark.parametrize("name", ["second", ""])
async def test_another_process_leaves_it_alone(store_of: OpenStore, name: str) -> None:
    left = await left_open(store_of)
    await store_of(name).open([THING.collection], {})
    left._transactions.commit()
    assert await left.database["secrets"].find_one({"_id": "half"}) is not None


async def test_what_fails_while_it_is_stopped_is_no_error_that_nobody_takes(store_of: OpenStore) -> None:
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    begun = asyncio.Event()

    async def work() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            raise ConnectionFailure("the store is away")

    leading = asyncio.create_task(Leases(store_of("first").database["leases"]).run_while_leader("relay", work))
    await begun.wait()
    leading.cancel()
    await asyncio.wait({leading})
    assert leading.cancelled()
    del leading
    gc.collect()
    await asyncio.sleep(0)
    assert complaints == []


async def test_a_lease_goes_over_to_the_successor_and_to_nobody_else(store_of: OpenStore) -> None:
    leases = store_of("first").database["leases"]
    assert await Leases(leases, holder="first").acquire("relay")
    assert not await Leases(leases, holder="second").acquire("relay")
    assert not await Leases(leases).acquire("relay")
    assert await Leases(leases, holder="first").acquire("relay")
