"""The REST calls of accounts, members and API keys, and the internal call that resolves a credential."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

from aiohttp import web
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from libs.contracts.internal import RESOLVE_CREDENTIAL, CredentialPresented, CredentialResolved
from libs.core.clock import isoformat_z
from libs.core.envelope import Metadata
from libs.core.errors import FieldError, Forbidden, InvalidInput, NotFound
from libs.core.json import canonical_json
from libs.core.principal import Principal, Role
from libs.runtime.command_handler import Entity, IdempotencyKey
from libs.runtime.http import (
    idempotency_of,
    if_match_of,
    internal_route,
    json_answer,
    metadata_of,
    principal_of,
    read_body,
    read_query,
    success,
)
from libs.runtime.mongo import Document
from services.auth.accounts import Accounts, project_meant, require_owner
from services.auth.config import AuthSettings
from services.auth.credentials import Credentials, without_scheme
from services.auth.domain.api_key import ApiKey, Permission
from services.auth.domain.user import User
from services.auth.keys import IssuedKey, Keys, KeyWanted
from services.auth.passwords import Passwords
from services.auth.queries import KEYS_MAX, AuthQueries
from services.auth.sessions import Sessions
from services.auth.throttle import address_subject
from services.auth.tokens import is_session_token

SESSION_COOKIE = "datasync_session"
CLIENT_ADDRESS_HEADER = "X-DataSync-Client-Address"

PASSWORD_LENGTH_MAX = 1024
LOGIN_LENGTH_MAX = 320
USERNAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
EMAIL = re.compile(r"[^@\s\x00-\x1f\x7f]{1,64}@[^@\s\x00-\x1f\x7f.]+(\.[^@\s\x00-\x1f\x7f.]+)+")


def _valid_username(value: str) -> str:
    if not USERNAME.fullmatch(value):
        raise ValueError("may hold letters, digits, '.', '_' and '-', and begins with a letter or a digit")
    return value


def _valid_email(value: str) -> str:
    if not EMAIL.fullmatch(value):
        raise ValueError("is not an e-mail address such as ada@example.com")
    return value


Username = Annotated[str, StringConstraints(min_length=3, max_length=64), AfterValidator(_valid_username)]
Email = Annotated[str, StringConstraints(max_length=254), AfterValidator(_valid_email)]
Password = Annotated[str, StringConstraints(min_length=8, max_length=PASSWORD_LENGTH_MAX)]


class Body(BaseModel):
    """A body of the project family: what it does not know it does not mind."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, hide_input_in_errors=True)


class SignupBody(Body):
    email: Email
    username: Username
    password: Password


class LoginBody(Body):
    """The bounds of a signup are not a login's: what nobody could have chosen is merely wrong."""

    username: str = Field(max_length=LOGIN_LENGTH_MAX)
    password: str = Field(max_length=PASSWORD_LENGTH_MAX)


class NewUserBody(SignupBody):
    role: Role = "member"
    project_id: int | None = None


class UserChangeBody(Body):
    username: str | None = None
    email: Email | None = None
    password: Password | None = None


