"""A job orchestrator for tests: started in this process, called as its page, its workers and catalog call it."""

import itertools
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar

import aiohttp
from aiohttp import web
from pydantic import SecretStr

from libs.contracts.internal import (
    CLAIM_WORK,
    FINISH_WORK,
    HEARTBEAT,
    RESERVE_ENDPOINTS,
    ClaimedRun,
    ClaimWork,
    EndpointReserved,
    EndpointsReserved,
    EndpointWanted,
    FinishWork,
    Heartbeat,
    HeartbeatAnswer,
    InternalCall,
    LogLine,
    ReserveEndpoints,
)
from libs.core.clock import Clock, SystemClock
from libs.core.envelope import Frozen
from libs.core.errors import NotFound
from libs.core.json import JsonObject, dump_json
from libs.core.principal import Principal
from libs.process.health import Health
from libs.process.signing_keys import new_signing_key
from libs.service.definition import ServiceContext
from libs.service.running import running_service
from libs.testing.urls import url_settings
from libs.web.internal import InternalClient, internal_route
from libs.web.principals import PRINCIPAL_HEADER, PrincipalSigner, PrincipalVerifier
from libs.web.shell import create_app
from services.job_orchestrator.app import SERVICE
from services.job_orchestrator.config import JobOrchestratorSettings

PROJECT = 123
ADA = Principal(kind="user", subject="u1", name="ada", projects={PROJECT: "owner"}, scopes=("*",))
STRANGERS_PROJECT = 99
STRANGER = Principal(kind="user", subject="u2", name="eve", projects={STRANGERS_PROJECT: "owner"}, scopes=("*",))
KEYS = {name: new_signing_key() for name in ("gateway", "worker", "catalog", "job_orchestrator")}
STREAMS: JsonObject = {
    "selected_streams": {"public": [{"stream_name": "flights"}]},
    "streams": [{"stream": {"name": "flights", "namespace": "public", "sync_mode": "full_refresh"}}],
}

_PROJECTS = itertools.count(PROJECT + 1)

RequestT = TypeVar("RequestT", bound=Frozen)
ResponseT = TypeVar("ResponseT", bound=Frozen)


def signer(service: str) -> PrincipalSigner:
    return PrincipalSigner(service, SecretStr(KEYS[service][0]))


def trusted_keys() -> dict[str, str]:
    return {name: public for name, (_, public) in KEYS.items()}


@dataclass
class CatalogStandIn:
    """Answers reservations as catalog does, over HTTP, and remembers them."""

    reservations: list[ReserveEndpoints] = field(default_factory=list)
    made: dict[tuple[str, str], int] = field(default_factory=dict)

    async def reserve(self, call: ReserveEndpoints) -> EndpointsReserved:
        self.reservations.append(call)
        return EndpointsReserved(
            source=self._endpoint("source", call.source),
            destination=self._endpoint("destination", call.destination),
            reserved_until=SystemClock().now() + timedelta(days=3650),
        )

    def _endpoint(self, side: str, wanted: EndpointWanted) -> EndpointReserved:
        if wanted.id is None:
            identifier = self.made.setdefault((side, wanted.name or ""), 100 + len(self.made))
            config = {**(wanted.config or {}), "password": "masked"}
            return EndpointReserved(
                id=identifier,
                name=wanted.name or "",
                type=wanted.type or "",
                version=wanted.version or "",
                config_json=dump_json(config),
            )
        if wanted.id > 1000:
            raise NotFound(f"{side} {wanted.id} does not exist")
        return EndpointReserved(
            id=wanted.id, name=f"{side}-{wanted.id}", type="postgres", version="v1.0.0", config_json='{"host":"db"}'
        )


@asynccontextmanager
async def standing_in_for_catalog() -> AsyncIterator[tuple[CatalogStandIn, str]]:
    """The stand-in and its address."""
    stand_in = CatalogStandIn()
    settings = JobOrchestratorSettings(port=0)
    routes = [internal_route(RESERVE_ENDPOINTS, stand_in.reserve)]
    app = create_app(
        "catalog", routes, PrincipalVerifier("catalog", trusted_keys()), health=Health(), settings=settings
    )
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield stand_in, f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@dataclass
class Answer:
    """A response of the project family."""

    status: int
    body: JsonObject
    headers: Mapping[str, str]

    @property
    def data(self) -> Any:
        assert self.status == 200, f"{self.status}: {self.body}"
        assert self.body["success"] is True
        return self.body["data"]


