"""Which scope opens which route."""

import pytest

from libs.core.errors import Forbidden, InsufficientScope
from libs.core.principal import Principal
from libs.web.scopes import authorize, scope_of


def a_key(*scopes: str, developer_id: str | None = None) -> Principal:
    return Principal(kind="api_key", subject="k", name="ci", scopes=scopes, developer_id=developer_id)


@pytest.mark.parametrize(
    ("changes", "route", "scope"),
    [
        (False, "/api/v1/sync/records", "sync:read"),
        (True, "/api/v1/sync/records:batch", "sync:write"),
        (False, "/api/v1/sync/{id}/status", "sync:read"),
        (False, "/api/v1/project/{projectid}/sources", "sources:read"),
        (False, "/api/v1/project/{projectid}/sources/{id}", "sources:read"),
        (False, "/api/v1/project/{projectid}/source/streams", "sources:read"),
        (True, "/api/v1/project/{projectid}/sources/test", "sources:write"),
        (True, "/api/v1/project/{projectid}/destinations/{id}", "destinations:write"),
        (False, "/api/v1/project/{projectid}/jobs/{jobid}/tasks", "jobs:read"),
        (True, "/api/v1/project/{projectid}/jobs/{jobid}/cancel", "jobs:write"),
        (True, "/api/v1/project/{projectid}/settings", "projects:write"),
        (True, "/api/v2/ingest", "ingest:write"),
        (False, "/v2/jobs/{job_id}", "jobs:read"),
        (False, "/api/v2/data/{dataset_id}", "data:read"),
        (True, "/api/v2/keys/{keyid}/rotate", "keys:write"),
        (True, "/v2/oauth/clients", "keys:write"),
        (False, "/api/v2/webhooks", "webhooks:read"),
        (False, "/api/v1/users/{userid}", "users:read"),
        (True, "/logout", None),
        (False, "/auth/check", None),
        (False, "/api/v1/projects", "projects:read"),
    ],
)
def test_a_route_needs_the_scope_of_its_resource(changes: bool, route: str, scope: str | None) -> None:
    assert scope_of(route, changes=changes) == scope
    if scope is not None:
        authorize(a_key(scope), route, changes=changes)
        with pytest.raises(InsufficientScope) as refused:
            authorize(a_key("usage:read", "usage:write"), route, changes=changes)
        assert refused.value.scope == scope
    authorize(a_key("*"), route, changes=changes)


@pytest.mark.parametrize("route", ["/api/v1/sources", "/api/v1/syncing", "/authority", "/api/v2/keysmith", "/{path}"])
def test_a_route_that_nobody_declared_is_open_to_every_scope_together_only(route: str) -> None:
    assert scope_of(route, changes=False) == "*"
    with pytest.raises(InsufficientScope):
        authorize(a_key("sync:read", "sync:write"), route, changes=False)


def test_a_credential_that_may_only_read_is_told_so() -> None:
    with pytest.raises(InsufficientScope) as refused:
        authorize(a_key("sync:read", "sources:read"), "/api/v1/project/{projectid}/sources", changes=True)
    assert (refused.value.code, refused.value.scope) == ("read_only_credential", "sources:write")


def test_a_key_of_one_developer_opens_that_developers_records_only() -> None:
    bound = a_key("*", developer_id="dev-1")
    authorize(bound, "/api/v1/sync/records", changes=True)
    authorize(bound, "/auth", changes=False)
    for route in ("/api/v1/sync/{id}", "/api/v1/project/{projectid}/sources", "/api/v2/keys", "/api/v1/users"):
        with pytest.raises(Forbidden) as refused:
            authorize(bound, route, changes=False)
        assert refused.value.code == "bound_to_developer"
