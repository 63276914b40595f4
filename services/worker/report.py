"""What a run tells of itself: progress by stream and numbered log lines, handed out in bounded portions."""

import itertools
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Literal, cast

from libs.connectors.protocol import StreamPlan
from libs.contracts.internal import LogLine, StreamProgress
from libs.contracts.runs import StreamResult
from libs.core.clock import Clock
from libs.core.sizes import text_bytes

LINE_CHARACTERS_MAX = 4_000
LINES_WAITING_MAX = 5_000
LINES_PER_REPORT = 200
LINES_BYTES_MAX = 256 * 1024
VERIFICATION_BYTES_MAX = 256 * 1024

Level = Literal["debug", "info", "warning", "error"]
StreamState = Literal["waiting", "running", "completed", "failed"]


@dataclass
class StreamReport:
    """One stream's counts, as its connectors add to them.

    Args:
        moved_last: the side that moved bytes or rows last, None before the first.
        moved_at: when that was, by the monotonic clock; None while no rows are to move.
        error: why it failed.
    """

    plan: StreamPlan
    state: StreamState = "waiting"
    rows_read: int = 0
    rows_written: int = 0
    bytes_read: int = 0
    rows_total: int | None = None
    moved_last: Literal["source", "destination"] | None = None
    moved_at: float | None = None
    error: str | None = None

    def add(self, *, rows_read: int = 0, rows_written: int = 0, bytes_read: int = 0, bytes_written: int = 0) -> None:
        self.moved_last = "destination" if rows_written or bytes_written else "source"
        self.moved_at = time.monotonic()
        self.rows_read += rows_read
        self.rows_written += rows_written
        self.bytes_read += bytes_read

    def begin(self) -> None:
        """From here on rows have to move."""
        self.state = "running"
        self.moved_at = time.monotonic()

    def loaded(self) -> None:
        self.moved_at = None

    def still_seconds(self) -> float:
        """For how long nothing has moved; 0 before and after rows are to move."""
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


@dataclass
class RunReport:
    """Everything that a run reports. Lines stay until a report that carried them was acknowledged."""

    clock: Clock
    streams: list[StreamReport] = field(default_factory=list)
    results: list[StreamResult] = field(default_factory=list)
    _lines: deque[LogLine] = field(default_factory=deque)
    _first: int = 0
    _left_out: int = 0

    def log(self, level: str, message: str) -> None:
        """Add a line; when too many wait, lines are counted instead, and the count becomes a line."""
        if len(self._lines) >= LINES_WAITING_MAX:
            self._left_out += 1
            return
        if self._left_out:
            left_out, self._left_out = self._left_out, 0
            self.log("warning", f"{left_out} lines were left out: they came faster than they could be reported")
        text = message.replace("\x00", "")[:LINE_CHARACTERS_MAX]
        self._lines.append(LogLine(time=self.clock.now(), level=cast(Level, level), message=text))

    def progress(self) -> tuple[StreamProgress, ...]:
        return tuple(stream.progress() for stream in self.streams)

    def portion(self) -> tuple[int, tuple[LogLine, ...]]:
        """The number of the first line that was not acknowledged, and as many lines as one report takes."""
        lines: list[LogLine] = []
        size_bytes = 0
        for line in itertools.islice(self._lines, LINES_PER_REPORT):
            size_bytes += text_bytes(line.message)
            if lines and size_bytes > LINES_BYTES_MAX:
                break
            lines.append(line)
        return self._first, tuple(lines)

    def acknowledge(self, first: int, count: int) -> None:
        """Forget the lines of a portion that has arrived."""
        while self._lines and self._first < first + count:
            self._lines.popleft()
            self._first += 1

    @property
    def more_than_a_portion(self) -> bool:
        return len(self._lines) > len(self.portion()[1])

    def bounded_results(self) -> tuple[StreamResult, ...]:
        """The results as one event holds them: beyond a bound in all, streams have no document of their verification.

        Streams that differ come first.
        """
        left_bytes = VERIFICATION_BYTES_MAX
        bounded = list(self.results)
        for place, result in sorted(enumerate(self.results), key=lambda item: item[1].verified is not False):
            left_bytes -= text_bytes(result.verification_json)
            if left_bytes < 0:
                bounded[place] = result.model_copy(update={"verification_json": None})
        return tuple(bounded)
