"""What callers see of jobs, tasks (runs), their logs and a project's settings."""

from collections.abc import Mapping, Sequence, Set
from datetime import datetime
from typing import Annotated, Any, Literal, NotRequired

import orjson
from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema
from typing_extensions import TypedDict

from libs.contracts.internal import StreamProgress
from libs.contracts.runs import StreamResult
from libs.core.entity import Entity
from libs.core.json import JsonObject
from libs.mongodb.client import Document
from libs.web.answers import Moment
from services.job_orchestrator.domain.job import JobState
from services.job_orchestrator.domain.run import RunState, RunStatus
from services.job_orchestrator.run_records import percent_done
from services.job_orchestrator.stream_states import KnownState

ConfigShown = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "object"}]})]
"""JSON as a string that holds it or, with ``?expand=config``, as the object."""

TaskState = Literal["scheduled", "running", "completed", "failed", "canceled"]
_FAMILY_STATES: dict[RunStatus, TaskState] = {
    "queued": "scheduled",
    "running": "running",
    "completed": "completed",
    "failed": "failed",
    "cancelled": "canceled",
}
JobType = Literal["sync", "clear", "verify"]


class EndpointShown(TypedDict):
    """A job's source or destination; ``config`` is a string that holds JSON, or with ``?expand=config`` an object."""

    id: int
    name: Annotated[str, Field(examples=["shop"])]
    type: Annotated[str, Field(examples=["postgres"])]
    version: Annotated[str, Field(examples=["v1.0.0"])]
    config: NotRequired[ConfigShown]


class JobListed(TypedDict):
    """A job; ``last_run_…`` only after a first run, ``next_run_time`` only where there is a schedule.

    ``streams_config`` and the ``config`` of source and destination are left out of summaries.
    """

    id: int
    name: Annotated[str, Field(examples=["shop to lake"])]
    source: EndpointShown
    destination: EndpointShown
    streams_config: NotRequired[ConfigShown]
    frequency: Annotated[
        str,
        Field(description="A cron expression; empty where runs are started by hand.", examples=["0 * * * *"]),
    ]
    advanced_settings: Annotated[Any, WithJsonSchema({"type": ["object", "null"]})]
    activate: bool
    created_at: Moment
    updated_at: Moment
    created_by: Annotated[str, Field(examples=["ann"])]
    updated_by: Annotated[str, Field(examples=["ann"])]
    last_run_time: NotRequired[Moment]
    last_run_state: NotRequired[TaskState]
    last_run_type: NotRequired[JobType]
    next_run_time: NotRequired[Moment]


class JobShown(JobListed):
    """A job with everything about it."""


class JobEchoed(BaseModel):
    """What was sent, the secrets of each ``config`` masked, and the id."""

    model_config = ConfigDict(extra="allow")

    id: int


class JobDeleted(TypedDict):
    name: Annotated[str, Field(examples=["shop to lake"])]


class ActivationEchoed(BaseModel):
    """What was sent."""

    model_config = ConfigDict(extra="allow")

    activate: bool


class RunBegun(TypedDict):
    task_id: Annotated[str, Field(examples=["01980f0a-7c1e-7d54-9f2b-1f2e5a7c9d10"])]
    message: str


class Cancelled(TypedDict):
    message: str


class StreamStateShown(TypedDict):
    """How far a stream has been read; ``reset``: the next run reads all of its rows again."""

    namespace: Annotated[str, Field(examples=["public"])]
    name: Annotated[str, Field(examples=["orders"])]
    position: Annotated[
        str | None,
        Field(
            description="The cursor's column and the value that the next run reads from; `transaction` where rows are "
            "found without a cursor.",
            examples=["updated_at: 2026-01-01 00:00:00+00"],
        ),
    ]
    task_id: Annotated[str | None, Field(description="The run that committed it.")]
    reported_at: Moment | None
    reset: bool


class JobStateShown(TypedDict):
    """The streams whose runs keep a state; those of full refreshes have none."""

    streams: list[StreamStateShown]


class Clearing(TypedDict):
    running: bool


class StreamsDiffer(TypedDict):
    """The catalog of the streams whose data will be cleared; empty for none."""

    difference_streams: dict[str, Any]


class JobNameIsFree(TypedDict):
    unique: Literal[True]


