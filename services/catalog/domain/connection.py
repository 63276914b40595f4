"""A source or destination: defined, changed, referenced by jobs, deleted.

A connection that a job uses can't be deleted (``_require_unused``). The life of a job's reference to a connection:

1. ``Reserve``: a job is about to be created or changed. The reference has a deadline.
2. ``Confirm``: the job's event has arrived. The reference no longer expires.
3. ``Release``: the job was deleted, or uses another connection. The reference is removed.
   ``Expire``: the deadline of a reservation has passed and the job never appeared. The reference is removed.

Reserving and deleting are decided on the connection's own stream, so a delete can't race with the creation of a job.
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
    """What the user defined; secrets in ``config_json`` are masks that refer to ``secret_ref``."""

    name: str
    type: str
    version: str
    config_json: str
    secret_ref: str | None = None


class Reference(Frozen):
    """A job's reference; ``reserved_until`` is None once it is confirmed."""

    job_id: int
    job_name: str
    reserved_at: datetime
    reserved_until: datetime | None

    def is_reserved_after(self, moment: datetime) -> bool:
        """Whether it is a reservation for a later change of the job than the event of ``moment``."""
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
    """A job that is about to be created or changed will use the connection."""

    job_id: int
    job_name: str
    reserved_until: datetime


@dataclass(frozen=True, slots=True)
class Confirm:
    """The job exists and uses the connection since ``known_at``."""

    job_id: int
    job_name: str
    known_at: datetime


@dataclass(frozen=True, slots=True)
class Release:
    """The job no longer uses the connection since ``known_at``."""

    job_id: int
    known_at: datetime


@dataclass(frozen=True, slots=True)
class Expire:
    """The job of the reservation until ``reserved_until`` never appeared."""

    job_id: int
    reserved_until: datetime


@dataclass(frozen=True, slots=True)
class Delete:
    """``secret_ref_before`` names the secrets that are deleted with it."""

    secret_ref_before: str | None


Command = Create | Update | Reserve | Confirm | Release | Expire | Delete


@dataclass(frozen=True, slots=True)
class EventTypes:
    """The event classes of sources, or of destinations."""

    role: Role
    collection: str
    created: type[ConnectionDefined]
    updated: type[ConnectionDefined]
    referenced: type[ConnectionReferenced]
    confirmed: type[ReferenceConfirmed]
    released: type[ReferenceReleased]
    deleted: type[CatalogEvent]


def connection_aggregate(types: EventTypes) -> Aggregate[Connection]:
    """The aggregate of sources, or of destinations."""
    return Aggregate(
        name=types.role,
        collection=types.collection,
        state=Connection,
        decide=lambda state, command: decide(types, state, command),
        evolve=lambda state, envelope: evolve(types, state, envelope),
        unique_keys=unique_keys,
        id_type=int,
        conflict_message=f"a {types.role} of this name exists in the project",
    )


def decide(types: EventTypes, state: Connection | None, command: Command) -> Sequence[Event]:
    """Raises ``NotFound`` if it does not exist or was deleted, ``Conflict`` if jobs use what is to be deleted."""
    if isinstance(command, Create):
        if state is not None:
            raise Conflict(f"the {types.role} exists already", code="already_exists")
        return [types.created(**command.definition.model_dump())]
    if state is None or state.deleted:
        raise NotFound(f"there is no such {types.role}")
    match command:
        case Update():
            return _update(types, state, command)
        case Reserve():
            return _reserve(types, state, command)
        case Confirm():
            return _confirm(types, state, command)
        case Release():
            return _release(types, state, command)
        case Expire():
            return _expire(types, state, command)
        case Delete(secret_ref_before):
            _require_unused(types.role, state)
            _require_same_secrets(state, secret_ref_before)
            return [types.deleted()]
        case _:
            assert_never(command)


def _update(types: EventTypes, state: Connection, command: Update) -> Sequence[Event]:
    require_same_type(types.role, state.definition.type, command.definition.type)
    _require_same_secrets(state, command.secret_ref_before)
    if command.definition == state.definition:
        return []
    return [types.updated(**command.definition.model_dump())]


def _require_same_secrets(state: Connection, secret_ref_before: str | None) -> None:
    """Raises ``Conflict`` if another change has replaced the secrets that this one was prepared with."""
    if state.definition.secret_ref != secret_ref_before:
        raise Conflict("the secrets have been changed by another request; try again", code=SECRETS_CHANGED)


