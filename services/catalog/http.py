"""The routes: sources and destinations, their specs, tests and streams; and the internal calls of jobs and runs."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import orjson
from aiohttp import web

from libs.connectors import registry
from libs.connectors.protocol import ConnectorRefused, ConnectorUnavailable
from libs.contracts.internal import (
    CHECK_CONNECTION,
    DISCOVER_STREAMS,
    RESERVE_ENDPOINTS,
    RESOLVE_ENDPOINTS,
    CheckResult,
    ConnectorConfig,
    EndpointsReserved,
    ReserveEndpoints,
)
from libs.core.entity import Entity
from libs.core.envelope import Envelope, Metadata
from libs.core.errors import Conflict, FieldError, NotFound, UpstreamTimeout
from libs.core.json import parse_json
from libs.eventsourcing.command_handler import CommandHandler
from libs.eventsourcing.documents import Documents
from libs.process.telemetry import current_traceparent
from libs.web import routes
from libs.web.answers import Answer, EventShown
from libs.web.calls import Call
from libs.web.entities import Entities, EntityRoutes
from libs.web.internal import InternalClient, internal_route
from libs.web.requests import REQUEST_ID, invalid_field
from services.catalog.answers import (
    ConnectionDeleted,
    ConnectionEchoed,
    ConnectionShown,
    DestinationShown,
    NameIsFree,
    SourceShown,
    SpecShown,
    StreamsDiscovered,
    TestShown,
    VersionsShown,
    connection_view,
    echo_view,
    event_view,
    test_view,
)
from services.catalog.connections import AGGREGATES, Connections
from services.catalog.domain.connection import Connection, Role
from services.catalog.inputs import (
    NO_JOB,
    ConnectionBody,
    ConnectionQuery,
    ConnectionsQuery,
    NameBody,
    SpecBody,
    StreamsBody,
    TestBody,
    VersionsQuery,
    config_object,
)
from services.catalog.masks import starred
from services.catalog.queries import CatalogQueries
from services.catalog.reservations import Reservations
from services.catalog.streams import merged_catalog, new_catalog
from services.catalog.vault import Configuration, Vault
from services.catalog.versions import VERSIONS

PROJECT = "/api/v1/project/{projectid}"
TEST_SECONDS_MIN = 0.3
"""OLake's page opens a dialogue when it sends a test, and freezes if the answer comes before the dialogue is open.

