"""An API key: what a program may do in one project, until when. Only its holder knows its secrets."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal, assert_never

from libs.contracts.auth import ApiKeyExpiring, ApiKeyIssued, ApiKeyRenamed, ApiKeyRevoked, ApiKeyRotated, Plan
from libs.core.decider import Aggregate
from libs.core.envelope import Envelope, Event, Frozen
from libs.core.errors import Conflict, NotFound
from services.auth.domain.scopes import Permission, granted_scopes

FIRST_SECRET = ""
"""The name of the secret that a key was issued with."""

EARLIER_SECRETS_MAX = 8
WARNED_BEFORE = timedelta(days=7)


class EarlierSecret(Frozen):
    """An earlier secret that is still valid for a while."""

    id: str
    valid_until: datetime


class ApiKey(Frozen):
    """What a key is allowed, and whether it still is.

    Args:
        prefix: the first characters of the present secret, by which its holder recognises it.
        secret_id: the present secret's name.
        earlier_secrets: those whose overlap may not have ended yet.
        expiry_announced_at: when the present end was announced, None while it was not.
        revoked_at: from when on it is refused, None while it is good.
        member_id: the user with whose membership of the project it ends, None for one made with the environment's key.
    """

    name: str
    prefix: str
    permission: Permission
    scopes: tuple[str, ...]
    developer_id: str | None
    expires_at: datetime | None
    created_at: datetime
    created_by: str
    plan: Plan = "standard"
    secret_id: str = FIRST_SECRET
    earlier_secrets: tuple[EarlierSecret, ...] = ()
    rotated_at: datetime | None = None
    expiry_announced_at: datetime | None = None
    revoked_at: datetime | None = None
    revoked_by: str | None = None
    member_id: int | None = None

    def end_of(self, secret_id: str) -> datetime | None:
        """When a secret expires, None for never; an unknown secret has expired when the key was created."""
        if secret_id == self.secret_id:
            return self.expires_at
        return next((item.valid_until for item in self.earlier_secrets if item.id == secret_id), self.created_at)

    def refusal_of(self, secret_id: str, now: datetime) -> Literal["revoked", "expired"] | None:
        """Why a secret is not valid now, None if it is."""
        if self.revoked_at is not None:
            return "revoked"
        end = self.end_of(secret_id)
        return "expired" if end is not None and end <= now else None

    @property
    def lifetime(self) -> timedelta | None:
        """For how long the present secret was issued, in whole days; None without end."""
        if self.expires_at is None:
            return None
        days = (self.expires_at - (self.rotated_at or self.created_at)) / timedelta(days=1)
        return timedelta(days=max(1, round(days)))


@dataclass(frozen=True, slots=True)
class IssueApiKey:
    """``scopes`` None means all that the permission allows."""

    name: str
    prefix: str
    permission: Permission
    scopes: tuple[str, ...] | None
    developer_id: str | None
    expires_at: datetime | None
    plan: Plan = "standard"
    member_id: int | None = None


@dataclass(frozen=True, slots=True)
class RenameApiKey:
    name: str


@dataclass(frozen=True, slots=True)
class RotateApiKey:
    """Give the key another secret.

    Args:
        at: the present.
        overlap: for how long the former secret stays good; never beyond its own end.
        lifetime: of the new secret; None for the former one's.
    """

    secret_id: str
    prefix: str
    at: datetime
    overlap: timedelta
    lifetime: timedelta | None = None


@dataclass(frozen=True, slots=True)
class AnnounceExpiry:
    """Has no effect unless the key is valid, expires soon, and this has not been announced."""

    at: datetime


@dataclass(frozen=True, slots=True)
class RevokeApiKey:
    """Revoking a revoked key changes nothing."""


Command = IssueApiKey | RenameApiKey | RotateApiKey | AnnounceExpiry | RevokeApiKey


def decide(state: ApiKey | None, command: Command) -> Sequence[Event]:
    if isinstance(command, IssueApiKey):
        return _issue(state, command)
    if state is None:
        raise NotFound("there is no such key", code="key_not_found")
    match command:
        case RenameApiKey(name):
            return [] if name == state.name else [ApiKeyRenamed(name=name)]
        case RotateApiKey():
            return _rotate(state, command)
        case AnnounceExpiry(at):
            return _announce(state, at)
        case RevokeApiKey():
            return [] if state.revoked_at is not None else [ApiKeyRevoked()]
        case _:
            assert_never(command)


def _issue(state: ApiKey | None, command: IssueApiKey) -> Sequence[Event]:
    if state is not None:
        raise Conflict("the key exists already", code="key_exists")
    return [
        ApiKeyIssued(
            name=command.name,
            prefix=command.prefix,
            permission=command.permission,
            scopes=granted_scopes(command.permission, command.scopes),
            developer_id=command.developer_id,
            expires_at=command.expires_at,
            plan=command.plan,
            member_id=command.member_id,
        )
    ]


def _rotate(state: ApiKey, command: RotateApiKey) -> Sequence[Event]:
    if state.revoked_at is not None:
        raise Conflict("the key was revoked; issue another one", code="key_revoked")
    if len(_still_good(state.earlier_secrets, command.at)) >= EARLIER_SECRETS_MAX:
        message = f"{EARLIER_SECRETS_MAX} earlier secrets of this key are still good; wait for their end, or revoke it"
        raise Conflict(message, code="too_many_secrets")
    overlap_end = command.at + command.overlap
    lifetime = command.lifetime or state.lifetime
    return [
        ApiKeyRotated(
            secret_id=command.secret_id,
            prefix=command.prefix,
            previous_valid_until=min(overlap_end, state.expires_at or overlap_end),
            expires_at=None if lifetime is None else command.at + lifetime,
        )
    ]


def _announce(state: ApiKey, at: datetime) -> Sequence[Event]:
    if state.expires_at is None or state.revoked_at is not None or state.expiry_announced_at is not None:
        return []
    return [ApiKeyExpiring(expires_at=state.expires_at)] if at < state.expires_at <= at + WARNED_BEFORE else []


def _still_good(secrets: Sequence[EarlierSecret], now: datetime) -> tuple[EarlierSecret, ...]:
    return tuple(secret for secret in secrets if secret.valid_until > now)


def evolve(state: ApiKey | None, envelope: Envelope) -> ApiKey:
    match envelope.data:
        case ApiKeyIssued() as issued:
            return ApiKey(
                name=issued.name,
                prefix=issued.prefix,
                permission=issued.permission,
                scopes=issued.scopes,
                developer_id=issued.developer_id,
                expires_at=issued.expires_at,
                plan=issued.plan,
                member_id=issued.member_id,
                created_at=envelope.time,
                created_by=envelope.metadata.actor,
            )
        case ApiKeyRenamed(name=name):
            assert state is not None
            return state.model_copy(update={"name": name})
        case ApiKeyRotated() as rotated:
            assert state is not None
            former = EarlierSecret(id=state.secret_id, valid_until=rotated.previous_valid_until)
            return state.model_copy(
                update={
                    "secret_id": rotated.secret_id,
                    "prefix": rotated.prefix,
                    "expires_at": rotated.expires_at,
                    "rotated_at": envelope.time,
                    "expiry_announced_at": None,
                    "earlier_secrets": _still_good((*state.earlier_secrets, former), envelope.time),
                }
            )
        case ApiKeyExpiring():
            assert state is not None
            return state.model_copy(update={"expiry_announced_at": envelope.time})
        case ApiKeyRevoked():
            assert state is not None
            return state.model_copy(update={"revoked_at": envelope.time, "revoked_by": envelope.metadata.actor})
        case unknown:
            raise AssertionError(f"an API key has no event {unknown.TYPE}")


API_KEY: Aggregate[ApiKey] = Aggregate(
    name="key",
    collection="api_keys",
    state=ApiKey,
    decide=decide,
    evolve=evolve,
)
