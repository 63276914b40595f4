"""The commands that pages of the documentation print, for tests that follow them word by word."""

import os
import re
import subprocess
import textwrap
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def blocks(page: str, heading: str = "") -> list[str]:
    """The ``sh`` blocks of a page, or of what stands below one of its headings but the first."""
    text = (ROOT / page).read_text()
    if heading:
        text = next(part for part in re.split(r"^##+ ", text, flags=re.MULTILINE) if part.startswith(heading + "\n"))
    return [textwrap.dedent(block) for block in re.findall(r"^ *```sh\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE)]


def adapted(script: str, instead: Mapping[str, str] | None = None, /, **values: str) -> str:
    """The script with what this machine needs.

    Args:
        script: one or more blocks.
        instead: texts by those that they replace; each must occur.
        values: other values of variables, each of which the script sets once.
    """
    for name, value in values.items():
        script, count = re.subn(rf"^{name}=[^#\n]*", f"{name}={value} ", script, flags=re.MULTILINE)
        assert count == 1, f"{name} is set {count} times"
    for text, replacement in (instead or {}).items():
        assert text in script, f"there is no {text!r} in\n{script}"
        script = script.replace(text, replacement)
    return script


def follow(
    script: str, environment: Mapping[str, str] | None = None, *, timeout_seconds: float = 60
) -> "subprocess.CompletedProcess[str]":
    """Run a script as a reader does, but stop at the first command that fails. What it left running is ended.

    Args:
        script: the commands.
        environment: all variables of the script; those of this process by default.
        timeout_seconds: for the whole script.
    """
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f"trap 'kill $(jobs -p) 2> /dev/null || true' EXIT\n{script}"],
        env=environment or os.environ,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_seconds,
        check=False,
    )
