"""What a connector does. The worker knows these shapes and nothing of any system.

A ``Source`` opens one ``Snapshot`` for a whole run and describes each stream as a ``Table``, cut into parts that may
be read at the same time. A ``Destination`` is opened for a run under its epoch, which fences older ones, and writes
tables: it stages what it reads and commits it together with the epoch and the marker of what was applied.

Arrow record batches are the common currency (``Table.batches``). A destination that speaks the source's own wire
format recognises the table's class and passes its bytes through instead.
"""

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from libs.core.errors import FixRequest, RetryLater

if TYPE_CHECKING:
    import pyarrow

    from libs.connectors.canonical import SourceEnd

Policy = Literal["fail", "null", "text"]
CatalogEntry = dict[str, Any]


class ConnectorRefused(FixRequest):
    """The configuration, the source's content or the destination stands in the way: somebody has to change it."""

    default_code = "connector_refused"


class ConnectorUnavailable(RetryLater):
    """The system can't be reached, or broke off; the same may work later."""

    default_code = "connector_unavailable"


class TargetShared(ConnectorRefused):
    """The target is another job's: writing or clearing it would destroy what that job keeps there."""

    default_code = "target_shared"

    def __init__(self, target: str, job_id: int) -> None:
        super().__init__(
            f"the destination's table {target} is written by job {job_id}: choose another table, or clear that job's "
            'destination first; where that job was deleted, take its tables over with "take_over": true in '
            "advanced_settings"
        )


class Fenced(FixRequest):
    """A younger epoch has written to the destination: this worker's claim is void."""

    status = 409
    default_code = "fenced"


@dataclass(frozen=True, slots=True)
class StreamName:
    """A stream as its source names it; ``namespace`` is a schema or a database."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}.{self.name}"


@dataclass(frozen=True, slots=True)
class Target:
    """Where a stream goes: a schema, database or folder, and the table in it."""

    namespace: str
    table: str

    def __str__(self) -> str:
        return f"{self.namespace}.{self.table}"


@dataclass(frozen=True, slots=True)
class StreamPlan:
    """One stream of a run.

    Args:
        columns: the columns chosen, None for all.
        left_out: columns not wanted, where all others are, also those that the source adds later.
        policies: what to do, by column, with a value that the destination can't hold; ``fail`` where absent.
    """

    stream: StreamName
    target: Target
    columns: tuple[str, ...] | None = None
    left_out: frozenset[str] = frozenset()
    policies: dict[str, Policy] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RunContext:
    """Who writes: a later ``epoch`` of the same job fences every earlier one, whatever the run.

    A table belongs to the job of the project that wrote it; another job is refused.

    Args:
        verify: compare both ends before a stream is committed.
        living_jobs: the project's jobs, where tables of those that are no more may be taken over; None: no table may.
        log: takes a level (debug, info, warning, error) and a line for the run's log.
    """

    job_id: int
    project_id: int
    run_id: str
    epoch: int
    verify: bool = False
    log: Callable[[str, str], None] = lambda level, message: None
    living_jobs: frozenset[int] | None = None

    def may_write(self, owner_job_id: int, owner_project_id: int | None) -> bool:
        """Whether a table that a job wrote last is this job's to write.

        Args:
            owner_project_id: None where the marker is of before projects were written down.
        """
        if owner_project_id not in (None, self.project_id):
            return False
        taken_over = self.living_jobs is not None and owner_job_id not in self.living_jobs
        return owner_job_id == self.job_id or taken_over


class Progress(Protocol):
    """Counts what has moved; called often, from the event loop only."""

    def add(
        self, *, rows_read: int = 0, rows_written: int = 0, bytes_read: int = 0, bytes_written: int = 0
    ) -> None: ...

    def loaded(self) -> None:
        """Every row is at the destination: comparing, indexing and committing move none and may take long."""


@dataclass(frozen=True, slots=True)
class Written:
    """What was committed for a stream.

    Args:
        verified: None when no verification was asked for, or the ends can't be compared.
        verification: what was compared and what came out, as ``comparison.py`` has it.
        values_changed: how many values a policy changed, by column that has one in force.
    """

    rows: int
    verified: bool | None = None
    verification: dict[str, Any] | None = None
    values_changed: Mapping[str, int] = field(default_factory=dict)


class Table(Protocol):
    """One stream as the snapshot holds it.

    Attributes:
        rows_estimated: the planner's estimate, None when it has none.
        warnings: what whoever reads the run's log has to know of what is read.
        connections_max: how many parts may be read at once.
        arrow_schema: of ``batches``; reading it imports pyarrow.
    """

    plan: StreamPlan
    primary_key: tuple[str, ...]
    rows_estimated: int | None
    warnings: tuple[str, ...]

    @property
    def connections_max(self) -> int: ...

    @property
    def arrow_schema(self) -> "pyarrow.Schema": ...

    def parts(self) -> Sequence[Any]:
        """The ranges that together are the whole table, each row in one of them."""

    def batches(self, part: Any) -> AsyncGenerator["pyarrow.RecordBatch", None]:
        """The rows of one part; only as many batches are in memory as are being worked on."""

    def comparable(self) -> "SourceEnd":
        """The source's end of a comparison: hashes the rows itself, in the snapshot, as the Arrow types hold them."""

    async def values_changed(self) -> dict[str, int]:
        """How many values a policy changed in ``batches``, by column that has one in force; counted by the source."""


class Snapshot(Protocol):
    """One moment of the source; every table read through it is of that moment."""

    async def table(self, plan: StreamPlan) -> Table:
        """Raises ``ConnectorRefused`` naming a table or column that is not there."""

    async def is_usable(self) -> bool:
        """Whether tables can still be read from it: a failed statement or a lost connection may have ended it."""


class Source(Protocol):
    async def check(self) -> Sequence[str]:
        """Connects, logs in and reads something; returns warnings, raises what has to be mended."""

    async def discover(self) -> list[CatalogEntry]:
        """The catalog's ``{"stream": {…}}`` entries, ordered by namespace and name."""

    def snapshot(self) -> AbstractAsyncContextManager[Snapshot]: ...


class DestinationRun(Protocol):
    """The destination under one run's epoch."""

    async def committed(self, plan: StreamPlan) -> Written | None:
        """What this run has already committed for the stream, None if nothing: how a resumed run skips it."""

    async def prepare(self, table: Table) -> None:
        """Refuses by name what the destination can't hold, before the first row moves."""

    async def write(self, table: Table, progress: Progress) -> Written:
        """Replaces the target with the table's rows, all or nothing; raises ``Fenced`` under a younger epoch."""

    async def clear(self, plan: StreamPlan) -> None:
        """Removes the stream's target, if it was made by DataSync; refuses one that is another job's."""


class Destination(Protocol):
    async def check(self) -> Sequence[str]:
        """Connects and proves that tables can be made; returns warnings, raises what has to be mended."""

    def open(self, context: RunContext) -> AbstractAsyncContextManager[DestinationRun]:
        """Takes the epoch and clears what older ones left behind; raises ``Fenced`` if a younger one has it."""
