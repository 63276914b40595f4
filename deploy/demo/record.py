"""Record ``make demo`` as an animated SVG: ``python -m deploy.demo.record docs/demo.svg``.

The command runs in a pseudo-terminal; the SVG replays its output with the original timing. A viewer without CSS
animations shows the final screen.
"""

import errno
import os
import pty
import re
import sys
import time
from dataclasses import dataclass
from html import escape
from pathlib import Path

COMMAND = ("make", "demo")
COLUMNS = 96
LINE_PX, CHARACTER_PX, MARGIN_PX, BAR_PX = 19, 8.0, 16, 28
FRAME_SECONDS = 0.2
_PIECE = re.compile("\r\033\\[K|\r?\n|[^\r\n\033]+")
_COLOURS = {"✓": "#3fb950", "…": "#d29922", "$": "#8b949e"}


@dataclass(frozen=True)
class State:
    """A line's text from a moment on, in seconds since the start."""

    seconds: float
    text: str


def main() -> int:
    """Record and write the SVG; returns the command's exit code."""
    chunks, code = record(COMMAND)
    if code == 0:
        Path(sys.argv[1]).write_text(drawing(lines_of(chunks)), encoding="utf-8")
    return code


def record(command: tuple[str, ...]) -> tuple[list[State], int]:
    """Run the command in a pseudo-terminal; returns its output in timed pieces, and its exit code."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ["COLUMNS"] = str(COLUMNS)
        os.execvp(command[0], command)
    started, chunks = time.monotonic(), []
    while chunk := _read(terminal):
        chunks.append(State(time.monotonic() - started, chunk.decode()))
        sys.stdout.write(chunks[-1].text)
        sys.stdout.flush()
    return chunks, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _read(terminal: int) -> bytes:
    """The next output; empty at the end, which Linux reports as EIO."""
    try:
        return os.read(terminal, 65_536)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return b""


def lines_of(chunks: list[State]) -> list[list[State]]:
    """The successive texts of each line of the screen; one shorter than a frame is replaced by its successor."""
    lines: list[list[State]] = [[State(0.0, f"$ {' '.join(COMMAND)}")], []]
    text = ""
    for chunk in chunks:
        for piece in _PIECE.findall(chunk.text):
            if piece.endswith("\n"):
                lines.append([])
                text = ""
                continue
            text = "" if piece.startswith("\r") else text + piece
            line = lines[-1]
            if line and (text == line[-1].text or chunk.seconds - line[-1].seconds < FRAME_SECONDS):
                line[-1] = State(line[-1].seconds, text)
            elif text:
                line.append(State(chunk.seconds, text))
    return lines


def drawing(lines: list[list[State]]) -> str:
    """The SVG."""
    height = BAR_PX + LINE_PX * len(lines) + MARGIN_PX
    width = COLUMNS * CHARACTER_PX + 2 * MARGIN_PX
    body, rules = [], []
    for row, states in enumerate(lines):
        for index, state in enumerate(states):
            name = f"s{row}-{index}"
            until = states[index + 1].seconds if index + 1 < len(states) else None
            rules.append(_rule(name, state.seconds, until))
            y = BAR_PX + LINE_PX * (row + 1)
            body.append(f'<text class="{name}" x="{MARGIN_PX}" y="{y}">{_spans(state.text)}</text>')
    dots = "".join(
        f'<circle cx="{16 + 18 * index}" cy="15" r="5" fill="{colour}"/>'
        for index, colour in enumerate(("#ff5f56", "#ffbd2e", "#27c93f"))
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height}" '
        'role="img" xml:space="preserve">'
        f"<title>A recording of {' '.join(COMMAND)}</title>\n<style>\n"
        "text{font:13.3px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;fill:#e6edf3;white-space:pre}\n"
        "@keyframes show{from{visibility:hidden}to{visibility:visible}}\n"
        "@keyframes hide{from{visibility:visible}to{visibility:hidden}}\n"
        f"{''.join(rules)}</style>\n"
        f'<rect width="100%" height="100%" rx="8" fill="#0d1117"/>{dots}\n{chr(10).join(body)}\n</svg>\n'
    )


def _rule(name: str, since: float, until: float | None) -> str:
    """Every state but a line's last is hidden outside its time, also without animations."""
    show = f"show 1ms step-end {since:.2f}s backwards"
    if until is None:
        return f".{name}{{animation:{show}}}\n"
    return f".{name}{{visibility:hidden;animation:hide {until - since:.2f}s step-end {since:.2f}s}}\n"


def _spans(text: str) -> str:
    mark = text.lstrip()[:1]
    if mark not in _COLOURS:
        return escape(text)
    before, _, after = text.partition(mark)
    return f'{escape(before)}<tspan fill="{_COLOURS[mark]}">{mark}</tspan>{escape(after)}'


if __name__ == "__main__":
    sys.exit(main())
