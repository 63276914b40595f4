"""mongod killed or paused while commands are under way: what was acknowledged is there, once, without gaps."""

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest

from libs.core.clock import SystemClock
from libs.core.envelope import Envelope, Metadata
from libs.core.errors import RetryLater
from libs.core.ids import uuid7
from libs.eventsourcing.command_handler import CommandHandler
from libs.eventsourcing.documents import Documents, Reader
from libs.eventsourcing.entities import fold_stream, stored_document
from libs.eventsourcing.event_store import EventStore
from libs.mongodb.client import connect
from libs.testing.servers import Mongod
from libs.testing.things import THING, MakeThing, RenameThing
from libs.testing.walks import Walk

PROJECT = Metadata(actor="ann", project_id=7)
CLIENTS = 32
PAUSE_SECONDS = 0.01


@pytest.fixture
def own_mongod() -> Iterator[Mongod]:
    with Mongod() as server:
        yield server


@asynccontextmanager
async def writer(url: str) -> AsyncIterator[tuple[EventStore, CommandHandler]]:
    client = connect(url)
    store = EventStore(client, "things")
    await store.open([THING.collection], {})
    commands = CommandHandler(store, SystemClock(), [THING])
    commands.start()
    try:
        yield store, commands
    finally:
        await commands.close()
        client.close()


class Clients:
    """Concurrent callers that make and rename things and remember what they were told."""

    def __init__(self, commands: CommandHandler) -> None:
        self._commands = commands
        self.acknowledged: dict[str, int] = {}
        self.refused: set[str] = set()
        self.codes: Counter[str] = Counter()
        self._stop = asyncio.Event()
        self._numbers = itertools.count()

    @asynccontextmanager
    async def at_work(self) -> AsyncIterator[None]:
        """They work while the block runs, and have come to their end when it is left, by an error too."""
        async with asyncio.TaskGroup() as group:
            for _ in range(CLIENTS):
                group.create_task(self._one())
            yield
            self._stop.set()

    async def acknowledged_beyond(self, count: int) -> None:
        """Wait until ``count`` more things were acknowledged than now."""
        goal = len(self.acknowledged) + count
        async with asyncio.timeout(60):
            while len(self.acknowledged) < goal:
                await asyncio.sleep(0.01)

    async def _one(self) -> None:
        while not self._stop.is_set():
            identifier = uuid7()
            try:
                made = await self._commands.handle(THING, identifier, MakeThing(identifier), PROJECT)
                self.acknowledged[identifier] = made.version
                renamed = await self._commands.handle(THING, identifier, RenameThing(f"{identifier} again"), PROJECT)
                self.acknowledged[identifier] = renamed.version
            except RetryLater as error:
                self.codes[error.code] += 1
                if error.code != "outcome_unknown":
                    self.refused.add(identifier)
                # A refusal may come at once: whoever repeats without a pause would let nobody else run.
                await asyncio.sleep(PAUSE_SECONDS)


async def everything_agrees(store: EventStore, clients: Clients) -> None:
    """Every acknowledged version is stored, what was surely refused is not, positions and documents agree."""
    envelopes = (await store.read_after(0, 1_000_000)).events
    assert [envelope.position for envelope in envelopes] == list(range(1, len(envelopes) + 1))
    versions = Counter(envelope.entity_id for envelope in envelopes)
    lost = {key: version for key, version in clients.acknowledged.items() if versions[key] < version}
    assert not lost
    surely_refused = {key for key in clients.refused if key not in clients.acknowledged}
    assert not surely_refused & versions.keys()
    by_stream: dict[str, list[Envelope]] = {}
    for envelope in envelopes:
        by_stream.setdefault(envelope.entity_id, []).append(envelope)
    documents = {document["_id"]: document async for document in store.database["things"].find({})}
    assert documents.keys() == by_stream.keys()
    for identifier, document in documents.items():
        history = by_stream[identifier]
        state = await fold_stream(THING, store.read_stream(THING.stream(identifier)))
        assert document == stored_document(
            identifier, len(history), 7, THING.unique_keys(state), state, time=history[-1].time
        )


async def test_killing_mongod_at_random_moments_loses_nothing_acknowledged(own_mongod: Mongod, walk: Walk) -> None:
    async with writer(own_mongod.url) as (store, commands):
        clients = Clients(commands)
        async with clients.at_work():
            for _ in range(walk.rounds(3, 60)):
                await clients.acknowledged_beyond(walk.random.randrange(50, 300))
                own_mongod.kill()
                await asyncio.to_thread(own_mongod.start)
            await clients.acknowledged_beyond(100)
        await everything_agrees(store, clients)


async def test_a_store_that_hangs_refuses_in_time_and_goes_on_when_it_wakes(own_mongod: Mongod) -> None:
    async with writer(own_mongod.url) as (store, commands):
        clients = Clients(commands)
        async with clients.at_work():
            await clients.acknowledged_beyond(100)
            own_mongod.pause()
            async with asyncio.timeout(40):
                while not clients.codes:
                    await asyncio.sleep(0.05)
            own_mongod.resume()
            await clients.acknowledged_beyond(100)
        await everything_agrees(store, clients)


async def test_a_snapshot_whose_collection_was_replaced_is_read_again(mongod: str, database_prefix: str) -> None:
    client = connect(mongod)
    store = EventStore(client, f"{database_prefix}things")
    await store.open([THING.collection, "views"], {})
    replaced = store.sync_database[store.live_collection("views")]
    counts: list[int] = []

    def read(reader: Reader) -> int:
        counts.append(reader.collection(THING.collection).count_documents({}, session=reader.session))
        if len(counts) == 1:
            replacement = store.sync_database["replacement"]
            replacement.insert_one({"_id": 1})
            replacement.rename(replaced.name, dropTarget=True)
        return reader.collection("views").count_documents({}, session=reader.session)

    assert await Documents(store).in_snapshot(read) == 1
    assert len(counts) == 2
    client.close()
