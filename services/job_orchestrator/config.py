"""The settings of the job orchestrator."""

from pydantic import Field

from libs.runtime.settings import ServiceSettings


class JobOrchestratorSettings(ServiceSettings):
    """Settings beside those of every service.

    Args:
        max_retries: how often a failed run is tried again before it counts as failed.
        retry_backoff_seconds: the pause before the first retry; it doubles with each one.
        run_lease_seconds: how long a worker that does not report keeps its run.
    """

    port: int = 8083
    max_retries: int = Field(default=3, ge=0, le=100)
    retry_backoff_seconds: float = Field(default=5.0, gt=0, le=3600)
    run_lease_seconds: float = Field(default=15.0, ge=0.5, le=3600)
