"""Which service owns a path, how large a body it accepts there, and how long its response may take."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

BODY_BYTES_MAX = 1024 * 1024
INGEST_BYTES_MAX = 10 * 1024 * 1024
# Discovery in a large database is slow; the worker's own timeout is 60 seconds.
CONNECTOR_TIMEOUT_SECONDS = 75.0
# A long poll of changes waits up to 60 seconds.
CHANGES_TIMEOUT_SECONDS = 75.0


@dataclass(frozen=True, slots=True)
class Target:
    """Where a request goes.

    Args:
        label: the group of paths in metrics.
        timeout_seconds: until the response begins; None for the gateway's setting.
        by_entity_type: the body's ``entity_type`` decides between catalog and job_orchestrator.
    """

    service: str
    label: str
    body_bytes_max: int = BODY_BYTES_MAX
    timeout_seconds: float | None = None
    by_entity_type: bool = False


_EXACT: Mapping[str, Target] = MappingProxyType(
    {
        path: Target("auth", path)
        for path in ("/login", "/signup", "/logout", "/auth", "/auth/check", "/oauth/token", "/telemetry-id")
    }
    | {
        "/api/v2/ingest": Target("job_orchestrator", "/api/v2/ingest", body_bytes_max=INGEST_BYTES_MAX),
        "/v2/ingest": Target("job_orchestrator", "/api/v2/ingest", body_bytes_max=INGEST_BYTES_MAX),
    }
)

# The first match decides, so longer prefixes come before shorter ones.
_PREFIXES: tuple[tuple[str, Target], ...] = (
    (
        "/api/v1/sync/records/changes",
        Target("record_sync", "/api/v1/sync/records/changes", timeout_seconds=CHANGES_TIMEOUT_SECONDS),
    ),
    ("/api/v1/sync/records:batch", Target("record_sync", "/api/v1/sync/records:batch")),
    ("/api/v1/sync/records", Target("record_sync", "/api/v1/sync/records")),
    ("/api/v1/sync", Target("job_orchestrator", "/api/v1/sync")),
    ("/api/v1/users", Target("auth", "/api/v1/users")),
    ("/api/v1/projects", Target("auth", "/api/v1/projects")),
    ("/api/v1/platform", Target("auth", "/api/v1/platform")),
    ("/api/v2/keys", Target("auth", "/api/v2/keys")),
    ("/api/v2/oauth", Target("auth", "/api/v2/oauth")),
    ("/api/v2/usage", Target("auth", "/api/v2/usage")),
    ("/v2/keys", Target("auth", "/api/v2/keys")),
    ("/v2/oauth", Target("auth", "/api/v2/oauth")),
    ("/v2/usage", Target("auth", "/api/v2/usage")),
    ("/api/v2", Target("job_orchestrator", "/api/v2")),
    ("/v2", Target("job_orchestrator", "/api/v2")),
)

_PROJECT = "/api/v1/project/"

_PROJECT_RESOURCES: Mapping[str, Target] = MappingProxyType(
    {
        "sources": Target("catalog", f"{_PROJECT}:id/sources"),
        "source": Target("catalog", f"{_PROJECT}:id/sources", timeout_seconds=CONNECTOR_TIMEOUT_SECONDS),
        "destinations": Target("catalog", f"{_PROJECT}:id/destinations"),
        "destination": Target("catalog", f"{_PROJECT}:id/destinations", timeout_seconds=CONNECTOR_TIMEOUT_SECONDS),
        "jobs": Target("job_orchestrator", f"{_PROJECT}:id/jobs"),
        "settings": Target("job_orchestrator", f"{_PROJECT}:id/settings"),
        "check-unique": Target("catalog", f"{_PROJECT}:id/check-unique", by_entity_type=True),
        "members": Target("auth", f"{_PROJECT}:id/members"),
    }
)

_CONNECTOR_CALLS: Mapping[str, Target] = MappingProxyType(
    {
        f"{resource}/{action}": Target(
            "catalog", f"{_PROJECT}:id/{resource}/{action}", timeout_seconds=CONNECTOR_TIMEOUT_SECONDS
        )
        for resource in ("sources", "destinations")
        for action in ("test", "streams")
    }
)


def target_of(path: str) -> Target | None:
    """The target of a path as it was sent; None if no service owns it."""
    found = _EXACT.get(path)
    if found is not None:
        return found
    if path.startswith(_PROJECT):
        return _target_in_project(path)
    return next((target for prefix, target in _PREFIXES if path == prefix or path.startswith(f"{prefix}/")), None)


def _target_in_project(path: str) -> Target | None:
    _, _, rest = path[len(_PROJECT) :].partition("/")
    return _CONNECTOR_CALLS.get(rest) or _PROJECT_RESOURCES.get(rest.partition("/")[0])


def target_of_entity_type(target: Target, entity_type: object) -> Target:
    """job_orchestrator decides about names of jobs, catalog about all others and about invalid types."""
    return Target("job_orchestrator", target.label) if entity_type == "job" else target
