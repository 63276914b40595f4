"""The REST calls of accounts, members and API keys, and the internal call that resolves a credential."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from typing import Annotated, Any, TypeVar

from aiohttp import web
from pydantic import Field

from libs.contracts.internal import RESOLVE_CREDENTIAL
from libs.core.addresses import one_client
from libs.core.decider import Aggregate
from libs.core.envelope import Frozen, Metadata
from libs.core.errors import FieldError, Forbidden, InvalidInput, NotFound
from libs.core.json import canonical_json
from libs.core.principal import Principal
from libs.core.text import number_of
from libs.eventsourcing.command_handler import Entity, IdempotencyKey
from libs.mongodb.client import Document
from libs.web.answers import EventShown, json_answer, success
from libs.web.conditions import if_match_of
from libs.web.internal import internal_route
from libs.web.openapi import Content, describe
from libs.web.requests import (
    cookie_of,
    idempotency_key_of,
    idempotency_of,
    metadata_of,
    principal_of,
    project_of,
    read_body,
    read_query,
)
from services.auth.accounts import Accounts, project_meant, require_owner
from services.auth.answers import (
    CallerShown,
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
    UserRemoved,
    UserShown,
)
from services.auth.config import AuthSettings
from services.auth.credentials import Credentials, without_scheme
from services.auth.domain.api_key import API_KEY, ApiKey
from services.auth.domain.project import PROJECT
from services.auth.domain.user import USER, User
from services.auth.inputs import (
    HistoryQuery,
    KeyChangeBody,
    KeysQuery,
    LoginBody,
    NewKeyBody,
    NewUserBody,
    OneQuery,
    ProjectQuery,
    RotationBody,
    SignupBody,
    UserChangeBody,
)
from services.auth.keys import Keys, KeyWanted
from services.auth.passwords import Passwords
from services.auth.queries import AuthQueries
from services.auth.sessions import Sessions
from services.auth.tokens import is_session_token
from services.auth.views import event_view, issued_key_view, key_view, project_detail, project_view, user_view

State = TypeVar("State", bound=Frozen)

UserId = Annotated[int, Field(ge=1, le=2**53)]
KeyId = Annotated[str, Field(min_length=1, examples=["key_5Hq2xKd81fJw"])]

SESSION_COOKIE = "datasync_session"
CLIENT_ADDRESS_HEADER = "X-DataSync-Client-Address"


@dataclass(frozen=True, slots=True)
class AccountRoutes:
    """Signing up, logging in and out."""

    settings: AuthSettings
    accounts: Accounts
    sessions: Sessions
    passwords: Passwords

    def routes(self) -> Sequence[web.RouteDef]:
        described = partial(describe, tag="Accounts")
        logged_in = Content("Logged in; the cookie holds the token too", LoggedIn, headers=("Set-Cookie",))
        return [
            described(
                web.post("/signup", self.sign_up),
                "Make an account, and a project of its own",
                body=SignupBody,
                answer=SignedUp,
                idempotent=True,
                refuses=(403,),
            ),
            described(web.post("/login", self.log_in), "Log in", body=LoginBody, answer=logged_in, refuses=(401,)),
            described(
                web.post("/logout", self.log_out),
                "Log out",
                answer=Content("Logged out", Nothing, headers=("Set-Cookie",)),
            ),
            *(
                described(web.get(path, self.who_am_i), "Who the caller is", answer=CallerShown)
                for path in ("/auth", "/auth/check")
            ),
        ]

    async def sign_up(self, request: web.Request) -> web.StreamResponse:
        if self.settings.auth_signup == "invite":
            message = "signing up is by invitation only: ask an owner of a project for an account"
            raise Forbidden(message, code="signup_closed")
        body = await read_body(request, SignupBody)
        metadata = replace(metadata_of(request), actor=body.username)
        idempotency = await guarded_idempotency(request, body, self.passwords)
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


@dataclass(frozen=True, slots=True)
class PlatformRoutes:
    """What OLake's page asks of the platform it runs on."""

    version: str

    def routes(self) -> Sequence[web.RouteDef]:
        root = "/api/v1/platform"
        described = partial(describe, tag="Platform")
        return [
            described(web.get("/telemetry-id", self.telemetry_id), "Whom telemetry is about", answer=TelemetryId),
            described(web.get(f"{root}/opt/status", self.opt_status), "Whether optimising is on", answer=OptStatus),
            described(web.get(f"{root}/releases", self.releases), "Releases to tell users of", answer=ReleasesShown),
        ]

    async def telemetry_id(self, request: web.Request) -> web.StreamResponse:
        """An empty id keeps the page from reporting to anybody."""
        return success({"user_id": "", "version": self.version})

    async def opt_status(self, request: web.Request) -> web.StreamResponse:
        return success({"enabled": False})

    async def releases(self, request: web.Request) -> web.StreamResponse:
        return success({name: {"releases": []} for name in ("olake_ui_worker", "olake_helm", "olake", "features")})


