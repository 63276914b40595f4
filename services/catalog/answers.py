"""What the answers about sources and destinations hold, for the API's description."""

from typing import Any, Literal

from pydantic import Field

from libs.web.answers import Moment
from libs.web.openapi import Answered

RunState = Literal["scheduled", "running", "completed", "failed", "canceled"]


class JobOfSource(Answered):
    """A job that reads the source; without a run there is no ``last_run_time``."""

    id: int
    name: str
    activate: bool
    last_run_state: RunState | Literal[""] | None
    last_run_time: Moment | None = None
    destination_name: str
    destination_type: str
    dest_name: str


class JobOfDestination(Answered):
    """A job that writes to the destination; without a run there is no ``last_run_time``."""

    id: int
    name: str
    activate: bool
    last_run_state: RunState | Literal[""] | None
    last_run_time: Moment | None = None
    source_name: str
    source_type: str


class ConnectionEchoed(Answered):
    """What was sent, its secrets masked, and the id."""

    id: int
    name: str = Field(examples=["shop"])
    type: str = Field(examples=["postgres"])
    version: str = Field(examples=["v1.0.0"])
    config: dict[str, Any] | str


class ConnectionShown(ConnectionEchoed):
    """``config`` is a string that holds JSON, or with ``?expand=config`` an object."""

    created_at: Moment
    updated_at: Moment
    created_by: str = Field(examples=["ann"])
    updated_by: str = Field(examples=["ann"])


class SourceShown(ConnectionShown):
    """A source; as it stood in the past (``as_of``) without its jobs."""

    jobs: list[JobOfSource] = Field(default=[], examples=[[]])


class DestinationShown(ConnectionShown):
    """A destination; as it stood in the past (``as_of``) without its jobs."""

    jobs: list[JobOfDestination] = Field(default=[], examples=[[]])


class ConnectionDeleted(Answered):
    id: int
    name: str = Field(examples=["shop"])


class VersionsShown(Answered):
    version: list[str] = Field(description="Newest first.", examples=[["v1.0.0"]])


class Spec(Answered):
    """What a form for the configuration is drawn from; ``uischema`` is JSON text."""

    jsonschema: dict[str, Any]
    uischema: str


class SpecShown(Answered):
    type: str = Field(examples=["postgres"])
    version: str = Field(examples=["v1.0.0"])
    catalog: str | None = None
    source_type: str | None = None
    source_version: str | None = None
    spec: Spec


class ConnectionResult(Answered):
    status: Literal["SUCCEEDED", "FAILED"]
    message: str


class TestLine(Answered):
    level: str = Field(examples=["info"])
    time: Moment
    message: str


class TestShown(Answered):
    """What a test of a connection found; a failed one is an answer, not an error."""

    type: str = Field(examples=["postgres"])
    version: str = Field(examples=["v1.0.0"])
    config: dict[str, Any] | str
    connection_result: ConnectionResult
    logs: list[TestLine]


class StreamsCatalog(Answered):
    """The source's streams, and which of them a job copies, by namespace."""

    streams: list[dict[str, Any]] = Field(
        examples=[[{"stream": {"name": "orders", "namespace": "public", "sync_mode": "full_refresh"}}]]
    )
    selected_streams: dict[str, list[dict[str, Any]]] = Field(examples=[{"public": [{"stream_name": "orders"}]}])


class StreamsDiscovered(StreamsCatalog):
    streams_config: StreamsCatalog


class NameIsFree(Answered):
    unique: Literal[True]
