"""Two versions of a service on one store: what the older one meets, and what is made good after its upgrade."""

import asyncio
import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import orjson
import pytest

from libs.contracts import registry
from libs.core.clock import ManualClock
from libs.core.decider import Act, Aggregate, Reaction
from libs.core.envelope import Envelope, Event
from libs.core.errors import NewerVersion
from libs.eventsourcing import passed_over
from libs.eventsourcing.command_handler import CommandHandler
from libs.eventsourcing.consumer import intervals
from libs.eventsourcing.documents import Documents
from libs.eventsourcing.parking import list_parked
from libs.eventsourcing.rebuild import Rebuild, RebuildFailed
from libs.testing.followers import ECHO, PROJECT, Behaviour, Follower, Installation, Owner, history
from libs.testing.things import (
    THING,
    TOPIC,
    MakeThing,
    RenameThing,
    Thing,
    ThingEvent,
    ThingMade,
    ThingRenamed,
    decide,
    evolve,
)
from libs.testing.waiting import until_after


class ThingPainted(ThingEvent, registered=False):
    colour: str


class NewerThing(Thing):
    colour: str = "plain"
    coats: int = 0


@dataclasses.dataclass(frozen=True)
class PaintThing:
    colour: str


def newer_decide(state: Thing | None, command: Any) -> Sequence[Event]:
    return [ThingPainted(colour=command.colour)] if isinstance(command, PaintThing) else decide(state, command)


def newer_evolve(state: NewerThing | None, envelope: Envelope) -> NewerThing:
    if isinstance(envelope.data, ThingPainted):
        assert state is not None
        return state.model_copy(update={"colour": envelope.data.colour, "coats": state.coats + 1})
    after = evolve(state, envelope)
    return after if isinstance(after, NewerThing) else NewerThing(**after.model_dump())


NEWER_THING: Aggregate[Any] = dataclasses.replace(
    cast("Aggregate[Any]", THING), state=NewerThing, decide=newer_decide, evolve=newer_evolve
)
NEWER_ECHO: Aggregate[Any] = dataclasses.replace(
    NEWER_THING, name=ECHO.name, collection=ECHO.collection, unique_keys=ECHO.unique_keys
)


def view_of(document: dict[str, Any] | None, envelope: Envelope) -> dict[str, Any]:
    """The newest name or colour of a thing, and the versions of the events that were seen, in order."""
    before = document or {"versions": [], "told": None}
    told = getattr(envelope.data, "name", None) or getattr(envelope.data, "colour", None)
    return {"versions": [*before["versions"], envelope.version], "told": told}


def newer_version() -> AbstractContextManager[None]:
    """Within it, this process is of the version that knows ``ThingPainted``."""
    return registry.known_meanwhile([ThingPainted])


@pytest.fixture(autouse=True)
def quick_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervals, "WAIT_SECONDS", 0.1)
    monkeypatch.setattr(intervals, "RETRY_SECONDS", 0.05)
    monkeypatch.setattr(intervals, "STOPPED_POLL_SECONDS", 0.05)


async def paint(owner: Owner, identifier: str, colour: str) -> None:
    """As an instance of the newer version does."""
    with newer_version():
        await owner.commands.handle(NEWER_THING, identifier, PaintThing(colour), PROJECT)


async def until(condition: Callable[[dict[str, Any]], bool], follower: Follower) -> dict[str, Any]:
    async with asyncio.timeout(30):
        while not condition(views := await follower.views()):
            await asyncio.sleep(0.02)
    return views


async def test_an_unknown_field_of_a_document_is_written_back(embedded: Installation) -> None:
    async with embedded.owner() as owner:
        await owner.make("1", "lamp")
        things = owner.store.database["things"]
        newer = {"state.colour": "red", "state.made_of": [{"part": "shade", "share": 0.5}], "labels": ["a"]}
        await things.update_one({"_id": "1"}, {"$set": newer})
        assert (await owner.rename("1", "torch")).version == 2
        document = await things.find_one({"_id": "1"})
        assert document is not None
        assert document["labels"] == ["a"]
        assert document["state"]["colour"] == "red"
        assert document["state"]["made_of"] == [{"part": "shade", "share": 0.5}]
        assert (document["state"]["name"], document["version"]) == ("torch", 2)


async def test_a_stream_that_a_newer_version_changed_is_refused_and_its_neighbours_are_not(
    embedded: Installation,
) -> None:
    async with embedded.owner() as owner:
        for identifier in ("1", "2", "3"):
            await owner.make(identifier, f"thing {identifier}")
        await paint(owner, "2", "red")
        await owner.store.database["things"].update_one({"_id": "3"}, {"$set": {"state.renamed": "often"}})
        renaming = [owner.rename(identifier, f"other {identifier}") for identifier in ("1", "2", "3", "1")]
        outcomes = await asyncio.gather(*renaming, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes[1:3]] == [NewerVersion, NewerVersion]
        assert [getattr(outcomes[number], "version", outcomes[number]) for number in (0, 3)] == [2, 2]
        assert (await history(owner.store, "thing-2"))[-1].type == "thing_painted"
        with newer_version():
            assert (await owner.rename("2", "other 2")).version == 3


