"""A real orchestrator and a real catalog, and a worker's executions of their jobs in this process."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from libs.contracts.internal import RUN_WORK, ClaimedRun, Heartbeat, InternalCall
from libs.contracts.runs import RunQueued
from libs.core.clock import SystemClock
from libs.core.envelope import Frozen
from libs.core.errors import RetryLater
from libs.core.json import JsonObject, dump_json
from libs.process.live import Live
from libs.testing.waiting import until
from services.worker.attempt import Attempt, Outcome
from services.worker.claiming import Claiming, WorkKind
from services.worker.config import WorkerSettings
from services.worker.run import RunExecutor
from tests.integration.connectors.moving import Lake, Server
from tests.integration.job_orchestrator.catalog import running_catalog
from tests.integration.job_orchestrator.orchestrator import Orchestrator, job_body, running_orchestrator

RequestT = TypeVar("RequestT", bound=Frozen)
ResponseT = TypeVar("ResponseT", bound=Frozen)


@dataclass
class Line:
    """A worker's connection to the services, which a test can interrupt.

    Args:
        lost: how many of the next requests to a path get lost.
    """

    orchestrator: Orchestrator
    lost: dict[str, int] = field(default_factory=dict)
    heartbeats: list[Heartbeat] = field(default_factory=list)

    def lose(self, call: InternalCall[Any, Any], count: int = 1_000_000) -> None:
        self.lost[call.path] = count

    async def call(self, call: InternalCall[RequestT, ResponseT], request: RequestT) -> ResponseT:
        if isinstance(request, Heartbeat):
            self.heartbeats.append(request)
        if self.lost.get(call.path, 0) > 0:
            self.lost[call.path] -= 1
            raise RetryLater(f"{call.service} can't be reached")
        return await self.orchestrator.as_worker(call, request)


@dataclass(frozen=True)
class Task:
    """A run as the API shows it. A failed attempt that will be retried has the status ``scheduled``."""

    detail: JsonObject
    log: list[JsonObject]

    @property
    def status(self) -> str:
        return str(self.detail["status"])

    @property
    def error(self) -> str:
        return self.detail["error"] or ""

    @property
    def streams(self) -> dict[str, JsonObject]:
        return {stream["name"]: stream for stream in self.detail["streams"]}

    @property
    def states(self) -> dict[str, str]:
        return {name: stream["state"] for name, stream in self.streams.items()}

    @property
    def messages(self) -> list[str]:
        return [line["message"] for line in self.log]


@dataclass
class Job:
    """One job, and the executions of its runs by workers of this process."""

    orchestrator: Orchestrator
    id: int
    line: Line

    async def begin(self, path: str = "sync") -> None:
        (await self.orchestrator.post(f"/jobs/{self.id}/{path}")).data  # noqa: B018 - raises if it was refused

    async def claim(self, worker_id: str = "worker-1") -> ClaimedRun:
        """Claim the job's waiting run."""
        claimed: list[ClaimedRun] = []

        async def is_claimed() -> bool:
            claimed.extend(run for run in [await self.orchestrator.claim(worker_id)] if run is not None)
            return bool(claimed)

        await until(is_claimed)
        assert claimed[0].job_id == self.id, "a run of another test is waiting"
        return claimed[0]

    async def execute(
        self, run: ClaimedRun | None = None, *, heartbeat_seconds: float = 0.05, **limits: Any
    ) -> Outcome:
        """Execute a claimed run, or a new one."""
        if run is None:
            await self.begin()
        claimed = run or await self.claim()
        executor, attempt = (
            RunExecutor(self.line, **limits),
            Attempt(claimed, self.line, SystemClock(), heartbeat_seconds),
        )
        return await attempt.run(lambda: executor.execute(claimed, attempt))

    async def task(self) -> Task:
        """The newest run."""
        newest = (await self.orchestrator.tasks(self.id))[0]
        detail = (await self.orchestrator.get(f"/jobs/{self.id}/tasks/{newest['id']}")).data
        log = (await self.orchestrator.get(f"/jobs/{self.id}/task/{newest['id']}/logs")).data["task_logs"]
        return Task(detail, log)

    async def logs(self, beginning: str) -> None:
        """Wait until a line of the newest run begins like this."""

        async def is_logged() -> bool:
            is_begun = bool(await self.orchestrator.tasks(self.id))
            return is_begun and any(message.startswith(beginning) for message in (await self.task()).messages)

        await until(is_logged)


@dataclass
class Installation:
    """A project of its own at a running orchestrator and catalog."""

    orchestrator: Orchestrator
    jobs: list[Job] = field(default_factory=list)

    async def job(
        self,
        source: JsonObject,
        to: Server | Lake | JsonObject,
        streams_config: JsonObject | None = None,
        **advanced_settings: Any,
    ) -> Job:
        """A new job from a PostgreSQL database; it verifies its streams unless told otherwise."""
        number = len(self.jobs)
        target: JsonObject = (
            to if isinstance(to, dict) else to.config if isinstance(to, Server) else {"local_path": str(to.path)}
        )
        body = job_body(
            f"job {number}",
            source={"name": f"source {number}", "type": "postgres", "version": "v1.0.0", "config": source},
            destination={
                "name": f"destination {number}",
                "type": "postgres" if "host" in target else "parquet",
                "version": "v1.0.0",
                "config": target,
            },
            streams_config=streams_config or {},
            advanced_settings={"verify": True} | advanced_settings,
        )
        created = (await self.orchestrator.post("/jobs", body)).data
        job = Job(self.orchestrator, int(created["id"]), Line(self.orchestrator))
        self.jobs.append(job)
        return job

    def claiming(self) -> Claiming:
        """The loop of a worker that executes one run at a time."""
        line = Line(self.orchestrator)
        settings = WorkerSettings(worker_poll_seconds=Live(0.05), worker_heartbeat_seconds=0.05, worker_runs_max=1)
        kinds = {RUN_WORK: WorkKind(ClaimedRun, RunExecutor(line).execute, RunQueued)}
        return Claiming(settings, line, SystemClock(), "worker-1", kinds)


@asynccontextmanager
async def running_installation(mongod: str, database_prefix: str, **settings: Any) -> AsyncIterator[Installation]:
    async with (
        running_catalog(mongod, database_prefix) as (catalog_url, _),
        running_orchestrator(mongod, database_prefix, catalog_url, **settings) as orchestrator,
    ):
        yield Installation(orchestrator)


def with_streams_config(run: ClaimedRun, config: JsonObject) -> ClaimedRun:
    """The run of a job that an earlier version accepted with this catalog."""
    return run.model_copy(update={"streams_config_json": dump_json(config)})
