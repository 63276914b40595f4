"""The routes: sources and destinations, their specs, tests and streams; and the internal calls of jobs and runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal, TypeVar

import orjson
from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field

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
from libs.core.clock import isoformat_z
from libs.core.envelope import Metadata
from libs.core.errors import Conflict, FieldError, NotFound, UpstreamTimeout
from libs.core.json import INTEGER_MAX, parse_json
from libs.core.validation import PastMoment
from libs.eventsourcing.command_handler import Entity
from libs.eventsourcing.documents import Documents
from libs.process.telemetry import current_traceparent
from libs.web.answers import EventShown, success
from libs.web.conditions import if_match_of
from libs.web.internal import InternalClient, internal_route
from libs.web.openapi import describe
from libs.web.requests import (
    REQUEST_ID,
    idempotency_of,
    metadata_of,
    project_of,
    read_body,
    read_query,
    read_query_or_body,
)
from services.catalog.answers import (
    ConnectionDeleted,
    ConnectionEchoed,
    DestinationShown,
    NameIsFree,
    SourceShown,
    SpecShown,
    StreamsDiscovered,
    TestShown,
    VersionsShown,
)
from services.catalog.connections import AGGREGATES, Connections, Given
from services.catalog.domain.connection import Connection, Role
from services.catalog.inputs import canonical_name, config_object, entity_id_of, invalid
from services.catalog.masks import starred
from services.catalog.queries import CatalogQueries
from services.catalog.reservations import Reservations
from services.catalog.streams import merged_catalog, new_catalog
from services.catalog.vault import Configuration, Vault
from services.catalog.versions import VERSIONS, canonical_version

PROJECT = "/api/v1/project/{projectid}"
NO_JOB = -1
HISTORY_EVENTS_MAX = 1000
VERSION_NUMBER_MAX = 2**53
TYPE_LENGTH_MAX = 64

_CONFIG = {"host": "db.internal", "port": 5432, "database": "shop", "username": "reader", "password": "correct horse"}
_TAGS: dict[Role, str] = {"source": "Sources", "destination": "Destinations"}
_SHOWN: dict[Role, tuple[Any, Any]] = {
    "source": (SourceShown, list[SourceShown]),
    "destination": (DestinationShown, list[DestinationShown]),
}

ModelT = TypeVar("ModelT", bound=BaseModel)
ConnectionId = Annotated[int, Field(ge=1, le=INTEGER_MAX)]
Type = Annotated[str, Field(min_length=1, max_length=TYPE_LENGTH_MAX, examples=["postgres"])]
Config = Annotated[dict[str, Any] | str, Field(examples=[_CONFIG])]


class Body(BaseModel):
    """A body of the project family: what it does not know it does not mind."""

    model_config = ConfigDict(frozen=True, extra="ignore", hide_input_in_errors=True)


class ConnectionBody(Body):
    """A source or destination; ``config`` is an object or a text that holds one."""

    name: str = Field(examples=["shop"])
    type: Type
    version: str = Field(min_length=1, max_length=TYPE_LENGTH_MAX, examples=["v1.0.0"])
    config: Config

    def given(self, role: Role) -> Given:
        return Given(
            name=canonical_name(self.name),
            type=registry.canonical_type(role, self.type),
            version=canonical_version(self.version),
            config=config_object(self.config),
        )


class KindBody(Body):
    """Which connector; without a version the newest."""

    type: Type
    version: str = Field(default="", max_length=TYPE_LENGTH_MAX)

    @property
    def canonical_version(self) -> str:
        return canonical_version(self.version or VERSIONS[0])


class SpecBody(KindBody):
    catalog: str | None = Field(default=None, max_length=TYPE_LENGTH_MAX)
    source_type: str | None = Field(default=None, max_length=TYPE_LENGTH_MAX)
    source_version: str | None = Field(default=None, max_length=TYPE_LENGTH_MAX)


class TestBody(KindBody):
    config: Config
    source_type: str | None = Field(default=None, max_length=TYPE_LENGTH_MAX)
    source_version: str | None = Field(default=None, max_length=TYPE_LENGTH_MAX)


class StreamsBody(KindBody):
    config: Config
    job_id: int | None = Field(default=None, ge=NO_JOB, le=VERSION_NUMBER_MAX)


class NameBody(Body):
    """Names of jobs are asked of the service that has them."""

    name: str = Field(examples=["shop"])
    entity_type: Literal["source", "destination", "job"]


class Query(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class VersionsQuery(Query):
    type: str | None = Field(default=None, max_length=TYPE_LENGTH_MAX)


class ListQuery(Query):
    expand: Literal["config"] | None = None


class OneQuery(ListQuery):
    as_of: PastMoment | None = None


class HistoryQuery(Query):
    before: int = Field(default=VERSION_NUMBER_MAX, ge=1, le=VERSION_NUMBER_MAX)
    limit: int = Field(default=100, ge=1, le=HISTORY_EVENTS_MAX)


@dataclass(frozen=True, slots=True)
class ConnectionRoutes:
    """The handlers of sources, or of destinations."""

    role: Role
    documents: Documents
    queries: CatalogQueries
    connections: Connections

    def routes(self) -> Sequence[web.RouteDef]:
        many = f"{PROJECT}/{self.role}s"
        one = f"{many}/{{id:[0-9]+}}"
        described = partial(describe, tag=_TAGS[self.role], path={"id": ConnectionId}, versioned=True)
        shown, listed = _SHOWN[self.role]
        return [
            described(
                web.post(many, self.create),
                f"Create a {self.role}",
                body=ConnectionBody,
                answer=ConnectionEchoed,
                idempotent=True,
            ),
            described(web.get(many, self.list), f"List the {self.role}s", query=ListQuery, answer=listed),
            described(web.get(one, self.get), f"Fetch a {self.role}", query=OneQuery, answer=shown),
            described(
                web.put(one, self.update),
                f"Change a {self.role}",
                body=ConnectionBody,
                answer=ConnectionEchoed,
                conditional=True,
                refuses=(409,),
            ),
            describe(
                web.delete(one, self.delete),
                f"Delete a {self.role}",
                tag=_TAGS[self.role],
                path={"id": ConnectionId},
                answer=ConnectionDeleted,
                conditional=True,
                refuses=(409,),
            ),
            describe(
                web.get(f"{one}/history", self.history),
                f"The history of a {self.role}",
                tag=_TAGS[self.role],
                path={"id": ConnectionId},
                query=HistoryQuery,
                answer=list[EventShown],
            ),
        ]

    async def create(self, request: web.Request) -> web.StreamResponse:
        metadata = metadata_of(request)
        body = await read_body(request, ConnectionBody)
        created = await self.connections.create(self.role, body.given(self.role), metadata, idempotency_of(request))
        return self._echo(created, body, "created")

    async def list(self, request: web.Request) -> web.StreamResponse:
        project_id = project_of(request)
        query = read_query(request, ListQuery)
        listed = await self.queries.listed(self.role, project_id, objects=query.expand is not None)
        return success(listed, etag=len(listed), embeds_others=True)

    async def get(self, request: web.Request) -> web.StreamResponse:
        project_id = project_of(request)
        query = read_query(request, OneQuery)
        entity_id = self._id(request)
        objects = query.expand is not None
        if query.as_of is not None:
            moment = query.as_of
            return success(await self.queries.shown_as_of(self.role, entity_id, project_id, moment, objects=objects))
        entity = await self.documents.require(AGGREGATES[self.role], entity_id, project_id)
        shown = await self.queries.shown(self.role, entity, objects=objects)
        return success(shown, etag=entity.version, embeds_others=True)

    async def update(self, request: web.Request) -> web.StreamResponse:
        metadata, entity_id = metadata_of(request), self._id(request)
        body = await read_body(request, ConnectionBody)
        changed = await self.connections.update(
            self.role, entity_id, body.given(self.role), metadata, if_match_of(request)
        )
        return self._echo(changed, body, "updated")

    async def delete(self, request: web.Request) -> web.StreamResponse:
        metadata, entity_id = metadata_of(request), self._id(request)
        deleted = await self.connections.delete(self.role, entity_id, metadata, if_match_of(request))
        name = deleted.state.definition.name
        return success({"id": deleted.id, "name": name}, message=f"{self.role} {name} deleted")

    async def history(self, request: web.Request) -> web.StreamResponse:
        project_id = project_of(request)
        query = read_query(request, HistoryQuery)
        events = await self.queries.history(
            self.role, self._id(request), project_id, before_version=query.before, limit=query.limit
        )
        return success(events)

    def _id(self, request: web.Request) -> int:
        text = request.match_info["id"]
        entity_id = entity_id_of(text)
        if entity_id is None:
            raise NotFound(f"{self.role} {text[:20]} does not exist")
        return entity_id

    def _echo(self, entity: Entity[Connection], body: ConnectionBody, verb: str) -> web.StreamResponse:
        """What was sent, as it is kept: secrets masked, the configuration in the form that it was sent in."""
        definition = entity.state.definition
        as_text = isinstance(body.config, str)
        data = {
            "id": entity.id,
            "name": definition.name,
            "type": definition.type,
            "version": definition.version,
            "config": definition.config_json if as_text else orjson.Fragment(definition.config_json),
        }
        return success(data, message=f"{self.role} {definition.name} {verb}", etag=entity.version)


@dataclass(frozen=True, slots=True)
class ConnectorRoutes:
    """The handlers of what connectors can tell: versions, specs, tests, streams."""

    queries: CatalogQueries
    vault: Vault
    internal: InternalClient

    def routes(self) -> Sequence[web.RouteDef]:
        streams = [
            web.post(f"{PROJECT}/sources/streams", self.streams),
            web.get(f"{PROJECT}/source/streams", self.streams),
            web.get(f"{PROJECT}/sources/streams", self.streams),
        ]
        discover = partial(describe, tag=_TAGS["source"], body=StreamsBody, answer=StreamsDiscovered)
        return [
            *(discover(route, "Discover the streams of a source") for route in streams),
            describe(
                web.post(f"{PROJECT}/check-unique", self.check_unique),
                "Ask whether a name is free",
                tag="Project",
                body=NameBody,
                answer=NameIsFree,
                refuses=(409,),
            ),
            *(route for role in AGGREGATES for route in RoleRoutes(role, self.vault, self.internal).routes()),
        ]

    async def streams(self, request: web.Request) -> web.StreamResponse:
        project_id = project_of(request)
        body = await _read(request, StreamsBody)
        saved = await self._saved_choice(project_id, body.job_id)
        config = config_object(body.config)
        configuration = await self.vault.configuration(project_id, "source", body.type, config)
        try:
            discovered = await self.internal.call(DISCOVER_STREAMS, _asked(configuration))
        except ConnectorUnavailable as error:
            # The platform is well: it is the address that was sent, or the system there, that has to change.
            raise ConnectorRefused(error.message, code=error.code) from error
        entries = parse_json(discovered.streams_json.encode(), subject="streams")
        catalog = new_catalog(entries) if saved is None else merged_catalog(entries, saved)
        return success({**catalog, "streams_config": catalog})

    async def check_unique(self, request: web.Request) -> web.StreamResponse:
        project_id = project_of(request)
        body = await read_body(request, NameBody)
        if body.entity_type == "job":
            raise invalid("entity_type", "must be source or destination here")
        if await self.queries.named(body.entity_type, project_id, canonical_name(body.name)) is not None:
            message = AGGREGATES[body.entity_type].conflict_message
            raise Conflict(message, code="already_exists", errors=[FieldError("name", message, "taken")])
        return success({"unique": True})

    async def _saved_choice(self, project_id: int, job_id: int | None) -> Any:
        if job_id is None or job_id == NO_JOB:
            return None
        job = await self.queries.job(project_id, job_id)
        if job is None:
            raise NotFound(f"job {job_id} does not exist")
        return parse_json(job["streams_config_json"].encode(), subject="streams_config")


@dataclass(frozen=True, slots=True)
class RoleRoutes:
    """The handlers of one role's connectors."""

    role: Role
    vault: Vault
    internal: InternalClient

    def routes(self) -> Sequence[web.RouteDef]:
        root = f"{PROJECT}/{self.role}s"
        described = partial(describe, tag=_TAGS[self.role])
        return [
            described(
                web.get(f"{root}/versions", self.versions),
                f"List the versions of {self.role} connectors",
                query=VersionsQuery,
                answer=VersionsShown,
            ),
            described(
                web.get(f"{root}/spec", self.spec),
                f"What a {self.role}'s configuration holds",
                query=SpecBody,
                body=SpecBody,
                body_required=False,
                answer=SpecShown,
            ),
            described(
                web.post(f"{root}/spec", self.spec),
                f"What a {self.role}'s configuration holds",
                body=SpecBody,
                answer=SpecShown,
            ),
            described(web.post(f"{root}/test", self.test), f"Test a {self.role}", body=TestBody, answer=TestShown),
        ]

    async def versions(self, request: web.Request) -> web.StreamResponse:
        project_of(request)
        query = read_query(request, VersionsQuery)
        if query.type:
            registry.canonical_type(self.role, query.type)
        return success({"version": list(VERSIONS)})

    async def spec(self, request: web.Request) -> web.StreamResponse:
        project_of(request)
        body = await _read(request, SpecBody)
        kind = registry.canonical_type(self.role, body.type)
        data = {"type": kind, "version": body.canonical_version, "spec": registry.spec(self.role, kind)}
        return success(
            {**body.model_dump(include={"catalog", "source_type", "source_version"}, exclude_none=True), **data}
        )

    async def test(self, request: web.Request) -> web.StreamResponse:
        project_id = project_of(request)
        body = await read_body(request, TestBody)
        config = config_object(body.config)
        configuration = await self.vault.configuration(project_id, self.role, body.type, config)
        result = await self._checked(configuration)
        shown = starred(config, registry.secret_fields(self.role, configuration.type))
        data = {
            "type": configuration.type,
            "version": body.canonical_version,
            "config": orjson.dumps(shown).decode() if isinstance(body.config, str) else shown,
            "connection_result": {
                "status": "SUCCEEDED" if result.succeeded else "FAILED",
                "message": result.message,
            },
            "logs": [
                {"level": line.level, "time": isoformat_z(line.time), "message": line.message}
                for line in result.log_lines
            ],
        }
        return success(data, message=result.message)

    async def _checked(self, configuration: Configuration) -> CheckResult:
        try:
            return await self.internal.call(CHECK_CONNECTION, _asked(configuration))
        except UpstreamTimeout:
            seconds = CHECK_CONNECTION.timeout_seconds
            message = f"{configuration.address} did not answer within {seconds:g} seconds"
            return CheckResult(succeeded=False, message=message)


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


async def _read(request: web.Request, model: type[ModelT]) -> ModelT:
    """The fields of a POST's body, or those that a GET brings in its query or body."""
    return await (read_body(request, model) if request.method == "POST" else read_query_or_body(request, model))
