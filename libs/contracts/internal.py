"""The internal calls: the only requests that services make of each other, signed, never more than one deep.

Each is a POST of one model that is answered by another. ``tests/architecture`` holds the list.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Generic, Literal, TypeVar

from libs.contracts.jobs import RunKind, RunOutcome
from libs.contracts.runs import StreamResult
from libs.core.envelope import Frozen
from libs.core.principal import Principal

Request = TypeVar("Request", bound=Frozen)
Response = TypeVar("Response", bound=Frozen)


@dataclass(frozen=True, slots=True)
class InternalCall(Generic[Request, Response]):
    """One internal call.

    Args:
        service: who answers.
        path: below the service's root; always ``/internal/…``.
        callers: the services that may call.
        is_repeatable: sent twice it does no more than once, so it is sent again when a connection breaks under it.
    """

    service: str
    path: str
    request: type[Request]
    response: type[Response]
    callers: tuple[str, ...]
    timeout_seconds: float = 2.0
    is_repeatable: bool = False


class Nothing(Frozen):
    """An empty answer."""


# auth


class CredentialPresented(Frozen):
    """``kind`` is ``bearer`` for the Authorization header's value, ``session`` for the cookie's."""

    kind: Literal["bearer", "session"]
    credential: str


class CredentialResolved(Frozen):
    """``principal`` is None when the credential is unknown, expired or revoked; ``reason`` then says why.

    ``expires_soon_at``: the end of a key's secret, where it is so near that its holder should hear of it.
    """

    principal: Principal | None
    reason: str | None = None
    expires_soon_at: datetime | None = None


# Every request waits for it: as long as auth may take to come back after it was killed.
RESOLVE_CREDENTIAL = InternalCall(
    "auth",
    "/internal/credentials/resolve",
    CredentialPresented,
    CredentialResolved,
    ("gateway",),
    timeout_seconds=8.0,
    is_repeatable=True,
)

# catalog


class EndpointWanted(Frozen):
    """A job's source or destination: an existing one by ``id``, or one to be made from the other fields."""

    id: int | None = None
    name: str | None = None
    type: str | None = None
    version: str | None = None
    config: dict[str, Any] | None = None


class EndpointReserved(Frozen):
    id: int
    name: str
    type: str
    version: str
    config_json: str


class ReserveEndpoints(Frozen):
    """Reserve both ends for a job; idempotent by ``job_id`` (the same call again answers the same)."""

    project_id: int
    job_id: int
    job_name: str
    actor: str
    source: EndpointWanted
    destination: EndpointWanted


class EndpointsReserved(Frozen):
    """``reserved_until``: the job must be created before this moment, else the reservation is void."""

    source: EndpointReserved
    destination: EndpointReserved
    reserved_until: datetime


RESERVE_ENDPOINTS = InternalCall(
    "catalog",
    "/internal/endpoints/reserve",
    ReserveEndpoints,
    EndpointsReserved,
    ("job_orchestrator",),
    timeout_seconds=8.0,
    is_repeatable=True,
)


class ResolveEndpoints(Frozen):
    """``grant`` is the token of a claimed run (signed by job_orchestrator) that names both ids."""

    grant: str


class EndpointResolved(Frozen):
    """``config`` holds its secrets in clear: for the worker's memory alone."""

    id: int
    type: str
    version: str
    config: dict[str, Any]


class EndpointsResolved(Frozen):
    source: EndpointResolved
    destination: EndpointResolved


RESOLVE_ENDPOINTS = InternalCall(
    "catalog",
    "/internal/endpoints/resolve",
    ResolveEndpoints,
    EndpointsResolved,
    ("worker",),
    timeout_seconds=8.0,
    is_repeatable=True,
)

# job_orchestrator


class JobsAsked(Frozen):
    job_ids: tuple[int, ...]


class JobEndpoints(Frozen):
    """What an existing job uses now."""

    job_id: int
    source_id: int
    destination_id: int


class JobsExisting(Frozen):
    """``endpoints`` says what each of ``job_ids`` uses, so that reservations of abandoned changes can be released."""

    job_ids: tuple[int, ...]
    endpoints: tuple[JobEndpoints, ...] = ()


JOBS_EXISTING = InternalCall(
    "job_orchestrator", "/internal/jobs/existing", JobsAsked, JobsExisting, ("catalog",), is_repeatable=True
)


class ClaimRun(Frozen):
    worker_id: str