@dataclass(frozen=True, slots=True)
class UserRoutes:
    """The caller's projects and their members."""

    accounts: Accounts
    queries: AuthQueries
    sessions: Sessions
    passwords: Passwords

    def routes(self) -> Sequence[web.RouteDef]:
        one = "/api/v1/users/{userid}"
        project = "/api/v1/projects/{projectid}"
        described = partial(describe, tag="Users", path={"userid": UserId})
        of_project = partial(describe, tag="Users")
        return [
            described(web.get("/api/v1/projects", self.list_projects), "List projects", answer=list[ProjectShown]),
            of_project(
                web.get(project, self.get_project),
                "Fetch a project",
                query=OneQuery,
                answer=ProjectDetail,
                versioned=True,
            ),
            of_project(
                web.get(f"{project}/history", self.project_history),
                "The history of a project",
                query=HistoryQuery,
                answer=list[EventShown],
            ),
            described(web.get("/api/v1/users", self.list), "List the members of your projects", answer=list[UserShown]),
            described(
                web.post("/api/v1/users", self.add),
                "Make an account for a new member",
                body=NewUserBody,
                answer=UserShown,
                versioned=True,
                idempotent=True,
            ),
            described(web.get(one, self.get), "Fetch a user", query=OneQuery, answer=UserShown, versioned=True),
            described(
                web.put(one, self.change),
                "Change a user",
                body=UserChangeBody,
                answer=UserShown,
                versioned=True,
                conditional=True,
                refuses=(409,),
            ),
            described(
                web.delete(one, self.remove),
                "Remove a user from a project",
                query=ProjectQuery,
                answer=UserRemoved,
                refuses=(409,),
            ),
            described(
                web.get(f"{one}/history", self.history),
                "The history of a user",
                query=HistoryQuery,
                answer=list[EventShown],
            ),
        ]

    async def list_projects(self, request: web.Request) -> web.StreamResponse:
        principal = principal_of(request)
        projects = await self.queries.projects(sorted(principal.projects, reverse=True))
        return success([project_view(project, principal.projects[int(project.id)]) for project in projects])

    async def get_project(self, request: web.Request) -> web.StreamResponse:
        moment = read_query(request, OneQuery).as_of
        project_id = project_of(request)
        role = principal_of(request).projects[project_id]
        if moment is not None:
            then = await self.queries.as_of(PROJECT, project_id, moment)
            return success(project_detail(then, role))
        project = await self.queries.project(project_id)
        if project is None:
            # API_KEY opens the first project before anybody has signed up.
            raise NotFound(f"project {project_id} is made with the first account")
        return success(project_detail(project, role), etag=project.version)

    async def project_history(self, request: web.Request) -> web.StreamResponse:
        query = read_query(request, HistoryQuery)
        events = await self.queries.history(PROJECT, project_of(request), query.before, query.limit)
        return success([event_view(event) for event in events])

    async def list(self, request: web.Request) -> web.StreamResponse:
        projects = await self.queries.projects(principal_of(request).projects)
        user_ids = {member.user_id for project in projects for member in project.state.members}
        return success([user_view(user) for user in await self.queries.users(user_ids)])

    async def add(self, request: web.Request) -> web.StreamResponse:
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
            in_project(metadata_of(request), project_id),
            await guarded_idempotency(request, body, self.passwords),
        )
        return success(user_view(user), message=f"the user {user.state.username} was added", etag=user.version)

    async def get(self, request: web.Request) -> web.StreamResponse:
        user = await self._visible(request)
        moment = read_query(request, OneQuery).as_of
        if moment is None:
            return success(user_view(user), etag=user.version)
        then = await self.queries.as_of(USER, user.id, moment)
        return success(user_view(then))

    async def history(self, request: web.Request) -> web.StreamResponse:
        user = await self._visible(request)
        query = read_query(request, HistoryQuery)
        events = await self.queries.history(USER, user.id, query.before, query.limit)
        return success([event_view(event) for event in events])

    async def change(self, request: web.Request) -> web.StreamResponse:
        body = await read_body(request, UserChangeBody)
        user = await self._changeable(request)
        if body.username is not None and body.username != user.state.username:
            message = "can't be changed: histories show it"
            raise InvalidInput(f"username: {message}", errors=[FieldError("username", message, "immutable")])
        if body.password is not None and _is_self(principal_of(request), int(user.id)):
            await self.accounts.confirm_password(user, body.current_password, client_address(request))
        changed = await self.accounts.change(
            int(user.id),
            None if body.email == user.state.email else body.email,
            body.password,
            in_project(metadata_of(request), None),
            session_token=await self._session_of(request, int(user.id)),
            expected_version=if_match_of(request),
        )
        return success(user_view(changed), message="the user was changed", etag=changed.version)

    async def remove(self, request: web.Request) -> web.StreamResponse:
        principal, user = principal_of(request), await self._visible(request)
        named = read_query(request, ProjectQuery).project_id
        project_id = await self._shared_project(principal, int(user.id), named)
        require_owner(principal, project_id)
        await self.accounts.remove_member(project_id, int(user.id), in_project(metadata_of(request), project_id))
        message = f"the user {user.state.username} was removed from project {project_id}"
        return success({"id": user.id, "username": user.state.username}, message=message)

    async def _visible(self, request: web.Request) -> Entity[User]:
        """The user of the path: the caller itself, or a member of one of the caller's projects."""
        principal, text = principal_of(request), request.match_info["userid"]
        refusal = NotFound(f"there is no user {text[:20]} in your projects", code="user_not_found")
        if number_of(text) is None:
            raise refusal
        user = await self.queries.user(int(text))
        theirs = await self.queries.projects_of(int(text))
        if user is None or not (_is_self(principal, int(text)) or principal.projects.keys() & theirs.keys()):
            raise refusal
        return user

    async def _changeable(self, request: web.Request) -> Entity[User]:
        """A user that the caller may change: itself, or one whose every project the caller owns."""
        principal, user = principal_of(request), await self._visible(request)
        theirs = await self.queries.projects_of(int(user.id))
        owns_all = all(principal.projects.get(project_id) == "owner" for project_id in theirs)
        if not (_is_self(principal, int(user.id)) or owns_all):
            message = "only the user, or an owner of all of the user's projects, may do this"
            raise Forbidden(message, code="not_an_owner")
        return user

    async def _shared_project(self, principal: Principal, user_id: int, named: int | None) -> int:
        """The project that the user is removed from: the one named, or the only one shared with the caller."""
        if named is not None:
            return project_meant(principal, named)
        theirs = await self.queries.projects_of(user_id)
        shared = {project_id: role for project_id, role in principal.projects.items() if project_id in theirs}
        return project_meant(principal.model_copy(update={"projects": shared}), None)

    async def _session_of(self, request: web.Request, user_id: int) -> str | None:
        """The token of the user's own session, if this request came by one."""
        for token in presented_sessions(request):
            session = await self.sessions.find(token)
            if session is not None and session.user_id == user_id:
                return token
        return None


