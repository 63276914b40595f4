"""The settings of the job orchestrator."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from libs.contracts.services import service_named
from libs.core.addresses import IPNetwork
from libs.process.live import Live, live
from libs.process.settings import Port, Seconds, ServiceSettings, listed


class JobOrchestratorSettings(ServiceSettings):
    """Settings beside those of every service.

    Args:
        max_retries: how often a failed run is tried again before it counts as failed.
        retry_backoff_seconds: the pause before the first retry; at most 5 minutes before any.
        sync_backoff: how it grows from retry to retry: ``exponential`` doubles it, ``linear`` adds as much each time,
            ``constant`` keeps it.
        outbound_allowed_networks: networks of private addresses that alerts may be sent to all the same.
        run_retention_seconds: for how long runs that have ended, and lines of their logs, are kept.
        run_lease_seconds: how long a worker that does not report keeps its run.
    """

    port: Port = service_named("job_orchestrator").port
    max_retries: Live[Annotated[int, Field(ge=0, le=100)]] = live(3)
    retry_backoff_seconds: Live[Annotated[float, Field(gt=0, le=3600)]] = live(5.0)
    sync_backoff: Live[Literal["exponential", "linear", "constant"]] = live("exponential")
    outbound_allowed_networks: Annotated[tuple[IPNetwork, ...], BeforeValidator(listed)] = ()
    run_retention_seconds: Seconds = Field(default=90.0 * 24 * 3600, ge=3600)
    run_lease_seconds: float = Field(default=15.0, ge=0.5, le=3600)
