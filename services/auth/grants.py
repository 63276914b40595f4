"""Rules for credentials: they grant no more than their issuer has, and their secrets are shown once."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from libs.contracts.auth import Plan
from libs.core.decider import Act
from libs.core.entity import Entity
from libs.core.envelope import Frozen
from libs.core.errors import FieldError, Forbidden
from libs.core.principal import FIRST_PROJECT_ID, Principal
from libs.core.scopes import ALL_SCOPES
from libs.eventsourcing.batch import SideWrite
from libs.eventsourcing.command_handler import CommandHandler
from libs.eventsourcing.requests import CommandRequest
from libs.web.calls import Call
from services.auth.domain.api_key import ApiKey
from services.auth.domain.oauth_client import OauthClient

State = TypeVar("State", bound=Frozen)


@dataclass(frozen=True, slots=True)
class Issued(Generic[State]):
    """``secret`` is shown once: None in the answer to a repeated request."""

    entity: Entity[State]
    secret: str | None


async def issue_once(commands: CommandHandler, call: Call, act: Act, secret: str, kept: SideWrite) -> Issued[Any]:
    """Store a credential's event together with ``kept``, the document that holds its secret's hash."""
    outcome = await commands.execute(CommandRequest([act], call.metadata, [kept], call.idempotency))
    entity = outcome.entities[0]
    assert entity is not None
    return Issued(replace(entity, project_id=call.project_id), None if outcome.replayed else secret)


def refuse_more_than_own(caller: Principal, scopes: Sequence[str], developer_id: str | None) -> None:
    """Raises ``Forbidden`` if a credential with these scopes could do more than its issuer."""
    if caller.developer_id is not None and developer_id != caller.developer_id:
        message = "a credential that is bound to a developer can hand on that developer's records only"
        raise Forbidden(message, code="insufficient_scope", errors=[FieldError("developer_id", message)])
    if ALL_SCOPES in caller.scopes:
        return
    lacking = [scope for scope in scopes if scope not in caller.scopes]
    if lacking:
        message = f"your credential does not hold {', '.join(lacking)} and so can't grant it"
        raise Forbidden(message, code="insufficient_scope", errors=[FieldError("scopes", message)])


def require_right_to_plan(caller: Principal, plan: Plan) -> None:
    """Raises ``Forbidden`` unless the caller may give this plan; only owners of the first project may raise it."""
    if plan != "standard" and caller.projects.get(FIRST_PROJECT_ID) != "owner":
        message = f"the plan {plan} is given by the operator: an owner of project {FIRST_PROJECT_ID}, or API_KEY"
        raise Forbidden(message, code="not_an_operator", errors=[FieldError("plan", message)])


def require_control(caller: Principal, credential: Entity[ApiKey] | Entity[OauthClient], member_id: int | None) -> None:
    """Raise ``Forbidden`` unless the caller may rotate, rename or revoke a credential.

    An owner of the project may change every credential, a member those that act on the member's behalf, and a key
    itself.

    Args:
        member_id: the user on whose behalf the caller acts, None when there is none.
    """
    project_id = credential.project_id
    owns_project = project_id is not None and caller.projects.get(project_id) == "owner"
    is_itself = caller.kind in ("api_key", "oauth_client") and caller.subject == str(credential.id)
    if owns_project or is_itself or (member_id is not None and member_id == credential.state.member_id):
        return
    message = "only an owner of the project, or the member who made this credential, may change it"
    raise Forbidden(message, code="not_an_owner")
