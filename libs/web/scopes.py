"""Which scope a route needs: one table for all services.

A scope is ``<resource>:<right>``, such as ``sources:write``. The route's path tells the resource; its right is what
its description says of changes. A route that the table does not know is open to credentials with every scope
(``*``) alone.
"""

import re
from functools import lru_cache
from typing import Literal

from libs.core.errors import Forbidden, InsufficientScope
from libs.core.principal import Principal
from libs.core.scopes import ALL_SCOPES

ANY = ""
"""The resource of routes that any valid credential may call."""

_RESOURCES: tuple[tuple[str, str], ...] = tuple(
    (re.sub(r"\{[^}]*\}", r"[^/]+", prefix), resource)
    for prefix, resource in (
        ("/auth", ANY),
        ("/logout", ANY),
        ("/api/v1/platform", ANY),
        ("/api/v1/sync", "sync"),
        ("/api/v1/users", "users"),
        ("/api/v1/projects", "projects"),
        ("/api/v1/project/{id}/sources?", "sources"),
        ("/api/v1/project/{id}/destinations?", "destinations"),
        ("/api/v1/project/{id}/jobs", "jobs"),
        ("/api/v1/project/{id}/check-unique", ANY),
        ("/api/v1/project/{id}/settings", "projects"),
        ("/api/v1/project/{id}/members", "users"),
        ("/api/v1/project/{id}/webhooks", "webhooks"),
        ("(?:/api)?/v2/ingest", "ingest"),
        ("(?:/api)?/v2/jobs", "jobs"),
        ("(?:/api)?/v2/data", "data"),
        ("(?:/api)?/v2/keys", "keys"),
        ("(?:/api)?/v2/oauth", "keys"),
        ("(?:/api)?/v2/usage", "usage"),
        ("(?:/api)?/v2/webhooks", "webhooks"),
    )
)
_TABLE = tuple((re.compile(rf"{prefix}(?:[/:].*)?"), resource) for prefix, resource in _RESOURCES)
_OF_ONE_DEVELOPER = re.compile(r"/api/v1/sync/records(?:[/:].*)?")


@lru_cache(maxsize=4096)
def scope_of(route: str, *, changes: bool) -> str | None:
    """The scope that a route needs, None where any credential will do.

    Args:
        route: the path as it was declared, such as ``/api/v1/project/{projectid}/sources``.
        changes: whether it changes something, as its description says.
    """
    resource = next((resource for pattern, resource in _TABLE if pattern.fullmatch(route)), None)
    if resource == ANY:
        return None
    if resource is None:
        return ALL_SCOPES
    right: Literal["read", "write"] = "write" if changes else "read"
    return f"{resource}:{right}"


def authorize(principal: Principal, route: str, *, changes: bool) -> None:
    """Refuse what the caller's scopes or its binding to one developer do not allow.

    Raises:
        InsufficientScope: the scope is missing.
        Forbidden: a credential bound to a developer was used for something else than that developer's records.
    """
    scope = scope_of(route, changes=changes)
    if scope is None:
        return
    if principal.developer_id is not None and not _OF_ONE_DEVELOPER.fullmatch(route):
        message = "this credential is bound to a developer and can only access that developer's sync records"
        raise Forbidden(message, code="bound_to_developer")
    if ALL_SCOPES in principal.scopes or scope in principal.scopes:
        return
    if changes and principal.scopes and all(held.endswith(":read") for held in principal.scopes):
        raise InsufficientScope("this credential may only read", scope, code="read_only_credential")
    needed = "every scope" if scope == ALL_SCOPES else f"the scope {scope}"
    raise InsufficientScope(f"this credential lacks {needed}", scope)
