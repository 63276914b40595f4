"""The write path on a real mongod: batches, races, unique keys, idempotency, unknown outcomes."""

import asyncio
import tracemalloc
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from libs.core.clock import ManualClock, SystemClock
from libs.core.decider import Act
from libs.core.envelope import Envelope, Metadata
from libs.core.errors import (
    Conflict,
    FixRequest,
    NotFound,
    OutcomeUnknown,
    PreconditionFailed,
    RetryLater,
    TooLarge,
    Unprocessable,
)
from libs.core.idempotency import IdempotencyKey
from libs.core.ids import uuid7
from libs.eventsourcing import batch_writer
from libs.eventsourcing.batch import Batch, OffsetMove, OffsetMoved, SideWrite
from libs.eventsourcing.command_handler import CommandHandler
from libs.eventsourcing.documents import Documents
from libs.eventsourcing.entities import fold_stream, stored_document
from libs.eventsourcing.event_store import EventStore
from libs.eventsourcing.requests import CommandRequest, ConsumerStep
from libs.eventsourcing.swap import swap_collections
from libs.mongodb.client import ConnectionFailure, Document, SyncDatabase, connect
from libs.mongodb.pipelined import PipelinedRoundTrips, PipelinedTransactions
from libs.mongodb.round_trips import RoundTrips
from libs.mongodb.sequential import SequentialRoundTrips
from libs.mongodb.wake_ups import WAKE_UPS
from libs.process.telemetry import REGISTRY
from libs.testing.followers import history
from libs.testing.things import THING, DiscardThing, MakeThing, RenameThing
from libs.testing.walks import examples

PROJECT = Metadata(actor="ann", project_id=7, correlation_id="request-1")
Answer = TypeVar("Answer")


class Service:
    """One instance of a service that owns things."""

    def __init__(self, store: EventStore, commands: CommandHandler) -> None:
        self.store = store
        self.commands = commands
        self.documents = Documents(store)

    async def make(self, identifier: str, name: str, **options: Any) -> Any:
        return await self.commands.handle(THING, identifier, MakeThing(name), PROJECT, **options)

    async def rename(self, identifier: str, name: str, **options: Any) -> Any:
        return await self.commands.handle(THING, identifier, RenameThing(name), PROJECT, **options)


RoundTripsOf = Callable[[SyncDatabase[Document]], RoundTrips]


@asynccontextmanager
async def instance(
    mongod: str, database: str, round_trips: RoundTripsOf = PipelinedRoundTrips
) -> AsyncIterator[Service]:
    client = connect(mongod)
    store = EventStore(client, database, round_trips=round_trips)
    await store.open([THING.collection], {})
    commands = CommandHandler(store, SystemClock(), [THING])
    commands.start()
    try:
        yield Service(store, commands)
    finally:
        await commands.close()
        client.close()


@pytest.fixture
async def service(mongod: str, database_prefix: str) -> AsyncIterator[Service]:
    async with instance(mongod, f"{database_prefix}things") as running:
        yield running


@pytest.fixture(params=[PipelinedRoundTrips, SequentialRoundTrips])
async def either_service(request: pytest.FixtureRequest, mongod: str, database_prefix: str) -> AsyncIterator[Service]:
    """On each way to MongoDB."""
    async with instance(mongod, f"{database_prefix}things", request.param) as running:
        yield running


async def outcomes(calls: Sequence[Awaitable[Answer]]) -> Counter[str]:
    """How the calls ended: ``ok`` or the error's code."""
    answers = await asyncio.gather(*calls, return_exceptions=True)
    return Counter(getattr(answer, "code", "ok") for answer in answers)


async def positions(service: Service) -> list[int]:
    return [envelope.position for envelope in (await service.store.read_after(0, 100_000)).events]


async def test_an_acknowledged_command_is_in_the_store_and_read_at_once(either_service: Service) -> None:
    made = await either_service.make("1", "lamp")
    assert (made.version, made.state.name) == (1, "lamp")
    entity = await either_service.documents.require(THING, "1", 7)
    assert entity == made
    [envelope] = await history(either_service.store, "thing-1")
    assert (envelope.position, envelope.metadata.actor, envelope.metadata.project_id) == (1, "ann", 7)


