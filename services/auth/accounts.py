"""Accounts: signing up, logging in, and what the owners of a project do with its members."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace

from libs.core.decider import Act, ExpectedVersion
from libs.core.entity import Entity
from libs.core.envelope import Metadata
from libs.core.errors import Conflict, FieldError, Forbidden, InvalidInput, NotFound, Unauthenticated
from libs.core.idempotency import IdempotencyKey
from libs.core.principal import FIRST_PROJECT_ID, Principal, Role
from libs.eventsourcing.batch import SideWrite
from libs.eventsourcing.command_handler import CommandHandler
from libs.eventsourcing.requests import CommandRequest
from libs.mongodb.sequences import Sequences
from services.auth.domain.api_key import API_KEY, RevokeApiKey
from services.auth.domain.oauth_client import OAUTH_CLIENT, RevokeOauthClient
from services.auth.domain.project import PROJECT, AddMember, CreateProject, RemoveMember
from services.auth.domain.user import USER, ChangeEmail, ChangePassword, SignUp, User
from services.auth.passwords import Passwords
from services.auth.queries import SECRETS, AuthQueries, password_id
from services.auth.sessions import Sessions
from services.auth.throttle import LoginThrottle

NOBODY = 0
REVOKED_AT_ONCE_MAX = 200


@dataclass(frozen=True, slots=True)
class NewUser:
    """What a new account is made from; ``password_hash`` stays out of every event."""

    username: str
    email: str
    password_hash: str

    def secret(self, user_id: int) -> SideWrite:
        return _password_secret(user_id, self.password_hash)


class Accounts:
    """The use cases of users and their membership."""

    def __init__(
        self,
        *,
        commands: CommandHandler,
        queries: AuthQueries,
        sequences: Sequences,
        passwords: Passwords,
        sessions: Sessions,
        throttle_accounts: LoginThrottle,
        throttle_addresses: LoginThrottle,
    ) -> None:
        self._commands = commands
        self._queries = queries
        self._sequences = sequences
        self._passwords = passwords
        self._sessions = sessions
        self._throttle_accounts = throttle_accounts
        self._throttle_addresses = throttle_addresses
        self._first_project_exists = False

    async def sign_up(
        self, username: str, email: str, password: str, metadata: Metadata, idempotency: IdempotencyKey | None
    ) -> Entity[User]:
        """Create a user with a project of its own, both in one transaction.

        Raises:
            Conflict: the username or the e-mail address is taken; ``errors`` says which.
        """
        new = await self._new_user(username, email, password, idempotency)
        if await self._first_project_is_free():
            try:
                return await self._create_with_project(new, FIRST_PROJECT_ID, metadata, idempotency)
            except Conflict as conflict:
                # Two first signups at once: the slower one takes the next project.
                if conflict.code != "project_exists":
                    raise
        project_id = await self._sequences.next("project", FIRST_PROJECT_ID + 1)
        return await self._create_with_project(new, project_id, metadata, idempotency)

    async def log_in(self, login: str, password: str, address: str) -> tuple[Entity[User], str]:
        """Open a session for a username or e-mail address; returns the user and the session's token.

        Raises:
            Unauthenticated: the account or its password is not known; both look and take the same.
            RateLimited: too many failures of this account or from this address.
        """
        user = await self._queries.user_by_login(login)
        if not await self._is_password_of(user, login, password, address) or user is None:
            raise Unauthenticated("the username or the password is wrong", code="wrong_credentials")
        await self._sessions.note_address(int(user.id), address)
        return user, await self._sessions.open(user)

    async def confirm_password(self, user: Entity[User], password: str | None, address: str) -> None:
        """Check that this is the user's current password.

        Raises:
            InvalidInput: it is missing or wrong.
            RateLimited: too many failures of this account or from this address.
        """
        if password is None:
            message = "is required to change your own password"
            raise _wrong_password(message, "required")
        if not await self._is_password_of(user, user.state.username, password, address):
            raise _wrong_password("is not your present password", "wrong_password")

    async def _is_password_of(self, user: Entity[User] | None, login: str, password: str, address: str) -> bool:
        """Whether the password is right. Counts the attempt, and takes it back if it is.

        Where the user logged in before, only failures from there count. So strangers who guess at an account, or from
        an address that is shared, can't lock its user out.
        """
        if user is not None and await self._sessions.knows_address(int(user.id), address):
            pair = "known", int(user.id), address
            await self._throttle_accounts.admit(*pair)
            if right := await self._verify(user, password):
                await self._throttle_accounts.forget(*pair)
            return right
        await self._throttle_addresses.admit(address)
        account = ("name", login.casefold()) if user is None else ("user", int(user.id))
        await self._throttle_accounts.admit(*account)
        if right := await self._verify(user, password):
            await self._throttle_accounts.forget(*account)
            await self._throttle_addresses.take_back(address)
        return right

    async def _verify(self, user: Entity[User] | None, password: str) -> bool:
        stored_hash = await self._queries.password_hash(NOBODY if user is None else int(user.id))
        return await self._passwords.verify(stored_hash, password)

    async def add_user(
        self,
        username: str,
        email: str,
        password: str,
        role: Role,
        project_id: int,
        metadata: Metadata,
        idempotency: IdempotencyKey | None,
    ) -> Entity[User]:
        """Create a user as a member of an existing project; the first user of a project without members owns it."""
        new = await self._new_user(username, email, password, idempotency)
        if project_id == FIRST_PROJECT_ID and await self._first_project_is_free():
            return await self._create_with_project(new, project_id, metadata, idempotency)
        user_id = await self._sequences.next("user")
        acts = [
            Act(USER, user_id, SignUp(username=username, email=email)),
            Act(PROJECT, project_id, AddMember(user_id=user_id, role=role)),
        ]
        return await self._execute_user(
            new.username, new.email, CommandRequest(acts, metadata, [new.secret(user_id)], idempotency)
        )

    async def change(
        self,
        user_id: int,
        email: str | None,
        password: str | None,
        metadata: Metadata,
        *,
        session_token: str | None = None,
        expected_version: ExpectedVersion = None,
    ) -> Entity[User]:
        """Change a user's e-mail address, password or both.

        A new password ends all of the user's sessions but the one in ``session_token``.
        """
        user = await self._queries.user(user_id)
        if user is None:
            raise NotFound(f"there is no user {user_id}", code="user_not_found")
        if email is not None:
            await self._refuse_taken(None, email, but_of=user_id)
        acts = [] if email is None else [Act(USER, user_id, ChangeEmail(email), expected_version)]
        side_writes: list[SideWrite] = []
        if password is not None:
            acts.append(Act(USER, user_id, ChangePassword(), None if acts else expected_version))
            side_writes.append(_password_secret(user_id, await self._passwords.hash(password)))
            if session_token is not None:
                version = user.state.password_version + 1
                side_writes.append(self._sessions.carried_over(session_token, user_id, version))
        if not acts:
            return user
        return await self._execute_user(None, email, CommandRequest(acts, metadata, side_writes))

    async def remove_member(self, project_id: int, user_id: int, metadata: Metadata) -> None:
        """End a membership, and revoke every key and client that acts on the member's behalf.

        Credentials are refused from the moment that the membership has ended. Beyond ``REVOKED_AT_ONCE_MAX``, they are
        marked as revoked in further transactions.
        """
        revocations = await self._revocations(project_id, user_id)
        removal = Act(PROJECT, project_id, RemoveMember(user_id))
        await self._commands.execute(CommandRequest([removal, *revocations], metadata))
        while revocations := await self._revocations(project_id, user_id):
            await self._commands.execute(CommandRequest(revocations, metadata))

    async def _revocations(self, project_id: int, user_id: int) -> list[Act]:
        keys, clients = await asyncio.gather(
            *(
                self._queries.good_credentials_of(aggregate, project_id, user_id, REVOKED_AT_ONCE_MAX)
                for aggregate in (API_KEY, OAUTH_CLIENT)
            )
        )
        acts = [
            *(Act(API_KEY, key_id, RevokeApiKey()) for key_id in keys),
            *(Act(OAUTH_CLIENT, client_id, RevokeOauthClient()) for client_id in clients),
        ]
        return acts[:REVOKED_AT_ONCE_MAX]

    async def _new_user(self, username: str, email: str, password: str, idempotency: IdempotencyKey | None) -> NewUser:
        if idempotency is None:
            # A repeated request finds its own names taken; the write path tells it from another's.
            await self._refuse_taken(username, email)
        return NewUser(username, email, await self._passwords.hash(password))

    async def _create_with_project(
        self, new: NewUser, project_id: int, metadata: Metadata, idempotency: IdempotencyKey | None
    ) -> Entity[User]:
        user_id = await self._sequences.next("user")
        acts = [
            Act(USER, user_id, SignUp(username=new.username, email=new.email)),
            Act(PROJECT, project_id, CreateProject(name=f"{new.username}'s project", owner_id=user_id)),
        ]
        placed = replace(metadata, project_id=project_id)
        work = CommandRequest(acts, placed, [new.secret(user_id)], idempotency)
        return await self._execute_user(new.username, new.email, work)

    async def _execute_user(self, username: str | None, email: str | None, work: CommandRequest) -> Entity[User]:
        try:
            outcome = await self._commands.execute(work)
        except Conflict as conflict:
            if conflict.code == "already_exists":
                await self._refuse_taken(username, email)
            raise
        # Changes of one user give one entity an act; the last is the user as it stands after all.
        users = [entity for entity in outcome.entities if entity is not None and isinstance(entity.state, User)]
        return users[-1]

    async def _first_project_is_free(self) -> bool:
        if not self._first_project_exists:
            self._first_project_exists = await self._queries.project(FIRST_PROJECT_ID) is not None
        return not self._first_project_exists

    async def _refuse_taken(self, username: str | None, email: str | None, but_of: int | None = None) -> None:
        taken = await self._queries.taken_fields(username, email, but_of)
        if taken:
            errors = [FieldError(field, f"the {field} is already taken", "taken") for field in taken]
            message = "; ".join(error.message for error in errors)
            raise Conflict(message, code=f"{taken[0]}_taken", errors=errors)


def project_meant(principal: Principal, project_id: int | None) -> int:
    """The project that a request is about: the one it names, or the caller's only one.

    Raises:
        Forbidden: the caller is not a member of it, or of none at all.
        Conflict: the caller has several and named none.
    """
    if project_id is not None:
        principal.require_project(project_id)
        return project_id
    match sorted(principal.projects):
        case [only]:
            return only
        case []:
            raise Forbidden("you are not a member of any project", code="not_a_member")
        case several:
            raise _ambiguous(several)


def require_owner(principal: Principal, project_id: int) -> None:
    """Raises ``Forbidden`` unless the caller owns the project."""
    principal.require_project(project_id)
    if principal.projects[project_id] != "owner":
        raise Forbidden(f"only an owner of project {project_id} may do this", code="not_an_owner")


def _wrong_password(message: str, code: str) -> InvalidInput:
    return InvalidInput(f"current_password: {message}", errors=[FieldError("current_password", message, code)])


def _ambiguous(project_ids: Sequence[int]) -> Conflict:
    named = ", ".join(map(str, project_ids))
    message = f"project_id: name one of your projects ({named})"
    return Conflict(message, code="project_ambiguous", errors=[FieldError("project_id", message, "required")])


def _password_secret(user_id: int, password_hash: str) -> SideWrite:
    document = {"_id": password_id(user_id), "kind": "password", "user_id": user_id, "hash": password_hash}
    return SideWrite(SECRETS, password_id(user_id), document)