class TaskShown(TypedDict):
    """A run; ``runtime`` in whole seconds, ``file_path`` is the key of its log.

    ``error`` is why it failed, or why the last attempt did; ``verified`` is true where the run completed and
    both ends of each stream were compared and equal, false where they differed in a stream, else null.
    """

    id: Annotated[str, Field(examples=["01980f0a-7c1e-7d54-9f2b-1f2e5a7c9d10"])]
    start_time: Moment
    runtime: Annotated[int, Field(ge=0)]
    status: TaskState
    job_type: JobType
    file_path: Annotated[str, Field(examples=["jobs/1/runs/01980f0a-7c1e-7d54-9f2b-1f2e5a7c9d10"])]
    attempts: Annotated[int, Field(ge=0)]
    error: str | None
    verified: bool | None


class ColumnChangedShown(TypedDict):
    """``before`` and ``after`` are the column's types, null where there is no such column."""

    column: Annotated[str, Field(examples=["note"])]
    kind: Literal["added", "dropped", "widened", "changed"]
    before: str | None
    after: Annotated[str | None, Field(examples=["text"])]


class StreamOfTask(TypedDict):
    namespace: Annotated[str, Field(examples=["public"])]
    name: Annotated[str, Field(examples=["orders"])]
    state: Literal["waiting", "running", "completed", "failed"]
    rows_read: Annotated[int, Field(ge=0)]
    rows_written: Annotated[int, Field(ge=0)]
    rows_skipped: int
    rows_inserted: Annotated[int, Field(ge=0)]
    rows_updated: Annotated[int, Field(ge=0)]
    rows_deleted: Annotated[int, Field(ge=0)]
    bytes_read: Annotated[int, Field(ge=0)]
    rows_total: int | None
    seconds: float | None
    verified: bool | None
    verification: Annotated[
        Any,
        Field(description="What was compared, by which method, and what came out; null where it was not asked for."),
    ]
    error: str | None
    values_changed: Annotated[
        dict[str, int],
        Field(description="values that a policy changed, by column", examples=[{"born": 2}]),
    ]
    columns_changed: Annotated[
        list[ColumnChangedShown],
        Field(description="What became of the destination's columns, because the source's had changed."),
    ]


class TaskDetail(TaskShown):
    """A run with its progress and its counts."""

    trigger: Literal["manual", "schedule"]
    progress: Annotated[int, Field(ge=0, le=100)]
    cancel_requested: bool
    streams: list[StreamOfTask]


class LogLineShown(TypedDict):
    level: Annotated[str, Field(examples=["info"])]
    time: Moment
    message: str


class TaskLogs(TypedDict):
    """The last lines, oldest first."""

    task_logs: list[LogLineShown]


class LogPage(TypedDict):
    """A page of lines, oldest first, with the cursors of its neighbours."""

    logs: list[LogLineShown]
    older_cursor: int
    newer_cursor: int
    has_more_older: bool
    has_more_newer: bool


class SettingsShown(TypedDict):
    id: Annotated[int, Field(examples=[123])]
    project_id: Annotated[str, Field(examples=["123"])]
    webhook_alert_url: Annotated[str, Field(examples=["https://hooks.example.com/alerts"])]


def job_view(
    job: Entity[JobState],
    sources: Mapping[int, Document],
    destinations: Mapping[int, Document],
    running: Set[str],
    *,
    objects: bool,
) -> JobShown:
    """A job.

    Args:
        sources, destinations: this service's documents of them, by id.
        running: the ids of the runs that are running.
        objects: configurations as objects.
    """
    state, definition = job.state, job.state.definition
    view: JobShown = {
        "id": int(job.id),
        "name": definition.name,
        "source": _endpoint_view(definition.source_id, sources, objects=objects),
        "destination": _endpoint_view(definition.destination_id, destinations, objects=objects),
        "streams_config": json_of(definition.streams_config_json, objects=objects),
        "frequency": definition.frequency,
        "advanced_settings": orjson.Fragment(definition.advanced_settings_json),
        "activate": definition.activate,
        "created_at": state.created_at,
        "updated_at": state.updated_at,
        "created_by": state.created_by,
        "updated_by": state.updated_by,
    }
    if (last := state.last_run) is not None:
        status: RunStatus = last.outcome or ("running" if last.run_id in running else "queued")
        view["last_run_time"] = last.requested_at
        view["last_run_state"] = _FAMILY_STATES[status]
        view["last_run_type"] = last.kind
    if state.next_tick is not None:
        view["next_run_time"] = state.next_tick
    return view


def summary_of(job: JobShown) -> JobListed:
    """A job without configurations and stream catalog."""
    summary: JobListed = {**job}
    del summary["streams_config"]
    for side in ("source", "destination"):
        endpoint: Any = {name: value for name, value in summary[side].items() if name != "config"}
        summary[side] = endpoint
    return summary