It closes the dialogue on a refusal too, so refusals wait as long.
"""

_TAGS: dict[Role, str] = {"source": "Sources", "destination": "Destinations"}
_SHOWN: dict[Role, Any] = {"source": SourceShown, "destination": DestinationShown}


class ConnectionRoutes(EntityRoutes[Connection, ConnectionShown]):
    """The handlers of sources, or of destinations."""

    embeds_others = True

    def __init__(
        self,
        role: Role,
        documents: Documents,
        commands: CommandHandler,
        queries: CatalogQueries,
        connections: Connections,
    ) -> None:
        self.path = f"{PROJECT}/{role}s"
        self.tag = _TAGS[role]
        self.shown = _SHOWN[role]
        super().__init__(Entities(AGGREGATES[role], documents, commands))
        self._role = role
        self._queries = queries
        self._connections = connections

    def routes(self) -> Sequence[web.RouteDef]:
        listed: Any = list[self.shown]  # type: ignore[name-defined]
        return [
            self.route("POST", self.path, self.create, f"Create a {self.noun}", versioned=True, idempotent=True),
            self.route("GET", self.path, self.list, f"List the {self.noun}s", answer=listed, versioned=True),
            *self.reading_one(self.fetch),
            self.route(
                "PUT", self.one, self.update, f"Change a {self.noun}", versioned=True, conditional=True, refuses=(409,)
            ),
            self.route("DELETE", self.one, self.delete, f"Delete a {self.noun}", conditional=True, refuses=(409,)),
        ]

    async def create(self, call: Call, body: ConnectionBody) -> Answer[ConnectionEchoed]:
        created = await self._connections.create(self._role, body.given(self._role), call)
        return self._echo(created, body, "created")

    async def list(self, call: Call, query: ConnectionsQuery) -> Answer[list[Any]]:
        entities, jobs = await self._queries.listed(self._role, call.project_id)
        objects = query.expand is not None
        shown = [
            {**connection_view(entity, objects=objects), "jobs": jobs.get(int(entity.id), ())} for entity in entities
        ]
        return Answer(shown, len(shown), embeds_others=True)

    async def fetch(self, call: Call, query: ConnectionQuery) -> Answer[ConnectionShown]:
        """One as it stands with its jobs; with ``as_of`` as it stood at that moment, without them."""
        entity = await self.entities.at(call, query.as_of)
        shown = connection_view(entity, objects=query.expand is not None)
        if query.as_of is not None:
            return Answer(shown)
        with_jobs: Any = {**shown, "jobs": await self._queries.jobs_of(self._role, entity)}
        return Answer(with_jobs, entity.version, embeds_others=True)

    async def update(self, call: Call, body: ConnectionBody) -> Answer[ConnectionEchoed]:
        entity = await self.entities.require(call)
        changed = await self._connections.update(self._role, int(entity.id), body.given(self._role), call)
        return self._echo(changed, body, "updated")

    async def delete(self, call: Call) -> Answer[ConnectionDeleted]:
        entity = await self.entities.require(call)
        deleted = await self._connections.delete(self._role, int(entity.id), call)
        name = deleted.state.definition.name
        return Answer({"id": int(deleted.id), "name": name}, message=f"{self.noun} {name} deleted")

    def event_view(self, envelope: Envelope) -> EventShown:
        return event_view(envelope)

    def _echo(self, entity: Entity[Connection], body: ConnectionBody, verb: str) -> Answer[ConnectionEchoed]:
        """What was sent, as it is stored: secrets masked, the configuration in the form that it was sent in."""
        echo = echo_view(entity, objects=not isinstance(body.config, str))
        return Answer(echo, entity.version, f"{self.noun} {entity.state.definition.name} {verb}")


@dataclass(frozen=True, slots=True)
class ConnectorRoutes:
    """The handlers of what one role's connectors can tell: versions, specs, tests."""

    role: Role
    vault: Vault
    internal: InternalClient

    def routes(self) -> Sequence[web.RouteDef]:
        root = f"{PROJECT}/{self.role}s"
        get, post = (partial(method, tag=_TAGS[self.role]) for method in (routes.get, routes.post))
        what_it_holds = f"What a {self.role}'s configuration holds"
        return [
            get(f"{root}/versions", self.versions, f"List the versions of {self.role} connectors"),
            get(f"{root}/spec", self.spec, what_it_holds),
            post(f"{root}/spec", self.spec, what_it_holds),
            post(f"{root}/test", self.test, f"Test a {self.role}"),
        ]

    async def versions(self, call: Call, query: VersionsQuery) -> VersionsShown:
        """The same for every type, also for those that are not supported: OLake's page asks before it shows a form."""
        return {"version": list(VERSIONS)}

    async def spec(self, call: Call, body: SpecBody) -> SpecShown:
        kind = registry.canonical_type(self.role, body.type)
        shown: SpecShown = {
            "type": kind,
            "version": body.canonical_version,
            "spec": registry.spec(self.role, kind),  # type: ignore[typeddict-item]
        }
        if body.catalog is not None:
            shown["catalog"] = body.catalog
        if body.source_type is not None:
            shown["source_type"] = body.source_type
        if body.source_version is not None:
            shown["source_version"] = body.source_version
        return shown

    async def test(self, call: Call, body: TestBody) -> Answer[TestShown]:
        answer, _ = await asyncio.gather(
            self._tested(call, body), asyncio.sleep(TEST_SECONDS_MIN), return_exceptions=True
        )
        if isinstance(answer, BaseException):
            raise answer
        return answer

    async def _tested(self, call: Call, body: TestBody) -> Answer[TestShown]:
        config = config_object(body.config)
        configuration = await self.vault.configuration(call.project_id, self.role, body.type, config)
        result = await self._checked(configuration)
        masked = starred(config, registry.secret_fields(self.role, configuration.type))
        shown = orjson.dumps(masked).decode() if isinstance(body.config, str) else masked
        return Answer(
            test_view(configuration.type, body.canonical_version, shown, result),
            message=result.message,
        )

    async def _checked(self, configuration: Configuration) -> CheckResult:
        try:
            return await self.internal.call(CHECK_CONNECTION, _asked(configuration))
        except UpstreamTimeout:
            seconds = CHECK_CONNECTION.timeout_seconds
            message = f"{configuration.address} did not answer within {seconds:g} seconds"
            return CheckResult(succeeded=False, message=message)


