"""The contract of a connector: what a source and a destination do in a run.

The worker knows this module and no system. A run goes through it in this order:

1. ``Destination.open`` records the run's epoch at the destination, which fences every earlier epoch of the job, and
   removes what killed runs left.
2. ``Source.snapshot`` opens one snapshot for the whole run.
3. For each stream: ``DestinationRun.committed`` tells whether this run has already committed it. If not,
   ``DestinationRun.state`` is what the last commit recorded, ``Snapshot.table`` describes the rows that the plan and
   that state call for, ``DestinationRun.prepare`` rejects what can't work before a row is read and reconciles the
   columns, and ``DestinationRun.write`` replaces the target's rows, appends to them or merges into them, as
   ``StreamPlan.disposition`` says.

What a destination promises, and how:

- **All or nothing.** Rows are staged out of readers' sight. One atomic commit publishes them and records the epoch and
  the stream's marker: the run, the number of rows, the verification, the stream's state. A run that is resumed reads
  the marker. So a state is never ahead of or behind the rows that it stands for.
- **A fenced writer can't commit.** The commit compares the run's epoch with the highest that the destination has
  recorded for the job; if that one is higher, it raises ``Fenced``. A claim in the control plane is no substitute: its
  holder may have been paused and not know that it expired.
- **A table belongs to the job that wrote it.** ``RunContext.require_ownership`` decides, in ``prepare``, again in the
  commit, and in ``clear``.
- **Unknown outcomes are resolved.** If the connection is lost during a commit, the destination reads the marker before
  it reports success or failure.

Every call may raise ``ConnectorRefused`` (someone has to change something: the run fails) or ``ConnectorUnavailable``
(may succeed later: the run is retried). Messages name the table, column or setting, and never contain values of rows
or secrets. Every call may be cancelled and then releases what it holds.

Rows travel as Arrow record batches (``Table.batches``). A destination that speaks the source's own wire format asks
for it by name (``Table.wire``) and passes its bytes through instead.
"""

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from libs.core.errors import FixRequest, RetryLater

if TYPE_CHECKING:
    import pyarrow

    from libs.connectors.canonical import SourceEnd
    from libs.connectors.comparison import Comparison
    from libs.connectors.schema_changes import SchemaChange
    from libs.connectors.states import StreamState
    from libs.contracts.filters import Filter

# What happens to a value that the destination can't store: the run fails, the value becomes null, or the whole column
# is stored as text.
Policy = Literal["fail", "null", "text"]
# Which rows a run reads: all, or those that were inserted or updated since the stream's state.
Mode = Literal["full_refresh", "incremental"]
# What a run does with the target's rows: replaces them all, adds to them, or inserts and updates by key.
Disposition = Literal["replace", "append", "merge"]
# What happens if the source's columns are no longer the target's: the target follows, the stream fails, or only the
# columns that the target has are moved.
SchemaPolicy = Literal["evolve", "freeze", "ignore"]
# When rows without a cursor value are read: never, when all rows are read, or in every run.
NullCursors = Literal["never", "first", "always"]
# What happens to the target's rows that the source no longer has: they are marked, or deleted.
Deletes = Literal["soft", "hard"]
CatalogEntry = dict[str, Any]
# The columns that DataSync adds to a target whose deletes are soft.
DELETED_AT = "_datasync_deleted_at"


class Source(Protocol):
    """A system to read from."""

    async def check(self) -> Sequence[str]:
        """Test the connection: connect, log in and read something. Returns warnings."""

    async def discover(self) -> list[CatalogEntry]:
        """The ``{"stream": {…}}`` entries of a streams catalog, ordered by namespace and name."""

    def snapshot(self) -> AbstractAsyncContextManager["Snapshot"]:
        """Open a snapshot, which lasts until the context is left."""


class Snapshot(Protocol):
    """The source at one moment: every table is read as of that moment."""

    async def table(self, plan: "StreamPlan", state: str | None = None) -> "Table":
        """The rows of a stream that a run has to move.

        Args:
            state: the ``Table.state`` of the rows that are at the destination; None to read all rows.

        Raises:
            ConnectorRefused: the table or a chosen column does not exist, or the mode is not possible.
        """

    async def is_usable(self) -> bool:
        """Whether further tables can be read; False after an error or a lost connection has ended the snapshot."""


