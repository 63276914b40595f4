"""What callers see of users, projects, keys and OAuth clients."""

from typing import Annotated, Any, Literal

from pydantic import Field
from typing_extensions import TypedDict

from libs.contracts.auth import Plan
from libs.core.entity import Entity
from libs.core.principal import Role
from libs.mongodb.client import Document
from libs.web.answers import EventShown, Moment
from services.auth.domain.api_key import ApiKey
from services.auth.domain.oauth_client import OauthClient
from services.auth.domain.project import Project
from services.auth.domain.scopes import Permission
from services.auth.domain.user import User


class SignedUp(TypedDict):
    email: Annotated[str, Field(examples=["ann@example.com"])]
    username: Annotated[str, Field(examples=["ann"])]


class LoggedIn(TypedDict):
    """``token`` is what the cookie holds too: a bearer token for programs."""

    username: Annotated[str, Field(examples=["ann"])]
    token: str


class Nothing(TypedDict):
    pass


class CallerShown(TypedDict):
    username: Annotated[str, Field(examples=["ann"])]


class TelemetryId(TypedDict):
    user_id: Literal[""]
    version: Annotated[str, Field(examples=["0.1.0"])]


class OptStatus(TypedDict):
    enabled: Literal[False]


class Releases(TypedDict):
    releases: list[str]


class ReleasesShown(TypedDict):
    olake_ui_worker: Releases
    olake_helm: Releases
    olake: Releases
    features: Releases


class ProjectShown(TypedDict):
    id: Annotated[int, Field(examples=[123])]
    name: Annotated[str, Field(examples=["ann's project"])]
    role: Role
    created_at: Moment


class MemberShown(TypedDict):
    user_id: Annotated[int, Field(ge=1)]
    role: Role


class ProjectDetail(ProjectShown):
    """A project with its members, in the order of their joining; ``role`` is the caller's present one."""

    members: list[MemberShown]


class UserShown(TypedDict):
    id: Annotated[int, Field(ge=1)]
    username: Annotated[str, Field(examples=["ann"])]
    email: Annotated[str, Field(examples=["ann@example.com"])]
    created_at: Moment
    updated_at: Moment


class UserRemoved(TypedDict):
    id: Annotated[int, Field(ge=1)]
    username: Annotated[str, Field(examples=["bob"])]


class KeyShown(TypedDict):
    """A key, never its secret; ``last_used_at`` and ``uses`` are some seconds behind."""

    id: Annotated[str, Field(examples=["key_5Hq2xKd81fJw"])]
    name: Annotated[str, Field(examples=["nightly export"])]
    prefix: Annotated[str, Field(examples=["ds_live_5Hq2"])]
    permission: Permission
    scopes: Annotated[list[str], Field(examples=[["sync:read", "sync:write"]])]
    project_id: Annotated[int, Field(examples=[123])]
    developer_id: str | None
    plan: Plan
    created_at: Moment
    created_by: Annotated[str, Field(examples=["ann"])]
    expires_at: Moment | None
    rotated_at: Moment | None
    previous_secret_valid_until: Moment | None
    revoked_at: Moment | None
    last_used_at: Moment | None
    uses: Annotated[int, Field(ge=0)]


class KeyIssued(KeyShown):
    """``secret`` is the key itself: shown once, null when a repeated request is answered again."""

    secret: str | None


class KeysShown(TypedDict):
    keys: list[KeyShown]
    next_page: Annotated[str | None, Field(description="The address of the next page.")]


class ClientShown(TypedDict):
    """An OAuth client, never its secret; ``last_used_at`` and ``uses`` are some seconds behind."""

    id: Annotated[str, Field(examples=["01980f0a-7c1e-7d54-9f2b-1f2e5a7c9d10"])]
    name: Annotated[str, Field(examples=["nightly import"])]
    scopes: Annotated[list[str], Field(examples=[["sync:read"]])]
    project_id: Annotated[int, Field(examples=[123])]
    developer_id: str | None
    plan: Plan
    created_at: Moment
    created_by: Annotated[str, Field(examples=["ann"])]
    revoked_at: Moment | None
    last_used_at: Moment | None
    uses: Annotated[int, Field(ge=0)]


class ClientIssued(ClientShown):
    """``client_secret`` is shown once, null when a repeated request is answered again."""

    client_id: Annotated[str, Field(examples=["01980f0a-7c1e-7d54-9f2b-1f2e5a7c9d10"])]
    client_secret: str | None


class ClientsShown(TypedDict):
    clients: list[ClientShown]
    next_page: Annotated[str | None, Field(description="The address of the next page.")]


class TokenGranted(TypedDict):
    """RFC 6749 section 5.1."""

    access_token: str
    token_type: Literal["Bearer"]
    expires_in: Annotated[int, Field(ge=1, examples=[3600])]
    scope: Annotated[str, Field(examples=["sync:read"])]


class EventsShown(TypedDict):
    """Newest first."""

    events: list[EventShown]


def user_view(user: Entity[User]) -> UserShown:
    return {
        "id": int(user.id),
        "username": user.state.username,
        "email": user.state.email,
        "created_at": user.state.created_at,
        "updated_at": user.state.updated_at,
    }


def project_view(project: Entity[Project], role: Role) -> ProjectShown:
    return {
        "id": int(project.id),
        "name": project.state.name,
        "role": role,
        "created_at": project.state.created_at,
    }


def project_detail(project: Entity[Project], role: Role) -> ProjectDetail:
    members: list[MemberShown] = [{"user_id": member.user_id, "role": member.role} for member in project.state.members]
    return {**project_view(project, role), "members": members}


def key_view(key: Entity[ApiKey], usage: Document | None) -> KeyShown:
    """``usage``: the recorded use of the key, which is some seconds behind."""
    state = key.state
    return {
        "id": str(key.id),
        "name": state.name,
        "prefix": state.prefix,
        "permission": state.permission,
        "scopes": list(state.scopes),
        "project_id": _project_of(key),
        "developer_id": state.developer_id,
        "plan": state.plan,
        "created_at": state.created_at,
        "created_by": state.created_by,
        "expires_at": state.expires_at,
        "rotated_at": state.rotated_at,
        "previous_secret_valid_until": max((secret.valid_until for secret in state.earlier_secrets), default=None),
        "revoked_at": state.revoked_at,
        "last_used_at": None if usage is None else usage["last_used_at"],
        "uses": 0 if usage is None else usage["uses"],
    }


def client_view(client: Entity[OauthClient], usage: Document | None) -> ClientShown:
    state = client.state
    return {
        "id": str(client.id),
        "name": state.name,
        "scopes": list(state.scopes),
        "project_id": _project_of(client),
        "developer_id": state.developer_id,
        "plan": state.plan,
        "created_at": state.created_at,
        "created_by": state.created_by,
        "revoked_at": state.revoked_at,
        "last_used_at": None if usage is None else usage["last_used_at"],
        "uses": 0 if usage is None else usage["uses"],
    }


def _project_of(credential: Entity[Any]) -> int:
    assert credential.project_id is not None, "every key and client belongs to a project"
    return credential.project_id
