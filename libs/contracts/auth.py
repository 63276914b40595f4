"""Events of ``datasync.auth.v1``: users, projects, API keys, OAuth clients.

Streams: ``user-<int>``, ``project-<int>``, ``key-<uuid>``, ``oauth_client-<uuid>``.
"""

from datetime import datetime
from typing import ClassVar, Literal

from libs.contracts.registry import register
from libs.core.envelope import Event

TOPIC = "datasync.auth.v1"

Plan = Literal["standard", "enterprise"]
"""Which rate limits a credential has."""


class AuthEvent(Event):
    TOPIC: ClassVar[str] = TOPIC


class UserSignedUp(AuthEvent):
    TYPE: ClassVar[str] = "user_signed_up"
    username: str
    email: str


class UserUpdated(AuthEvent):
    """The user's e-mail address is another one now."""

    TYPE: ClassVar[str] = "user_updated"
    email: str


class PasswordChanged(AuthEvent):
    """Every session that was opened with the former password ends here."""

    TYPE: ClassVar[str] = "password_changed"


class ProjectCreated(AuthEvent):
    TYPE: ClassVar[str] = "project_created"
    name: str


class MemberAdded(AuthEvent):
    """On the project's stream."""

    TYPE: ClassVar[str] = "member_added"
    user_id: int
    role: Literal["owner", "member"]


class MemberRemoved(AuthEvent):
    """On the project's stream."""

    TYPE: ClassVar[str] = "member_removed"
    user_id: int


class ApiKeyIssued(AuthEvent):
    """``prefix`` is the part of the key that lists show; the key itself is never in an event.

    ``member_id`` is the user on whose behalf the key acts: it ends with that user's membership of the project. Keys
    made with the environment's key have none.
    """

    TYPE: ClassVar[str] = "api_key_issued"
    name: str
    prefix: str
    permission: Literal["read-only", "read-write"]
    scopes: tuple[str, ...]
    developer_id: str | None = None
    expires_at: datetime | None = None
    plan: Plan = "standard"
    member_id: int | None = None


class ApiKeyRenamed(AuthEvent):
    TYPE: ClassVar[str] = "api_key_renamed"
    name: str


class ApiKeyRotated(AuthEvent):
    """The key has another secret; the former one is good until ``previous_valid_until``.

    ``secret_id`` is a random name for the new secret, by which nobody can use it.
    """

    TYPE: ClassVar[str] = "api_key_rotated"
    secret_id: str
    prefix: str
    previous_valid_until: datetime
    expires_at: datetime | None = None


class ApiKeyExpiring(AuthEvent):
    """Seven days or less are left of a key that has not been rotated; told once."""

    TYPE: ClassVar[str] = "api_key_expiring"
    expires_at: datetime


class ApiKeyRevoked(AuthEvent):
    TYPE: ClassVar[str] = "api_key_revoked"


class OauthClientIssued(AuthEvent):
    """The stream's id is the client's; its secret is never in an event. ``member_id`` as in ``ApiKeyIssued``."""

    TYPE: ClassVar[str] = "oauth_client_issued"
    name: str
    scopes: tuple[str, ...]
    developer_id: str | None = None
    plan: Plan = "standard"
    member_id: int | None = None


class OauthClientRevoked(AuthEvent):
    """Every token of the client ends here."""

    TYPE: ClassVar[str] = "oauth_client_revoked"


EVENTS = (
    UserSignedUp,
    UserUpdated,
    PasswordChanged,
    ProjectCreated,
    MemberAdded,
    MemberRemoved,
    ApiKeyIssued,
    ApiKeyRenamed,
    ApiKeyRotated,
    ApiKeyExpiring,
    ApiKeyRevoked,
    OauthClientIssued,
    OauthClientRevoked,
)
register(EVENTS)
