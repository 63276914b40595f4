"""The shape of a domain file: a state, the commands that it takes, ``decide`` and ``evolve``.

After Emmett and Jérémie Chassaing's Decider: ``decide`` is pure and returns what happened, ``evolve`` is pure and
folds it into the state. Time, ids and randomness come in with the command.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from libs.core.envelope import Envelope, Event, Frozen

State = TypeVar("State", bound=Frozen)

ExpectedVersion = int | frozenset[int] | None
"""The version, or any of several, that a caller bases a command on; None for whatever is current."""


def claims_nothing(_: Any) -> Sequence[str]:
    return ()


@dataclass(frozen=True, slots=True)
class Listing(Generic[State]):
    """The lists that entities stand in: counted exactly, in the transaction of whatever changes them.

    Args:
        collection: where the counts are kept.
        lists: the names of the lists that an entity stands in, such as ``[123,"ACTIVE"]``, none of which may begin
            another; empty once it is deleted.
    """

    collection: str
    lists: Callable[[State], Sequence[str]]


@dataclass(frozen=True, slots=True)
class Aggregate(Generic[State]):
    """How one kind of entity decides and remembers.

    Args:
        name: the stream's prefix, ``source`` for ``source-42``.
        collection: where the owner keeps the current state, one document an entity.
        state: the frozen model of the state.
        decide: ``(state or None, command) -> events``; raises a ``FixRequest`` error to refuse.
        evolve: ``(state or None, envelope) -> state``; never refuses.
        unique_keys: texts that only one living entity of this collection may hold at a time, such as
            ``123/my-source``; none once the entity is deleted, which frees them.
        id_type: int where entity ids are integers, so that documents are keyed by the number.
        conflict_message: what a caller reads when a unique key is taken by somebody else.
        listing: for entities by the million: lists whose totals and pages are known without counting or skipping.
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
    """How documents about another service's entities follow that service's events.

    Args:
        collection: where the documents are kept in the reader's database.
        topic: the log topic it follows.
        key: the document's ``_id`` for an event, None when the event does not concern it.
        apply: ``(document or None, envelope) -> document or None``; None deletes. Pure. ``_id`` is set by the runtime.
    """

    collection: str
    topic: str
    key: Callable[[Envelope], int | str | None]
    apply: Callable[[dict[str, Any] | None, Envelope], dict[str, Any] | None]


@dataclass(frozen=True, slots=True)
class Act:
    """One command for one entity.

    Args:
        expected_version: what the caller read (``If-Match``).
        ignore_refusal: for reactions: a refusal means there is nothing left to do.
    """

    aggregate: Aggregate[Any]
    entity_id: int | str
    command: Any
    expected_version: ExpectedVersion = None
    ignore_refusal: bool = False


@dataclass(frozen=True, slots=True)
class Reaction:
    """How a foreign event becomes commands of one's own, exactly once.

    Args:
        topic: the log topic it follows.
        react: pure; the acts to perform, often none.
    """

    topic: str
    react: Callable[[Envelope], Sequence[Act]]