class Table(Protocol):
    """The rows of one stream in the snapshot, under the names of the target's columns.

    Attributes:
        primary_key: the key's columns in order; empty if there is none or not all its columns were chosen.
        rows_estimated: the source's own estimate, None if it has none.
        warnings: for the run's log.
        is_whole: every row of the stream is read, not only those that changed since a state.
        state: the source's own note, as text, of how far the rows reach, which ``StreamState`` holds; None if the
            plan's mode needs none. It contains no values but the cursor's.
        connections_max: how many parts may be read concurrently.
        arrow_schema: of ``batches``.
    """

    @property
    def plan(self) -> "StreamPlan": ...

    @property
    def primary_key(self) -> tuple[str, ...]: ...

    @property
    def rows_estimated(self) -> int | None: ...

    @property
    def warnings(self) -> tuple[str, ...]: ...

    @property
    def is_whole(self) -> bool: ...

    @property
    def state(self) -> str | None: ...

    @property
    def connections_max(self) -> int: ...

    @property
    def arrow_schema(self) -> "pyarrow.Schema": ...

    def parts(self) -> Sequence[Any]:
        """Disjoint parts that together hold every row once."""

    def batches(self, part: Any) -> AsyncGenerator["pyarrow.RecordBatch", None]:
        """The rows of one part.

        Batches are produced as they are consumed: memory is bounded by the batch size and the largest row.
        """

    def wire(self, wire_format: str) -> Any:
        """The table in the source's own wire format of this name, None if it does not have it.

        What the name promises is the format's own matter (``postgres/table.py``: ``POSTGRES_WIRE``).
        """

    def without(self, columns: frozenset[str]) -> "Table":
        """The same rows without these columns."""

    def keys(self) -> "Table":
        """The keys of all rows of the stream, whatever the state is."""

    def comparable(self) -> "SourceEnd":
        """The source's end of a verification, which hashes all rows of the stream, whatever the state is."""

    async def values_changed(self) -> dict[str, int]:
        """How many values the policies changed, by column; only columns with a policy other than ``fail``."""


class Destination(Protocol):
    """A system to write to."""

    async def check(self) -> Sequence[str]:
        """Test the connection, including the right to create tables, and leave nothing behind. Returns warnings."""

    def open(self, context: "RunContext") -> AbstractAsyncContextManager["DestinationRun"]:
        """Record the run's epoch and remove what earlier runs left; raises ``Fenced`` if a higher one is recorded."""


class DestinationRun(Protocol):
    """A destination opened for one run, under that run's epoch."""

    async def committed(self, plan: "StreamPlan") -> "Written | None":
        """What this run has already committed for the stream, as its marker says; None if nothing."""

    async def state(self, plan: "StreamPlan") -> "StreamState | None":
        """What the job's last commit of the stream into its target recorded; None if it recorded no state."""

    async def prepare(self, table: Table) -> "Preparation":
        """Compare the table with its target; called before a row is read, and changes nothing.

        Raises:
            ConnectorRefused: for whatever would make ``write`` fail, such as columns that the policy does not allow.
        """

    async def write(
        self,
        table: Table,
        progress: "Progress",
        *,
        state: "StreamState | None" = None,
        keys: Table | None = None,
    ) -> "Written":
        """Write the rows by the plan's disposition, all or nothing, and commit the state with them.

        Args:
            table: without the columns that ``prepare`` left out.
            state: the stream's, once the rows are written; None if its mode has none.
            keys: ``Table.keys``: also delete the rows with other keys, as ``StreamPlan.deletes`` says.

        Raises:
            Fenced, TargetShared
        """

    async def compare(self, table: Table) -> "Comparison":
        """Compare the target, as it is, with all rows of the stream, and change nothing.

        Raises:
            EndsDiffer: names what differs.
        """

    async def clear(self, plan: "StreamPlan") -> None:
        """Remove the stream's target if DataSync wrote it; raises ``Fenced``, ``TargetShared``."""


@dataclass(frozen=True, slots=True)
class StreamName:
    """A stream as the source names it; ``namespace`` is a schema or a database."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}.{self.name}"


@dataclass(frozen=True, slots=True)
class Target:
    """Where a stream is written: a schema, database or folder, and the table in it."""

    namespace: str
    table: str

    def __str__(self) -> str:
        return f"{self.namespace}.{self.table}"


@dataclass(frozen=True, slots=True)
class StreamPlan:
    """What to move of one stream, and where to.

    Args:
        columns: the chosen columns, None for all.
        left_out: columns to leave out if all others are chosen, including those added to the source later.
        policies: by column; ``fail`` where absent.
        renames: the target's name of a column, where it is not the source's.
        cursor: the column whose greatest value tells how far a run has read, in the mode ``incremental``; None: the
            source's own means, if it has one.
        cursor_fallback: the column that stands for the cursor where that is null.
        lag_seconds: how far behind a time the next run begins, for rows that are committed late; None: what the source
            finds necessary.
        nulls: when rows without a cursor value are read.
        key: columns that identify a row, instead of the primary key.
        row_filter: only rows that match are moved.
        deletes: None: rows that the source deleted stay.
        partition: how the destination lays out the rows, in its own syntax.
    """

    stream: StreamName
    target: Target
    columns: tuple[str, ...] | None = None
    left_out: frozenset[str] = frozenset()
    policies: Mapping[str, Policy] = field(default_factory=dict)
    renames: Mapping[str, str] = field(default_factory=dict)
    mode: Mode = "full_refresh"
    disposition: Disposition = "replace"
    cursor: str | None = None
    cursor_fallback: str | None = None
    lag_seconds: float | None = None
    nulls: NullCursors = "first"
    key: tuple[str, ...] = ()
    row_filter: "Filter | None" = None
    schema_policy: SchemaPolicy = "evolve"
    deletes: Deletes | None = None
    partition: str | None = None

    def renamed(self, column: str) -> str:
        """The name of a source's column at the target."""
        return self.renames.get(column, column)


