"""An entity's state from its events, and its document in the owner's store."""

from collections.abc import AsyncIterable, AsyncIterator, Mapping, Sequence
from datetime import datetime
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from libs.core.decider import Aggregate, PureCodeFailed
from libs.core.entity import Entity
from libs.core.envelope import Envelope, Frozen, UnknownEvent
from libs.core.errors import NewerVersion, NotFound
from libs.mongodb.client import Document

State = TypeVar("State", bound=Frozen)

DOCUMENT_FIELDS = frozenset({"_id", "version", "project_id", "state", "keys", "number", "time"})


async def fold_stream(aggregate: Aggregate[State], envelopes: AsyncIterable[Envelope]) -> State:
    """The state after these events. One event is held at a time, because a stream may be larger than the memory.

    Raises:
        NotFound: there are no events.
        NewerVersion: one of them is known only to a newer version.
    """
    state: State | None = None
    async for envelope in envelopes:
        if isinstance(envelope.data, UnknownEvent):
            raise newer_version(aggregate, envelope.entity_id)
        state = aggregate.evolve(state, envelope)
    if state is None:
        raise NotFound(f"no such {aggregate.name}")
    return state


async def fold_entity(
    aggregate: Aggregate[State], entity_id: int | str, version: int, envelopes: AsyncIterable[Envelope]
) -> Entity[State]:
    """The entity at a version, from its events up to that version; raises as ``fold_stream``."""
    project_id: int | None = None

    async def noting_the_project() -> AsyncIterator[Envelope]:
        nonlocal project_id
        async for envelope in envelopes:
            project_id = envelope.metadata.project_id
            yield envelope

    state = await fold_stream(aggregate, noting_the_project())
    return Entity(entity_id, version, state, project_id)


def entity_of(aggregate: Aggregate[State], document: Document) -> Entity[State]:
    """The entity in its document; raises as ``state_of``."""
    return Entity(document["_id"], document["version"], state_of(aggregate, document), document.get("project_id"))


def state_of(aggregate: Aggregate[State], document: Document) -> State:
    """The state in an entity's document. Fields that only a newer version knows are kept, to be written back.

    Raises:
        NewerVersion: a value is not valid in this version.
        PureCodeFailed: a field that every version writes is missing.
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
    """An entity's document. It is a pure function of the entity's events, so a rebuild produces the same.

    Args:
        number: its number in its aggregate's lists.
        time: of the last event; no later event gets an earlier time, whatever the clock says.
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


def newer_version(aggregate: Aggregate[Any], entity_id: int | str) -> NewerVersion:
    return NewerVersion(
        f"a newer version of the service changed {aggregate.name} {entity_id} in a way that this instance can't read",
        retry_after_seconds=1,
    )


def _dumped(state: Frozen) -> Document:
    # Only a state that was read with ``extra="allow"`` has unknown fields, and ``model_dump`` omits them.
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
