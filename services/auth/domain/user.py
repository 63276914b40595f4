"""A user: a unique name, a unique e-mail address, and how often the password was changed."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import assert_never

from libs.contracts.auth import PasswordChanged, UserSignedUp, UserUpdated
from libs.core.decider import Aggregate
from libs.core.envelope import Envelope, Event, Frozen
from libs.core.errors import Conflict, NotFound


class User(Frozen):
    """What a user is to the platform.

    Args:
        password_version: raised by every change of the password; a session opened under another one is void.
    """

    username: str
    email: str
    password_version: int
    created_at: datetime
    updated_at: datetime


@dataclass(frozen=True, slots=True)
class SignUp:
    username: str
    email: str


@dataclass(frozen=True, slots=True)
class ChangeEmail:
    email: str


@dataclass(frozen=True, slots=True)
class ChangePassword:
    """The new password's hash is written beside the event, never in it."""


Command = SignUp | ChangeEmail | ChangePassword


def decide(state: User | None, command: Command) -> Sequence[Event]:
    if isinstance(command, SignUp):
        return _sign_up(state, command)
    if state is None:
        raise NotFound("there is no such user", code="user_not_found")
    match command:
        case ChangeEmail(email):
            return [] if email == state.email else [UserUpdated(email=email)]
        case ChangePassword():
            return [PasswordChanged()]
        case _:
            assert_never(command)


def _sign_up(state: User | None, command: SignUp) -> Sequence[Event]:
    if state is not None:
        raise Conflict("the user exists already", code="user_exists")
    return [UserSignedUp(username=command.username, email=command.email)]


def evolve(state: User | None, envelope: Envelope) -> User:
    match envelope.data:
        case UserSignedUp(username=username, email=email):
            return User(
                username=username,
                email=email,
                password_version=1,
                created_at=envelope.time,
                updated_at=envelope.time,
            )
        case UserUpdated(email=email):
            assert state is not None
            return state.model_copy(update={"email": email, "updated_at": envelope.time})
        case PasswordChanged():
            assert state is not None
            return state.model_copy(
                update={"password_version": state.password_version + 1, "updated_at": envelope.time}
            )
        case unknown:
            raise AssertionError(f"a user has no event {unknown.TYPE}")


def username_key(username: str) -> str:
    return f"username/{username.casefold()}"


def email_key(email: str) -> str:
    return f"email/{email.casefold()}"


USER: Aggregate[User] = Aggregate(
    name="user",
    collection="users",
    state=User,
    decide=decide,
    evolve=evolve,
    unique_keys=lambda user: (username_key(user.username), email_key(user.email)),
    id_type=int,
    conflict_message="the username or the email is already taken",
    conflict_field="username",
)
