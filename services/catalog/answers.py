"""What callers see of sources, destinations and connectors."""

from typing import Annotated, Any, Literal, NotRequired

import orjson
from pydantic import Field, WithJsonSchema
from typing_extensions import TypedDict

from libs.contracts.internal import CheckResult
from libs.core.entity import Entity
from libs.core.envelope import Envelope
from libs.mongodb.client import Document
from libs.web.answers import EventShown, Moment
from libs.web.answers import event_view as usual_event_view
from services.catalog.domain.connection import Connection, Definition

Config = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "object"}, {"type": "string"}]})]
RunState = Literal["scheduled", "running", "completed", "failed", "canceled"]


class JobOfConnection(TypedDict):
    """A job that uses the connection; without a run there is no ``last_run_time``."""

    id: int
    name: str
    activate: bool
    last_run_state: RunState | Literal[""] | None
    last_run_time: NotRequired[Moment]


class JobOfSource(JobOfConnection):
    """A job that reads the source."""

    destination_name: str
    destination_type: str
    dest_name: str


class JobOfDestination(JobOfConnection):
    """A job that writes to the destination."""

    source_name: str
    source_type: str


class ConnectionEchoed(TypedDict):
    """What was sent, its secrets masked, and the id."""

    id: int
    name: Annotated[str, Field(examples=["shop"])]
    type: Annotated[str, Field(examples=["postgres"])]
    version: Annotated[str, Field(examples=["v1.0.0"])]
    config: Config


class ConnectionShown(ConnectionEchoed):
    """``config`` is a string that holds JSON, or with ``?expand=config`` an object."""

    created_at: Moment
    updated_at: Moment
    created_by: Annotated[str, Field(examples=["ann"])]
    updated_by: Annotated[str, Field(examples=["ann"])]


class SourceShown(ConnectionShown):
    """A source; as it stood in the past (``as_of``) without its jobs."""

    jobs: NotRequired[Annotated[list[JobOfSource], Field(examples=[[]])]]


class DestinationShown(ConnectionShown):
    """A destination; as it stood in the past (``as_of``) without its jobs."""

    jobs: NotRequired[Annotated[list[JobOfDestination], Field(examples=[[]])]]


class ConnectionDeleted(TypedDict):
    id: int
    name: Annotated[str, Field(examples=["shop"])]


class VersionsShown(TypedDict):
    version: Annotated[list[str], Field(description="Newest first.", examples=[["v1.0.0"]])]


class Spec(TypedDict):
    """What a form for the configuration is drawn from; ``uischema`` is JSON text."""

    jsonschema: dict[str, Any]
    uischema: str


class SpecShown(TypedDict):
    type: Annotated[str, Field(examples=["postgres"])]
    version: Annotated[str, Field(examples=["v1.0.0"])]
    catalog: NotRequired[str]
    source_type: NotRequired[str]
    source_version: NotRequired[str]
    spec: Spec


class ConnectionResult(TypedDict):
    status: Literal["SUCCEEDED", "FAILED"]
    message: str


class TestLine(TypedDict):
    level: Annotated[str, Field(examples=["info"])]
    time: Moment
    message: str


class TestShown(TypedDict):
    """What a test of a connection found; a failed one is an answer, not an error."""

    type: Annotated[str, Field(examples=["postgres"])]
    version: Annotated[str, Field(examples=["v1.0.0"])]
    config: Config
    connection_result: ConnectionResult
    logs: list[TestLine]


class StreamsCatalog(TypedDict):
    """The source's streams, and which of them a job copies, by namespace."""

    streams: Annotated[
        list[dict[str, Any]],
        Field(examples=[[{"stream": {"name": "orders", "namespace": "public", "sync_mode": "full_refresh"}}]]),
    ]
    selected_streams: Annotated[
        dict[str, list[dict[str, Any]]], Field(examples=[{"public": [{"stream_name": "orders"}]}])
    ]


class StreamsDiscovered(StreamsCatalog):
    streams_config: StreamsCatalog


class NameIsFree(TypedDict):
    unique: Literal[True]


def config_view(definition: Definition, *, objects: bool) -> Any:
    """The configuration, secrets masked: a text that holds JSON, which OLake's page parses, or the object."""
    return orjson.Fragment(definition.config_json) if objects else definition.config_json


def echo_view(entity: Entity[Connection], *, objects: bool) -> ConnectionEchoed:
    definition = entity.state.definition
    return {
        "id": int(entity.id),
        "name": definition.name,
        "type": definition.type,
        "version": definition.version,
        "config": config_view(definition, objects=objects),
    }


def connection_view(entity: Entity[Connection], *, objects: bool) -> ConnectionShown:
    """A source or destination without its jobs."""
    state = entity.state
    return {
        **echo_view(entity, objects=objects),
        "created_at": state.created_at,
        "updated_at": state.updated_at,
        "created_by": state.created_by,
        "updated_by": state.updated_by,
    }


def job_of_source(job: Document, destination: tuple[str, str]) -> JobOfSource:
    """A job from this service's document of it, and its destination's name and type."""
    name, kind = destination
    return {**_job_of(job), "destination_name": name, "destination_type": kind, "dest_name": name}


def job_of_destination(job: Document, source: tuple[str, str]) -> JobOfDestination:
    """A job from this service's document of it, and its source's name and type."""
    name, kind = source
    return {**_job_of(job), "source_name": name, "source_type": kind}


def test_view(kind: str, version: str, config: Any, result: CheckResult) -> TestShown:
    return {
        "type": kind,
        "version": version,
        "config": config,
        "connection_result": {"status": "SUCCEEDED" if result.succeeded else "FAILED", "message": result.message},
        "logs": [{"level": line.level, "time": line.time, "message": line.message} for line in result.log_lines],
    }


def event_view(envelope: Envelope) -> EventShown:
    """An event without the name of its secrets, its configuration as an object."""
    data = envelope.data.model_dump(mode="json", exclude={"secret_ref"})
    if "config_json" in data:
        data["config"] = orjson.Fragment(data.pop("config_json"))
    return {**usual_event_view(envelope), "data": data}


def _job_of(job: Document) -> JobOfConnection:
    shown: JobOfConnection = {
        "id": job["_id"],
        "name": job["name"],
        "activate": job["activate"],
        "last_run_state": job["last_run_state"],
    }
    if job["last_run_time"] is not None:
        shown["last_run_time"] = job["last_run_time"]
    return shown