async def test_of_500_creations_of_one_name_one_succeeds_and_honest_ones_do_not_suffer(either_service: Service) -> None:
    same = [either_service.make(f"same-{number}", "lamp") for number in range(500)]
    honest = [either_service.make(f"honest-{number}", f"lamp {number}") for number in range(100)]
    ended = await outcomes(same + honest)
    assert ended == {"ok": 101, "already_exists": 499}
    assert await positions(either_service) == list(range(1, 102))


async def test_commands_of_one_stream_in_one_batch_see_each_other_in_order(either_service: Service) -> None:
    await either_service.make("1", "lamp")
    renamed = await asyncio.gather(*[either_service.rename("1", f"lamp {number}") for number in range(50)])
    assert [entity.version for entity in renamed] == list(range(2, 52))
    assert [entity.state.renamed for entity in renamed] == list(range(1, 51))


async def test_a_name_freed_in_a_batch_can_be_taken_in_the_same_moment(either_service: Service) -> None:
    await either_service.make("1", "lamp")
    first, second = await asyncio.gather(either_service.rename("1", "torch"), either_service.make("2", "lamp"))
    assert (first.state.name, second.state.name) == ("torch", "lamp")


async def test_a_deleted_entitys_name_is_free_again(service: Service) -> None:
    await service.make("1", "lamp")
    await service.commands.handle(THING, "1", DiscardThing(), PROJECT)
    assert (await service.make("2", "lamp")).version == 1
    with pytest.raises(NotFound):
        await service.documents.require(THING, "1", 7)


async def test_two_instances_racing_for_names_and_streams_lose_nothing(mongod: str, database_prefix: str) -> None:
    async with AsyncExitStack() as stack:
        pair = [await stack.enter_async_context(instance(mongod, f"{database_prefix}things")) for _ in range(2)]
        await pair[0].make("shared", "shared")
        names = await outcomes(
            [each.make(f"{name}-{number}", f"name {name}") for name in range(100) for number, each in enumerate(pair)]
        )
        assert names == {"ok": 100, "already_exists": 100}
        renames = await outcomes(
            [each.rename("shared", f"n{number} {turn}") for turn in range(60) for number, each in enumerate(pair)]
        )
        assert renames == {"ok": 120}
        assert await positions(pair[0]) == list(range(1, 222))
        assert (await pair[1].documents.require(THING, "shared", 7)).version == 121


async def test_writers_that_take_turns_leave_no_gaps(mongod: str, database_prefix: str) -> None:
    """After two batches in a row a writer expects the head to be its own; its next batch finds that it is not."""
    async with AsyncExitStack() as stack:
        pair = [await stack.enter_async_context(instance(mongod, f"{database_prefix}things")) for _ in range(2)]
        for turn in range(12):
            for each in (pair[0], pair[0], pair[turn % 2], pair[1]):
                identifier = uuid7()
                await each.make(identifier, identifier)
        assert await positions(pair[1]) == list(range(1, 49))


async def test_nothing_is_acknowledged_by_a_store_without_a_head(either_service: Service) -> None:
    await either_service.make("1", "lamp")
    await either_service.make("2", "torch")
    [head] = [item async for item in either_service.store.database["head"].find({})]
    await either_service.store.database["head"].delete_one({})
    with pytest.raises(RetryLater):
        await either_service.make("3", "candle")
    await either_service.store.database["head"].insert_one(head)
    await either_service.make("3", "candle")
    assert await positions(either_service) == [1, 2, 3]


async def test_large_entities_take_several_batches(service: Service) -> None:
    """Together they are larger than a message to the server may be; their events are small."""
    names = {str(number): f"{number} {'x' * 800_000}" for number in range(64)}
    for identifier, name in names.items():
        await service.make(identifier, name)
    calls = [service.commands.handle(THING, identifier, DiscardThing(), PROJECT) for identifier in names]
    assert await outcomes(calls) == {"ok": 64}


