"""The routes: accounts, projects and their members, API keys, OAuth clients and tokens; and the internal call that
resolves a credential."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from typing import ClassVar

from aiohttp import web

from libs.contracts.internal import RESOLVE_CREDENTIAL
from libs.core.addresses import one_client
from libs.core.entity import Entity
from libs.core.errors import Forbidden
from libs.core.idempotency import IdempotencyKey
from libs.core.json import canonical_json
from libs.core.principal import Principal
from libs.eventsourcing.command_handler import CommandHandler
from libs.eventsourcing.documents import Documents
from libs.mongodb.client import Document
from libs.web import routes
from libs.web.answers import Answer, event_view, respond
from libs.web.calls import Call
from libs.web.entities import NUMBERS, Entities, EntityRoutes, Shown, State
from libs.web.inputs import HistoryQuery
from libs.web.internal import internal_route
from libs.web.openapi import Content
from libs.web.requests import cookie_of, idempotency_key_of, idempotency_of, invalid_field
from services.auth.accounts import Accounts, project_meant, require_owner
from services.auth.answers import (
    CallerShown,
    ClientIssued,
    ClientShown,
    ClientsShown,
    EventsShown,
    KeyIssued,
    KeyShown,
    KeysShown,
    LoggedIn,
    Nothing,
    OptStatus,
    ProjectDetail,
    ProjectShown,
    ReleasesShown,
    SignedUp,
    TelemetryId,
    TokenGranted,
    UserRemoved,
    UserShown,
    client_view,
    key_view,
    project_detail,
    project_view,
    user_view,
)
from services.auth.config import AuthSettings
from services.auth.credentials import Credentials, without_scheme
from services.auth.domain.api_key import ApiKey
from services.auth.domain.oauth_client import OauthClient
from services.auth.domain.project import PROJECT, Project
from services.auth.domain.user import USER, User
from services.auth.inputs import (
    FORM,
    KeyChangeBody,
    KeysQuery,
    LoginBody,
    NewClientBody,
    NewKeyBody,
    NewUserBody,
    ProjectQuery,
    RotationBody,
    SignupBody,
    TokenForm,
    UserChangeBody,
    read_form,
)
from services.auth.keys import Keys
from services.auth.oauth import OauthClients, OauthTokens, token_request
from services.auth.passwords import Passwords
from services.auth.queries import AuthQueries
from services.auth.sessions import Sessions
from services.auth.tokens import is_session_token

SESSION_COOKIE = "datasync_session"
CLIENT_ADDRESS_HEADER = "X-DataSync-Client-Address"
IDS = replace(NUMBERS, pattern="")
"""The path matches any text, so that the error for a text that is no number names the user or project."""

NOT_STORED = {"Cache-Control": "no-store"}


@dataclass(frozen=True, slots=True)
class AccountRoutes:
    """Signing up, logging in and out."""

    settings: AuthSettings
    accounts: Accounts
    sessions: Sessions
    passwords: Passwords

    def routes(self) -> Sequence[web.RouteDef]:
        get, post = (partial(method, tag="Accounts") for method in (routes.get, routes.post))
        logged_in = Content("Logged in; the cookie holds the token too", LoggedIn, headers=("Set-Cookie",))
        logged_out = Content("Logged out", Nothing, headers=("Set-Cookie",))
        return [
            post("/signup", self.sign_up, "Make an account, and a project of its own", idempotent=True, refuses=(403,)),
            post("/login", self.log_in, "Log in", answer=logged_in, refuses=(401,)),
            post("/logout", self.log_out, "Log out", answer=logged_out),
            *(get(path, self.who_am_i, "Who the caller is") for path in ("/auth", "/auth/check")),
        ]

    async def sign_up(self, call: Call, body: SignupBody) -> Answer[SignedUp]:
        if self.settings.auth_signup == "invite":
            message = "signing up is by invitation only: ask an owner of a project for an account"
            raise Forbidden(message, code="signup_closed")
        metadata = replace(call.metadata, actor=body.username)
        idempotency = await guarded_idempotency(call, body, self.passwords)
        user = await self.accounts.sign_up(body.username, body.email, body.password, metadata, idempotency)
        return Answer({"email": user.state.email, "username": user.state.username}, message="the account was made")

    async def log_in(self, call: Call, body: LoginBody) -> web.StreamResponse:
        user, token = await self.accounts.log_in(body.username, body.password, client_address(call.request))
        shown: LoggedIn = {"username": user.state.username, "token": token}
        answer = respond(Answer(shown, message="logged in", headers=NOT_STORED), 200, enveloped=True)
        answer.set_cookie(
            SESSION_COOKIE,
            token,
            max_age=int(self.sessions.ttl_seconds),
            path="/",
            httponly=True,
            samesite="Lax",
            secure=self.settings.session_cookie_secure,
        )
        return answer

    async def log_out(self, call: Call) -> web.StreamResponse:
        for token in presented_sessions(call.request):
            await self.sessions.end(token)
        answer = respond(Answer(Nothing(), message="logged out"), 200, enveloped=True)
        answer.del_cookie(
            SESSION_COOKIE, path="/", httponly=True, samesite="Lax", secure=self.settings.session_cookie_secure
        )
        return answer

    async def who_am_i(self, call: Call) -> CallerShown:
        return {"username": call.caller.name}


@dataclass(frozen=True, slots=True)
class PlatformRoutes:
    """The calls of OLake's page about its platform."""

    version: str

    def routes(self) -> Sequence[web.RouteDef]:
        root = "/api/v1/platform"
        get = partial(routes.get, tag="Platform")
        return [
            get("/telemetry-id", self.telemetry_id, "Whom telemetry is about"),
            get(f"{root}/opt/status", self.opt_status, "Whether optimising is on"),
            get(f"{root}/releases", self.releases, "Releases to tell users of"),
        ]

    async def telemetry_id(self, call: Call) -> TelemetryId:
        """An empty id turns the page's telemetry off."""
        return {"user_id": "", "version": self.version}

    async def opt_status(self, call: Call) -> OptStatus:
        return {"enabled": False}

    async def releases(self, call: Call) -> ReleasesShown:
        return {
            "olake_ui_worker": {"releases": []},
            "olake_helm": {"releases": []},
            "olake": {"releases": []},
            "features": {"releases": []},
        }