@dataclass(frozen=True, slots=True)
class KeyRoutes:
    """API keys, in the shapes of the v2 family."""

    keys: Keys
    queries: AuthQueries

    def routes(self) -> Sequence[web.RouteDef]:
        return [route for path in ("/api/v2/keys", "/v2/keys") for route in self._routes_under(path)]

    def _routes_under(self, all_keys: str) -> Sequence[web.RouteDef]:
        one = f"{all_keys}/{{keyid}}"
        described = partial(describe, tag="API keys", path={"keyid": KeyId})
        return [
            described(web.get(all_keys, self.list), "List API keys", query=KeysQuery, answer=KeysShown),
            described(
                web.post(all_keys, self.issue),
                "Issue an API key",
                status=201,
                body=NewKeyBody,
                answer=KeyIssued,
                versioned=True,
                idempotent=True,
            ),
            described(web.get(one, self.get), "Fetch an API key", query=OneQuery, answer=KeyShown, versioned=True),
            described(
                web.patch(one, self.rename),
                "Rename an API key",
                body=KeyChangeBody,
                answer=KeyShown,
                versioned=True,
                conditional=True,
            ),
            described(
                web.post(f"{one}/rotate", self.rotate),
                "Rotate an API key",
                body=RotationBody,
                body_required=False,
                answer=KeyIssued,
                versioned=True,
                conditional=True,
                idempotent=True,
            ),
            described(
                web.delete(one, self.revoke), "Revoke an API key", answer=KeyShown, versioned=True, conditional=True
            ),
            described(
                web.get(f"{one}/history", self.history),
                "The history of an API key",
                query=HistoryQuery,
                answer=EventsShown,
            ),
        ]

    async def issue(self, request: web.Request) -> web.StreamResponse:
        principal = principal_of(request)
        body = await read_body(request, NewKeyBody)
        project_id = project_meant(principal, body.project_id)
        scopes = None if body.scopes is None else tuple(body.scopes)
        wanted = KeyWanted(body.name, body.permission, scopes, body.developer_id, body.expires_in_days, body.plan)
        metadata = in_project(metadata_of(request), project_id)
        issued = await self.keys.issue(principal, project_id, wanted, metadata, idempotency_of(request))
        answer = json_answer(issued_key_view(issued, project_id), status=201, etag=issued.entity.version)
        answer.headers["Cache-Control"] = "no-store"
        return answer

    async def list(self, request: web.Request) -> web.StreamResponse:
        return await credentials_page(request, self.queries, API_KEY, "keys", key_view)

    async def get(self, request: web.Request) -> web.StreamResponse:
        key, project_id = await self._own(request)
        usage = await self.queries.usage_of([key.id])
        moment = read_query(request, OneQuery).as_of
        if moment is None:
            # The counters of use change without a new version.
            return json_answer(key_view(key, project_id, usage.get(str(key.id))), etag=key.version, embeds_others=True)
        then = await self.queries.as_of(API_KEY, key.id, moment)
        return json_answer(key_view(then, project_id, None))

    async def history(self, request: web.Request) -> web.StreamResponse:
        key, _ = await self._own(request)
        query = read_query(request, HistoryQuery)
        events = await self.queries.history(API_KEY, key.id, query.before, query.limit)
        return json_answer({"events": [event_view(event) for event in events]})

    async def rotate(self, request: web.Request) -> web.StreamResponse:
        """Give the key another secret; the former one stays good for the overlap."""
        key, project_id = await self._own(request)
        body = await read_body(request, RotationBody) if request.body_exists else RotationBody()
        lifetime = None if body.expires_in_days is None else timedelta(days=body.expires_in_days)
        rotated = await self.keys.rotate(
            principal_of(request),
            key,
            project_id,
            timedelta(seconds=body.overlap_seconds),
            lifetime,
            in_project(metadata_of(request), project_id),
            if_match_of(request),
            idempotency_of(request),
        )
        answer = json_answer(issued_key_view(rotated, project_id), etag=rotated.entity.version)
        answer.headers["Cache-Control"] = "no-store"
        return answer

    async def rename(self, request: web.Request) -> web.StreamResponse:
        key, project_id = await self._own(request)
        body = await read_body(request, KeyChangeBody)
        metadata = in_project(metadata_of(request), project_id)
        renamed = await self.keys.rename(principal_of(request), key, body.name, metadata, if_match_of(request))
        return json_answer(key_view(renamed, project_id, None), etag=renamed.version)

    async def revoke(self, request: web.Request) -> web.StreamResponse:
        key, project_id = await self._own(request)
        metadata = in_project(metadata_of(request), project_id)
        revoked = await self.keys.revoke(principal_of(request), key, metadata, if_match_of(request))
        return json_answer(key_view(revoked, project_id, None), etag=revoked.version)

    async def _own(self, request: web.Request) -> tuple[Entity[ApiKey], int]:
        """The key of the path, with its project, which must be one of the caller's."""
        found = await self.queries.one_in(API_KEY, request.match_info["keyid"], principal_of(request))
        if found is None:
            raise NotFound("there is no such key in your projects", code="key_not_found")
        return found


