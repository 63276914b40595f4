"""What an attempt reports: progress per stream, results, and numbered log lines, in portions that fit one request."""

import itertools
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar, cast

from libs.connectors.protocol import StreamPlan, Written
from libs.connectors.schema_changes import SchemaChange
from libs.connectors.states import StreamState
from libs.contracts.internal import LogLine, StreamProgress
from libs.contracts.runs import ColumnChanged, StreamResult, ValuesChanged
from libs.core.clock import Clock
from libs.core.envelope import Frozen
from libs.core.json import dump_json
from libs.core.sizes import text_bytes

LINE_CHARACTERS_MAX = 4_000
LINES_WAITING_MAX = 5_000
LINES_PER_REPORT = 200
PART_BYTES_MAX = 192 * 1024
"""Of each of a report's three parts as JSON. Together they fit into the 1 MiB of a request."""
VERIFICATION_BYTES_MAX = 256 * 1024

Level = Literal["debug", "info", "warning", "error"]
StreamPhase = Literal["waiting", "running", "completed", "failed"]
ItemT = TypeVar("ItemT", bound=Frozen)


@dataclass
class StreamReport:
    """One stream's progress, which its connectors count.

    Args:
        moved_last: the side that moved bytes or rows last, None before the first.
        moved_at: when that was, by the monotonic clock; None unless rows are being moved.
        error: why it failed.
    """

    plan: StreamPlan
    state: StreamPhase = "waiting"
    rows_read: int = 0
    rows_written: int = 0
    bytes_read: int = 0
    rows_total: int | None = None
    moved_last: Literal["source", "destination"] | None = None
    moved_at: float | None = None
    error: str | None = None
    acknowledged: StreamProgress | None = None

    def add(self, *, rows_read: int = 0, rows_written: int = 0, bytes_read: int = 0, bytes_written: int = 0) -> None:
        self.moved_last = "destination" if rows_written or bytes_written else "source"
        self.moved_at = time.monotonic()
        self.rows_read += rows_read
        self.rows_written += rows_written
        self.bytes_read += bytes_read

    def begin(self) -> None:
        """Rows are expected to move from now on."""
        self.state = "running"
        self.moved_at = time.monotonic()

    def loaded(self) -> None:
        self.moved_at = None

    def complete(self, rows: int) -> None:
        self.state = "completed"
        self.rows_read = self.rows_written = self.rows_total = rows

    def fail(self, error: str) -> None:
        self.state = "failed"
        self.error = error

    def still_seconds(self) -> float:
        """For how long nothing has moved; 0 unless rows are being moved."""
        return 0.0 if self.moved_at is None else time.monotonic() - self.moved_at

    def progress(self) -> StreamProgress:
        return StreamProgress(
            namespace=self.plan.stream.namespace,
            name=self.plan.stream.name,
            state=self.state,
            rows_read=self.rows_read,
            rows_written=self.rows_written,
            bytes_read=self.bytes_read,
            rows_total=self.rows_total,
            error=self.error,
        )

    def result(
        self,
        written: Written,
        seconds: float,
        state: StreamState | None = None,
        changes: Sequence[SchemaChange] = (),
    ) -> StreamResult:
        return StreamResult(
            namespace=self.plan.stream.namespace,
            name=self.plan.stream.name,
            rows_read=self.rows_read,
            rows_written=written.rows - written.unchanged,
            rows_skipped=written.unchanged,
            rows_inserted=written.inserted,
            rows_updated=written.updated,
            rows_deleted=written.deleted,
            bytes_read=self.bytes_read,
            seconds=round(seconds, 3),
            verified=written.verified,
            verification_json=None if written.verification is None else dump_json(written.verification),
            values_changed=tuple(ValuesChanged(column=name, values=n) for name, n in written.values_changed.items()),
            position=None if state is None else state.shown,
            columns_changed=tuple(
                ColumnChanged(column=change.column, kind=change.kind, before=change.before, after=change.after)
                for change in changes
            ),
        )