@dataclass
class Orchestrator:
    """One running instance and the clients that call it."""

    base_url: str
    context: ServiceContext[JobOrchestratorSettings]
    session: aiohttp.ClientSession
    worker_client: InternalClient
    catalog_client: InternalClient
    project: int = PROJECT
    audience: str = "job_orchestrator"

    def in_new_project(self) -> "Orchestrator":
        """The same instance, as a project sees it that has nothing yet."""
        return replace(self, project=next(_PROJECTS))

    async def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        principal: Principal | None = None,
        headers: dict[str, str] | None = None,
        data: bytes | None = None,
        project: int | None = None,
    ) -> Answer:
        """A call below the project's path, as the gateway forwards it."""
        project = project or self.project
        owner = ADA.model_copy(update={"projects": {self.project: "owner"}})
        token = signer("gateway").sign(principal or owner, self.audience)
        all_headers = {PRINCIPAL_HEADER: token, **(headers or {})}
        sent: dict[str, Any] = {"json": body} if body is not None else {"data": data}
        url = f"{self.base_url}/api/v1/project/{project}{path}"
        async with self.session.request(method, url, headers=all_headers, **sent) as response:
            is_json = response.content_type.endswith("json")
            answer = await response.json() if is_json else {"raw": await response.read()}
            return Answer(response.status, answer, response.headers)

    async def get(self, path: str, **more: Any) -> Answer:
        return await self.request("GET", path, **more)

    async def post(self, path: str, body: Any = None, **more: Any) -> Answer:
        return await self.request("POST", path, body, **more)

    async def put(self, path: str, body: Any, **more: Any) -> Answer:
        return await self.request("PUT", path, body, **more)

    async def create_job(self, name: str = "nightly", **changes: Any) -> int:
        """The id of a new job between existing ends."""
        return int((await self.post("/jobs", job_body(name, **changes))).data["id"])

    async def as_worker(self, call: InternalCall[RequestT, ResponseT], request: RequestT) -> ResponseT:
        return await self.worker_client.call(call, request)

    async def claim(self, worker_id: str = "w1") -> ClaimedRun | None:
        claim = await self.as_worker(CLAIM_WORK, ClaimWork(worker_id=worker_id))
        return None if claim.run is None else ClaimedRun.model_validate(claim.run)

    async def claimed(self, worker_id: str = "w1") -> ClaimedRun:
        run = await self.claim(worker_id)
        assert run is not None, "no run was handed out"
        return run

    async def heartbeat(self, run: ClaimedRun, lines: Sequence[LogLine] = (), **more: Any) -> HeartbeatAnswer:
        beat = Heartbeat(run_id=run.run_id, epoch=run.epoch, log_lines=tuple(lines), **more)
        return await self.as_worker(HEARTBEAT, beat)

    async def finish(self, run: ClaimedRun, outcome: Any = "completed", **more: Any) -> str:
        report = FinishWork(run_id=run.run_id, epoch=run.epoch, outcome=outcome, **more)
        return (await self.as_worker(FINISH_WORK, report)).verdict

    async def tasks(self, job_id: int) -> list[JsonObject]:
        tasks: list[JsonObject] = (await self.get(f"/jobs/{job_id}/tasks")).data
        return tasks


def job_body(name: str = "nightly", **changes: Any) -> JsonObject:
    """A valid job between existing ends."""
    body = {
        "name": name,
        "source": {"id": 1},
        "destination": {"id": 2},
        "frequency": "",
        "streams_config": STREAMS,
    }
    return body | changes


@asynccontextmanager
async def running_orchestrator(
    mongod: str, database_prefix: str, catalog_url: str, *, clock: Clock | None = None, **settings: Any
) -> AsyncIterator[Orchestrator]:
    """An instance on a test's own databases; several share them when given the same prefix."""
    chosen = JobOrchestratorSettings(
        mongodb_url=mongod,
        database_prefix=database_prefix,
        port=0,
        **url_settings(catalog=catalog_url),
        signing_key=SecretStr(KEYS["job_orchestrator"][0]),
        trusted_keys=trusted_keys(),
        **settings,
    )
    async with AsyncExitStack() as stack:
        service = await stack.enter_async_context(running_service(SERVICE, chosen, clock=clock))
        at = chosen.model_copy(update={"job_orchestrator_url": service.base_url})
        worker, catalog = InternalClient(at, signer("worker")), InternalClient(at, signer("catalog"))
        stack.push_async_callback(worker.close)
        stack.push_async_callback(catalog.close)
        session = await stack.enter_async_context(aiohttp.ClientSession())
        yield Orchestrator(service.base_url, service.context, session, worker, catalog)