def internal_routes(credentials: Credentials) -> Sequence[web.RouteDef]:
    return [internal_route(RESOLVE_CREDENTIAL, credentials.resolve)]


def client_address(request: web.Request) -> str:
    """What logins of one client count under; the gateway removes this header from what it is sent and sets it."""
    return one_client(request.headers.get(CLIENT_ADDRESS_HEADER) or request.remote or "")


def presented_sessions(request: web.Request) -> list[str]:
    """The session tokens that the request carries, the Authorization header's first."""
    candidates = [without_scheme(request.headers.get("Authorization", "")), cookie_of(request, SESSION_COOKIE)]
    return [candidate for candidate in candidates if is_session_token(candidate)]


async def guarded_idempotency(request: web.Request, body: SignupBody, passwords: Passwords) -> IdempotencyKey | None:
    """The request's Idempotency-Key; its record is no quicker way to guess the password than the password's hash."""
    salt = idempotency_key_of(request)
    if salt is None:
        return None
    fingerprint = await passwords.fingerprint(body.password, f"{body.username}\n{salt}")
    return idempotency_of(request, canonical_json({**body.model_dump(), "password": fingerprint}))


async def credentials_page(
    request: web.Request,
    queries: AuthQueries,
    aggregate: Aggregate[State],
    name: str,
    view: Callable[[Entity[State], int, Document | None], dict[str, Any]],
) -> web.StreamResponse:
    """The keys or clients of the caller's projects under ``name``, newest first, with the next page's URL."""
    principal = principal_of(request)
    query = read_query(request, KeysQuery)
    if query.project_id is not None:
        principal.require_project(query.project_id)
    project_ids = principal.projects if query.project_id is None else [query.project_id]
    # One more than asked for tells whether there is a next page.
    found = await queries.page(aggregate, project_ids, query.limit + 1, query.offset)
    page = found[: query.limit]
    usage = await queries.usage_of([item.id for item, _ in page])
    following = request.rel_url.update_query(limit=query.limit, offset=query.offset + query.limit)
    return json_answer(
        {
            name: [view(item, project_id, usage.get(str(item.id))) for item, project_id in page],
            "next_page": str(following) if len(found) > query.limit else None,
        }
    )


def in_project(metadata: Metadata, project_id: int | None) -> Metadata:
    return replace(metadata, project_id=project_id)


def _is_self(principal: Principal, user_id: int) -> bool:
    return principal.kind == "user" and principal.subject == str(user_id)
