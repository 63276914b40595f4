"""The demonstration's output: a line for each step, and the table at the end."""

import sys
import time
from collections.abc import Sequence

_BAR_WIDTH = 30


class Progress:
    """One line per step with its duration; a progress bar where there are rows to count."""

    def __init__(self) -> None:
        self._live = sys.stdout.isatty()
        self._step = ""
        self._started = 0.0

    def step(self, name: str) -> None:
        """Begin a step."""
        self._step, self._started = name, time.monotonic()
        if self._live:
            print(f"  … {name}", end="", flush=True)

    def done(self, note: str = "") -> None:
        """End the step successfully."""
        seconds = time.monotonic() - self._started
        line = f"  ✓ {self._step}{f': {note}' if note else ''} ({seconds:.1f} s)"
        print(f"\r\033[K{line}" if self._live else line, flush=True)

    def bar(self, rows: int, rows_total: int, percent: int) -> None:
        """Draw the progress bar, on a terminal only."""
        if not self._live:
            return
        share = min(1.0, rows / rows_total if rows_total else percent / 100)
        filled = round(share * _BAR_WIDTH)
        drawn = "█" * filled + "·" * (_BAR_WIDTH - filled)
        print(f"\r\033[K  … {self._step} {drawn} {rows:,} of {rows_total:,} rows", end="", flush=True)

    def interrupted(self) -> None:
        """End the current line, so that further output starts on its own."""
        if self._live:
            print()


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A text table; its first two columns are left-aligned, the others right-aligned."""
    widths = [max(len(line[index]) for line in (header, *rows)) for index in range(len(header))]
    rule = "  ".join("─" * width for width in widths)
    lines = [_line(header, widths), rule, *(_line(row, widths) for row in rows)]
    return "\n".join(f"  {line}" for line in lines)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    aligned = [
        f"{cell:<{width}}" if index < 2 else f"{cell:>{width}}"
        for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return "  ".join(aligned).rstrip()
