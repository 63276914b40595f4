"""Events of ``datasync.runs.v1``: the progress of each run, from its queue to its end. Streams ``run-<uuid>``."""

from datetime import datetime
from typing import Annotated, Literal

from libs.contracts.jobs import RunKind, RunOutcome, RunTrigger
from libs.contracts.registry import PublicEvent
from libs.core.envelope import Frozen

TOPIC = "datasync.runs.v1"

Count = Annotated[int, "double"]
"""A number that may exceed an ``int32``: a ``double`` in the schema, since protobuf's JSON writes ``int64`` as text."""


class RunEvent(PublicEvent, topic=TOPIC):
    pass


class ValuesChanged(Frozen):
    """How many values of a column were changed by the column's policy.

    Args:
        values: the number of changed values.
    """

    column: str
    values: Count


class ColumnChanged(Frozen):
    """A column of the destination that a run added or changed, because the source's columns had changed.

    Args:
        kind: ``dropped``: at the source; the destination keeps the column, and it is null in new rows.
        before, after: the column's types at the destination; absent where there is no such column.
    """

    column: str
    kind: Literal["added", "dropped", "widened", "changed"]
    before: str | None = None
    after: str | None = None


class StreamResult(Frozen):
    """What a run did for one stream.

    Args:
        namespace: the stream's namespace, such as a database schema.
        name: the stream's name, such as a table.
        rows_read: rows received from the source.
        rows_written: rows that were inserted or updated.
        rows_skipped: rows that the destination had already.
        rows_inserted, rows_updated, rows_deleted: rows of the destination. Rows that are marked as deleted count as
            deleted.
        bytes_read: bytes received from the source.
        seconds: time spent on the stream.
        verified: whether source and destination were equal; absent if they were not compared.
        verification_json: what was compared, and with which result, as JSON text; absent if they were not compared.
        values_changed: one entry per column whose policy was in force.
        position: how far the stream has been read, for people; absent if its mode has no position.
        columns_changed: what became of the destination's columns.
    """

    namespace: str
    name: str
    rows_read: Count
    rows_written: Count
    rows_skipped: Count = 0
    bytes_read: Count
    seconds: float
    verified: bool | None = None
    verification_json: str | None = None
    values_changed: tuple[ValuesChanged, ...] = ()
    rows_inserted: Count = 0
    rows_updated: Count = 0
    rows_deleted: Count = 0
    position: str | None = None
    columns_changed: tuple[ColumnChanged, ...] = ()


class RunQueued(RunEvent):
    """A run waits for a worker.

    Args:
        scheduled_for: the time in the job's schedule that the run was started for; absent for manual runs.
        streams_config_json: the catalog that the run works on, as JSON text; absent if it is the job's own.
        verify: the run compares both ends, and moves only what that takes.
        repair: rows that differ are written again.
    """

    job_id: int
    kind: RunKind
    trigger: RunTrigger
    scheduled_for: datetime | None = None
    streams_config_json: str | None = None
    verify: bool = False
    repair: bool = False


class RunStarted(RunEvent):
    """A worker claimed the run.

    Args:
        epoch: the number of the claim. A destination that has seen it rejects every commit under a lower number.
        same_attempt: whether this continues the previous attempt, whose worker could not report, instead of
            starting another.
    """

    worker_id: str
    epoch: int
    same_attempt: bool = False


class RunRetryScheduled(RunEvent):
    """An attempt of the run ended early, and the run waits for another one.

    Args:
        epoch: the claim that the attempt was made under.
        not_before: the earliest time of the next attempt.
        same_attempt: whether the worker was stopped and gave the run back, which does not count as an attempt.
    """

    epoch: int
    error: str
    not_before: datetime
    same_attempt: bool = False


class RunCancelRequested(RunEvent):
    """The worker was asked to stop the run."""


class RunStreamsRecorded(RunEvent):
    """Part of what a run did, ahead of its end. Only runs of very many streams have such parts.

    Args:
        epoch: the claim that the run was made under. A later claim starts afresh.
    """

    epoch: int
    streams: tuple[StreamResult, ...]


class RunFinished(RunEvent):
    """A run ended.

    Args:
        epoch: the last claim of the run; 0 if no worker ever claimed it.
        error: what went wrong; absent if nothing did.
        streams: what the run did, stream by stream, unless a preceding event has it.
    """

    epoch: int
    outcome: RunOutcome
    error: str | None = None
    streams: tuple[StreamResult, ...] = ()
