"""The settings of the job orchestrator."""

from typing import Literal

from pydantic import Field

from libs.runtime.settings import ServiceSettings


class JobOrchestratorSettings(ServiceSettings):
    """Settings beside those of every service.

    Args:
        max_retries: how often a failed run is tried again before it counts as failed.
        retry_backoff_seconds: the pause before the first retry; at most 5 minutes before any.
        sync_backoff: how it grows from retry to retry: ``exponential`` doubles it, ``linear`` adds as much each time,
            ``constant`` keeps it.
        run_lease_seconds: how long a worker that does not report keeps its run.
    """

    port: int = 8083
    max_retries: int = Field(default=3, ge=0, le=100)
    retry_backoff_seconds: float = Field(default=5.0, gt=0, le=3600)
    sync_backoff: Literal["exponential", "linear", "constant"] = "exponential"
    run_lease_seconds: float = Field(default=15.0, ge=0.5, le=3600)
