"""The settings of the job orchestrator."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from libs.contracts.services import service_named
from libs.core.addresses import IPNetwork
from libs.process.live import Live, live
from libs.process.setting_types import Port, Seconds, listed
from libs.process.settings import ServiceSettings


class JobOrchestratorSettings(ServiceSettings):
    """The settings of jobs and runs.

    Args:
        max_retries: how many times a failed run is retried.
        retry_backoff_seconds: the delay before the first retry. No delay is longer than 5 minutes.
        sync_backoff: how the delay grows: ``exponential`` doubles it with each retry, ``linear`` adds the first delay
            each time, ``constant`` keeps it.
        outbound_allowed_networks: private networks that alerts may be sent to.
        run_retention_seconds: how long ended runs and the lines of their logs are kept.
        run_lease_seconds: how long a worker keeps a run without sending a heartbeat.
    """

    port: Port = service_named("job_orchestrator").port
    max_retries: Live[Annotated[int, Field(ge=0, le=100)]] = live(3)
    retry_backoff_seconds: Live[Annotated[float, Field(gt=0, le=3600)]] = live(5.0)
    sync_backoff: Live[Literal["exponential", "linear", "constant"]] = live("exponential")
    outbound_allowed_networks: Annotated[tuple[IPNetwork, ...], BeforeValidator(listed)] = ()
    run_retention_seconds: Seconds = Field(default=90.0 * 24 * 3600, ge=3600)
    run_lease_seconds: float = Field(default=15.0, ge=0.5, le=3600)
