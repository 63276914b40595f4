"""Events of ``datasync.auth.v1``: users, projects, API keys and OAuth clients.

Streams: ``user-<int>``, ``project-<int>``, ``key-<uuid>``, ``oauth_client-<uuid>``.
"""

from datetime import datetime
from typing import Literal

from libs.contracts.registry import PublicEvent

TOPIC = "datasync.auth.v1"

Plan = Literal["standard", "enterprise"]
"""Which rate limits apply to a credential."""


class AuthEvent(PublicEvent, topic=TOPIC):
    pass


class UserSignedUp(AuthEvent):
    """A user account was created."""

    username: str
    email: str


class UserUpdated(AuthEvent):
    """A user's e-mail address was changed.

    Args:
        email: the new address.
    """

    email: str


class PasswordChanged(AuthEvent):
    """A user's password was changed. All sessions that were opened with the previous password are closed."""


class ProjectCreated(AuthEvent):
    """A project was created."""

    name: str


class MemberAdded(AuthEvent):
    """A user became a member of the project."""

    user_id: int
    role: Literal["owner", "member"]


class MemberRemoved(AuthEvent):
    """A user is no longer a member of the project."""

    user_id: int


class ApiKeyIssued(AuthEvent):
    """An API key was issued. Events never contain the key itself.

    Args:
        prefix: the first characters of the key, by which its holder can recognise it.
        scopes: the operations that the key allows.
        developer_id: the only developer whose data the key gives access to; absent if the key is not restricted to one.
        expires_at: absent if the key does not expire.
        plan: which rate limits apply to the key. Events written before plans existed lack it: ``standard``.
        member_id: the user on whose behalf the key acts; the key stops working when that user leaves the project.
            Absent for keys that were issued with the setting ``API_KEY``.
    """

    name: str
    prefix: str
    permission: Literal["read-only", "read-write"]
    scopes: tuple[str, ...]
    developer_id: str | None = None
    expires_at: datetime | None = None
    plan: Plan = "standard"
    member_id: int | None = None


class ApiKeyRenamed(AuthEvent):
    """An API key was given another name.

    Args:
        name: the new name.
    """

    name: str


class ApiKeyRotated(AuthEvent):
    """An API key was given a new secret. The previous secret remains valid until ``previous_valid_until``.

    Args:
        secret_id: a random identifier of the new secret, which does not give access.
        prefix: the first characters of the key with its new secret.
        expires_at: when the new secret expires; absent if it does not.
    """

    secret_id: str
    prefix: str
    previous_valid_until: datetime
    expires_at: datetime | None = None


class ApiKeyExpiring(AuthEvent):
    """An API key expires within seven days. Published once for each secret of the key."""

    expires_at: datetime


class ApiKeyRevoked(AuthEvent):
    """An API key was revoked: it no longer gives access."""


class OauthClientIssued(AuthEvent):
    """An OAuth client was created. Its client id is the id in the stream's name; events never contain its secret.

    Args:
        scopes: the operations that the client's tokens may allow.
        developer_id: the only developer whose data the client has access to; absent if it is not restricted to one.
        plan: which rate limits apply to the client's tokens.
        member_id: the user on whose behalf the client acts; the client stops working when that user leaves the project.
            Absent for clients that were created with the setting ``API_KEY``.
    """

    name: str
    scopes: tuple[str, ...]
    developer_id: str | None = None
    plan: Plan = "standard"
    member_id: int | None = None


class OauthClientRevoked(AuthEvent):
    """An OAuth client was revoked, and with it all of its tokens."""