class LosingCommits(PipelinedTransactions):
    """Its connections break before a commit is sent."""

    def commit(self, *, then: Document | None = None) -> None:
        raise ConnectionFailure("the connection is closed")


class LosingRoundTrips(PipelinedRoundTrips):
    def transactions(self) -> PipelinedTransactions:
        return LosingCommits(self)


async def test_a_writer_that_gave_up_releases_the_head(
    mongod: str, database_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"{database_prefix}things"
    async with instance(mongod, name, LosingRoundTrips) as first, instance(mongod, name) as second:
        monkeypatch.setattr(batch_writer, "OUTCOME_SECONDS_MAX", 0.0)
        with pytest.raises(OutcomeUnknown):
            await first.make("1", "lamp")
        monkeypatch.undo()
        assert (await second.make("2", "torch")).version == 1
        assert await positions(second) == [1]


async def test_a_dropped_collection_of_wake_ups_is_capped_again(service: Service) -> None:
    database = service.store.database
    await database.drop_collection(WAKE_UPS)
    await service.make("1", "lamp")
    assert not (await database[WAKE_UPS].options()).get("capped")
    await service.store.open([THING.collection], {})
    assert (await database[WAKE_UPS].options())["capped"] is True


async def test_a_stale_expected_version_is_refused_and_none_decides_on_the_current(either_service: Service) -> None:
    await either_service.make("1", "lamp")
    await either_service.rename("1", "torch")
    with pytest.raises(PreconditionFailed, match="current version is 2"):
        await either_service.rename("1", "candle", expected_version=1)
    assert (await either_service.rename("1", "candle", expected_version=2)).version == 3


async def test_a_refused_act_refuses_its_whole_request(either_service: Service) -> None:
    await either_service.make("1", "lamp")
    acts = [Act(THING, "2", MakeThing("torch")), Act(THING, "3", MakeThing("lamp"))]
    secret = SideWrite("secrets", "s-1", {"value": "x"})
    with pytest.raises(Conflict):
        await either_service.commands.execute(CommandRequest(acts, PROJECT, [secret]))
    assert await either_service.documents.get(THING, "2") is None
    assert await either_service.documents.plain("secrets").find_one({"_id": "s-1"}) is None


async def test_side_writes_are_there_with_their_command(either_service: Service) -> None:
    await either_service.make("1", "lamp", side_writes=[SideWrite("secrets", "s-1", {"value": "x"})])
    assert await either_service.documents.plain("secrets").find_one({"_id": "s-1"}) == {"_id": "s-1", "value": "x"}


async def test_the_same_idempotency_key_gives_the_same_answer_and_acts_once(either_service: Service) -> None:
    key = IdempotencyKey("key", "hash")
    calls = [either_service.make(str(number), f"lamp {number}", idempotency=key) for number in range(3)]
    first, *others = await asyncio.gather(*calls)
    assert others == [first, first]
    await either_service.rename(str(first.id), "torch")
    assert await either_service.make("9", "candle", idempotency=key) == first
    with pytest.raises(Unprocessable):
        await either_service.make("10", "candle", idempotency=IdempotencyKey("key", "another hash"))
    assert len(await positions(either_service)) == 2


async def test_an_event_over_its_size_is_refused_naming_the_field(service: Service) -> None:
    with pytest.raises(TooLarge, match="name: is 1000000 bytes; at most 921600 are kept"):
        await service.make("1", "x" * 1_000_000)
    assert await positions(service) == []


async def test_the_size_of_an_event_is_that_of_the_text_that_was_sent(service: Service) -> None:
    """Quotes are escaped when it is stored, which the client need not know."""
    await service.make("1", '"' * 900_000)
    with pytest.raises(TooLarge, match="name: is 930000 bytes"):
        await service.make("2", '"' * 930_000)
    assert await positions(service) == [1]


async def test_an_entity_of_another_project_does_not_exist(service: Service) -> None:
    await service.make("1", "lamp")
    with pytest.raises(NotFound):
        await service.commands.handle(THING, "1", RenameThing("x"), Metadata(project_id=8))
    with pytest.raises(NotFound):
        await service.documents.require(THING, "1", 8)


async def test_a_batch_whose_commit_result_was_lost_is_recognised_and_not_written_twice(
    either_service: Service,
) -> None:
    """The same batch conflicts with its own event ids, and a majority read tells that it was committed."""
    batch = await _batch_making(either_service, "1", "lamp")
    loop = asyncio.get_running_loop()
    first = await loop.run_in_executor(None, either_service.store.writer.commit, batch)
    again = await loop.run_in_executor(None, either_service.store.writer.commit, batch)
    assert (first, again) == (0, 0)
    assert await positions(either_service) == [1]


async def test_a_lost_commit_result_is_recognised_behind_a_moved_offset_too(either_service: Service) -> None:
    """A consumer's step shares the batch with a command, and the second attempt conflicts with the offset first."""
    batch = await _batch_making(either_service, "1", "lamp")
    batch.offsets.append(OffsetMove("topic", 0, 0, 5, 5, "store"))
    loop = asyncio.get_running_loop()
    first = await loop.run_in_executor(None, either_service.store.writer.commit, batch)
    again = await loop.run_in_executor(None, either_service.store.writer.commit, batch)
    assert (first, again) == (0, 0)
    assert await positions(either_service) == [1]


async def test_a_lost_commit_result_is_recognised_after_a_swap_too(either_service: Service) -> None:
    batch = await _batch_making(either_service, "1", "lamp")
    loop = asyncio.get_running_loop()
    first = await loop.run_in_executor(None, either_service.store.writer.commit, batch)
    swap = partial(swap_collections, either_service.store, {"things": "things_rebuilt"}, lambda session, head: None)
    await loop.run_in_executor(None, swap)
    again = await loop.run_in_executor(None, either_service.store.writer.commit, batch)
    assert (first, again) == (0, 0)
    assert await positions(either_service) == [1]


async def _batch_making(service: Service, identifier: str, name: str) -> Batch:
    head = await service.store.head()
    events = THING.decide(None, MakeThing(name))
    envelope = Envelope(
        uuid7(), THING.stream(identifier), 1, 0, head.store_id, SystemClock().now(), events[0],
        events[0].model_dump_json().encode(), PROJECT,
    )  # fmt: skip
    document = stored_document(identifier, 1, 7, (name,), THING.evolve(None, envelope), time=envelope.time)
    return Batch(head.collections, events=[envelope], inserts={"things": [document]})


async def test_a_consumers_step_counts_only_from_the_offset_it_started_from(either_service: Service) -> None:
    def step(expected: int, following: int, identifier: str) -> ConsumerStep:
        move = OffsetMove("topic", 0, expected, following, following, "store")
        return ConsumerStep(move, acts=[(Act(THING, identifier, MakeThing(identifier)), PROJECT)])

    await either_service.commands.consume(step(0, 5, "a"))
    with pytest.raises(OffsetMoved):
        await either_service.commands.consume(step(0, 6, "b"))
    await either_service.commands.consume(step(5, 9, "c"))
    assert await either_service.documents.get(THING, "b") is None
    stored = await either_service.documents.plain("offsets").find_one({"_id": "topic/0"})
    assert stored is not None
    assert stored["offset"] == 9


async def test_a_reactions_ignorable_refusal_does_not_stop_the_consumer(service: Service) -> None:
    act = Act(THING, "nobody", DiscardThing(), ignore_refusal=True)
    move = OffsetMove("topic", 0, 0, 1, 1, "store")
    outcome = await service.commands.consume(ConsumerStep(move, acts=[(act, PROJECT)]))
    assert outcome.entities == [None]


async def test_as_of_gives_the_state_of_that_moment(mongod: str, database_prefix: str) -> None:
    clock = ManualClock()
    client = connect(mongod)
    store = EventStore(client, f"{database_prefix}things")
    await store.open([THING.collection], {})
    commands = CommandHandler(store, clock, [THING])
    commands.start()
    made = await commands.handle(THING, "1", MakeThing("lamp"), PROJECT)
    clock.advance(60)
    await commands.handle(THING, "1", RenameThing("torch"), PROJECT)
    documents = Documents(store)
    between = await documents.as_of(THING, "1", made.state.created_at + timedelta(seconds=30))
    assert between == made
    assert await documents.as_of(THING, "1", made.state.created_at - timedelta(seconds=1)) is None
    await commands.close()
    client.close()


async def test_a_state_of_the_past_is_folded_without_holding_its_stream(service: Service) -> None:
    """So is the reply to a repeated request."""
    event_bytes, versions = 900_000, 120
    key = IdempotencyKey("key", "hash")
    await service.make("1", "lamp")
    events = service.store.database["events"]
    first = await events.find_one({"stream": "thing-1"})
    assert first is not None
    for version in range(2, versions):
        data = orjson.dumps({"name": f"{version}".ljust(event_bytes)}).decode()
        numbers = {"_id": uuid7(), "version": version, "position": version}
        await events.insert_one({**first, **numbers, "type": "thing_renamed", "data": data})
    await service.store.database["head"].update_one({}, {"$set": {"position": versions - 1}})
    await service.store.database["things"].update_one({}, {"$set": {"version": versions - 1}})
    await service.store.head()
    acts = [Act(THING, "1", RenameThing("torch"))]
    await service.commands.execute(CommandRequest(acts, PROJECT, idempotency=key))
    tracemalloc.start()
    try:
        then = await service.documents.as_of(THING, "1", first["time"])
        replayed = await service.commands.execute(CommandRequest(acts, PROJECT, idempotency=key))
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert then is not None
    assert (then.version, then.state.renamed) == (versions - 1, versions - 2)
    assert replayed.replayed
    [thing] = replayed.entities
    assert thing is not None
    assert (thing.version, thing.state.name) == (versions, "torch")
    assert peak_bytes < event_bytes * versions / 2


Step = tuple[str, str, str]
STEPS = st.lists(
    st.tuples(st.sampled_from(["make", "rename", "discard"]), st.sampled_from("abc"), st.sampled_from("xyz")),
    max_size=25,
)


@settings(max_examples=examples(25), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
async def test_any_sequence_agrees_with_a_dictionary_and_its_replay(service: Service, steps: list[Step]) -> None:
    run = uuid7()
    model: dict[str, str] = {}
    born: set[str] = set()
    for verb, identifier, name in steps:
        expected = _modelled(model, born, verb, identifier, name)
        try:
            await service.commands.handle(THING, run + identifier, _command(verb, run + name), PROJECT)
            happened = True
        except FixRequest:
            happened = False
        assert happened == expected, (verb, identifier, name)
    for identifier in born:
        stored = await service.documents.collection("things").find_one({"_id": run + identifier})
        envelopes = await history(service.store, THING.stream(run + identifier))
        state = await fold_stream(THING, service.store.read_stream(THING.stream(run + identifier)))
        keys, time = THING.unique_keys(state), envelopes[-1].time
        rebuilt = stored_document(run + identifier, len(envelopes), 7, keys, state, time=time)
        assert stored == rebuilt
        assert state.deleted == (identifier not in model)


def _modelled(model: dict[str, str], born: set[str], verb: str, identifier: str, name: str) -> bool:
    """Whether a plain dictionary would take the step; takes it."""
    holder = next((key for key, value in model.items() if value == name), None)
    match verb:
        case "make":
            if identifier in born or holder is not None:
                return False
            born.add(identifier)
            model[identifier] = name
        case "rename":
            if identifier not in model or holder not in (None, identifier):
                return False
            model[identifier] = name
        case _:
            return model.pop(identifier, None) is not None
    return True


def _command(verb: str, name: str) -> Any:
    return {"make": MakeThing(name), "rename": RenameThing(name), "discard": DiscardThing()}[verb]


async def test_what_the_write_path_did_is_measured(service: Service) -> None:
    def counted(outcome: str) -> float:
        return REGISTRY.get_sample_value("datasync_commands_total", {"outcome": outcome}) or 0.0

    before = {outcome: counted(outcome) for outcome in ("committed", "refused")}
    await outcomes([service.make(str(number), "lamp") for number in range(5)])
    assert {outcome: counted(outcome) - before[outcome] for outcome in before} == {"committed": 1, "refused": 4}
