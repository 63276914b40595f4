"""The settings of the worker."""

from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field

from libs.contracts.services import service_named
from libs.process.live import Live, live
from libs.process.settings import Port, Seconds, ServiceSettings, listed


def _absolute(path: str) -> str:
    if not path.startswith("/") or "\x00" in path:
        raise ValueError("must be an absolute path, such as /data/lake")
    return path


class WorkerSettings(ServiceSettings):
    """What an installation may choose about its workers.

    Args:
        worker_id: what runs show as their worker; host and process when empty.
        worker_runs_max: how many runs one worker moves at once; each takes about 150 MB at most.
        worker_heartbeat_seconds: how often a run reports; a third of the lease where that is shorter.
        worker_poll_seconds: how often an idle worker asks for work when no event has told it of any.
        worker_check_seconds: how long the test of a connection may take.
        worker_discover_seconds: how long a discovery of streams may take.
        stall_timeout_seconds: how long a stream may move nothing before the attempt is given up and tried again.
        parquet_roots: the directories below which Parquet files may be written; anywhere when empty.
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
