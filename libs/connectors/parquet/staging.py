"""The folders that runs stage in, and the sweep of those that killed runs left.

``_datasync/staging/job-<job>-epoch-<epoch>-<unique>/`` belongs to one run, whose process holds a lock on the file
``lock`` in it; a folder whose lock nobody holds is abandoned. Each folder below holds a version of the table that its
version file names, or the version that a swap has put in its place.
"""

import contextlib
import os
import re
import shutil
import time
import uuid
from pathlib import Path
from typing import Any

import structlog

from libs.connectors.parquet.folders import read_version, try_lock
from libs.connectors.parquet.log import Log, sync_folder
from libs.connectors.parquet.names import FOLDER
from libs.connectors.parquet.tables import VERSIONS, Tables
from libs.connectors.protocol import RunContext
from libs.core.errors import DataSyncError

STAGING = f"{FOLDER}/staging"
UNLOCKED_AGE_SECONDS = 24 * 3600.0
_LOCK_FILE = "lock"
_CREATING = ".making-"
_WRITER = re.compile(r"job-([0-9]+)-epoch-([0-9]+)(?:-|$)")

logger = structlog.get_logger(__name__)


class Staging:
    """One run's folder, and the sweep of abandoned ones."""

    def __init__(self, root: Path, context: RunContext, log: Log) -> None:
        self._root = root
        self._context = context
        self._lock: int | None = None
        self.folder = root / STAGING / f"job-{context.job_id}-epoch-{context.epoch}-{uuid.uuid4().hex[:8]}"
        self._log = log
        self.tables = Tables(root, log, self.folder)

    def take(self) -> None:
        """Create the folder; it is locked before it gets its name."""
        creating = self.folder.parent / f"{_CREATING}{uuid.uuid4().hex}"
        creating.mkdir(parents=True)
        self._lock = os.open(creating / _LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        with contextlib.suppress(OSError):
            # On a file system without locks, an abandoned folder is recognised by its age.
            try_lock(self._lock)
        creating.rename(self.folder)
        sync_folder(self.folder.parent)

    def release(self) -> None:
        """Finish or remove what the folder holds; what fails is left to the next sweep."""
        if self._lock is None:
            return
        try:
            self._finish(self.folder)
        finally:
            os.close(self._lock)
            self._lock = None

    def sweep(self) -> None:
        """Finish what killed runs had committed, and remove what they had not."""
        state = self._log.refresh()
        for folder in _folders(self._root / STAGING):
            if folder != self.folder:
                try:
                    self._sweep_one(folder, state.epochs)
                except OSError as error:
                    # For example a folder of another user, whose own runs sweep it.
                    logger.warning("parquet_staging_not_swept", folder=str(folder), error=str(error))
        for table in self.tables.behind():
            self._reconcile(table)
        self._sweep_versions()
        for draft in (self._root / FOLDER).glob("draft-*"):
            if _is_old(draft):
                draft.unlink(missing_ok=True)

    def _sweep_one(self, folder: Path, epochs: dict[int, int]) -> None:
        if self._is_fenced(folder.name, epochs):
            self._finish(folder)
            return
        try:
            descriptor = os.open(folder / _LOCK_FILE, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            if folder.name.startswith(_CREATING) or any(folder.iterdir()):
                # Created a moment ago, or by an earlier version.
                if _is_old(folder):
                    self._finish(folder)
            else:
                _remove_empty(folder)
            return
        try:
            if self._is_abandoned(descriptor, folder):
                self._finish(folder)
        finally:
            os.close(descriptor)

    def _is_fenced(self, name: str, epochs: dict[int, int]) -> bool:
        """Whether this run's epoch fences the run that created the folder."""
        found = _WRITER.match(name)
        if found is None or int(found[1]) != self._context.job_id:
            return False
        return int(found[2]) < self._context.epoch <= epochs.get(self._context.job_id, 0)

    def _is_abandoned(self, descriptor: int, folder: Path) -> bool:
        try:
            unlocked = try_lock(descriptor)
        except OSError:
            return _is_old(folder)
        return unlocked and (self.tables.can_swap or _is_old(folder))

    def _finish(self, folder: Path) -> None:
        reconciled = True
        for version in map(read_version, _folders(folder)):
            if version is not None:
                reconciled = self._reconcile(version["table"], version.get("cleared")) and reconciled
        if reconciled:
            # The lock file is removed last, because a folder without one counts as new.
            for path in _folders(folder):
                shutil.rmtree(path, ignore_errors=True)
            (folder / _LOCK_FILE).unlink(missing_ok=True)
            _remove_empty(folder)

    def _reconcile(self, table: str, cleared: dict[str, Any] | None = None) -> bool:
        try:
            self.tables.reconcile(table, cleared)
        except (OSError, DataSyncError) as error:
            logger.warning("parquet_table_not_reconciled", table=table, folder=str(self._root), error=str(error))
            return False
        return True

    def _sweep_versions(self) -> None:
        """Remove folders of versions that no link points to any more."""
        folders = _folders(self._root / VERSIONS)
        if not folders:
            return
        epochs = self._log.refresh().epochs
        linked = set(self.tables.linked_folders())
        for folder in folders:
            if folder not in linked and (self._is_fenced(folder.name, epochs) or _is_old(folder)):
                shutil.rmtree(folder, ignore_errors=True)


def _folders(parent: Path) -> list[Path]:
    try:
        return [path for path in parent.iterdir() if path.is_dir() and not path.is_symlink()]
    except FileNotFoundError:
        return []


def _remove_empty(folder: Path) -> None:
    """What can't be removed is left to the next sweep."""
    with contextlib.suppress(OSError):
        folder.rmdir()


def _is_old(path: Path) -> bool:
    try:
        newest = max(item.stat().st_mtime for item in (path, *path.rglob("*")))
    except FileNotFoundError:
        return False
    return time.time() - newest > UNLOCKED_AGE_SECONDS