async def test_the_first_newer_event_is_noticed_by_an_instance_that_is_deciding(embedded: Installation) -> None:
    """The older instance has read the head before: the head itself refuses what was decided without looking."""
    async with embedded.owner() as older, embedded.owner() as newer:
        await older.make("1", "lamp")
        await paint(newer, "1", "red")
        assert older.store.head_cached is not None
        assert older.store.head_cached.newer_types == frozenset(), "it decides without looking for newer events"
        with pytest.raises(NewerVersion):
            await older.rename("1", "torch")
        assert len(await history(older.store, "thing-1")) == 2


async def test_a_state_of_the_past_that_only_a_newer_version_can_fold_is_refused(embedded: Installation) -> None:
    async with embedded.owner() as owner:
        await owner.make("1", "lamp")
        before = (await history(owner.store, "thing-1"))[0].time
        await until_after(before)
        await paint(owner, "1", "red")
        documents = Documents(owner.store)
        with pytest.raises(NewerVersion):
            await documents.as_of(THING, "1", datetime.now(UTC))
        then = await documents.as_of(THING, "1", before)
        assert then is not None
        assert then.state.name == "lamp"


async def test_an_older_rebuild_refuses_what_a_newer_version_wrote(embedded: Installation) -> None:
    async with embedded.owner() as owner:
        await owner.make("1", "lamp")
        await paint(owner, "1", "red")
        with pytest.raises(RebuildFailed, match="newer version"):
            await Rebuild(owner.store, embedded.open_log("rebuild"), aggregates=[THING]).run(grace_seconds=0)
        with newer_version():
            rebuild = Rebuild(owner.store, embedded.open_log("rebuild"), aggregates=[NEWER_THING])
            assert (await rebuild.run(grace_seconds=0)).swapped


async def test_what_an_older_consumer_passes_over_is_handled_in_order_after_its_upgrade(place: Installation) -> None:
    behaviour = Behaviour(view_of)
    async with place.owner() as owner:
        await owner.make("1", "lamp")
        await paint(owner, "1", "red")
        with newer_version():
            await owner.rename("1", "torch")
        async with place.follower(behaviour) as older:
            await owner.make("2", "candle")
            views = await until(lambda views: len(views) == 2 and len(views["1"]["versions"]) == 2, older)
            assert views["1"] == {"versions": [1, 3], "told": "torch"}, "the older version goes on without the event"
            assert await list_parked(older.store.database) == []
        async with place.follower(behaviour) as still_older:
            await owner.make("3", "match")
            await until(lambda views: "3" in views, still_older)
        with newer_version():
            async with place.follower(behaviour) as newer:
                views = await until(lambda views: len(views["1"]["versions"]) == 3, newer)
                assert views["1"] == {"versions": [1, 2, 3], "told": "torch"}
                await owner.rename("1", "spot")
                await until(lambda views: views["1"]["versions"] == [1, 2, 3, 4], newer)
                assert await newer.store.database["passed_over"].count_documents({}) == 0
                assert await newer.echoes() == {"1": 1, "2": 1, "3": 1}


class Echoing(Behaviour):
    """Every name and colour of a thing becomes the name of its echo."""

    def reaction(self) -> Reaction:
        def react(envelope: Envelope) -> Sequence[Act]:
            match envelope.data:
                case ThingMade(name=name):
                    return [Act(ECHO, envelope.entity_id, MakeThing(name))]
                case ThingRenamed(name=name) | ThingPainted(colour=name):
                    return [Act(ECHO, envelope.entity_id, RenameThing(name))]
            return ()

        return Reaction(TOPIC, react)


async def echoed(follower: Follower, identifier: str) -> list[str]:
    return [getattr(envelope.data, "name", "") for envelope in await history(follower.store, f"echo-{identifier}")]


async def until_echoed(follower: Follower, identifier: str, names: list[str]) -> None:
    async with asyncio.timeout(30):
        while (seen := await echoed(follower, identifier)) != names:
            assert seen == names[: len(seen)]
            await asyncio.sleep(0.02)


async def test_reactions_wait_behind_an_earlier_one_of_their_stream_that_was_passed_over(place: Installation) -> None:
    behaviour = Echoing()
    async with place.owner() as owner:
        await owner.make("1", "lamp")
        await paint(owner, "1", "red")
        with newer_version():
            await owner.rename("1", "torch")
        async with place.follower(behaviour) as older:
            await owner.make("2", "candle")
            await until_echoed(older, "2", ["candle"])
            await until(lambda views: "1" in views and views["1"]["name"] == "torch", older)
            assert await echoed(older, "1") == ["lamp"]
        with newer_version():
            await owner.rename("1", "spot")
        async with place.follower(behaviour) as restarted:
            await owner.rename("2", "match")
            await until_echoed(restarted, "2", ["candle", "match"])
            await until(lambda views: views["1"]["name"] == "spot", restarted)
            assert await echoed(restarted, "1") == ["lamp"]
        with newer_version():
            await owner.rename("1", "beam")
            async with place.follower(behaviour) as newer:
                await until_echoed(newer, "1", ["lamp", "red", "torch", "spot", "beam"])
                assert await newer.store.database["passed_over"].count_documents({}) == 0