@dataclass(frozen=True, slots=True)
class DiscoveryRoutes:
    """The handlers that discover streams and tell whether a name is free."""

    queries: CatalogQueries
    vault: Vault
    internal: InternalClient

    def routes(self) -> Sequence[web.RouteDef]:
        paths = (("POST", "sources"), ("GET", "source"), ("GET", "sources"))
        return [
            *(
                routes.route(
                    method,
                    f"{PROJECT}/{name}/streams",
                    self.streams,
                    "Discover the streams of a source",
                    tag=_TAGS["source"],
                    query=None,
                )
                for method, name in paths
            ),
            routes.post(
                f"{PROJECT}/check-unique",
                self.check_unique,
                "Ask whether a name is free",
                tag="Project",
                refuses=(409,),
            ),
        ]

    async def streams(self, call: Call, body: StreamsBody) -> StreamsDiscovered:
        saved = await self._saved_choice(call.project_id, body.job_id)
        configuration = await self.vault.configuration(call.project_id, "source", body.type, config_object(body.config))
        try:
            discovered = await self.internal.call(DISCOVER_STREAMS, _asked(configuration))
        except ConnectorUnavailable as error:
            # The platform works: the address that was sent, or the system there, has to change.
            raise ConnectorRefused(error.message, code=error.code) from error
        entries = parse_json(discovered.streams_json.encode(), subject="streams")
        catalog: Any = new_catalog(entries) if saved is None else merged_catalog(entries, saved)
        return {
            "streams": catalog["streams"],
            "selected_streams": catalog["selected_streams"],
            "streams_config": catalog,
        }

    async def check_unique(self, call: Call, body: NameBody) -> NameIsFree:
        if body.entity_type == "job":
            raise invalid_field("entity_type", "must be source or destination here")
        if await self.queries.named(body.entity_type, call.project_id, body.name) is not None:
            message = AGGREGATES[body.entity_type].conflict_message
            raise Conflict(message, code="already_exists", errors=[FieldError("name", message, "taken")])
        return {"unique": True}

    async def _saved_choice(self, project_id: int, job_id: int | None) -> Any:
        if job_id is None or job_id == NO_JOB:
            return None
        job = await self.queries.job(project_id, job_id)
        if job is None:
            raise NotFound(f"job {job_id} does not exist")
        return parse_json(job["streams_config_json"].encode(), subject="streams_config")


@dataclass(frozen=True, slots=True)
class InternalRoutes:
    """The handlers of the internal calls."""

    reservations: Reservations

    def routes(self) -> Sequence[web.RouteDef]:
        return [
            internal_route(RESERVE_ENDPOINTS, self.reserve),
            internal_route(RESOLVE_ENDPOINTS, self.reservations.resolve),
        ]

    async def reserve(self, call: ReserveEndpoints) -> EndpointsReserved:
        metadata = Metadata(
            actor=call.actor,
            project_id=call.project_id,
            correlation_id=REQUEST_ID.get(),
            traceparent=current_traceparent(),
        )
        return await self.reservations.reserve(call, metadata)


def _asked(configuration: Configuration) -> ConnectorConfig:
    return ConnectorConfig(role=configuration.role, type=configuration.type, config=configuration.clear)