@dataclass(frozen=True, slots=True)
class Preparation:
    """How a target takes a stream.

    Args:
        exists: there is a target already.
        changes: what ``write`` will change about the target's columns.
        left_out: columns of the stream that do not move, under the policy ``ignore``.
    """

    exists: bool = False
    changes: "tuple[SchemaChange, ...]" = ()
    left_out: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class RunContext:
    """The writer: a run of a job, under an epoch.

    Args:
        epoch: rises with every claim of a run of the job; a higher one fences all lower ones.
        verify: compare source and destination before a stream is committed.
        log: takes a level (debug, info, warning, error) and a line for the run's log.
        living_jobs: the project's existing jobs, if tables of deleted jobs may be taken over; None: they may not.
    """

    job_id: int
    project_id: int
    run_id: str
    epoch: int
    verify: bool = False
    log: Callable[[str, str], None] = lambda level, message: None
    living_jobs: frozenset[int] | None = None

    def require_ownership(self, target: str, owner_job_id: int, owner_project_id: int | None) -> None:
        """Raise ``TargetShared`` unless a table that a job wrote last may be written by this job.

        Args:
            target: the table, as the message names it.
            owner_project_id: None if the marker does not record the project.
        """
        same_project = owner_project_id in (None, self.project_id)
        deleted = self.living_jobs is not None and owner_job_id not in self.living_jobs
        if not same_project or not (owner_job_id == self.job_id or deleted):
            raise TargetShared(target, owner_job_id)


class Progress(Protocol):
    """Counts what has been moved; called often, from the event loop only."""

    def add(
        self, *, rows_read: int = 0, rows_written: int = 0, bytes_read: int = 0, bytes_written: int = 0
    ) -> None: ...

    def loaded(self) -> None:
        """All rows are staged. Verifying, indexing and committing follow; they move no rows and may take long."""


class Uncounted:
    """Progress of the keys that are read for a comparison: something moves, but they are not the stream's rows."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def add(self, *, rows_read: int = 0, rows_written: int = 0, bytes_read: int = 0, bytes_written: int = 0) -> None:
        self._progress.add(bytes_read=bytes_read, bytes_written=bytes_written)

    def loaded(self) -> None:
        """The rows' own end counts."""


@dataclass(frozen=True, slots=True)
class Written:
    """What was committed for a stream.

    Args:
        rows: the number of rows that were read and arrived.
        inserted, updated, deleted: of the target's rows; a row that is marked as deleted counts as deleted.
        unchanged: rows that the target had already.
        verified: None if no verification was requested or the ends are not comparable.
        verification: what was compared and the result, as documented in ``comparison.py``.
        values_changed: see ``Table.values_changed``.
    """

    rows: int
    inserted: int = 0
    updated: int = 0
    deleted: int = 0
    unchanged: int = 0
    verified: bool | None = None
    verification: dict[str, Any] | None = None
    values_changed: Mapping[str, int] = field(default_factory=dict)


class ConnectorRefused(FixRequest):
    """The configuration, the source or the destination has to be changed first; a retry would fail again."""

    default_code = "connector_refused"


class ConnectorUnavailable(RetryLater):
    """The system could not be reached or the operation was interrupted; a retry may succeed."""

    default_code = "connector_unavailable"


class TargetShared(ConnectorRefused):
    """The target belongs to another job, whose data writing or clearing it would destroy."""

    default_code = "target_shared"

    def __init__(self, target: str, job_id: int) -> None:
        super().__init__(
            f"the destination's table {target} is written by job {job_id}: choose another table or clear that job's "
            'destination first; if that job was deleted, set "take_over": true in advanced_settings to take over its '
            "tables"
        )


class Fenced(FixRequest):
    """The destination has recorded a higher epoch of the job: this run's claim has been taken over."""

    status = 409
    default_code = "fenced"

    def __init__(self, context: RunContext, recorded_epoch: int | None) -> None:
        recorded = "none" if recorded_epoch is None else str(recorded_epoch)
        super().__init__(
            f"job {context.job_id} may not write under epoch {context.epoch}: the destination has recorded epoch "
            f"{recorded}, because another worker has claimed the run since"
        )
