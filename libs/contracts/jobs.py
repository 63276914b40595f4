"""Events of ``datasync.jobs.v1``: jobs and the runs that they start. Streams ``job-<int>``."""

from datetime import datetime
from typing import Literal

from libs.contracts.registry import PublicEvent
from libs.core.envelope import Frozen

TOPIC = "datasync.jobs.v1"

RunKind = Literal["sync", "clear"]
RunTrigger = Literal["manual", "schedule"]
RunOutcome = Literal["completed", "failed", "cancelled"]


class JobEvent(PublicEvent, topic=TOPIC):
    pass


class JobDefined(JobEvent, registered=False):
    """The definition of a job.

    Args:
        frequency: a cron expression with five fields; empty for a job that runs only on request.
        streams_config_json: the catalog with the selected streams, as JSON text.
        advanced_settings_json: further settings as JSON text; the text ``null`` if there are none.
        activate: whether the job's schedule is active.
    """

    name: str
    source_id: int
    destination_id: int
    frequency: str
    streams_config_json: str
    advanced_settings_json: str
    activate: bool


class JobCreated(JobDefined):
    """A job was created."""


class JobUpdated(JobDefined):
    """A job was changed. The event contains its whole definition, unchanged fields included.

    Args:
        clear_streams_config_json: a catalog whose selected streams are cleared before the next sync; absent for none.
        previous_source_id: the source that the job no longer uses; absent if the source did not change.
        previous_destination_id: the destination that the job no longer uses; absent if the destination did not change.
    """

    clear_streams_config_json: str | None = None
    previous_source_id: int | None = None
    previous_destination_id: int | None = None


class JobActivated(JobEvent):
    """A job's schedule was activated."""


class JobDeactivated(JobEvent):
    """A job's schedule was deactivated: the job runs only on request."""


class JobDeleted(JobEvent):
    """A job was deleted.

    Args:
        source_id, destination_id: what the job used.
    """

    source_id: int | None = None
    destination_id: int | None = None


class StreamNamed(Frozen):
    """A stream of the job's source."""

    namespace: str
    name: str


class JobStreamsReset(JobEvent):
    """The states of streams were reset: the next run reads all of their rows again.

    Args:
        streams: the streams.
    """

    streams: tuple[StreamNamed, ...]


class JobRunRequested(JobEvent):
    """A job started a run.

    Args:
        run_id: the id in the name of the run's own stream on ``datasync.runs.v1``.
        scheduled_for: the time in the job's schedule that the run was started for; absent for manual runs.
    """

    run_id: str
    kind: RunKind
    trigger: RunTrigger
    scheduled_for: datetime | None = None


class JobRunEnded(JobEvent):
    """A run of the job ended.

    Args:
        streams_reset: streams whose reset state the run has replaced.
    """

    run_id: str
    outcome: RunOutcome
    streams_reset: tuple[StreamNamed, ...] = ()