class ProjectRoutes(EntityRoutes[Project, ProjectDetail]):
    """The caller's projects."""

    path = "/api/v1/projects"
    tag = "Users"
    shown = ProjectDetail

    def __init__(self, documents: Documents, commands: CommandHandler, queries: AuthQueries) -> None:
        super().__init__(Entities(PROJECT, documents, commands, parameter="projectid", ids=IDS, permit=_is_the_calls))
        self._queries = queries

    def routes(self) -> Sequence[web.RouteDef]:
        return [
            self.route("GET", self.path, self.list_own, "List projects"),
            *self.reading_one(),
        ]

    async def view(self, call: Call, entity: Entity[Project], as_of: datetime | None = None) -> ProjectDetail:
        return project_detail(entity, call.caller.projects[call.project_id])

    async def list_own(self, call: Call) -> list[ProjectShown]:
        own = call.caller.projects
        projects = await self._queries.projects(sorted(own, reverse=True))
        return [project_view(project, own[int(project.id)]) for project in projects]


class UserRoutes(EntityRoutes[User, UserShown]):
    """The members of the caller's projects."""

    path = "/api/v1/users"
    tag = "Users"
    shown = UserShown

    def __init__(
        self,
        documents: Documents,
        commands: CommandHandler,
        accounts: Accounts,
        queries: AuthQueries,
        sessions: Sessions,
        passwords: Passwords,
    ) -> None:
        users = Entities(
            USER,
            documents,
            commands,
            parameter="userid",
            ids=IDS,
            permit=self._shares_a_project,
            not_found_code="user_not_found",
        )
        super().__init__(users)
        self._accounts = accounts
        self._queries = queries
        self._sessions = sessions
        self._passwords = passwords

    def routes(self) -> Sequence[web.RouteDef]:
        return [
            self.route("GET", self.path, self.members, "List the members of your projects"),
            self.route(
                "POST", self.path, self.add, "Make an account for a new member", versioned=True, idempotent=True
            ),
            *self.reading_one(),
            self.route("PUT", self.one, self.change, "Change a user", versioned=True, conditional=True, refuses=(409,)),
            self.route("DELETE", self.one, self.remove, "Remove a user from a project", refuses=(409,)),
        ]

    async def view(self, call: Call, entity: Entity[User], as_of: datetime | None = None) -> UserShown:
        return user_view(entity)

    async def members(self, call: Call) -> list[UserShown]:
        projects = await self._queries.projects(call.caller.projects)
        user_ids = {member.user_id for project in projects for member in project.state.members}
        return [user_view(user) for user in await self._queries.users(user_ids)]

    async def add(self, call: Call, body: NewUserBody) -> Answer[UserShown]:
        project_id = project_meant(call.caller, body.project_id)
        require_owner(call.caller, project_id)
        user = await self._accounts.add_user(
            body.username,
            body.email,
            body.password,
            body.role,
            project_id,
            call.in_project(project_id).metadata,
            await guarded_idempotency(call, body, self._passwords),
        )
        return await self.answer(call, user, f"the user {user.state.username} was added")

    async def change(self, call: Call, body: UserChangeBody) -> Answer[UserShown]:
        user = await self._changeable(call)
        if body.username is not None and body.username != user.state.username:
            raise invalid_field("username", "can't be changed: histories show it", "immutable")
        if body.password is not None and _is_self(call.caller, user):
            address = client_address(call.request)
            await self._accounts.confirm_password(user, body.current_password, address)
        changed = await self._accounts.change(
            int(user.id),
            None if body.email == user.state.email else body.email,
            body.password,
            call.metadata,
            session_token=await self._session_of(call, int(user.id)),
            expected_version=call.expected_version,
        )
        return await self.answer(call, changed, "the user was changed")

    async def remove(self, call: Call, query: ProjectQuery) -> Answer[UserRemoved]:
        user = await self.entities.require(call)
        project_id = await self._shared_project(call.caller, int(user.id), query.project_id)
        require_owner(call.caller, project_id)
        await self._accounts.remove_member(project_id, int(user.id), call.in_project(project_id).metadata)
        message = f"the user {user.state.username} was removed from project {project_id}"
        return Answer({"id": int(user.id), "username": user.state.username}, message=message)

    async def _shares_a_project(self, call: Call, user: Entity[User]) -> bool:
        """Callers see themselves and the members of their projects."""
        theirs = await self._queries.projects_of(int(user.id))
        return _is_self(call.caller, user) or bool(call.caller.projects.keys() & theirs.keys())

    async def _changeable(self, call: Call) -> Entity[User]:
        """A user that the caller may change: itself, or one whose every project the caller owns."""
        user = await self.entities.require(call)
        theirs = await self._queries.projects_of(int(user.id))
        owns_all = all(call.caller.projects.get(project_id) == "owner" for project_id in theirs)
        if not (_is_self(call.caller, user) or owns_all):
            message = "only the user, or an owner of all of the user's projects, may do this"
            raise Forbidden(message, code="not_an_owner")
        return user

    async def _shared_project(self, caller: Principal, user_id: int, named: int | None) -> int:
        """The project that the user is removed from: the one named, or the only one shared with the caller."""
        if named is not None:
            return project_meant(caller, named)
        theirs = await self._queries.projects_of(user_id)
        shared = {project_id: role for project_id, role in caller.projects.items() if project_id in theirs}
        return project_meant(caller.model_copy(update={"projects": shared}), None)

    async def _session_of(self, call: Call, user_id: int) -> str | None:
        """The token of the user's own session, if this request came by one."""
        for token in presented_sessions(call.request):
            session = await self._sessions.find(token)
            if session is not None and session.user_id == user_id:
                return token
        return None