def require_same_type(role: Role, before: str, after: str) -> None:
    """Raises ``InvalidInput`` if a change would change the connector."""
    if after != before:
        message = f"the type of a {role} can't change from {before} to {after}"
        raise InvalidInput(
            f"type: {message}", code="type_changed", errors=[FieldError("type", message, "type_changed")]
        )


def _reserve(types: EventTypes, state: Connection, command: Reserve) -> Sequence[Event]:
    reference = state.reference_of(command.job_id)
    if (
        reference is not None
        and reference.reserved_until is not None
        and reference.reserved_until >= command.reserved_until
    ):
        return []
    # A confirmed reference is reserved again, so that an earlier event of the job can't release it.
    return [types.referenced(job_id=command.job_id, job_name=command.job_name, reserved_until=command.reserved_until)]


def _confirm(types: EventTypes, state: Connection, command: Confirm) -> Sequence[Event]:
    reference = state.reference_of(command.job_id)
    if reference is not None and reference.is_reserved_after(command.known_at):
        return []
    confirmed = types.confirmed(job_id=command.job_id)
    if reference is None or reference.job_name != command.job_name:
        named = types.referenced(job_id=command.job_id, job_name=command.job_name, reserved_until=command.known_at)
        return [named, confirmed]
    return [] if reference.reserved_until is None else [confirmed]


def _release(types: EventTypes, state: Connection, command: Release) -> Sequence[Event]:
    reference = state.reference_of(command.job_id)
    if reference is None or reference.is_reserved_after(command.known_at):
        return []
    return [types.released(job_id=command.job_id)]


def _expire(types: EventTypes, state: Connection, command: Expire) -> Sequence[Event]:
    reference = state.reference_of(command.job_id)
    is_the_one = reference is not None and reference.reserved_until == command.reserved_until
    return [types.released(job_id=command.job_id)] if is_the_one else []


def _require_unused(role: Role, state: Connection) -> None:
    """Raises ``Conflict``, naming the jobs, while any job has a reference."""
    if not state.references:
        return
    names = [f'"{item.job_name}"' for item in state.references[:JOBS_NAMED_MAX]]
    if (more := len(state.references) - len(names)) > 0:
        names.append(f"{more} more")
    jobs = "job" if len(state.references) == 1 else "jobs"
    message = f"the {role} is used by the {jobs} {', '.join(names)}; delete or change them first"
    raise Conflict(message, code="in_use")


def evolve(types: EventTypes, state: Connection | None, envelope: Envelope) -> Connection:
    """Fold one event; references do not change ``updated_at`` and ``updated_by``."""
    now, actor, event = envelope.time, envelope.metadata.actor, envelope.data
    if isinstance(event, types.created):
        return Connection(
            project_id=envelope.metadata.project_id or 0,
            definition=_definition(event),
            created_at=now,
            created_by=actor,
            updated_at=now,
            updated_by=actor,
        )
    assert state is not None, f"a {types.role}'s stream begins with its creation"
    touched: dict[str, object] = {"updated_at": now, "updated_by": actor}
    if isinstance(event, types.updated):
        return state.model_copy(update={**touched, "definition": _definition(event)})
    if isinstance(event, types.deleted):
        return state.model_copy(update={**touched, "deleted": True})
    return state.model_copy(update={"references": _references(types, state, envelope)})


def _references(types: EventTypes, state: Connection, envelope: Envelope) -> tuple[Reference, ...]:
    event = envelope.data
    if isinstance(event, types.referenced):
        others = tuple(item for item in state.references if item.job_id != event.job_id)
        return (*others, Reference(**event.model_dump(), reserved_at=envelope.time))
    if isinstance(event, types.confirmed):
        return tuple(
            item.model_copy(update={"reserved_until": None}) if item.job_id == event.job_id else item
            for item in state.references
        )
    if isinstance(event, types.released):
        return tuple(item for item in state.references if item.job_id != event.job_id)
    raise AssertionError(f"a {types.role} has no event {event.TYPE}")


def _definition(event: ConnectionDefined) -> Definition:
    return Definition(**event.model_dump())


def unique_keys(state: Connection) -> Sequence[str]:
    return () if state.deleted else (name_key(state.project_id, state.definition.name),)


def name_key(project_id: int, name: str) -> str:
    """The unique key of a name in its project."""
    return f"{project_id}/{name}"
