"""Which scope opens which route."""

import pytest

from libs.core.errors import Forbidden, InsufficientScope
from libs.core.principal import Principal
from libs.runtime.scopes import authorize, scope_of


def a_key(*scopes: str, developer_id: str | None = None) -> Principal:
    return Principal(kind="api_key", subject="k", name="ci", scopes=scopes, developer_id=developer_id)


@pytest.mark.parametrize(
    ("method", "route", "scope"),
    [
        ("GET", "/api/v1/sync/records", "sync:read"),
        ("POST", "/api/v1/sync/records:batch", "sync:write"),
        ("GET", "/api/v1/sync/{id}/status", "sync:read"),
        ("GET", "/api/v1/project/{projectid}/sources", "sources:read"),
        ("HEAD", "/api/v1/project/{projectid}/sources/{id}", "sources:read"),
        ("GET", "/api/v1/project/{projectid}/source/streams", "sources:read"),
        ("POST", "/api/v1/project/{projectid}/sources/test", "sources:write"),
        ("DELETE", "/api/v1/project/{projectid}/destinations/{id}", "destinations:write"),
        ("GET", "/api/v1/project/{projectid}/jobs/{jobid}/tasks", "jobs:read"),
        ("GET", "/api/v1/project/{projectid}/jobs/{jobid}/cancel", "jobs:write"),
        ("PUT", "/api/v1/project/{projectid}/settings", "projects:write"),
        ("POST", "/api/v2/ingest", "ingest:write"),
        ("GET", "/v2/jobs/{job_id}", "jobs:read"),
        ("GET", "/api/v2/data/{dataset_id}", "data:read"),
        ("POST", "/api/v2/keys/{keyid}/rotate", "keys:write"),
        ("POST", "/v2/oauth/clients", "keys:write"),
        ("GET", "/api/v2/webhooks", "webhooks:read"),
        ("GET", "/api/v1/users/{userid}", "users:read"),
        ("POST", "/logout", None),
        ("GET", "/auth/check", None),
        ("GET", "/api/v1/projects", "projects:read"),
    ],
)
def test_a_route_needs_the_scope_of_its_resource(method: str, route: str, scope: str | None) -> None:
    assert scope_of(method, route) == scope
    if scope is not None:
        authorize(a_key(scope), method, route)
        with pytest.raises(InsufficientScope) as refused:
            authorize(a_key("usage:read", "usage:write"), method, route)
        assert refused.value.scope == scope
    authorize(a_key("*"), method, route)


@pytest.mark.parametrize("route", ["/api/v1/sources", "/api/v1/syncing", "/authority", "/api/v2/keysmith", "/{path}"])
def test_a_route_that_nobody_declared_is_open_to_every_scope_together_only(route: str) -> None:
    assert scope_of("GET", route) == "*"
    with pytest.raises(InsufficientScope):
        authorize(a_key("sync:read", "sync:write"), "GET", route)


def test_a_credential_that_may_only_read_is_told_so() -> None:
    with pytest.raises(InsufficientScope) as refused:
        authorize(a_key("sync:read", "sources:read"), "POST", "/api/v1/project/{projectid}/sources")
    assert (refused.value.code, refused.value.scope) == ("read_only_credential", "sources:write")


def test_a_key_of_one_developer_opens_that_developers_records_only() -> None:
    bound = a_key("*", developer_id="dev-1")
    authorize(bound, "POST", "/api/v1/sync/records")
    authorize(bound, "GET", "/auth")
    for route in ("/api/v1/sync/{id}", "/api/v1/project/{projectid}/sources", "/api/v2/keys", "/api/v1/users"):
        with pytest.raises(Forbidden) as refused:
            authorize(bound, "GET", route)
        assert refused.value.code == "bound_to_developer"
