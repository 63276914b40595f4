"""An API key: what a program may do in one project, until when. The key's text is known to its holder alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, assert_never

from libs.contracts.auth import ApiKeyIssued, ApiKeyRevoked
from libs.core.decider import Aggregate
from libs.core.envelope import Envelope, Event, Frozen
from libs.core.errors import Conflict, FieldError, InvalidInput, NotFound

Permission = Literal["read-only", "read-write"]

ALL_SCOPES = "*"
RESOURCES = (
    "data",
    "destinations",
    "ingest",
    "jobs",
    "keys",
    "projects",
    "sources",
    "sync",
    "usage",
    "users",
    "webhooks",
)
SCOPES = tuple(f"{resource}:{right}" for resource in RESOURCES for right in ("read", "write"))
READ_SCOPES = tuple(scope for scope in SCOPES if scope.endswith(":read"))


class ApiKey(Frozen):
    """What a key is allowed, and whether it still is.

    Args:
        prefix: the first characters of the key, by which its holder recognises it.
        revoked_at: from when on it is refused, None while it is good.
    """

    name: str
    prefix: str
    permission: Permission
    scopes: tuple[str, ...]
    developer_id: str | None
    expires_at: datetime | None
    created_at: datetime
    created_by: str
    revoked_at: datetime | None = None
    revoked_by: str | None = None


@dataclass(frozen=True, slots=True)
class IssueApiKey:
    """``scopes`` empty means all that the permission allows."""

    name: str
    prefix: str
    permission: Permission
    scopes: tuple[str, ...]
    developer_id: str | None
    expires_at: datetime | None


@dataclass(frozen=True, slots=True)
class RevokeApiKey:
    """Revoking a revoked key changes nothing."""


Command = IssueApiKey | RevokeApiKey


def granted_scopes(permission: Permission, wanted: Sequence[str]) -> tuple[str, ...]:
    """The scopes that a key gets: those wanted, or by default all that its permission allows.

    A read-only key never holds ``*`` nor a ``:write`` scope, so that the scopes alone tell what a key may do.

    Raises:
        InvalidInput: an unknown scope, or one that a read-only key can't hold.
    """
    allowed = READ_SCOPES if permission == "read-only" else (ALL_SCOPES, *SCOPES)
    for index, scope in enumerate(wanted):
        if scope not in (ALL_SCOPES, *SCOPES):
            raise _invalid_scope(index, f"{scope[:64]!r} is not a scope; the scopes are {', '.join(SCOPES)}")
        if scope not in allowed:
            raise _invalid_scope(index, f"a read-only key can't hold the scope {scope}")
    if wanted:
        return tuple(dict.fromkeys(wanted))
    return READ_SCOPES if permission == "read-only" else (ALL_SCOPES,)


def _invalid_scope(index: int, message: str) -> InvalidInput:
    field = f"scopes[{index}]"
    return InvalidInput(f"{field}: {message}", errors=[FieldError(field, message, "invalid_scope")])


def decide(state: ApiKey | None, command: Command) -> Sequence[Event]:
    match command:
        case IssueApiKey():
            return _issue(state, command)
        case RevokeApiKey():
            if state is None:
                raise NotFound("there is no such key", code="key_not_found")
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
        )
    ]


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
                created_at=envelope.time,
                created_by=envelope.metadata.actor,
            )
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
