"""What the answers about jobs, tasks and settings hold, for the API's description."""

from typing import Any, Literal

from pydantic import ConfigDict, Field

from libs.web.answers import Moment
from libs.web.openapi import Answered

TaskState = Literal["scheduled", "running", "completed", "failed", "canceled"]
JobType = Literal["sync", "clear"]


class EndpointShown(Answered):
    """A job's source or destination; ``config`` is a string that holds JSON, or with ``?expand=config`` an object."""

    id: int
    name: str = Field(examples=["shop"])
    type: str = Field(examples=["postgres"])
    version: str = Field(examples=["v1.0.0"])
    config: str | dict[str, Any]


class JobShown(Answered):
    """A job; ``last_run_…`` only after a first run, ``next_run_time`` only where there is a schedule."""

    id: int
    name: str = Field(examples=["shop to lake"])
    source: EndpointShown
    destination: EndpointShown
    streams_config: str | dict[str, Any]
    frequency: str = Field(
        description="A cron expression; empty where runs are started by hand.", examples=["0 * * * *"]
    )
    advanced_settings: dict[str, Any] | None
    activate: bool
    created_at: Moment
    updated_at: Moment
    created_by: str = Field(examples=["ann"])
    updated_by: str = Field(examples=["ann"])
    last_run_time: Moment | None = None
    last_run_state: TaskState | None = None
    last_run_type: JobType | None = None
    next_run_time: Moment | None = None


class JobEchoed(Answered):
    """What was sent, the secrets of each ``config`` masked, and the id."""

    model_config = ConfigDict(extra="allow")

    id: int


class JobDeleted(Answered):
    name: str = Field(examples=["shop to lake"])


class ActivationEchoed(Answered):
    """What was sent."""

    model_config = ConfigDict(extra="allow")

    activate: bool


class RunBegun(Answered):
    task_id: str = Field(examples=["01980f0a-7c1e-7d54-9f2b-1f2e5a7c9d10"])
    message: str


class Cancelled(Answered):
    message: str


class Clearing(Answered):
    running: bool


class StreamsDiffer(Answered):
    """The catalog of the streams whose data will be cleared; empty for none."""

    difference_streams: dict[str, Any]


class JobNameIsFree(Answered):
    unique: Literal[True]


class TaskShown(Answered):
    """A run; ``runtime`` in whole seconds, ``file_path`` is the key of its log.

    ``error`` is why it failed, or why the last attempt did; ``verified`` is true where the run completed and
    both ends of each stream were compared and equal, false where they differed in a stream, else null.
    """

    id: str = Field(examples=["01980f0a-7c1e-7d54-9f2b-1f2e5a7c9d10"])
    start_time: Moment
    runtime: int = Field(ge=0)
    status: TaskState
    job_type: JobType
    file_path: str = Field(examples=["jobs/1/runs/01980f0a-7c1e-7d54-9f2b-1f2e5a7c9d10"])
    attempts: int = Field(ge=0)
    error: str | None
    verified: bool | None


class StreamOfTask(Answered):
    namespace: str = Field(examples=["public"])
    name: str = Field(examples=["orders"])
    state: Literal["waiting", "running", "completed", "failed"]
    rows_read: int = Field(ge=0)
    rows_written: int = Field(ge=0)
    rows_skipped: int = 0
    bytes_read: int = Field(ge=0)
    rows_total: int | None
    seconds: float | None
    verified: bool | None
    verification: Any = Field(
        description="What was compared, by which method, and what came out; null where it was not asked for."
    )
    error: str | None
    values_changed: dict[str, int] = Field(
        description="values that a policy changed, by column", examples=[{"born": 2}]
    )


class TaskDetail(TaskShown):
    """A run with its progress and its counts."""

    trigger: Literal["manual", "schedule"]
    progress: int = Field(ge=0, le=100)
    cancel_requested: bool
    streams: list[StreamOfTask]


class LogLineShown(Answered):
    level: str = Field(examples=["info"])
    time: Moment
    message: str


class TaskLogs(Answered):
    """The last lines, oldest first."""

    task_logs: list[LogLineShown]


class LogPage(Answered):
    """A page of lines, oldest first, with the cursors of its neighbours."""

    logs: list[LogLineShown]
    older_cursor: int
    newer_cursor: int
    has_more_older: bool
    has_more_newer: bool


class SettingsShown(Answered):
    id: int = Field(examples=[123])
    project_id: int = Field(examples=[123])
    webhook_alert_url: str = Field(examples=["https://hooks.example.com/alerts"])
