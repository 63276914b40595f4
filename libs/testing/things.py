"""A smallest aggregate, for tests and benchmarks of the kernel itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from libs.contracts.registry import PublicEvent
from libs.core.decider import Aggregate
from libs.core.envelope import Envelope, Event, Frozen
from libs.core.errors import Conflict, NotFound

TOPIC = "datasync.things.v1"


class ThingEvent(PublicEvent, topic=TOPIC):
    pass


class ThingMade(ThingEvent):
    name: str


class ThingRenamed(ThingEvent):
    name: str


class ThingDiscarded(ThingEvent):
    pass


class Thing(Frozen):
    name: str
    created_at: datetime
    renamed: int = 0
    deleted: bool = False


@dataclass(frozen=True, slots=True)
class MakeThing:
    name: str


@dataclass(frozen=True, slots=True)
class RenameThing:
    name: str


@dataclass(frozen=True, slots=True)
class DiscardThing:
    pass


ThingCommand = MakeThing | RenameThing | DiscardThing


def decide(state: Thing | None, command: ThingCommand) -> Sequence[Event]:
    match command:
        case MakeThing(name):
            if state is not None:
                raise Conflict("the thing exists")
            return [ThingMade(name=name)]
        case RenameThing(name):
            living = _living(state)
            return [] if living.name == name else [ThingRenamed(name=name)]
        case DiscardThing():
            _living(state)
            return [ThingDiscarded()]


def evolve(state: Thing | None, envelope: Envelope) -> Thing:
    match envelope.data:
        case ThingMade(name=name):
            return Thing(name=name, created_at=envelope.time)
        case ThingRenamed(name=name):
            assert state is not None
            return state.model_copy(update={"name": name, "renamed": state.renamed + 1})
        case ThingDiscarded():
            assert state is not None
            return state.model_copy(update={"deleted": True})
        case other:
            raise TypeError(f"not an event of a thing: {other}")


def unique_keys(state: Thing) -> Sequence[str]:
    return () if state.deleted else (state.name,)


THING = Aggregate("thing", "things", Thing, decide, evolve, unique_keys)


def _living(state: Thing | None) -> Thing:
    if state is None or state.deleted:
        raise NotFound("no such thing")
    return state
