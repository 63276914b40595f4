"""The shape of a domain file: a state, the commands that it takes, ``decide`` and ``evolve``.

After Emmett and Jérémie Chassaing's Decider: ``decide`` returns the events that a command causes, and ``evolve`` folds
an event into the state. Both are pure; time, ids and randomness come in with the command.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from libs.core.envelope import Envelope, Event, Frozen

State = TypeVar("State", bound=Frozen)

ExpectedVersion = int | frozenset[int] | None
"""The version, or one of several, that the entity must have; None for any."""


def claims_nothing(_: Any) -> Sequence[str]:
    return ()


@dataclass(frozen=True, slots=True)
class Listing(Generic[State]):
    """Lists of entities with exact counts, which are updated in the same transaction as the entities.

    Args:
        collection: the collection of the counts.
        lists: the names of the lists that contain an entity, such as ``[123,"ACTIVE"]``; empty once it is deleted.
            No name may be a prefix of another.
    """

    collection: str
    lists: Callable[[State], Sequence[str]]


@dataclass(frozen=True, slots=True)
class Aggregate(Generic[State]):
    """One kind of entity: its commands, events and state, and how the state is stored.

    Args:
        name: the prefix of its streams: ``source`` for ``source-42``.
        collection: the owner's collection of current states, with one document per entity.
        state: the frozen model of the state.
        decide: ``(state or None, command) -> events``; raises a ``FixRequest`` error to reject the command.
        evolve: ``(state or None, envelope) -> state``; accepts every event of the stream.
        unique_keys: texts that only one entity of the collection can have at a time, such as ``123/my-source``; empty
            once the entity is deleted.
        id_type: int if entity ids are integers; documents then have a number as their key.
        conflict_message, conflict_field: the error that a caller gets if another entity has a unique key.
        listing: for millions of entities: lists whose totals and pages are read without counting or skipping.
    """

    name: str
    collection: str
    state: type[State]
    decide: Callable[[State | None, Any], Sequence[Event]]
    evolve: Callable[[State | None, Envelope], State]
    unique_keys: Callable[[State], Sequence[str]] = claims_nothing
    id_type: type[int] | type[str] = str
    conflict_message: str = "the name is already taken"
    conflict_field: str = "name"
    listing: Listing[State] | None = None

    def stream(self, entity_id: int | str) -> str:
        return f"{self.name}-{entity_id}"


@dataclass(frozen=True, slots=True)
class Projection:
    """Documents about another service's entities, kept up to date from that service's events.

    Args:
        collection: the collection of the documents, in the reader's database.
        topic: the topic of the events.
        key: the ``_id`` of the document that an event concerns; None if it concerns none.
        apply: ``(document or None, envelope) -> document or None``; None deletes the document. Pure. The result needs
            no ``_id``.
    """

    collection: str
    topic: str
    key: Callable[[Envelope], int | str | None]
    apply: Callable[[dict[str, Any] | None, Envelope], dict[str, Any] | None]


@dataclass(frozen=True, slots=True)
class Act:
    """A command for an entity.

    Args:
        expected_version: the version that the caller has read (``If-Match``).
        ignore_refusal: for reactions: a rejected command means that nothing is left to do.
    """

    aggregate: Aggregate[Any]
    entity_id: int | str
    command: Any
    expected_version: ExpectedVersion = None
    ignore_refusal: bool = False


@dataclass(frozen=True, slots=True)
class Reaction:
    """Commands that another service's event causes, executed exactly once.

    Args:
        topic: the topic of the events.
        react: ``envelope -> acts``, often none. Pure.
    """

    topic: str
    react: Callable[[Envelope], Sequence[Act]]


class PureCodeFailed(Exception):
    """``decide``, ``evolve`` or ``apply`` raised something other than a refusal: a defect, the same every time."""
