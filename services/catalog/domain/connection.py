"""What sources and destinations have in common: defined, changed, held on to by jobs, deleted.

A job reserves a connection before it exists itself; the reservation is confirmed when the job appears and released
when it does not. "In use" is decided here, on the connection's own stream, so that a delete can't race a new job.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, assert_never

from libs.contracts.catalog import (
    CatalogEvent,
    ConnectionDefined,
    ConnectionReferenced,
    ReferenceConfirmed,
    ReferenceReleased,
)
from libs.core.decider import Aggregate
from libs.core.envelope import Envelope, Event, Frozen
from libs.core.errors import Conflict, FieldError, InvalidInput, NotFound

Role = Literal["source", "destination"]

JOBS_NAMED_MAX = 5
SECRETS_CHANGED = "secrets_changed"


class Definition(Frozen):
    """What a connection is; secrets in ``config_json`` are masked references to ``secret_ref``."""

    name: str
    type: str
    version: str
    config_json: str
    secret_ref: str | None = None


class Reference(Frozen):
    """A job's hold; ``reserved_until`` is None once the job is known to exist and to use it."""

    job_id: int
    job_name: str
    reserved_at: datetime
    reserved_until: datetime | None

    def is_younger_than(self, moment: datetime) -> bool:
        """A reservation made after ``moment`` is for a change of the job that was not known then."""
        return self.reserved_until is not None and self.reserved_at > moment


class Connection(Frozen):
    """A source or destination as it is now."""

    project_id: int
    definition: Definition
    created_at: datetime
    created_by: str
    updated_at: datetime
    updated_by: str
    references: tuple[Reference, ...] = ()
    deleted: bool = False

    def reference_of(self, job_id: int) -> Reference | None:
        return next((item for item in self.references if item.job_id == job_id), None)


@dataclass(frozen=True, slots=True)
class Create:
    definition: Definition


@dataclass(frozen=True, slots=True)
class Update:
    """``secret_ref_before`` names the secrets that the new definition keeps or replaces."""

    definition: Definition
    secret_ref_before: str | None


@dataclass(frozen=True, slots=True)
class Reserve:
    """A job that is about to be made, or changed, will use it."""

    job_id: int
    job_name: str
    reserved_until: datetime


@dataclass(frozen=True, slots=True)
class Confirm:
    """The job exists and uses it; ``known_at`` is when that happened."""

    job_id: int
    job_name: str
    known_at: datetime


@dataclass(frozen=True, slots=True)
class Release:
    """The job no longer uses it; ``known_at`` is when that happened."""

    job_id: int
    known_at: datetime


@dataclass(frozen=True, slots=True)
class Expire:
    """The reservation that ended at ``reserved_until`` came to nothing."""

    job_id: int
    reserved_until: datetime


@dataclass(frozen=True, slots=True)
class Delete:
    """``secret_ref_before`` names the secrets that are deleted along."""

    secret_ref_before: str | None


Command = Create | Update | Reserve | Confirm | Release | Expire | Delete


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The events of one kind of connection."""

    role: Role
    collection: str
    created: type[ConnectionDefined]
    updated: type[ConnectionDefined]
    referenced: type[ConnectionReferenced]
    confirmed: type[ReferenceConfirmed]
    released: type[ReferenceReleased]
    deleted: type[CatalogEvent]


def connection_aggregate(words: Vocabulary) -> Aggregate[Connection]:
    """The aggregate that speaks of connections in these words."""
    return Aggregate(
        name=words.role,
        collection=words.collection,
        state=Connection,
        decide=lambda state, command: decide(words, state, command),
        evolve=lambda state, envelope: evolve(words, state, envelope),
        unique_keys=unique_keys,
        id_type=int,
        conflict_message=f"a {words.role} of this name exists in the project",
    )


def decide(words: Vocabulary, state: Connection | None, command: Command) -> Sequence[Event]:
    """Raises ``NotFound`` for what is not there or deleted, ``Conflict`` for a delete of what jobs use."""
    if isinstance(command, Create):
        if state is not None:
            raise Conflict(f"the {words.role} exists already", code="already_exists")
        return [words.created(**command.definition.model_dump())]
    if state is None or state.deleted:
        raise NotFound(f"there is no such {words.role}")
    match command:
        case Update():
            return _update(words, state, command)
        case Reserve():
            return _reserve(words, state, command)
        case Confirm():
            return _confirm(words, state, command)
        case Release(job_id, known_at):
            held = state.reference_of(job_id)
            keep = held is None or held.is_younger_than(known_at)
            return [] if keep else [words.released(job_id=job_id)]
        case Expire(job_id, reserved_until):
            held = state.reference_of(job_id)
            ended = held is not None and held.reserved_until == reserved_until
            return [words.released(job_id=job_id)] if ended else []
        case Delete(secret_ref_before):
            if state.references:
                raise Conflict(_in_use(words.role, state), code="in_use")
            _require_same_secrets(state, secret_ref_before)
            return [words.deleted()]
        case _:
            assert_never(command)


def _update(words: Vocabulary, state: Connection, command: Update) -> Sequence[Event]:
    require_same_type(words.role, state.definition.type, command.definition.type)
    _require_same_secrets(state, command.secret_ref_before)
    if command.definition == state.definition:
        return []
    return [words.updated(**command.definition.model_dump())]


def _require_same_secrets(state: Connection, secret_ref_before: str | None) -> None:
    """What was prepared on other secrets would lose one of two changes, or leave secrets behind."""
    if state.definition.secret_ref != secret_ref_before:
        raise Conflict("the secrets were changed meanwhile; try again", code=SECRETS_CHANGED)


def require_same_type(role: Role, before: str, after: str) -> None:
    """Raises ``InvalidInput`` where a change would make it another system's."""
    if after != before:
        message = f"the type of a {role} can't change from {before} to {after}"
        raise InvalidInput(
            f"type: {message}", code="type_changed", errors=[FieldError("type", message, "type_changed")]
        )


