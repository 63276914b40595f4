"""Which service a path belongs to."""

import pytest

from libs.contracts.services import SERVICES, names_forwarded_to
from services.gateway.routes import INGEST_BYTES_MAX, target_of, target_of_entity_type

P = "/api/v1/project/123"


@pytest.mark.parametrize(
    ("path", "service"),
    [
        ("/login", "auth"),
        ("/auth/check", "auth"),
        ("/telemetry-id", "auth"),
        ("/api/v1/users", "auth"),
        ("/api/v1/users/7", "auth"),
        ("/api/v1/platform/releases", "auth"),
        ("/api/v2/keys/abc", "auth"),
        (f"{P}/sources", "catalog"),
        (f"{P}/sources/7/history", "catalog"),
        (f"{P}/source/streams", "catalog"),
        (f"{P}/destinations/test", "catalog"),
        (f"{P}/jobs", "job_orchestrator"),
        (f"{P}/jobs/dest_id=7", "job_orchestrator"),
        (f"{P}/jobs/7/tasks/x/logs", "job_orchestrator"),
        (f"{P}/settings", "job_orchestrator"),
        ("/api/v1/sync", "job_orchestrator"),
        ("/api/v1/sync/sync_abc/status", "job_orchestrator"),
        ("/api/v1/sync/records", "record_sync"),
        ("/api/v1/sync/records/7", "record_sync"),
        ("/api/v1/sync/records/changes", "record_sync"),
        ("/api/v1/sync/records:batch", "record_sync"),
        ("/api/v2/ingest", "job_orchestrator"),
        ("/v2/data/x", "job_orchestrator"),
    ],
)
def test_a_path_belongs_to_its_owner(path: str, service: str) -> None:
    target = target_of(path)
    assert target is not None
    assert target.service == service
    assert service in names_forwarded_to(SERVICES)


@pytest.mark.parametrize(
    "path",
    ["/", "", "/loginx", "/login/", "/api/v1/syncx", "/api/v3", P, f"{P}/", f"{P}/x", f"{P}/webhooks"],
)
def test_other_paths_belong_to_nobody(path: str) -> None:
    assert target_of(path) is None


def test_ingest_alone_takes_large_bodies() -> None:
    for path in ("/api/v2/ingest", "/v2/ingest"):
        target = target_of(path)
        assert target is not None
        assert target.body_bytes_max == INGEST_BYTES_MAX


def test_calls_that_connect_to_databases_get_more_time() -> None:
    for path in (f"{P}/sources/test", f"{P}/destinations/test", f"{P}/sources/streams", f"{P}/source/streams"):
        target = target_of(path)
        assert target is not None
        assert target.timeout_seconds is not None


@pytest.mark.parametrize(
    ("entity_type", "service"), [("job", "job_orchestrator"), ("source", "catalog"), (None, "catalog"), (7, "catalog")]
)
def test_names_are_judged_by_their_entitys_owner(entity_type: object, service: str) -> None:
    target = target_of(f"{P}/check-unique")
    assert target is not None
    assert target_of_entity_type(target, entity_type).service == service
