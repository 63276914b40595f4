"""A catalog for tests: started in this process, called as the gateway, jobs and workers call it."""

import base64
import itertools
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import aiohttp
from aiohttp import web
from pydantic import SecretStr

from libs.contracts.internal import (
    CHECK_CONNECTION,
    DISCOVER_STREAMS,
    JOBS_EXISTING,
    CheckResult,
    ConnectorConfig,
    DiscoveredStreams,
    InternalCall,
    JobEndpoints,
    JobsAsked,
    JobsExisting,
    LogLine,
)
from libs.contracts.jobs import JobCreated, JobEvent
from libs.core.clock import Clock, SystemClock
from libs.core.decider import Aggregate
from libs.core.envelope import Envelope, Frozen, Metadata
from libs.core.json import JsonObject, dump_json
from libs.core.principal import Principal
from libs.eventsourcing.command_handler import CommandHandler
from libs.eventsourcing.event_store import EventStore
from libs.mongodb.client import connect
from libs.process.health import Health
from libs.process.signing_keys import new_signing_key
from libs.service.definition import ServiceContext
from libs.service.running import running_service
from libs.testing.urls import url_settings
from libs.web.internal import InternalClient, internal_route
from libs.web.principals import PRINCIPAL_HEADER, PrincipalSigner, PrincipalVerifier
from libs.web.shell import create_app
from services.catalog.app import SERVICE
from services.catalog.config import CatalogSettings

PASSWORD = "s3cr3t-of-ada"
KEYS = {name: new_signing_key() for name in ("gateway", "worker", "catalog", "job_orchestrator")}
ENCRYPTION_KEYS = {"k1": SecretStr(base64.b64encode(os.urandom(32)).decode())}

_PROJECTS = itertools.count(123)

RequestT = TypeVar("RequestT", bound=Frozen)
ResponseT = TypeVar("ResponseT", bound=Frozen)


def signer(service: str) -> PrincipalSigner:
    return PrincipalSigner(service, SecretStr(KEYS[service][0]))


def trusted_keys() -> dict[str, str]:
    return {name: public for name, (_, public) in KEYS.items()}


def stream(name: str, namespace: str = "public", **changes: Any) -> JsonObject:
    """A stream as discovery finds it."""
    found = {
        "name": name,
        "namespace": namespace,
        "supported_sync_modes": ["full_refresh"],
        "sync_mode": "full_refresh",
        "cursor_field": "",
        "destination_database": namespace,
        "destination_table": name,
        "default_stream_properties": {"normalization": True, "append_mode": False},
    }
    return {"stream": found | changes}


@dataclass
class WorkerStandIn:
    """Answers tests and discoveries as a worker does, over HTTP, and remembers what it was asked."""

    asked: list[ConnectorConfig] = field(default_factory=list)
    succeeds: bool = True
    streams: list[JsonObject] = field(default_factory=lambda: [stream("flights"), stream("planes")])

    async def check(self, call: ConnectorConfig) -> CheckResult:
        self.asked.append(call)
        line = LogLine(time=SystemClock().now(), level="info", message="connecting")
        message = "connected" if self.succeeds else "password authentication failed"
        return CheckResult(succeeded=self.succeeds, message=message, log_lines=(line,))

    async def discover(self, call: ConnectorConfig) -> DiscoveredStreams:
        self.asked.append(call)
        return DiscoveredStreams(streams_json=dump_json(self.streams))


@dataclass
class JobsStandIn:
    """Answers which jobs exist, as job_orchestrator does."""

    jobs: dict[int, JobEndpoints] = field(default_factory=dict)

    async def existing(self, call: JobsAsked) -> JobsExisting:
        found = [self.jobs[job_id] for job_id in call.job_ids if job_id in self.jobs]
        return JobsExisting(job_ids=tuple(item.job_id for item in found), endpoints=tuple(found))


@asynccontextmanager
async def served(service: str, routes: Sequence[web.RouteDef]) -> AsyncIterator[str]:
    """The address of an application that answers as ``service``."""
    settings = CatalogSettings(port=0, encryption_keys=ENCRYPTION_KEYS)
    app = create_app(service, routes, PrincipalVerifier(service, trusted_keys()), health=Health(), settings=settings)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


class JobLog(Frozen):
    """The state of a job that only serves to write its events."""

    events: int = 0


def _counted(state: JobLog | None, _: Envelope) -> JobLog:
    return JobLog(events=(state.events if state else 0) + 1)


JOB_LOG: Aggregate[JobLog] = Aggregate(
    "job", "jobs", JobLog, decide=lambda _, events: events, evolve=_counted, id_type=int
)


@dataclass
class Answer:
    """A response of the project family."""

    status: int
    body: Any
    headers: Mapping[str, str]

    @property
    def data(self) -> Any:
        assert self.status == 200, f"{self.status}: {self.body}"
        assert self.body["success"] is True
        return self.body["data"]

    @property
    def fields(self) -> list[str]:
        """The fields at fault."""
        return [item["field"] for item in self.body["errors"]]


