"""What the answers about accounts, projects and keys hold, for the API's description."""

from typing import Literal

from pydantic import Field

from libs.contracts.auth import Plan
from libs.core.principal import Role
from libs.web.answers import EventShown, Moment
from libs.web.openapi import Answered
from services.auth.domain.scopes import Permission


class SignedUp(Answered):
    email: str = Field(examples=["ann@example.com"])
    username: str = Field(examples=["ann"])


class LoggedIn(Answered):
    """``token`` is what the cookie holds too: a bearer token for programs."""

    username: str = Field(examples=["ann"])
    token: str


class Nothing(Answered):
    pass


class CallerShown(Answered):
    username: str = Field(examples=["ann"])


class TelemetryId(Answered):
    user_id: Literal[""]
    version: str = Field(examples=["0.1.0"])


class OptStatus(Answered):
    enabled: Literal[False]


class Releases(Answered):
    releases: list[str]


class ReleasesShown(Answered):
    olake_ui_worker: Releases
    olake_helm: Releases
    olake: Releases
    features: Releases


class ProjectShown(Answered):
    id: int = Field(examples=[123])
    name: str = Field(examples=["ann's project"])
    role: Role
    created_at: Moment


class MemberShown(Answered):
    user_id: int = Field(ge=1)
    role: Role


class ProjectDetail(ProjectShown):
    """A project with its members, in the order of their joining; ``role`` is the caller's present one."""

    members: list[MemberShown]


class UserShown(Answered):
    id: int = Field(ge=1)
    username: str = Field(examples=["ann"])
    email: str = Field(examples=["ann@example.com"])
    created_at: Moment
    updated_at: Moment


class UserRemoved(Answered):
    id: int = Field(ge=1)
    username: str = Field(examples=["bob"])


class KeyShown(Answered):
    """A key, never its secret; ``last_used_at`` and ``uses`` are some seconds behind."""

    id: str = Field(examples=["key_5Hq2xKd81fJw"])
    name: str = Field(examples=["nightly export"])
    prefix: str = Field(examples=["ds_live_5Hq2"])
    permission: Permission
    scopes: list[str] = Field(examples=[["sync:read", "sync:write"]])
    project_id: int = Field(examples=[123])
    developer_id: str | None
    plan: Plan
    created_at: Moment
    created_by: str = Field(examples=["ann"])
    expires_at: Moment | None
    rotated_at: Moment | None
    previous_secret_valid_until: Moment | None
    revoked_at: Moment | None
    last_used_at: Moment | None
    uses: int = Field(ge=0)


class KeyIssued(KeyShown):
    """``secret`` is the key itself: shown once, null when a repeated request is answered again."""

    secret: str | None


class KeysShown(Answered):
    keys: list[KeyShown]
    next_page: str | None = Field(description="The address of the next page.")


class ClientShown(Answered):
    """An OAuth client, never its secret; ``last_used_at`` and ``uses`` are some seconds behind."""

    id: str = Field(examples=["01980f0a-7c1e-7d54-9f2b-1f2e5a7c9d10"])
    name: str = Field(examples=["nightly import"])
    scopes: list[str] = Field(examples=[["sync:read"]])
    project_id: int = Field(examples=[123])
    developer_id: str | None
    plan: Plan
    created_at: Moment
    created_by: str = Field(examples=["ann"])
    revoked_at: Moment | None
    last_used_at: Moment | None
    uses: int = Field(ge=0)


class ClientIssued(ClientShown):
    """``client_secret`` is shown once, null when a repeated request is answered again."""

    client_id: str = Field(examples=["01980f0a-7c1e-7d54-9f2b-1f2e5a7c9d10"])
    client_secret: str | None


class ClientsShown(Answered):
    clients: list[ClientShown]
    next_page: str | None = Field(description="The address of the next page.")


class TokenGranted(Answered):
    """RFC 6749 section 5.1."""

    access_token: str
    token_type: Literal["Bearer"]
    expires_in: int = Field(ge=1, examples=[3600])
    scope: str = Field(examples=["sync:read"])


class EventsShown(Answered):
    """Newest first."""

    events: list[EventShown]