def _reserve(words: Vocabulary, state: Connection, command: Reserve) -> Sequence[Event]:
    held = state.reference_of(command.job_id)
    if held is not None and held.reserved_until is not None and held.reserved_until >= command.reserved_until:
        return []
    # A confirmed hold is reserved anew: an event that is on its way must not release what is wanted again.
    return [words.referenced(job_id=command.job_id, job_name=command.job_name, reserved_until=command.reserved_until)]


def _confirm(words: Vocabulary, state: Connection, command: Confirm) -> Sequence[Event]:
    held = state.reference_of(command.job_id)
    if held is not None and held.is_younger_than(command.known_at):
        return []
    confirmed = words.confirmed(job_id=command.job_id)
    if held is None or held.job_name != command.job_name:
        named = words.referenced(job_id=command.job_id, job_name=command.job_name, reserved_until=command.known_at)
        return [named, confirmed]
    return [] if held.reserved_until is None else [confirmed]


def _in_use(role: Role, state: Connection) -> str:
    names = [f'"{item.job_name}"' for item in state.references[:JOBS_NAMED_MAX]]
    if (more := len(state.references) - len(names)) > 0:
        names.append(f"{more} more")
    jobs = "job" if len(state.references) == 1 else "jobs"
    return f"the {role} is used by the {jobs} {', '.join(names)}; delete or change them first"


def evolve(words: Vocabulary, state: Connection | None, envelope: Envelope) -> Connection:
    """Fold one event; being held on to or released is no update of the connection itself."""
    now, actor, event = envelope.time, envelope.metadata.actor, envelope.data
    if isinstance(event, words.created):
        return Connection(
            project_id=envelope.metadata.project_id or 0,
            definition=_definition(event),
            created_at=now,
            created_by=actor,
            updated_at=now,
            updated_by=actor,
        )
    assert state is not None, f"a {words.role}'s stream begins with its creation"
    touched: dict[str, object] = {"updated_at": now, "updated_by": actor}
    if isinstance(event, words.updated):
        return state.model_copy(update={**touched, "definition": _definition(event)})
    if isinstance(event, words.deleted):
        return state.model_copy(update={**touched, "deleted": True})
    return state.model_copy(update={"references": _references(words, state, envelope)})


def _references(words: Vocabulary, state: Connection, envelope: Envelope) -> tuple[Reference, ...]:
    event = envelope.data
    if isinstance(event, words.referenced):
        others = tuple(item for item in state.references if item.job_id != event.job_id)
        return (*others, Reference(**event.model_dump(), reserved_at=envelope.time))
    if isinstance(event, words.confirmed):
        return tuple(
            item.model_copy(update={"reserved_until": None}) if item.job_id == event.job_id else item
            for item in state.references
        )
    if isinstance(event, words.released):
        return tuple(item for item in state.references if item.job_id != event.job_id)
    raise AssertionError(f"a {words.role} has no event {event.TYPE}")


def _definition(event: ConnectionDefined) -> Definition:
    return Definition(**event.model_dump())


def unique_keys(state: Connection) -> Sequence[str]:
    return () if state.deleted else (name_key(state.project_id, state.definition.name),)


def name_key(project_id: int, name: str) -> str:
    """What makes a name unique in its project."""
    return f"{project_id}/{name}"
