"""Bodies and queries about jobs, tasks and settings."""

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from libs.contracts.jobs import StreamNamed
from libs.contracts.streams import AdvancedSettings, StreamsConfig
from libs.core.schedule import FREQUENCY_LENGTH_MAX, parse_frequency
from libs.web.calls import Call
from libs.web.inputs import NUMBER_MAX, Name, Number, OneQuery, Query
from libs.web.openapi import ReadAs
from libs.web.requests import invalid_field
from services.job_orchestrator.domain.streams import advanced_settings_text, catalog_of, supported_catalog_text
from services.job_orchestrator.job_writing import EndpointGiven, JobGiven
from services.job_orchestrator.queries import RUNS_LISTED_MAX
from services.job_orchestrator.run_records import PAGE_LINES_MAX

JOBS_LISTED_MAX = 1000
RESETS_MAX = 1000

_CATALOG = {"selected_streams": {"public": [{"stream_name": "orders"}]}, "streams": []}

JobName = Annotated[Name, Field(examples=["shop to lake"])]
IdText = Annotated[str, Field(min_length=1, description="The id, with or without quotes.", examples=["1"])]


class EchoedBody(BaseModel):
    """A body of which the known fields are echoed as they were sent, and unknown ones are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, hide_input_in_errors=True)


class EndpointBody(EchoedBody):
    """An id uses what is there and ignores the rest; without one it is created."""

    id: Number | None = None
    name: JobName | None = None
    type: str | None = Field(default=None, max_length=64)
    version: str | None = Field(default=None, max_length=64)
    config: Any = None

    def given(self) -> EndpointGiven:
        return EndpointGiven(self.id, self.name, self.type, self.version, self.config)


class JobBody(EchoedBody):
    name: JobName
    source: EndpointBody = Field(examples=[{"id": 1}])
    destination: EndpointBody = Field(examples=[{"id": 1}])
    streams_config: Annotated[Any, ReadAs(StreamsConfig | str)] = Field(
        description="The streams to move: an object, or a string that holds it as JSON.", examples=[_CATALOG]
    )
    frequency: Annotated[str, StringConstraints(max_length=FREQUENCY_LENGTH_MAX)] | None = Field(
        default="",
        description="When the job runs, in UTC: five cron fields (`30 2 * * 1-5`), `@hourly`, `@daily`, `@weekly`, "
        "`@monthly` or `@yearly`, `every 15 minutes` or `every 2 hours`; empty for a job that is started by hand.",
        examples=["@hourly"],
    )
    advanced_settings: Annotated[Any, ReadAs(AdvancedSettings | str | None)] = Field(
        default=None,
        description="An object, or a string that holds it as JSON.",
        examples=[{"verify": True}],
    )
    activate: bool | None = None

    def given(self, *, activate: bool) -> JobGiven:
        """The checked job; ``activate`` is what holds when the body does not say."""
        return JobGiven(
            name=self.name,
            source=self.source.given(),
            destination=self.destination.given(),
            frequency=parse_frequency(self.frequency or ""),
            streams_config_json=supported_catalog_text(self.streams_config),
            advanced_settings_json=advanced_settings_text(self.advanced_settings),
            activate=activate if self.activate is None else self.activate,
        )


class JobChangeBody(JobBody):
    difference_streams: Annotated[Any, ReadAs(StreamsConfig | str | None)] = Field(
        default=None, description="What `stream-difference` answered: streams to clear before the next sync."
    )

    def streams_to_clear(self) -> str | None:
        if self.difference_streams in (None, ""):
            return None
        text, catalog = catalog_of(self.difference_streams, "difference_streams")
        return text if catalog.selections else None


class ActivationBody(EchoedBody):
    activate: bool


class LogsBody(EchoedBody):
    file_path: str = Field(min_length=1, max_length=512, examples=["jobs/1/runs/01980f0a-7c1e-7d54-9f2b-1f2e5a7c9d10"])


class StreamsChoiceBody(EchoedBody):
    updated_streams_config: Annotated[Any, ReadAs(StreamsConfig | str)] = Field(examples=[_CATALOG])


class VerifyBody(EchoedBody):
    repair: bool = Field(default=False, description="Write the rows again that differ.")


class StreamNameBody(EchoedBody):
    namespace: Annotated[str, Field(max_length=512, examples=["public"])] = ""
    name: Annotated[str, Field(min_length=1, max_length=512, examples=["orders"])]


class StateResetBody(EchoedBody):
    streams: Annotated[list[StreamNameBody], Field(min_length=1, max_length=RESETS_MAX)] = Field(
        description="The streams of which the next run reads all rows again."
    )

    def named(self) -> tuple[StreamNamed, ...]:
        return tuple(StreamNamed(namespace=item.namespace, name=item.name) for item in self.streams)


class JobNameBody(EchoedBody):
    name: JobName
    entity_type: Literal["source", "destination", "job"]


class SettingsBody(EchoedBody):
    project_id: str | int | None = Field(default=None, description="Must be the project of the path, if it is given.")
    webhook_alert_url: Annotated[str, StringConstraints(max_length=2048)]


class JobsQuery(Query):
    """``before``: only jobs with a lower id; ``limit``: all when left out."""

    before: Number | None = None
    limit: int | None = Field(default=None, ge=1, le=JOBS_LISTED_MAX)
    source_id: Number | None = None
    dest_id: Number | None = None
    expand: Literal["config"] | None = None
    view: Literal["full", "summary"] = Field(
        default="full", description="`summary` leaves out `streams_config` and the `config` of source and destination."
    )


class JobQuery(OneQuery):
    expand: Literal["config"] | None = None


class TasksQuery(Query):
    """``before``: the last task of the page before."""

    before: str | None = Field(default=None, min_length=1, max_length=64)
    limit: int = Field(default=RUNS_LISTED_MAX, ge=1, le=RUNS_LISTED_MAX)


class LogsQuery(Query):
    cursor: int = Field(default=-1, ge=-1, le=NUMBER_MAX)
    limit: int = Field(default=1000, ge=1, le=PAGE_LINES_MAX)
    direction: Literal["older", "newer"] = "older"


class DownloadQuery(Query):
    file_path: str = Field(min_length=1, max_length=512)


def filter_of(call: Call) -> JobsQuery:
    """The filter of ``/jobs/dest_id=5`` or ``/jobs/source_id=5``, the number with or without quotes."""
    field = "source_id" if "source_id" in call.request.match_info else "dest_id"
    number = call.path(field).strip("\"'")
    if not re.fullmatch(r"[1-9][0-9]{0,15}", number):
        raise invalid_field(field, "must be an id")
    return JobsQuery(source_id=int(number)) if field == "source_id" else JobsQuery(dest_id=int(number))