@dataclass(frozen=True, slots=True)
class Portion:
    """What one request carries.

    Args:
        first_line: the number of the first of ``lines``.
        streams, progress: the streams that changed, and their progress.
        has_more: not everything fitted.
    """

    first_line: int
    lines: tuple[LogLine, ...]
    streams: tuple[StreamReport, ...]
    progress: tuple[StreamProgress, ...]
    results: tuple[StreamResult, ...]
    has_more: bool


@dataclass
class Report:
    """Everything that an attempt reports. What was sent is sent again until it is acknowledged."""

    clock: Clock
    streams: list[StreamReport] = field(default_factory=list)
    results: list[StreamResult] = field(default_factory=list)
    _results_due: deque[StreamResult] = field(default_factory=deque)
    _lines: deque[LogLine] = field(default_factory=deque)
    _first_line: int = 0
    _lines_dropped: int = 0

    def log(self, level: str, message: str) -> None:
        """Add a line. If too many wait, it is dropped, and the number of dropped lines is logged later."""
        if len(self._lines) >= LINES_WAITING_MAX:
            self._lines_dropped += 1
            return
        if self._lines_dropped:
            dropped, self._lines_dropped = self._lines_dropped, 0
            self.log("warning", f"{dropped} lines were dropped because they came faster than they could be reported")
        text = message.replace("\x00", "")[:LINE_CHARACTERS_MAX]
        self._lines.append(LogLine(time=self.clock.now(), level=cast(Level, level), message=text))

    def portion(self) -> Portion:
        """As much of what is not acknowledged as one request takes."""
        lines, more_lines = _fitting(itertools.islice(self._lines, LINES_PER_REPORT))
        changed = self._changed()
        progress, more_progress = _fitting(progress for _, progress in changed)
        results, more_results = _fitting(self._results_due)
        return Portion(
            first_line=self._first_line,
            lines=lines,
            streams=tuple(stream for stream, _ in changed[: len(progress)]),
            progress=progress,
            results=results,
            has_more=more_lines or more_progress or more_results or len(self._lines) > LINES_PER_REPORT,
        )

    def acknowledge(self, portion: Portion) -> None:
        """Do not send this portion again."""
        while self._lines and self._first_line < portion.first_line + len(portion.lines):
            self._lines.popleft()
            self._first_line += 1
        for stream, progress in zip(portion.streams, portion.progress, strict=True):
            stream.acknowledged = progress
        for result in portion.results:
            if self._results_due and self._results_due[0] is result:
                self._results_due.popleft()

    def conclude(self, *, with_results: bool) -> None:
        """Let the next portions be the last: they carry the final progress of every stream, and all results."""
        self._results_due = deque(self._bounded_results() if with_results else ())
        for stream in self.streams:
            stream.acknowledged = None

    def _changed(self) -> list[tuple[StreamReport, StreamProgress]]:
        pairs = ((stream, stream.progress()) for stream in self.streams)
        return [(stream, progress) for stream, progress in pairs if progress != stream.acknowledged]

    def _bounded_results(self) -> list[StreamResult]:
        """The results, without verification documents once those exceed a total size. Differences are kept first."""
        left_bytes = VERIFICATION_BYTES_MAX
        bounded = list(self.results)
        for place, result in sorted(enumerate(self.results), key=lambda item: item[1].verified is not False):
            left_bytes -= text_bytes(result.verification_json)
            if left_bytes < 0:
                bounded[place] = result.model_copy(update={"verification_json": None})
        return bounded


def _fitting(items: Iterable[ItemT]) -> tuple[tuple[ItemT, ...], bool]:
    """The first items up to ``PART_BYTES_MAX``, at least one, and whether there are more."""
    fitting: list[ItemT] = []
    size_bytes = 0
    for item in items:
        size_bytes += text_bytes(item.model_dump_json())
        if fitting and size_bytes > PART_BYTES_MAX:
            return tuple(fitting), True
        fitting.append(item)
    return tuple(fitting), False
