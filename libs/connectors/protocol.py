"""The contract of a connector: what a source and a destination do in a run.

The worker knows this module and no system. A run goes through it in this order:

1. ``Destination.open`` records the run's epoch at the destination, which fences every earlier epoch of the job, and
   removes what killed runs left.
2. ``Source.snapshot`` opens one snapshot for the whole run.
3. For each stream: ``DestinationRun.committed`` tells whether this run has already committed it. If not,
   ``Snapshot.table`` describes it, ``DestinationRun.prepare`` rejects what can't work before a row is read, and
   ``DestinationRun.write`` replaces the target's rows.

What a destination promises, and how:

- **All or nothing.** Rows are staged out of readers' sight. One atomic commit publishes them and records the epoch and
  the stream's marker: the run, the number of rows, the verification. A run that is resumed reads the marker.
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

Rows travel as Arrow record batches (``Table.batches``). A destination that speaks the source's own wire format may
check for the source's ``Table`` class and pass its bytes through instead.
"""

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from libs.core.errors import FixRequest, RetryLater

if TYPE_CHECKING:
    import pyarrow

    from libs.connectors.canonical import SourceEnd

# What happens to a value that the destination can't store: the run fails, the value becomes null, or the whole column
# is stored as text.
Policy = Literal["fail", "null", "text"]
CatalogEntry = dict[str, Any]


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

    async def table(self, plan: "StreamPlan") -> "Table":
        """Describe a stream; raises ``ConnectorRefused`` if the table or a chosen column does not exist."""

    async def is_usable(self) -> bool:
        """Whether further tables can be read; False after an error or a lost connection has ended the snapshot."""


class Table(Protocol):
    """One stream in the snapshot.

    Attributes:
        primary_key: the key's columns in order; empty if there is none or not all its columns were chosen.
        rows_estimated: the source's own estimate, None if it has none.
        warnings: for the run's log.
        connections_max: how many parts may be read concurrently.
        arrow_schema: of ``batches``.
    """

    plan: "StreamPlan"
    primary_key: tuple[str, ...]
    rows_estimated: int | None
    warnings: tuple[str, ...]

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

    def comparable(self) -> "SourceEnd":
        """The source's end of a verification, which hashes the rows in the source, within the snapshot."""

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

    async def prepare(self, table: Table) -> None:
        """Raise ``ConnectorRefused`` for whatever would make ``write`` fail; called before a row is read."""

    async def write(self, table: Table, progress: "Progress") -> "Written":
        """Replace the target's rows with the table's, all or nothing; raises ``Fenced``, ``TargetShared``."""

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
    """

    stream: StreamName
    target: Target
    columns: tuple[str, ...] | None = None
    left_out: frozenset[str] = frozenset()
    policies: dict[str, Policy] = field(default_factory=dict)


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


@dataclass(frozen=True, slots=True)
class Written:
    """What was committed for a stream.

    Args:
        verified: None if no verification was requested or the ends are not comparable.
        verification: what was compared and the result, as documented in ``comparison.py``.
        values_changed: see ``Table.values_changed``.
    """

    rows: int
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
