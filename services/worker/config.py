"""The settings of the worker."""

from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field

from libs.contracts.services import service_named
from libs.process.live import Live, live
from libs.process.setting_types import Port, Seconds, listed
from libs.process.settings import ServiceSettings


def _absolute(path: str) -> str:
    if not path.startswith("/") or "\x00" in path:
        raise ValueError("must be an absolute path, such as /data/lake")
    return path


class WorkerSettings(ServiceSettings):
    """The settings of the data plane.

    Args:
        worker_id: the worker's name in runs. The host name and process id by default.
        worker_runs_max: how many runs a worker executes at once. Each needs up to 150 MB.
        worker_heartbeat_seconds: how often a run sends a heartbeat; a third of its lease if that is shorter.
        worker_poll_seconds: how often an idle worker asks for work when no event has announced any.
        worker_check_seconds: how long a connection test may take.
        worker_discover_seconds: how long a discovery of streams may take.
        stall_timeout_seconds: how long a stream may make no progress before the attempt fails and is retried.
        parquet_roots: the directories that Parquet files may be written to. Any directory if empty.
    """

    port: Port = service_named("worker").port
    worker_id: str = Field(default="", max_length=256, pattern=r"^[^\x00-\x1f\x7f]*$")
    worker_runs_max: int = Field(default=2, ge=1, le=64)
    worker_heartbeat_seconds: Seconds = Field(default=5.0, gt=0)
    worker_poll_seconds: Live[Annotated[Seconds, Field(gt=0)]] = live(5.0)
    worker_check_seconds: Seconds = Field(default=20.0, gt=0)
    worker_discover_seconds: Seconds = Field(default=50.0, gt=0)
    stall_timeout_seconds: Seconds = Field(default=600.0, gt=0)
    parquet_roots: Annotated[tuple[Annotated[str, AfterValidator(_absolute)], ...], BeforeValidator(listed)] = ()
