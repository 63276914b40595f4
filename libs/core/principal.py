"""Who is calling, as the gateway found out and signed."""

from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from libs.core.envelope import Frozen
from libs.core.errors import Forbidden

Role = Literal["owner", "member"]

FIRST_PROJECT_ID = 123
"""The project of those who run the installation."""


class Principal(Frozen):
    """The caller of a request.

    Args:
        kind: ``user`` by session, ``api_key`` or ``oauth_client`` by token, ``service`` for internal calls.
        subject: the stable id: user id, key id or service name.
        name: what histories show: username, key name, service name.
        projects: the role held in each project, by project id.
        scopes: such as ``sync:read``; users hold ``*``.
        developer_id: set where a key is bound to one developer.
        rate_class: the rate limit class of the caller: ``standard`` or ``enterprise``.
    """

    kind: Literal["user", "api_key", "oauth_client", "service"]
    subject: str
    name: str
    projects: Mapping[int, Role] = Field(default_factory=dict)
    scopes: tuple[str, ...] = ()
    developer_id: str | None = None
    rate_class: str = "standard"

    def require_project(self, project_id: int) -> None:
        """Raises ``Forbidden`` unless the caller is a member of the project."""
        if project_id not in self.projects:
            raise Forbidden(f"you are not a member of project {project_id}", code="not_a_member")
