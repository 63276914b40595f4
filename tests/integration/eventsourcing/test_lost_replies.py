"""A connection to MongoDB that breaks while a command is committed: one truthful reply, and exactly one effect."""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

import pymongo
import pytest

from libs.core.clock import SystemClock
from libs.core.envelope import Metadata
from libs.core.errors import OutcomeUnknown
from libs.core.idempotency import IdempotencyKey
from libs.eventsourcing import batch_writer
from libs.eventsourcing.command_handler import CommandHandler
from libs.eventsourcing.documents import Documents
from libs.eventsourcing.event_store import EventStore
from libs.mongodb.client import Document, SyncDatabase, connect
from libs.mongodb.pipelined import PipelinedRoundTrips
from libs.mongodb.round_trips import RoundTrips
from libs.mongodb.sequential import SequentialRoundTrips
from libs.testing.cutting_proxy import CuttingProxy
from libs.testing.things import THING, MakeThing

PROJECT = Metadata(actor="ann", project_id=7)
KEY = IdempotencyKey("key", "hash")

RoundTripsOf = Callable[[SyncDatabase[Document]], RoundTrips]


@pytest.fixture(params=[PipelinedRoundTrips, SequentialRoundTrips])
def round_trips(request: pytest.FixtureRequest) -> RoundTripsOf:
    made: RoundTripsOf = request.param
    return made


@pytest.fixture
def proxy(mongod: str) -> Iterator[CuttingProxy]:
    with CuttingProxy(pymongo.uri_parser.parse_uri(mongod)["nodelist"][0][1]) as cutting:
        yield cutting


@asynccontextmanager
async def writer(
    url: str, database: str, round_trips: RoundTripsOf
) -> AsyncIterator[tuple[EventStore, CommandHandler]]:
    client = connect(url)
    store = EventStore(client, database, round_trips=round_trips)
    await store.open([THING.collection], {})
    commands = CommandHandler(store, SystemClock(), [THING])
    commands.start()
    try:
        yield store, commands
    finally:
        await commands.close()
        client.close()


def through(proxy: CuttingProxy) -> str:
    return f"mongodb://127.0.0.1:{proxy.port}/?directConnection=true"


@pytest.mark.parametrize("delivered", [True, False])
@pytest.mark.parametrize("command", ["find", "head", "commitTransaction"])
async def test_a_command_takes_effect_once_wherever_its_connection_is_cut(
    proxy: CuttingProxy, database_prefix: str, round_trips: RoundTripsOf, command: str, delivered: bool
) -> None:
    """In the queries, the statements or the commit of its batch; before the server gets them, or before its reply."""
    async with writer(through(proxy), f"{database_prefix}things", round_trips) as (store, commands):
        await commands.handle(THING, "1", MakeThing("lamp"), PROJECT)
        proxy.cut_once(lambda sent: command.encode() in sent, delivered=delivered)
        made = await commands.handle(THING, "2", MakeThing("torch"), PROJECT)
        assert proxy.cuts == 1
        assert (made.version, made.state.name) == (1, "torch")
        await commands.handle(THING, "3", MakeThing("candle"), PROJECT)
        events = (await store.read_after(0, 100)).events
        assert [(event.position, event.entity_id) for event in events] == [(1, "1"), (2, "2"), (3, "3")]
        assert await Documents(store).get(THING, "2") == made


async def test_a_command_whose_outcome_stays_unknown_is_not_acknowledged_and_its_repetition_acts_once(
    proxy: CuttingProxy,
    mongod: str,
    database_prefix: str,
    round_trips: RoundTripsOf,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The commit arrives, its reply does not, and the server can't be reached after it."""
    name = f"{database_prefix}things"
    monkeypatch.setattr(batch_writer, "OUTCOME_SECONDS_MAX", 0.1)
    async with writer(through(proxy), name, round_trips) as (_, commands), writer(mongod, name, round_trips) as other:
        proxy.cut_once(lambda sent: b"commitTransaction" in sent, delivered=True, stays_away=True)
        with pytest.raises(OutcomeUnknown):
            await commands.handle(THING, "1", MakeThing("lamp"), PROJECT, idempotency=KEY)
        monkeypatch.undo()
        store, commands_elsewhere = other
        again = await commands_elsewhere.handle(THING, "1", MakeThing("lamp"), PROJECT, idempotency=KEY)
        assert (again.version, again.state.name) == (1, "lamp")
        assert len((await store.read_after(0, 100)).events) == 1
