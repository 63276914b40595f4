"""An OAuth client: a program that exchanges its secret for short-lived tokens of one project (RFC 6749 section 4.4)."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import assert_never

from libs.contracts.auth import OauthClientIssued, OauthClientRevoked, Plan
from libs.core.decider import Aggregate
from libs.core.envelope import Envelope, Event, Frozen
from libs.core.errors import Conflict, NotFound
from services.auth.domain.scopes import granted_scopes


class OauthClient(Frozen):
    """What a client's tokens may hold, and whether it still gets any.

    Args:
        scopes: the most that a token holds; it may ask for less.
        revoked_at: from when on it and its tokens are refused, None while they are good.
        member_id: the user with whose membership of the project it ends, None for one made with the environment's key.
    """

    name: str
    scopes: tuple[str, ...]
    developer_id: str | None
    plan: Plan
    created_at: datetime
    created_by: str
    revoked_at: datetime | None = None
    revoked_by: str | None = None
    member_id: int | None = None


@dataclass(frozen=True, slots=True)
class IssueOauthClient:
    """``scopes`` None means all."""

    name: str
    scopes: tuple[str, ...] | None
    developer_id: str | None
    plan: Plan = "standard"
    member_id: int | None = None


@dataclass(frozen=True, slots=True)
class RevokeOauthClient:
    """Revoking a revoked client changes nothing."""


Command = IssueOauthClient | RevokeOauthClient


def decide(state: OauthClient | None, command: Command) -> Sequence[Event]:
    match command:
        case IssueOauthClient():
            if state is not None:
                raise Conflict("the client exists already", code="client_exists")
            scopes = granted_scopes("read-write", command.scopes)
            return [
                OauthClientIssued(
                    name=command.name,
                    scopes=scopes,
                    developer_id=command.developer_id,
                    plan=command.plan,
                    member_id=command.member_id,
                )
            ]
        case RevokeOauthClient():
            if state is None:
                raise NotFound("there is no such client", code="client_not_found")
            return [] if state.revoked_at is not None else [OauthClientRevoked()]
        case _:
            assert_never(command)


def evolve(state: OauthClient | None, envelope: Envelope) -> OauthClient:
    match envelope.data:
        case OauthClientIssued() as issued:
            return OauthClient(
                name=issued.name,
                scopes=issued.scopes,
                developer_id=issued.developer_id,
                plan=issued.plan,
                member_id=issued.member_id,
                created_at=envelope.time,
                created_by=envelope.metadata.actor,
            )
        case OauthClientRevoked():
            assert state is not None
            return state.model_copy(update={"revoked_at": envelope.time, "revoked_by": envelope.metadata.actor})
        case unknown:
            raise AssertionError(f"an OAuth client has no event {unknown.TYPE}")


OAUTH_CLIENT: Aggregate[OauthClient] = Aggregate(
    name="oauth_client",
    collection="oauth_clients",
    state=OauthClient,
    decide=decide,
    evolve=evolve,
)
