"""Events of ``datasync.auth.v1``: users, projects, API keys. Streams ``user-<int>``, ``project-<int>``, ``key-<uuid>``."""

from datetime import datetime
from typing import ClassVar, Literal

from libs.contracts.registry import register
from libs.core.envelope import Event

TOPIC = "datasync.auth.v1"


class AuthEvent(Event):
    TOPIC: ClassVar[str] = TOPIC


class UserSignedUp(AuthEvent):
    TYPE: ClassVar[str] = "user_signed_up"
    username: str
    email: str


class ProjectCreated(AuthEvent):
    TYPE: ClassVar[str] = "project_created"
    name: str


class MemberAdded(AuthEvent):
    """On the project's stream."""

    TYPE: ClassVar[str] = "member_added"
    user_id: int
    role: Literal["owner", "member"]


class ApiKeyIssued(AuthEvent):
    """``prefix`` is the part of the key that lists show; the key itself is never in an event."""

    TYPE: ClassVar[str] = "api_key_issued"
    name: str
    prefix: str
    permission: Literal["read-only", "read-write"]
    scopes: tuple[str, ...]
    developer_id: str | None = None
    expires_at: datetime | None = None


class ApiKeyRevoked(AuthEvent):
    TYPE: ClassVar[str] = "api_key_revoked"


EVENTS = (UserSignedUp, ProjectCreated, MemberAdded, ApiKeyIssued, ApiKeyRevoked)
register(EVENTS)