@dataclass
class Catalog:
    """A running instance, the stand-ins that it calls, and the clients that call it."""

    base_url: str
    context: ServiceContext[CatalogSettings]
    session: aiohttp.ClientSession
    worker: WorkerStandIn
    jobs: JobsStandIn
    clients: dict[str, InternalClient]
    job_events: CommandHandler
    project: int = 0

    def in_new_project(self) -> "Catalog":
        """The same instance, as a project sees it that has nothing yet."""
        return replace(self, project=next(_PROJECTS))

    @property
    def ada(self) -> Principal:
        return Principal(kind="user", subject="u1", name="ada", projects={self.project: "owner"}, scopes=("*",))

    async def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        principal: Principal | None = None,
        headers: Mapping[str, str] | None = None,
        data: bytes | None = None,
        project: int | None = None,
    ) -> Answer:
        """A call below the project's path, as the gateway forwards it."""
        token = signer("gateway").sign(principal or self.ada, "catalog")
        all_headers = {PRINCIPAL_HEADER: token, **(headers or {})}
        sent: dict[str, Any] = {"json": body} if data is None and body is not None else {"data": data}
        url = f"{self.base_url}/api/v1/project/{project or self.project}{path}"
        async with self.session.request(method, url, headers=all_headers, **sent) as response:
            content = await response.read()
            return Answer(response.status, await response.json() if content else None, response.headers.copy())

    async def get(self, path: str, **more: Any) -> Answer:
        return await self.request("GET", path, **more)

    async def post(self, path: str, body: Any = None, **more: Any) -> Answer:
        return await self.request("POST", path, body, **more)

    async def put(self, path: str, body: Any, **more: Any) -> Answer:
        return await self.request("PUT", path, body, **more)

    async def delete(self, path: str, **more: Any) -> Answer:
        return await self.request("DELETE", path, **more)

    async def create_source(self, name: str = "flights", **changes: Any) -> int:
        return int((await self.post("/sources", source_body(name, **changes))).data["id"])

    async def create_destination(self, name: str = "lake", **changes: Any) -> int:
        return int((await self.post("/destinations", destination_body(name, **changes))).data["id"])

    async def call(self, service: str, call: InternalCall[RequestT, ResponseT], request: RequestT) -> ResponseT:
        """An internal call of a service."""
        return await self.clients[service].call(call, request)

    async def job_happened(self, job_id: int, *events: JobEvent) -> None:
        """Write a job's events into job_orchestrator's store."""
        metadata = Metadata(actor="ada", project_id=self.project)
        await self.job_events.handle(JOB_LOG, job_id, events, metadata)


def config(**changes: Any) -> JsonObject:
    return {
        "host": "db.example.com",
        "port": 5432,
        "database": "flights",
        "username": "ada",
        "password": PASSWORD,
    } | changes


def source_body(name: str = "flights", **changes: Any) -> JsonObject:
    return {"name": name, "type": "postgres", "version": "v1.0.0", "config": config()} | changes


def destination_body(name: str = "lake", **changes: Any) -> JsonObject:
    files = {"type": "PARQUET", "writer": {"local_path": "/data/lake"}}
    return {"name": name, "type": "parquet", "version": "v1.0.0", "config": files} | changes


def job_created(source_id: int, destination_id: int, name: str = "nightly", **changes: Any) -> JobCreated:
    fields: dict[str, Any] = {
        "name": name,
        "source_id": source_id,
        "destination_id": destination_id,
        "frequency": "",
        "streams_config_json": "{}",
        "advanced_settings_json": "null",
        "activate": True,
    }
    return JobCreated(**fields | changes)


@asynccontextmanager
async def running_catalog(
    mongod: str, database_prefix: str, *, clock: Clock | None = None, worker_url: str | None = None, **settings: Any
) -> AsyncIterator[Catalog]:
    """An instance on a test's own databases; ``worker_url`` takes the place of the worker's stand-in."""
    worker, jobs = WorkerStandIn(), JobsStandIn()
    worker_routes = [internal_route(CHECK_CONNECTION, worker.check), internal_route(DISCOVER_STREAMS, worker.discover)]
    async with AsyncExitStack() as stack:
        client = connect(mongod)
        stack.callback(client.close)
        store = EventStore(client, database_prefix + "job_orchestrator")
        await store.open([JOB_LOG.collection], {})
        job_events = CommandHandler(store, SystemClock(), [JOB_LOG])
        job_events.start()
        stack.push_async_callback(job_events.close)
        if worker_url is None:
            worker_url = await stack.enter_async_context(served("worker", worker_routes))
        chosen = CatalogSettings(
            mongodb_url=mongod,
            database_prefix=database_prefix,
            port=0,
            signing_key=SecretStr(KEYS["catalog"][0]),
            trusted_keys=trusted_keys(),
            encryption_keys=settings.pop("encryption_keys", ENCRYPTION_KEYS),
            **url_settings(
                worker=worker_url,
                job_orchestrator=await stack.enter_async_context(
                    served("job_orchestrator", [internal_route(JOBS_EXISTING, jobs.existing)])
                ),
            ),
            **settings,
        )
        service = await stack.enter_async_context(running_service(SERVICE, chosen, clock=clock))
        at = chosen.model_copy(update={"catalog_url": service.base_url})
        clients = {name: InternalClient(at, signer(name)) for name in ("worker", "job_orchestrator")}
        for internal in clients.values():
            stack.push_async_callback(internal.close)
        session = await stack.enter_async_context(
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), cookie_jar=aiohttp.DummyCookieJar())
        )
        running = Catalog(service.base_url, service.context, session, worker, jobs, clients, job_events)
        yield running.in_new_project()
