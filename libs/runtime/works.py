"""What is asked of the write path, and what comes back."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from libs.core.decider import Act, Aggregate, Projection
from libs.core.envelope import Envelope, Frozen, Metadata
from libs.core.errors import NotFound
from libs.runtime.event_store import OffsetMove, SideWrite
from libs.runtime.mongo import Document

State = TypeVar("State", bound=Frozen)


@dataclass(frozen=True, slots=True)
class IdempotencyKey:
    """``id`` is the hash of principal, method, path and key; ``request_hash`` that of the body under the key."""

    id: str
    request_hash: str


@dataclass(frozen=True, slots=True)
class Entity(Generic[State]):
    """An entity as it stands at a version."""

    id: int | str
    version: int
    state: State


@dataclass(frozen=True, slots=True)
class Work:
    """Commands that take effect together or not at all."""

    acts: Sequence[Act]
    metadata: Metadata
    side_writes: Sequence[SideWrite] = ()
    idempotency: IdempotencyKey | None = None


@dataclass(frozen=True, slots=True)
class ConsumerWork:
    """What a consumer's step writes in one transaction with the offset that it moves to."""

    offset: OffsetMove
    projections: Sequence[tuple[Projection, Envelope]] = ()
    acts: Sequence[tuple[Act, Metadata]] = ()
    side_writes: Sequence[SideWrite] = ()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a work came to.

    Args:
        entities: one for each act, as it stands after it; None where an ignorable refusal left nothing.
        replayed: True when an earlier request with the same Idempotency-Key had done it.
    """

    entities: Sequence[Entity[Any] | None]
    events: Sequence[Envelope] = ()
    replayed: bool = False


class PureCodeFailed(Exception):
    """``decide``, ``evolve`` or ``apply`` raised something other than a refusal: a defect, the same every time."""


def fold(aggregate: Aggregate[State], envelopes: Iterable[Envelope]) -> State:
    """The state after these events; raises ``NotFound`` when there are none."""
    state: State | None = None
    for envelope in envelopes:
        state = aggregate.evolve(state, envelope)
    if state is None:
        raise NotFound(f"no such {aggregate.name}")
    return state


def stored_document(
    identifier: int | str,
    version: int,
    project_id: int | None,
    keys: Sequence[str],
    state: Frozen,
    number: int | None = None,
) -> Document:
    """The owner's document of an entity: a pure function of its events, so that a rebuild gives the same."""
    document: Document = {"_id": identifier, "version": version, "project_id": project_id, "state": state.model_dump()}
    if keys:
        document["keys"] = list(keys)
    if number is not None:
        document["number"] = number
    return document