@pytest.mark.parametrize("bound", ["MESSAGES_MAX", "SIZE_BYTES_MAX"])
async def test_a_topic_of_which_too_much_waits_for_a_newer_version_waits_too_with_an_alarm(
    embedded: Installation, monkeypatch: pytest.MonkeyPatch, bound: str
) -> None:
    monkeypatch.setattr(passed_over, bound, {"MESSAGES_MAX": 2, "SIZE_BYTES_MAX": 40}[bound])
    behaviour = Echoing()
    async with embedded.owner() as owner:
        await owner.make("1", "lamp")
        for colour in ("red", "blue", "green"):
            await paint(owner, "1", colour)
        async with embedded.follower(behaviour) as older, asyncio.timeout(30):
            while (reason := (await older.health.report())[f"consumer {TOPIC}"]) is None:
                await asyncio.sleep(0.02)
            assert "run the newer version" in reason
            assert await older.store.database["passed_over"].count_documents({}) == 2
        with newer_version():
            async with embedded.follower(behaviour) as newer:
                await until_echoed(newer, "1", ["lamp", "red", "blue", "green"])
                assert (await newer.health.report())[f"consumer {TOPIC}"] is None


async def test_a_field_that_an_older_consumer_did_not_know_is_there_after_its_upgrade(embedded: Installation) -> None:
    class ThingMade(ThingEvent, registered=False):
        name: str
        colour: str = "plain"

    def apply(_: dict[str, Any] | None, envelope: Envelope) -> dict[str, Any]:
        return {"name": getattr(envelope.data, "name", ""), "colour": getattr(envelope.data, "colour", None)}

    async with embedded.owner() as owner:
        await owner.make("1", "lamp")
        events = owner.store.database["events"]
        data = orjson.dumps({"name": "lamp", "colour": "red"}).decode()
        await events.update_one({"stream": "thing-1"}, {"$set": {"data": data}})
        async with embedded.follower(Behaviour(apply)) as older:
            views = await until(lambda views: "1" in views, older)
            assert views["1"] == {"name": "lamp", "colour": None}
        with registry.known_meanwhile([ThingMade]):
            async with embedded.follower(Behaviour(apply)) as newer:
                await until(lambda views: views["1"]["colour"] == "red", newer)
                assert await newer.echoes() == {"1": 1}


async def test_a_reaction_on_an_entity_that_is_ahead_of_this_version_waits_for_the_upgrade(
    embedded: Installation,
) -> None:
    """Nothing else of the topic waits for it."""
    async with embedded.owner() as owner:
        async with embedded.follower() as follower:
            await follower.commands.handle(NEWER_ECHO, "1", MakeThing("lamp"), PROJECT)
            with newer_version():
                await follower.commands.handle(NEWER_ECHO, "1", PaintThing("red"), PROJECT)
        behaviour = Behaviour(command=lambda name: RenameThing(name) if name == "torch" else MakeThing(name))
        async with embedded.follower(behaviour) as older:
            await owner.make("1", "torch")
            await owner.make("2", "candle")
            await until(lambda views: views.keys() == {"1", "2"}, older)
            assert await older.echoes() == {"1": 2, "2": 1}
            rebuild = Rebuild(older.store, embedded.open_log("rebuild"), projections=[behaviour.projection()])
            assert (await rebuild.run(swap=False)).is_equal
        with newer_version():
            async with embedded.follower(behaviour) as newer:
                async with asyncio.timeout(30):
                    while await newer.echoes() != {"1": 3, "2": 1}:
                        await asyncio.sleep(0.02)


async def test_events_of_a_stream_never_run_backwards_and_a_past_state_has_no_gap(embedded: Installation) -> None:
    noon = datetime(2026, 5, 1, 12, tzinfo=UTC)
    async with embedded.owner() as owner:
        fast, slow = (
            CommandHandler(owner.store, ManualClock(noon + timedelta(seconds=seconds)), [THING]) for seconds in (60, 0)
        )
        for commands in (fast, slow):
            commands.start()
        await fast.handle(THING, "1", MakeThing("lamp"), PROJECT)
        await slow.handle(THING, "1", RenameThing("torch"), PROJECT)
        await fast.close()
        await slow.close()
        times = [envelope.time for envelope in await history(owner.store, "thing-1")]
        assert times == [noon + timedelta(seconds=60)] * 2

        # As an earlier version left it: 1 at noon, 2 a minute late, 3 by a clock that was right.
        await owner.rename("1", "candle")
        for version, seconds in ((1, 0), (2, 60), (3, 1)):
            criteria = {"stream": "thing-1", "version": version}
            await owner.store.database["events"].update_one(
                criteria, {"$set": {"time": noon + timedelta(seconds=seconds)}}
            )
        documents = Documents(owner.store)
        seen = [await documents.as_of(THING, "1", noon + timedelta(seconds=seconds)) for seconds in (-1, 0, 1, 60)]
        assert [None if then is None else then.version for then in seen] == [None, 1, 3, 3]
