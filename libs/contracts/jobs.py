"""Events of ``datasync.jobs.v1``. Streams ``job-<int>``."""

from datetime import datetime
from typing import ClassVar, Literal

from libs.contracts.registry import register
from libs.core.envelope import Event

TOPIC = "datasync.jobs.v1"

RunKind = Literal["sync", "clear"]
RunTrigger = Literal["manual", "schedule"]
RunOutcome = Literal["completed", "failed", "cancelled"]


class JobEvent(Event):
    TOPIC: ClassVar[str] = TOPIC


class JobDefined(JobEvent):
    """What a job does.

    Args:
        frequency: a five-field cron expression, or empty for a job that only runs when asked.
        streams_config_json: the catalog with the chosen streams, as JSON text.
        advanced_settings_json: further settings as JSON text; ``null`` where none were given.
    """

    name: str
    source_id: int
    destination_id: int
    frequency: str
    streams_config_json: str
    advanced_settings_json: str
    activate: bool


class JobCreated(JobDefined):
    TYPE: ClassVar[str] = "job_created"


class JobUpdated(JobDefined):
    """The job is another one now.

    Args:
        clear_streams_config_json: a catalog whose selected streams are cleared before the next sync, None for none.
        previous_source_id, previous_destination_id: what the job no longer uses, None where that stayed the same.
    """

    TYPE: ClassVar[str] = "job_updated"
    clear_streams_config_json: str | None = None
    previous_source_id: int | None = None
    previous_destination_id: int | None = None


class JobActivated(JobEvent):
    TYPE: ClassVar[str] = "job_activated"


class JobDeactivated(JobEvent):
    TYPE: ClassVar[str] = "job_deactivated"


class JobDeleted(JobEvent):
    """``source_id`` and ``destination_id`` are what the job used until now."""

    TYPE: ClassVar[str] = "job_deleted"
    source_id: int | None = None
    destination_id: int | None = None


class JobRunRequested(JobEvent):
    """The job started a run; ``scheduled_for`` is the tick that asked for it, None for a manual one."""

    TYPE: ClassVar[str] = "job_run_requested"
    run_id: str
    kind: RunKind
    trigger: RunTrigger
    scheduled_for: datetime | None = None


class JobRunEnded(JobEvent):
    TYPE: ClassVar[str] = "job_run_ended"
    run_id: str
    outcome: RunOutcome


EVENTS = (JobCreated, JobUpdated, JobActivated, JobDeactivated, JobDeleted, JobRunRequested, JobRunEnded)
register(EVENTS)
