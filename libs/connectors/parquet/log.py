"""The destination's log: numbered files that decide who may write and which version of a table is current.

``_datasync/00000107.json`` is entry 107. A writer reads all entries before it adds one, and a number can be taken only
once, since link(2) fails if the name exists. So all writers agree on one order: after a higher epoch of a job has its
entry, a writer with a lower one finds it before it can add its own.

``_datasync/checkpoint-00000100.json`` is the state after entries 1 to 100, which are then removed. A writer that was
paused might take one of these numbers again, so it looks for a checkpoint after it has taken a number. For this reason
checkpoints are never removed; older ones are emptied.
"""

import contextlib
import json
import os
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog

from libs.connectors.parquet.names import FOLDER
from libs.connectors.protocol import ConnectorUnavailable, Fenced, RunContext

CHECKPOINT_ENTRIES = 100
CATCH_UP_SECONDS_MAX = 60.0
_CHECKPOINT_FORMAT = 1
_CHECKPOINT = "checkpoint-"
_DIGITS = 8

log = structlog.get_logger(__name__)


@dataclass
class LogState:
    """The state after an entry.

    Args:
        number: of the entry.
        epochs: the highest epoch of each job.
        current: the entry that published each table, by the table's path; none for cleared tables.
    """

    number: int = 0
    epochs: dict[int, int] = field(default_factory=dict)
    current: dict[str, dict[str, Any]] = field(default_factory=dict)

    def apply(self, number: int, entry: dict[str, Any]) -> None:
        self.number = number
        job = entry["job_id"]
        self.epochs[job] = max(entry["epoch"], self.epochs.get(job, 0))
        match entry["kind"]:
            case "publish":
                self.current[entry["table"]] = entry
            case "clear":
                self.current.pop(entry["table"], None)

    def checkpoint(self) -> bytes:
        """Deterministic, because several writers may write it."""
        content = {
            "format": _CHECKPOINT_FORMAT,
            "number": self.number,
            "epochs": sorted(self.epochs.items()),
            "current": [self.current[table] for table in sorted(self.current)],
        }
        return json.dumps(content).encode()

    @classmethod
    def of_checkpoint(cls, content: bytes) -> "LogState":
        found = json.loads(content)
        if found["format"] != _CHECKPOINT_FORMAT:
            raise ConnectorUnavailable(
                "the destination's log was written by a newer version of DataSync: upgrade this one"
            )
        current = {entry["table"]: entry for entry in found["current"]}
        return cls(found["number"], dict(found["epochs"]), current)


