"""The internal calls: all requests between services. They are signed, and whoever answers one makes none.

Each is a POST of one model that is answered with another. ``tests/architecture`` checks the list.
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
        service: the service that answers.
        path: below the service's root; always ``/internal/…``.
        callers: the services that may call.
        is_repeatable: idempotent, so it is sent again if the connection breaks.
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
    """``kind`` is ``bearer`` for the value of the Authorization header, ``session`` for that of the cookie."""

    kind: Literal["bearer", "session"]
    credential: str


class CredentialResolved(Frozen):
    """``principal`` is None if the credential is unknown, expired or revoked; ``reason`` then says which.

    ``expires_soon_at``: when a key's secret expires, if that is so soon that its holder should be warned.
    """

    principal: Principal | None
    reason: str | None = None
    expires_soon_at: datetime | None = None


# Every request waits for it, so it outlasts a restart of auth after a crash.
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
    """A job's source or destination: an existing one by ``id``, or a new one from the other fields."""

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
    """Reserve source and destination for a job; idempotent by ``job_id``."""

    project_id: int
    job_id: int
    job_name: str
    actor: str
    source: EndpointWanted
    destination: EndpointWanted


class EndpointsReserved(Frozen):
    """``reserved_until``: the reservation expires unless the job has been created by then."""

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
    """``grant``: the token of a claimed run, signed by job_orchestrator, that names both endpoints."""

    grant: str


class EndpointResolved(Frozen):
    """``config`` holds secrets in clear text, which must not leave the worker's memory."""

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
    """``endpoints``: what each of ``job_ids`` uses, so that reservations of abandoned changes can be released."""

    job_ids: tuple[int, ...]
    endpoints: tuple[JobEndpoints, ...] = ()


JOBS_EXISTING = InternalCall(
    "job_orchestrator", "/internal/jobs/existing", JobsAsked, JobsExisting, ("catalog",), is_repeatable=True
)


RUN_WORK = "run"
"""The kind of work of a job's run."""


class ClaimWork(Frozen):
    """``kinds``: the kinds of work that the worker executes. Workers of earlier versions send none and get runs."""

    worker_id: str
    kinds: tuple[str, ...] = (RUN_WORK,)


class Claimed(Frozen):
    """What every kind of claimed work has; each kind extends it.

    Args:
        run_id: identifies the work in reports.
        epoch: fences every earlier claim.
        lease_seconds: the claim expires this long after the last heartbeat.
        cancel_requested: cancelled before it was claimed.
    """

    run_id: str
    epoch: int
    lease_seconds: float
    cancel_requested: bool = False


class ClaimedRun(Claimed):
    """A job's run.

    Args:
        grant: catalog resolves the run's endpoints for it.
        attempt, attempts_max: the number of this attempt, and of the last one.
        living_job_ids: the project's jobs, if the job may take over tables of deleted ones.
        resets: the streams, as namespace and name, whose rows are all read again.
        job_name: for the run's log; empty from orchestrators of earlier versions.
        verify, repair: as in ``RunQueued``.
    """

    job_id: int
    project_id: int
    kind: RunKind
    grant: str
    streams_config_json: str
    advanced_settings_json: str
    attempt: int = 1
    attempts_max: int = 1
    living_job_ids: tuple[int, ...] | None = None
    resets: tuple[tuple[str, str], ...] = ()
    job_name: str = ""
    verify: bool = False
    repair: bool = False


class WorkClaim(Frozen):
    """The claimed work, if there was any.

    Args:
        kind: the kind of work. Orchestrators of earlier versions only have runs and do not send it.
        run: the fields of the kind's own extension of ``Claimed``.
    """

    kind: str = RUN_WORK
    run: dict[str, Any] | None = None


CLAIM_WORK = InternalCall("job_orchestrator", "/internal/runs/claim", ClaimWork, WorkClaim, ("worker",))


class LogLine(Frozen):
    """``level`` in lower case: debug, info, warning, error."""

    time: datetime
    level: Literal["debug", "info", "warning", "error"]
    message: str


class StreamProgress(Frozen):
    """``rows_total`` is the planner's estimate, None if unknown; ``error`` says why the stream failed."""

    namespace: str
    name: str
    state: Literal["waiting", "running", "completed", "failed"]
    rows_read: int = 0
    rows_written: int = 0
    bytes_read: int = 0
    rows_total: int | None = None
    error: str | None = None


class Heartbeat(Frozen):
    """Renews the lease and reports what is new.

    Args:
        streams: the progress of the streams that changed since the last acknowledged report.
        results: results ahead of the end, if they do not all fit into the final report.
        log_sequence: the number of the first of ``log_lines`` in this epoch's log. A repeated line is stored once.
    """

    run_id: str
    epoch: int
    streams: tuple[StreamProgress, ...] = ()
    results: tuple[StreamResult, ...] = ()
    log_sequence: int = 0
    log_lines: tuple[LogLine, ...] = ()


class HeartbeatAnswer(Frozen):
    """``fenced``: another worker has the work; stop at once and commit nothing."""

    verdict: Literal["continue", "cancel", "fenced"]


HEARTBEAT = InternalCall(
    "job_orchestrator", "/internal/runs/heartbeat", Heartbeat, HeartbeatAnswer, ("worker",), is_repeatable=True
)


class FinishWork(Frozen):
    """The attempt's end.

    Args:
        retryable: a failed attempt may succeed when it is retried.
        given_back: the worker was stopped, which is no failure: another worker continues the same attempt.
        streams: the results that no heartbeat carried.
        progress, log_sequence, log_lines: as in ``Heartbeat``.
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


FINISH_WORK = InternalCall("job_orchestrator", "/internal/runs/finish", FinishWork, FinishAnswer, ("worker",))

# worker


class ConnectorConfig(Frozen):
    """What to connect to, and as which side."""

    role: Literal["source", "destination"]
    type: str
    config: dict[str, Any]


class CheckResult(Frozen):
    """``message`` says why a check failed, addressed to the person who entered the configuration."""

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
    CLAIM_WORK,
    HEARTBEAT,
    FINISH_WORK,
    CHECK_CONNECTION,
    DISCOVER_STREAMS,
)