class CredentialRoutes(EntityRoutes[State, Shown]):
    """What keys and clients share: lists over the caller's projects, histories in the v2 family's shape, their use.

    Args:
        root: ``/api/v2`` or its alias ``/v2``.
    """

    embeds_others = True  # the counters of use change without a new version
    family_path: ClassVar[str]

    def __init__(self, root: str, entities: Entities[State], queries: AuthQueries) -> None:
        self.path = f"{root}{self.family_path}"
        super().__init__(entities)
        self._queries = queries

    async def view(self, call: Call, entity: Entity[State], as_of: datetime | None = None) -> Shown:
        usage = {} if as_of else await self._queries.usage_of([entity.id])
        return self.shown_of(entity, usage.get(str(entity.id)))

    def shown_of(self, entity: Entity[State], usage: Document | None) -> Shown:
        raise NotImplementedError

    async def events(self, call: Call, query: HistoryQuery) -> EventsShown:
        return {"events": [event_view(event) for event in await self.entities.events(call, query)]}

    async def page_of(self, call: Call, query: KeysQuery) -> tuple[list[Shown], str | None]:
        """A page of the caller's projects, newest first, and the next page's address."""
        if query.project_id is not None:
            call.caller.require_project(query.project_id)
        project_ids = call.caller.projects if query.project_id is None else [query.project_id]
        # One more than asked for tells whether there is a next page.
        found = await self._queries.page(self.entities.aggregate, project_ids, query.limit + 1, query.offset)
        page = found[: query.limit]
        usage = await self._queries.usage_of([entity.id for entity in page])
        following = call.request.rel_url.update_query(limit=query.limit, offset=query.offset + query.limit)
        shown = [self.shown_of(entity, usage.get(str(entity.id))) for entity in page]
        return shown, str(following) if len(found) > query.limit else None


