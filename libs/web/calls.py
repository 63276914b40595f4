"""A request as handlers get it: read once, at the door."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from aiohttp import web

from libs.core.decider import ExpectedVersion
from libs.core.envelope import Metadata
from libs.core.errors import Forbidden, NotFound, Unauthenticated
from libs.core.idempotency import IdempotencyKey
from libs.core.principal import Principal
from libs.core.text import number_of
from libs.process.telemetry import current_traceparent
from libs.web.requests import PRINCIPAL, REQUEST_ID, invalid_field

PROJECT_HEADER = "X-Project-Id"

ProjectFrom = Literal["path", "header", "nowhere"]
"""Where a route names its project; a credential with only one project may leave the header ``X-Project-Id`` out."""

Reader = Callable[[web.Request], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class Call:
    """One request: who calls, for which project, and under which conditions.

    Args:
        request: for the few handlers that need more: headers, a streamed answer.
        principal: None on a public path without a credential.
        metadata: what the events of this call carry about it.
        expected_version: of ``If-Match``; None where any version will do.
        idempotency: the request's ``Idempotency-Key``, unique to the caller, the method, the path and the project.
    """

    request: web.Request
    principal: Principal | None
    metadata: Metadata
    expected_version: ExpectedVersion = None
    idempotency: IdempotencyKey | None = None

    @property
    def caller(self) -> Principal:
        """Who calls; raises ``Unauthenticated`` on a public path without a credential."""
        if self.principal is None:
            raise Unauthenticated("authentication is required")
        return self.principal

    @property
    def project_id(self) -> int:
        """The project that the route names, of which the caller is a member."""
        assert self.metadata.project_id is not None, "this route names no project"
        return self.metadata.project_id

    def path(self, name: str) -> str:
        """A parameter of the path, as it was sent."""
        return self.request.match_info[name]

    def in_project(self, project_id: int | None) -> "Call":
        """The same call for a project that its input names; membership is the handler's to check."""
        return replace(self, metadata=replace(self.metadata, project_id=project_id))


def call_of(request: web.Request, project_from: ProjectFrom) -> Call:
    """The call without its input.

    Raises:
        NotFound: the project in the path is no number.
        Forbidden: the caller is not a member of the project, or of any.
        InvalidInput: the caller has several projects and names none.
    """
    principal: Principal | None = request.get(PRINCIPAL)
    project_id = None if project_from == "nowhere" else _project_of(request, principal, project_from)
    metadata = Metadata(
        actor="anonymous" if principal is None else principal.name,
        project_id=project_id,
        correlation_id=REQUEST_ID.get(),
        traceparent=current_traceparent(),
    )
    return Call(request, principal, metadata)


def _project_of(request: web.Request, principal: Principal | None, project_from: ProjectFrom) -> int:
    if principal is None:
        raise Unauthenticated("authentication is required")
    project_id = _in_path(request) if project_from == "path" else _in_header(request, principal)
    principal.require_project(project_id)
    return project_id


def _in_path(request: web.Request) -> int:
    text = request.match_info["projectid"]
    project_id = number_of(text)
    if project_id is None:
        raise NotFound(f"project {text[:64]!r} does not exist")
    return project_id


def _in_header(request: web.Request, principal: Principal) -> int:
    named = request.headers.get(PROJECT_HEADER)
    if named is None:
        if not principal.projects:
            raise Forbidden("you are not a member of any project", code="not_a_member")
        if len(principal.projects) == 1:
            return next(iter(principal.projects))
    project_id = None if named is None else number_of(named)
    if project_id is None:
        raise invalid_field(PROJECT_HEADER, "must name one of your projects by its number")
    return project_id