class ProjectQuery(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    project_id: int | None = None


class NewKeyBody(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str = Field(min_length=1, max_length=128)
    permission: Permission = "read-write"
    scopes: list[str] = Field(default_factory=list, max_length=64)
    expires_in_days: int = Field(default=90, ge=1, le=3650)
    project_id: int | None = None
    developer_id: str | None = Field(default=None, min_length=1, max_length=128)


class KeysQuery(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    limit: int = Field(default=100, ge=1, le=KEYS_MAX)
    offset: int = Field(default=0, ge=0)
    project_id: int | None = None


@dataclass(frozen=True, slots=True)
class AuthHttp:
    """The handlers, over the use cases that they call."""

    settings: AuthSettings
    accounts: Accounts
    keys: Keys
    queries: AuthQueries
    sessions: Sessions
    credentials: Credentials
    passwords: Passwords
    version: str

    def routes(self) -> Sequence[web.AbstractRouteDef]:
        return [
            web.post("/signup", self.sign_up),
            web.post("/login", self.log_in),
            web.post("/logout", self.log_out),
            web.get("/auth", self.who_am_i),
            web.get("/auth/check", self.who_am_i),
            web.get("/telemetry-id", self.telemetry_id),
            web.get("/api/v1/platform/opt/status", self.opt_status),
            web.get("/api/v1/platform/releases", self.releases),
            web.get("/api/v1/projects", self.list_projects),
            web.get("/api/v1/users", self.list_users),
            web.post("/api/v1/users", self.add_user),
            web.put("/api/v1/users/{userid}", self.change_user),
            web.delete("/api/v1/users/{userid}", self.remove_user),
            web.get("/api/v2/keys", self.list_keys),
            web.post("/api/v2/keys", self.issue_key),
            web.get("/api/v2/keys/{keyid}", self.get_key),
            web.delete("/api/v2/keys/{keyid}", self.revoke_key),
            internal_route(RESOLVE_CREDENTIAL, self.resolve_credential),
        ]

    # Accounts

    async def sign_up(self, request: web.Request) -> web.StreamResponse:
        if self.settings.auth_signup == "invite":
            message = "signing up is by invitation only: ask an owner of a project for an account"
            raise Forbidden(message, code="signup_closed")
        body = await read_body(request, SignupBody)
        metadata = replace(metadata_of(request), actor=body.username)
        idempotency = await self._idempotency_of(request, body)
        user = await self.accounts.sign_up(body.username, body.email, body.password, metadata, idempotency)
        data = {"email": user.state.email, "username": user.state.username}
        return success(data, message="the account was made")

    async def log_in(self, request: web.Request) -> web.StreamResponse:
        body = await read_body(request, LoginBody)
        user, token = await self.accounts.log_in(body.username, body.password, client_address(request))
        answer = success({"username": user.state.username, "token": token}, message="logged in")
        answer.set_cookie(
            SESSION_COOKIE,
            token,
            max_age=int(self.sessions.ttl_seconds),
            path="/",
            httponly=True,
            samesite="Lax",
            secure=self.settings.session_cookie_secure,
        )
        answer.headers["Cache-Control"] = "no-store"
        return answer

    async def log_out(self, request: web.Request) -> web.StreamResponse:
        for token in presented_sessions(request):
            await self.sessions.end(token)
        answer = success({}, message="logged out")
        answer.del_cookie(
            SESSION_COOKIE, path="/", httponly=True, samesite="Lax", secure=self.settings.session_cookie_secure
        )
        return answer

    async def who_am_i(self, request: web.Request) -> web.StreamResponse:
        return success({"username": principal_of(request).name})

    # What the front end asks of the platform

    async def telemetry_id(self, request: web.Request) -> web.StreamResponse:
        return success({"user_id": "", "version": self.version})

    async def opt_status(self, request: web.Request) -> web.StreamResponse:
        return success({"enabled": False})

    async def releases(self, request: web.Request) -> web.StreamResponse:
        return success({name: {"releases": []} for name in ("olake_ui_worker", "olake_helm", "olake", "features")})

    # Projects and their members

    async def list_projects(self, request: web.Request) -> web.StreamResponse:
        principal = principal_of(request)
        projects = await self.queries.projects(sorted(principal.projects, reverse=True))
        return success(
            [
                {
                    "id": project.id,
                    "name": project.state.name,
                    "role": principal.projects[int(project.id)],
                    "created_at": isoformat_z(project.state.created_at),
                }
                for project in projects
            ]
        )

    async def list_users(self, request: web.Request) -> web.StreamResponse:
        users = await self.queries.users(await self._visible_user_ids(principal_of(request)))
        return success([user_body(user) for user in users])

    async def add_user(self, request: web.Request) -> web.StreamResponse:
        principal = principal_of(request)
        body = await read_body(request, NewUserBody)
        project_id = project_meant(principal, body.project_id)
        require_owner(principal, project_id)
        user = await self.accounts.add_user(
            body.username,
            body.email,
            body.password,
            body.role,
            project_id,
            _in_project(metadata_of(request), project_id),
            await self._idempotency_of(request, body),
        )
        return success(user_body(user), message=f"the user {user.state.username} was added", etag=_etag(user))

    async def change_user(self, request: web.Request) -> web.StreamResponse:
        principal = principal_of(request)
        body = await read_body(request, UserChangeBody)
        user = await self._changeable_user(principal, _integer_of(request, "userid"))
        if body.username is not None and body.username != user.state.username:
            message = "a username can't be changed: histories show it"
            raise InvalidInput(f"username: {message}", errors=[FieldError("username", message, "immutable")])
        own = principal.kind == "user" and principal.subject == str(user.id)
        changed = await self.accounts.change(
            int(user.id),
            None if body.email == user.state.email else body.email,
            body.password,
            _in_project(metadata_of(request), None),
            session_token=next(iter(presented_sessions(request)), None) if own else None,
            expected_version=if_match_of(request),
        )
        return success(user_body(changed), message="the user was changed", etag=_etag(changed))

    async def remove_user(self, request: web.Request) -> web.StreamResponse:
        principal = principal_of(request)
        user_id = _integer_of(request, "userid")
        project_id = await self._shared_project(principal, user_id, read_query(request, ProjectQuery).project_id)
        require_owner(principal, project_id)
        user = await self.queries.user(user_id)
        await self.accounts.remove_member(project_id, user_id, _in_project(metadata_of(request), project_id))
        username = "" if user is None else user.state.username
        message = f"the user {username} was removed from project {project_id}"
        return success({"id": user_id, "username": username}, message=message)

    async def _idempotency_of(self, request: web.Request, body: SignupBody) -> IdempotencyKey | None:
        """The request's key; the record of it must be no quicker way to guess the password than its hash is."""
        salt = request.headers.get("Idempotency-Key")
        if salt is None:
            return None
        fingerprint = await self.passwords.fingerprint(body.password, f"{body.username}\n{salt}")
        return idempotency_of(request, canonical_json({**body.model_dump(), "password": fingerprint}))

    async def _visible_user_ids(self, principal: Principal) -> set[int]:
        projects = await self.queries.projects(principal.projects)
        return {member.user_id for project in projects for member in project.state.members}

    async def _shared_project(self, principal: Principal, user_id: int, named: int | None) -> int:
        """The project that the user is removed from: the one named, or the only one shared with the caller."""
        if named is not None:
            return project_meant(principal, named)
        theirs = await self.queries.projects_of(user_id)
        shared = {project_id: role for project_id, role in principal.projects.items() if project_id in theirs}
        if not shared:
            raise _no_such_user(user_id)
        return project_meant(principal.model_copy(update={"projects": shared}), None)

    async def _changeable_user(self, principal: Principal, user_id: int) -> Entity[User]:
        """A user that the caller may change: itself, or one whose every project the caller owns."""
        user = await self.queries.user(user_id)
        theirs = await self.queries.projects_of(user_id)
        own = principal.kind == "user" and principal.subject == str(user_id)
        if user is None or not (own or principal.projects.keys() & theirs.keys()):
            raise _no_such_user(user_id)
        if not own and any(principal.projects.get(project_id) != "owner" for project_id in theirs):
            message = "only the user, or an owner of all of the user's projects, may do this"
            raise Forbidden(message, code="not_an_owner")
        return user

    # API keys

    async def issue_key(self, request: web.Request) -> web.StreamResponse:
        principal = principal_of(request)
        body = await read_body(request, NewKeyBody)
        project_id = project_meant(principal, body.project_id)
        wanted = KeyWanted(body.name, body.permission, tuple(body.scopes), body.developer_id, body.expires_in_days)
        metadata = _in_project(metadata_of(request), project_id)
        issued = await self.keys.issue(principal, project_id, wanted, metadata, idempotency_of(request))
        answer = json_answer(new_key_body(issued, project_id), status=201, etag=_etag(issued.entity))
        answer.headers["Cache-Control"] = "no-store"
        return answer

    async def list_keys(self, request: web.Request) -> web.StreamResponse:
        principal = principal_of(request)
        query = read_query(request, KeysQuery)
        if query.project_id is not None:
            principal.require_project(query.project_id)
        project_ids = principal.projects if query.project_id is None else [query.project_id]
        # One more than asked for tells whether there is a next page.
        found = await self.queries.keys(project_ids, query.limit + 1, query.offset)
        page = found[: query.limit]
        usage = await self.queries.usage_of([key.id for key, _ in page])
        following = request.rel_url.update_query(limit=query.limit, offset=query.offset + query.limit)
        return json_answer(
            {
                "keys": [key_body(key, project_id, usage.get(str(key.id))) for key, project_id in page],
                "next_page": str(following) if len(found) > query.limit else None,
            }
        )

    async def get_key(self, request: web.Request) -> web.StreamResponse:
        key_id = request.match_info["keyid"]
        found = await self.queries.key_in(key_id, principal_of(request))
        if found is None:
            raise NotFound("there is no such key", code="key_not_found")
        key, project_id = found
        usage = await self.queries.usage_of([key_id])
        return json_answer(key_body(key, project_id, usage.get(key_id)), etag=_etag(key))

    async def revoke_key(self, request: web.Request) -> web.StreamResponse:
        principal = principal_of(request)
        metadata = _in_project(metadata_of(request), None)
        key, project_id = await self.keys.revoke(principal, request.match_info["keyid"], metadata, if_match_of(request))
        return json_answer(key_body(key, project_id, None), etag=_etag(key))

    # Internal

    async def resolve_credential(self, request: CredentialPresented) -> CredentialResolved:
        return await self.credentials.resolve(request)


def client_address(request: web.Request) -> str:
    """What logins of one client count under; the gateway removes this header from what it is sent and sets it."""
    return address_subject(request.headers.get(CLIENT_ADDRESS_HEADER) or request.remote or "")


def presented_sessions(request: web.Request) -> list[str]:
    """The session tokens that the request carries, the Authorization header's first."""
    candidates = [without_scheme(request.headers.get("Authorization", "")), request.cookies.get(SESSION_COOKIE, "")]
    return [candidate for candidate in candidates if is_session_token(candidate)]


def user_body(user: Entity[User]) -> dict[str, Any]:
    return {
        "id": user.id,
        "username": user.state.username,
        "email": user.state.email,
        "created_at": isoformat_z(user.state.created_at),
        "updated_at": isoformat_z(user.state.updated_at),
    }


def key_body(key: Entity[ApiKey], project_id: int, usage: Document | None) -> dict[str, Any]:
    state = key.state
    return {
        "id": key.id,
        "name": state.name,
        "prefix": state.prefix,
        "permission": state.permission,
        "scopes": state.scopes,
        "project_id": project_id,
        "developer_id": state.developer_id,
        "created_at": isoformat_z(state.created_at),
        "created_by": state.created_by,
        "expires_at": state.expires_at and isoformat_z(state.expires_at),
        "revoked_at": state.revoked_at and isoformat_z(state.revoked_at),
        "last_used_at": None if usage is None else isoformat_z(usage["last_used_at"]),
        "uses": 0 if usage is None else usage["uses"],
    }


def new_key_body(issued: IssuedKey, project_id: int) -> dict[str, Any]:
    """The one answer that holds the key itself."""
    return {**key_body(issued.entity, project_id, None), "secret": issued.secret}


def _etag(entity: Entity[Any]) -> str:
    return str(entity.version)


def _in_project(metadata: Metadata, project_id: int | None) -> Metadata:
    return replace(metadata, project_id=project_id)


def _integer_of(request: web.Request, name: str) -> int:
    text = request.match_info[name]
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise InvalidInput(f"{name}: is not an id", errors=[FieldError(name, "is not an id")])
    return int(text)


def _no_such_user(user_id: int) -> NotFound:
    return NotFound(f"there is no user {user_id} in your projects", code="user_not_found")
