"""A project: what owns sources, destinations and jobs, and the users who work in it."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import assert_never

from libs.contracts.auth import MemberAdded, MemberRemoved, ProjectCreated
from libs.core.decider import Aggregate
from libs.core.envelope import Envelope, Event, Frozen
from libs.core.errors import Conflict, NotFound
from libs.core.principal import Role


class Member(Frozen):
    user_id: int
    role: Role


class Project(Frozen):
    """A project and its members.

    Args:
        members: in the order of their joining; at least one of them is an owner.
    """

    name: str
    members: tuple[Member, ...]
    created_at: datetime

    def role_of(self, user_id: int) -> Role | None:
        return next((member.role for member in self.members if member.user_id == user_id), None)

    def owners(self) -> tuple[int, ...]:
        return tuple(member.user_id for member in self.members if member.role == "owner")


@dataclass(frozen=True, slots=True)
class CreateProject:
    name: str
    owner_id: int


@dataclass(frozen=True, slots=True)
class AddMember:
    user_id: int
    role: Role


@dataclass(frozen=True, slots=True)
class RemoveMember:
    user_id: int


Command = CreateProject | AddMember | RemoveMember


def decide(state: Project | None, command: Command) -> Sequence[Event]:
    if isinstance(command, CreateProject):
        return _create(state, command)
    if state is None:
        raise NotFound("there is no such project", code="project_not_found")
    match command:
        case AddMember():
            return _add(state, command)
        case RemoveMember():
            return _remove(state, command)
        case _:
            assert_never(command)


def _create(state: Project | None, command: CreateProject) -> Sequence[Event]:
    if state is not None:
        raise Conflict("the project exists already", code="project_exists")
    return [ProjectCreated(name=command.name), MemberAdded(user_id=command.owner_id, role="owner")]


def _add(state: Project, command: AddMember) -> Sequence[Event]:
    if state.role_of(command.user_id) is not None:
        raise Conflict("the user is a member of this project already", code="member_exists")
    return [MemberAdded(user_id=command.user_id, role=command.role)]


def _remove(state: Project, command: RemoveMember) -> Sequence[Event]:
    if state.role_of(command.user_id) is None:
        raise NotFound("the user is not a member of this project", code="user_not_found")
    if state.owners() == (command.user_id,):
        raise Conflict("the last owner of a project can't be removed from it", code="last_owner")
    return [MemberRemoved(user_id=command.user_id)]


def evolve(state: Project | None, envelope: Envelope) -> Project:
    match envelope.data:
        case ProjectCreated(name=name):
            return Project(name=name, members=(), created_at=envelope.time)
        case MemberAdded(user_id=user_id, role=role):
            assert state is not None
            return state.model_copy(update={"members": (*state.members, Member(user_id=user_id, role=role))})
        case MemberRemoved(user_id=user_id):
            assert state is not None
            remaining = tuple(member for member in state.members if member.user_id != user_id)
            return state.model_copy(update={"members": remaining})
        case unknown:
            raise AssertionError(f"a project has no event {unknown.TYPE}")


PROJECT: Aggregate[Project] = Aggregate(
    name="project",
    collection="projects",
    state=Project,
    decide=decide,
    evolve=evolve,
    id_type=int,
)