class Log:
    """The log of one destination directory. Blocking, and not thread-safe."""

    def __init__(self, root: Path) -> None:
        self.folder = root / FOLDER
        self.state = LogState()
        self._checkpoint_due: tuple[int, bytes] | None = None

    def refresh(self) -> LogState:
        """Read the entries added since the last call.

        A directory listing may be stale, particularly over NFS. It is repeated if an entry that it names was compacted.
        """
        deadline = time.monotonic() + CATCH_UP_SECONDS_MAX
        while not self._catch_up():
            if time.monotonic() > deadline:
                raise ConnectorUnavailable(f"entry {self.state.number + 1} of the log in {self.folder} is missing")
            time.sleep(0.02)
        return self.state

    def append(self, entry: dict[str, Any], admitted: Callable[[LogState], None]) -> LogState:
        """Add an entry unless ``admitted`` raises for the state directly before it; it is durable on return.

        If a checkpoint included the entry before its writer looked, it is added a second time. Entries are idempotent.
        """
        draft = self.folder / f"draft-{uuid.uuid4().hex}"
        write_durably(draft, json.dumps(entry).encode())
        try:
            while not self._appended(draft, admitted):
                pass
        finally:
            draft.unlink(missing_ok=True)
        self.refresh()
        self._compact()
        return self.state

    def _appended(self, draft: Path, admitted: Callable[[LogState], None]) -> bool:
        admitted(self.refresh())
        number = self.state.number + 1
        path = self.folder / f"{number:0{_DIGITS}d}.json"
        try:
            os.link(draft, path)
        except FileExistsError:
            # Over NFS the reply to a successful link may be lost, and the retransmitted request then fails.
            if not _same_file(draft, path):
                return False
        sync_folder(self.folder)
        if self._last_checkpoint(os.listdir(self.folder)) < number:
            return True
        path.unlink(missing_ok=True)
        return False

    def _catch_up(self) -> bool:
        """Returns False if entries were compacted after they were listed."""
        names = os.listdir(self.folder)
        checkpoint = self._last_checkpoint(names)
        if checkpoint > self.state.number and not self._load(checkpoint):
            return False
        numbers = sorted(number for number in map(_entry_number, names) if number > self.state.number)
        due = max(numbers, default=0) // CHECKPOINT_ENTRIES * CHECKPOINT_ENTRIES
        for number in numbers:
            if number != self.state.number + 1:
                return False
            try:
                content = (self.folder / f"{number:0{_DIGITS}d}.json").read_bytes()
            except FileNotFoundError:
                return False
            self.state.apply(number, json.loads(content))
            if number == due and due > checkpoint:
                self._checkpoint_due = (due, self.state.checkpoint())
        return True

    def _load(self, checkpoint: int) -> bool:
        with contextlib.suppress(FileNotFoundError):
            content = (self.folder / _checkpoint_name(checkpoint)).read_bytes()
            if content:
                self.state = LogState.of_checkpoint(content)
                return True
        return False

    def _compact(self) -> None:
        """Write the due checkpoint. The entry is added already, so after a failure the next writer compacts."""
        if self._checkpoint_due is None:
            return
        number, content = self._checkpoint_due
        self._checkpoint_due = None
        try:
            self._make(number, content)
            for name in os.listdir(self.folder):
                if 0 < _entry_number(name) <= number:
                    (self.folder / name).unlink(missing_ok=True)
                elif 0 < _checkpoint_number(name) < number and (self.folder / name).stat().st_size:
                    self._empty(name)
        except OSError as error:
            log.warning("parquet_log_not_compacted", folder=str(self.folder), error=str(error))

    def _make(self, number: int, content: bytes) -> None:
        draft = self.folder / f"draft-{uuid.uuid4().hex}"
        try:
            write_durably(draft, content)
            with contextlib.suppress(FileExistsError):
                os.link(draft, self.folder / _checkpoint_name(number))
        finally:
            draft.unlink(missing_ok=True)
        sync_folder(self.folder)

    def _empty(self, name: str) -> None:
        """Replace the file, so that a reader of the old one can finish."""
        draft = self.folder / f"draft-{uuid.uuid4().hex}"
        draft.touch()
        draft.replace(self.folder / name)

    @staticmethod
    def _last_checkpoint(names: list[str]) -> int:
        return max(map(_checkpoint_number, names), default=0)


def refuse_fenced(context: RunContext) -> Callable[[LogState], None]:
    """A check that raises ``Fenced`` if the log has a higher epoch of the job."""

    def check(state: LogState) -> None:
        recorded = state.epochs.get(context.job_id, 0)
        if recorded > context.epoch:
            raise Fenced(context, recorded)

    return check


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


def _same_file(first: Path, second: Path) -> bool:
    try:
        return first.samefile(second)
    except FileNotFoundError:
        return False


def _checkpoint_name(number: int) -> str:
    return f"{_CHECKPOINT}{number:0{_DIGITS}d}.json"


def _checkpoint_number(name: str) -> int:
    return _entry_number(name.removeprefix(_CHECKPOINT)) if name.startswith(_CHECKPOINT) else 0


def _entry_number(name: str) -> int:
    stem, _, suffix = name.partition(".")
    return int(stem) if suffix == "json" and len(stem) >= _DIGITS and stem.isdecimal() and stem.isascii() else 0