class KeyRoutes(CredentialRoutes[ApiKey, KeyShown]):
    """API keys."""

    family_path = "/keys"
    tag = "API keys"
    shown = KeyShown

    def __init__(self, root: str, keys: Keys, queries: AuthQueries) -> None:
        super().__init__(root, keys, queries)
        self._keys = keys

    def routes(self) -> Sequence[web.RouteDef]:
        return [
            self.route("GET", self.path, self.list, "List API keys"),
            self.route("POST", self.path, self.issue, "Issue an API key", status=201, versioned=True, idempotent=True),
            *self.reading_one(history=self.events),
            self.route("PATCH", self.one, self.rename, "Rename an API key", versioned=True, conditional=True),
            self.route(
                "POST",
                f"{self.one}/rotate",
                self.rotate,
                "Rotate an API key",
                versioned=True,
                conditional=True,
                idempotent=True,
            ),
            self.route("DELETE", self.one, self.revoke, "Revoke an API key", versioned=True, conditional=True),
        ]

    def shown_of(self, entity: Entity[ApiKey], usage: Document | None) -> KeyShown:
        return key_view(entity, usage)

    async def list(self, call: Call, query: KeysQuery) -> KeysShown:
        keys, next_page = await self.page_of(call, query)
        return {"keys": keys, "next_page": next_page}

    async def issue(self, call: Call, body: NewKeyBody) -> Answer[KeyIssued]:
        issued = await self._keys.issue(call.in_project(project_meant(call.caller, body.project_id)), body)
        shown: KeyIssued = {**key_view(issued.entity, None), "secret": issued.secret}
        return Answer(shown, issued.entity.version, headers=NOT_STORED)

    async def rotate(self, call: Call, body: RotationBody | None) -> Answer[KeyIssued]:
        """Give the key another secret; the former one stays good for the overlap."""
        rotated = await self._keys.rotate(call, body or RotationBody())
        shown: KeyIssued = {**key_view(rotated.entity, None), "secret": rotated.secret}
        return Answer(shown, rotated.entity.version, headers=NOT_STORED)

    async def rename(self, call: Call, body: KeyChangeBody) -> Answer[KeyShown]:
        return await self.answer(call, await self._keys.rename(call, body.name))

    async def revoke(self, call: Call) -> Answer[KeyShown]:
        return await self.answer(call, await self._keys.revoke(call))


