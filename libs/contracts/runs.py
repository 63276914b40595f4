"""Events of ``datasync.runs.v1``: the short life of each run. Streams ``run-<uuid>``."""

from datetime import datetime
from typing import ClassVar

from libs.contracts.jobs import RunKind, RunOutcome, RunTrigger
from libs.contracts.registry import register
from libs.core.envelope import Event, Frozen

TOPIC = "datasync.runs.v1"


class RunEvent(Event):
    TOPIC: ClassVar[str] = TOPIC


class ValuesChanged(Frozen):
    """How many ``values`` of a column its policy changed."""

    column: str
    values: int


class StreamResult(Frozen):
    """What a run did for one stream.

    Args:
        rows_read, rows_written, rows_skipped: counts of rows.
        bytes_read: bytes on the wire from the source.
        seconds: wall time spent on the stream.
        verified: None when no verification was asked for, or the ends can't be compared.
        verification: what was compared and what came out as JSON text, when asked for.
        values_changed: by column that has a policy in force.
    """

    namespace: str
    name: str
    rows_read: int
    rows_written: int
    rows_skipped: int = 0
    bytes_read: int
    seconds: float
    verified: bool | None = None
    verification_json: str | None = None
    values_changed: tuple[ValuesChanged, ...] = ()


class RunQueued(RunEvent):
    """A run waits for a worker; ``streams_config_json`` is the catalog that it works on, None for the job's own."""

    TYPE: ClassVar[str] = "run_queued"
    job_id: int
    kind: RunKind
    trigger: RunTrigger
    scheduled_for: datetime | None = None
    streams_config_json: str | None = None


class RunStarted(RunEvent):
    """A worker claimed the run under ``epoch``; a higher epoch fences every lower one.

    Args:
        same_attempt: it goes on with an attempt that its worker could not report on.
    """

    TYPE: ClassVar[str] = "run_started"
    worker_id: str
    epoch: int
    same_attempt: bool = False


class RunRetryScheduled(RunEvent):
    """The attempt under ``epoch`` failed; the run waits until ``not_before``.

    Args:
        same_attempt: the worker was stopped and gave the run back, which counts as no attempt.
    """

    TYPE: ClassVar[str] = "run_retry_scheduled"
    epoch: int
    error: str
    not_before: datetime
    same_attempt: bool = False


class RunCancelRequested(RunEvent):
    TYPE: ClassVar[str] = "run_cancel_requested"


class RunFinished(RunEvent):
    TYPE: ClassVar[str] = "run_finished"
    epoch: int
    outcome: RunOutcome
    error: str | None = None
    streams: tuple[StreamResult, ...] = ()


EVENTS = (RunQueued, RunStarted, RunRetryScheduled, RunCancelRequested, RunFinished)
register(EVENTS)
