"""What is asked of the write path, and what comes back."""

from collections.abc import AsyncIterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ValidationError

from libs.core.decider import Act, Aggregate, Projection
from libs.core.envelope import Envelope, Frozen, Metadata, UnknownEvent
from libs.core.errors import NewerVersion, NotFound
from libs.eventsourcing.event_store import OffsetMove, SideWrite
from libs.mongodb.client import Document

State = TypeVar("State", bound=Frozen)


@dataclass(frozen=True, slots=True)
class IdempotencyKey:
    """``id`` is the hash of principal, method, path and key; ``request_hash`` that of the body under the key."""

    id: str
    request_hash: str


@dataclass(frozen=True, slots=True)
class Entity(Generic[State]):
    """An entity as it stands at a version; ``project_id`` is known of those that were read from a document."""

    id: int | str
    version: int
    state: State
    project_id: int | None = None


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


async def fold_stream(aggregate: Aggregate[State], envelopes: AsyncIterable[Envelope]) -> State:
    """The state after these events, of which one is held at a time: a stream may be larger than the memory.

    Raises:
        NotFound: there are none.
        NewerVersion: only a newer version knows one of them.
    """
    state: State | None = None
    async for envelope in envelopes:
        if isinstance(envelope.data, UnknownEvent):
            raise newer_version(aggregate, envelope.entity_id)
        state = aggregate.evolve(state, envelope)
    if state is None:
        raise NotFound(f"no such {aggregate.name}")
    return state


def newer_version(aggregate: Aggregate[Any], entity_id: int | str) -> NewerVersion:
    return NewerVersion(
        f"a newer version of the service changed {aggregate.name} {entity_id} in a way that this instance can't read",
        retry_after_seconds=1,
    )


def state_of(aggregate: Aggregate[State], document: Document) -> State:
    """The state in an owner's document, with the fields that only a newer version knows: they are written back.

    Raises:
        NewerVersion: it holds values that this version does not take.
        PureCodeFailed: it lacks what every version writes.
    """
    fields = document["state"]
    try:
        return aggregate.state.model_validate(fields)
    except ValidationError:
        try:
            return aggregate.state.model_validate(fields, extra="allow")
        except ValidationError as error:
            if any(item["type"] == "missing" for item in error.errors()):
                raise PureCodeFailed(f"the document of {aggregate.name} {document['_id']} is broken") from error
            raise newer_version(aggregate, document["_id"]) from None


DOCUMENT_FIELDS = frozenset({"_id", "version", "project_id", "state", "keys", "number", "time"})


def stored_document(
    identifier: int | str,
    version: int,
    project_id: int | None,
    keys: Sequence[str],
    state: Frozen,
    number: int | None = None,
    time: datetime | None = None,
    others: Mapping[str, Any] | None = None,
) -> Document:
    """The owner's document of an entity: a pure function of its events, so that a rebuild gives the same.

    Args:
        time: of the last event; the next one is not earlier, whatever the clock says.
        others: the document's fields that only a newer version knows.
    """
    document: Document = {
        **(others or {}),
        "_id": identifier,
        "version": version,
        "project_id": project_id,
        "state": _dumped(state),
    }
    if time is not None:
        document["time"] = time
    if keys:
        document["keys"] = list(keys)
    if number is not None:
        document["number"] = number
    return document


def _dumped(state: Frozen) -> Document:
    # Only documents that were read with ``extra="allow"`` have unknown fields; pydantic leaves those out of its dumps.
    if state.model_extra is None:
        return state.model_dump()
    dumped: Document = _with_unknown_fields(state)
    return dumped


def _with_unknown_fields(value: Any) -> Any:
    match value:
        case BaseModel():
            fields = {**vars(value), **(value.model_extra or {})}
            return {name: _with_unknown_fields(item) for name, item in fields.items()}
        case Mapping():
            return {key: _with_unknown_fields(item) for key, item in value.items()}
        case tuple() | list():
            return [_with_unknown_fields(item) for item in value]
        case _:
            return value