def job_state_view(job: Entity[JobState], known: Sequence[KnownState]) -> JobStateShown:
    """The known states, and the streams that were reset before a run reported one."""
    resets = {(stream.namespace, stream.name) for stream in job.state.resets}
    views: dict[tuple[str, str], StreamStateShown] = {
        name: {
            "namespace": name[0],
            "name": name[1],
            "position": None,
            "task_id": None,
            "reported_at": None,
            "reset": True,
        }
        for name in resets
    }
    for state in known:
        views[state.namespace, state.name] = {
            "namespace": state.namespace,
            "name": state.name,
            "position": state.position,
            "task_id": state.run_id,
            "reported_at": state.reported_at,
            "reset": (state.namespace, state.name) in resets,
        }
    return {"streams": [views[name] for name in sorted(views)]}


def json_of(text: str, *, objects: bool) -> Any:
    """JSON text as a string, which OLake's page parses, or as the object."""
    return orjson.Fragment(text) if objects else text


def task_view(run: Entity[RunState], now: datetime) -> TaskShown:
    """A run as lists show it; the start of a run that waits is when it was queued."""
    state = run.state
    start = state.started_at or state.queued_at
    end = state.finished_at or now
    return {
        "id": str(run.id),
        "start_time": start,
        "runtime": max(0, int((end - start).total_seconds())) if state.started_at else 0,
        "status": _FAMILY_STATES[state.status],
        "job_type": "verify" if state.verify else state.kind,
        "file_path": file_path(run),
        "attempts": state.attempts,
        "error": state.error,
        "verified": _verified(state),
    }


def task_detail(run: Entity[RunState], progress: Sequence[StreamProgress], now: datetime) -> TaskDetail:
    """A run with its progress and, once it has ended, its counts per stream."""
    return {
        **task_view(run, now),
        "trigger": run.state.trigger,
        "progress": 100 if run.state.status == "completed" else percent_done(progress),
        "cancel_requested": run.state.cancel_requested,
        "streams": _stream_views(progress, run.state.streams),
    }


def file_path(run: Entity[RunState]) -> str:
    """The opaque key by which the page asks for a run's log."""
    return f"jobs/{run.state.job_id}/runs/{run.id}"


def line_view(line: Mapping[str, Any]) -> LogLineShown:
    return {"level": line["level"], "time": line["time"], "message": line["message"]}


def _endpoint_view(identifier: int, known: Mapping[int, Document], *, objects: bool) -> EndpointShown:
    endpoint = known.get(identifier, {"name": "", "type": "", "version": "", "config_json": "{}"})
    return {
        "id": identifier,
        "name": endpoint["name"],
        "type": endpoint["type"],
        "version": endpoint["version"],
        "config": json_of(endpoint["config_json"], objects=objects),
    }


_UNREPORTED: JsonObject = {"rows_total": None, "state": "failed", "error": None}


def _stream_views(progress: Sequence[StreamProgress], results: Sequence[StreamResult]) -> list[StreamOfTask]:
    """Per stream what it came to, or how far it is."""
    views: dict[tuple[str, str], Any] = {(item.namespace, item.name): _progress_view(item) for item in progress}
    for result in results:
        key = (result.namespace, result.name)
        views[key] = _UNREPORTED | views.get(key, {}) | _result_view(result)
    return list(views.values())


def _progress_view(item: StreamProgress) -> JsonObject:
    return item.model_dump() | {
        "rows_skipped": 0,
        "rows_inserted": 0,
        "rows_updated": 0,
        "rows_deleted": 0,
        "seconds": None,
        "verified": None,
        "verification": None,
        "values_changed": {},
        "columns_changed": [],
    }


def _result_view(result: StreamResult) -> JsonObject:
    verification = orjson.Fragment(result.verification_json) if result.verification_json else None
    # Progress tells how a stream whose ends differ ended, for as long as it is kept.
    end = {} if result.verified is False else {"state": "completed", "error": None}
    return result.model_dump(exclude={"verification_json", "position"}) | {
        "verification": verification,
        "values_changed": {changed.column: changed.values for changed in result.values_changed},
        **end,
    }


def _verified(run: RunState) -> bool | None:
    """False if a stream's ends differ, True if the run completed and those of all its streams are equal, else None."""
    verdicts = {result.verified for result in run.streams}
    if False in verdicts:
        return False
    return True if run.status == "completed" and verdicts == {True} else None