class ClientRoutes(CredentialRoutes[OauthClient, ClientShown]):
    """OAuth clients."""

    family_path = "/oauth/clients"
    tag = "OAuth"
    shown = ClientShown

    def __init__(self, root: str, clients: OauthClients, queries: AuthQueries) -> None:
        super().__init__(root, clients, queries)
        self._clients = clients

    def routes(self) -> Sequence[web.RouteDef]:
        return [
            self.route(
                "POST", self.path, self.issue, "Issue an OAuth client", status=201, versioned=True, idempotent=True
            ),
            self.route("GET", self.path, self.list, "List the OAuth clients"),
            *self.reading_one(history=self.events),
            self.route("DELETE", self.one, self.revoke, "Revoke an OAuth client", versioned=True, conditional=True),
        ]

    def shown_of(self, entity: Entity[OauthClient], usage: Document | None) -> ClientShown:
        return client_view(entity, usage)

    async def list(self, call: Call, query: KeysQuery) -> ClientsShown:
        clients, next_page = await self.page_of(call, query)
        return {"clients": clients, "next_page": next_page}

    async def issue(self, call: Call, body: NewClientBody) -> Answer[ClientIssued]:
        issued = await self._clients.issue(call.in_project(project_meant(call.caller, body.project_id)), body)
        shown = client_view(issued.entity, None)
        with_secret: ClientIssued = {**shown, "client_id": shown["id"], "client_secret": issued.secret}
        return Answer(with_secret, issued.entity.version, headers=NOT_STORED)

    async def revoke(self, call: Call) -> Answer[ClientShown]:
        return await self.answer(call, await self._clients.revoke(call))


@dataclass(frozen=True, slots=True)
class TokenRoutes:
    """The token endpoint of OAuth."""

    tokens: OauthTokens

    def routes(self) -> Sequence[web.RouteDef]:
        return [
            routes.post(
                "/oauth/token",
                self.grant,
                "Exchange client credentials for an access token",
                tag="OAuth",
                body=TokenForm,
                body_type=FORM,
                reads=read_form,
                refuses=(401, 429),
            )
        ]

    async def grant(self, call: Call, body: dict[str, str]) -> Answer[TokenGranted]:
        """RFC 6749 section 4.4: the client authenticates by HTTP Basic or in the body; ``scope`` narrows the token."""
        asked = token_request(call.request.headers.get("Authorization"), body)
        token = await self.tokens.grant(asked, client_address(call.request))
        granted: TokenGranted = {
            "access_token": token.text,
            "token_type": "Bearer",
            "expires_in": token.expires_in_seconds,
            "scope": " ".join(token.scopes),
        }
        return Answer(granted, headers={**NOT_STORED, "Pragma": "no-cache"})


def internal_routes(credentials: Credentials) -> Sequence[web.RouteDef]:
    return [internal_route(RESOLVE_CREDENTIAL, credentials.resolve)]


def client_address(request: web.Request) -> str:
    """What logins of one client count under; the gateway removes this header from requests and sets its own."""
    return one_client(request.headers.get(CLIENT_ADDRESS_HEADER) or request.remote or "")


def presented_sessions(request: web.Request) -> list[str]:
    """The session tokens that the request carries, the Authorization header's first."""
    candidates = [without_scheme(request.headers.get("Authorization", "")), cookie_of(request, SESSION_COOKIE)]
    return [candidate for candidate in candidates if is_session_token(candidate)]


async def guarded_idempotency(call: Call, body: SignupBody, passwords: Passwords) -> IdempotencyKey | None:
    """The call's Idempotency-Key, hashed with the password's hash function, so its record does not help to guess it."""
    salt = idempotency_key_of(call.request)
    if salt is None:
        return None
    fingerprint = await passwords.fingerprint(body.password, f"{body.username}\n{salt}")
    return idempotency_of(call.request, canonical_json({**body.model_dump(), "password": fingerprint}))


async def _is_the_calls(call: Call, project: Entity[Project]) -> bool:
    return project.id == call.project_id


def _is_self(principal: Principal, user: Entity[User]) -> bool:
    return principal.kind == "user" and principal.subject == str(user.id)