class ClaimedRun(Frozen):
    """A run and the lease on it.

    Args:
        epoch: fences every earlier claim of this run's job.
        grant: what catalog wants before it hands out the configuration.
        cancel_requested: the run was cancelled before it was claimed.
        attempt, attempts_max: which attempt this is, and how many there are at most.
        living_job_ids: the project's jobs, where the job may take over tables of those that are no more.
    """

    run_id: str
    job_id: int
    project_id: int
    kind: RunKind
    epoch: int
    lease_seconds: float
    grant: str
    streams_config_json: str
    advanced_settings_json: str
    cancel_requested: bool = False
    attempt: int = 1
    attempts_max: int = 1
    living_job_ids: tuple[int, ...] | None = None


class RunClaim(Frozen):
    run: ClaimedRun | None


CLAIM_RUN = InternalCall("job_orchestrator", "/internal/runs/claim", ClaimRun, RunClaim, ("worker",))


class LogLine(Frozen):
    """``level`` in lower case: debug, info, warning, error."""

    time: datetime
    level: Literal["debug", "info", "warning", "error"]
    message: str


class StreamProgress(Frozen):
    """``rows_total`` is the planner's estimate, None when unknown; ``error`` says why a stream failed."""

    namespace: str
    name: str
    state: Literal["waiting", "running", "completed", "failed"]
    rows_read: int = 0
    rows_written: int = 0
    bytes_read: int = 0
    rows_total: int | None = None
    error: str | None = None


class Heartbeat(Frozen):
    """Renews the lease and carries what happened since the last one.

    Args:
        log_sequence: the number of the first of ``log_lines`` in this epoch's log, so that a repeated heartbeat adds
            no line twice.
    """

    run_id: str
    epoch: int
    streams: tuple[StreamProgress, ...] = ()
    log_sequence: int = 0
    log_lines: tuple[LogLine, ...] = ()


class HeartbeatAnswer(Frozen):
    """``fenced``: another worker has the run; stop at once and commit nothing."""

    verdict: Literal["continue", "cancel", "fenced"]
    grant: str | None = None


HEARTBEAT = InternalCall(
    "job_orchestrator", "/internal/runs/heartbeat", Heartbeat, HeartbeatAnswer, ("worker",), is_repeatable=True
)


class FinishRun(Frozen):
    """The attempt's end; ``retryable`` failures are tried again up to the installation's limit.

    Args:
        given_back: the worker was told to stop, which is no failure: another one goes on with the same attempt.
    """

    run_id: str
    epoch: int
    outcome: RunOutcome
    error: str | None = None
    retryable: bool = False
    given_back: bool = False
    streams: tuple[StreamResult, ...] = ()
    progress: tuple[StreamProgress, ...] = ()
    log_sequence: int = 0
    log_lines: tuple[LogLine, ...] = ()


class FinishAnswer(Frozen):
    verdict: Literal["recorded", "fenced"]


FINISH_RUN = InternalCall("job_orchestrator", "/internal/runs/finish", FinishRun, FinishAnswer, ("worker",))

# worker


class ConnectorConfig(Frozen):
    """``role`` tells a source's connector from a destination's."""

    role: Literal["source", "destination"]
    type: str
    config: dict[str, Any]


class CheckResult(Frozen):
    """``succeeded`` False carries the reason in ``message``, in words for the person who typed the configuration."""

    succeeded: bool
    message: str
    log_lines: tuple[LogLine, ...] = ()


class DiscoveredStreams(Frozen):
    """``streams_json`` is the list of the catalog's ``{"stream": {…}}`` entries as JSON text."""

    streams_json: str


CHECK_CONNECTION = InternalCall(
    "worker", "/internal/connectors/check", ConnectorConfig, CheckResult, ("catalog",), timeout_seconds=30.0
)
DISCOVER_STREAMS = InternalCall(
    "worker", "/internal/connectors/discover", ConnectorConfig, DiscoveredStreams, ("catalog",), timeout_seconds=60.0
)

CALLS: tuple[InternalCall[Any, Any], ...] = (
    RESOLVE_CREDENTIAL,
    RESERVE_ENDPOINTS,
    RESOLVE_ENDPOINTS,
    JOBS_EXISTING,
    CLAIM_RUN,
    HEARTBEAT,
    FINISH_RUN,
    CHECK_CONNECTION,
    DISCOVER_STREAMS,
)
