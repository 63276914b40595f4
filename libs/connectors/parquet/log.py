"""The destination's log: numbered files that only ever are added, which decide who may write and what is current.

``_datasync/00000007.json`` is entry 7. Whoever adds an entry has read every earlier one, and a number can be taken
once (a hard link fails when its name exists), so the entries have one order that all writers agree on: after a younger
epoch of a job has its entry, an older one finds it before it can add its own.
"""

import json
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from libs.connectors.protocol import Fenced

FOLDER = "_datasync"
_DIGITS = 8


@dataclass
class LogState:
    """What the entries add up to.

    Args:
        number: the last entry's.
        epochs: the highest epoch of each job.
        current: the entry that published each table, by ``namespace/table``; cleared tables have none.
        committed: the last publication of each job's streams, by job and ``namespace.name``.
        previous: the folder that a table had before its current one.
        retired: folders that were current once and are neither current nor previous now.
    """

    number: int = 0
    epochs: dict[int, int] = field(default_factory=dict)
    current: dict[str, dict[str, Any]] = field(default_factory=dict)
    previous: dict[str, str] = field(default_factory=dict)
    retired: set[str] = field(default_factory=set)
    committed: dict[tuple[int, str], dict[str, Any]] = field(default_factory=dict)

    def apply(self, number: int, entry: dict[str, Any]) -> None:
        self.number = number
        job = entry["job_id"]
        self.epochs[job] = max(entry["epoch"], self.epochs.get(job, 0))
        match entry["kind"]:
            case "publish":
                table = entry["table"]
                if table in self.previous:
                    self.retired.add(self.previous.pop(table))
                if table in self.current:
                    self.previous[table] = self.current[table]["folder"]
                self.current[table] = entry
                self.committed[job, entry["stream"]] = entry
            case "clear":
                cleared = self.current.pop(entry["table"], None)
                if cleared is not None:
                    self.retired.add(cleared["folder"])
                if entry["table"] in self.previous:
                    self.retired.add(self.previous.pop(entry["table"]))
                self.committed.pop((job, entry["stream"]), None)


class Log:
    """The log of one destination directory. Blocking; call it from a thread."""

    def __init__(self, root: Path) -> None:
        self.folder = root / FOLDER
        self.state = LogState()

    def refresh(self) -> LogState:
        """Read the entries added since the last look."""
        names = sorted(name for name in os.listdir(self.folder) if _number(name) > self.state.number)
        for name in names:
            number = _number(name)
            assert number == self.state.number + 1, f"the log's entry {self.state.number + 1} is missing"
            self.state.apply(number, json.loads((self.folder / name).read_bytes()))
        return self.state

    def append(self, entry: dict[str, Any], admitted: Callable[[LogState], None]) -> LogState:
        """Add an entry, once ``admitted`` has agreed to the state right before it; durable when it returns."""
        draft = self.folder / f"draft-{uuid.uuid4().hex}"
        write_durably(draft, json.dumps(entry).encode())
        try:
            while True:
                admitted(self.refresh())
                try:
                    os.link(draft, self.folder / f"{self.state.number + 1:0{_DIGITS}d}.json")
                except FileExistsError:
                    continue
                sync_folder(self.folder)
                return self.refresh()
        finally:
            draft.unlink(missing_ok=True)


def admit(job_id: int, epoch: int) -> Callable[[LogState], None]:
    """Raises ``Fenced`` when the job has a younger epoch."""

    def admitted(state: LogState) -> None:
        youngest = state.epochs.get(job_id, 0)
        if youngest > epoch:
            raise Fenced(f"job {job_id} has epoch {youngest} in the destination; epoch {epoch} may no longer write")

    return admitted


def write_durably(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _number(name: str) -> int:
    stem, _, suffix = name.partition(".")
    return int(stem) if suffix == "json" and len(stem) >= _DIGITS and stem.isdigit() else 0
