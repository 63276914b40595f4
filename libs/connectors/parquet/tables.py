"""The paths of tables, where readers look: any run can reconcile a path with the log.

A table's path is a folder that is swapped with the next version's. On file systems that can't swap names it is a
symbolic link to the version's folder. Earlier versions of DataSync used such links everywhere; the next publication
turns one into a folder.
"""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from libs.connectors.parquet.folders import (
    anchor,
    can_swap,
    foreign_name,
    hide,
    locked,
    read_version,
    release,
    swap,
)
from libs.connectors.parquet.log import Log, sync_folder
from libs.connectors.parquet.names import FOLDER
from libs.connectors.protocol import ConnectorRefused

VERSIONS = f"{FOLDER}/versions"


class Tables:
    """The paths of a destination's tables.

    Args:
        trash: a folder on the same file system, for what is being removed.
    """

    def __init__(self, root: Path, log: Log, trash: Path) -> None:
        self._root = root
        self._log = log
        self._trash = trash
        self._can_swap: bool | None = None

    def refuse_foreign(self, table: str) -> None:
        """Raises ``ConnectorRefused`` if the path holds files that DataSync did not write, or another table."""
        path = self._root / table
        if path.is_symlink():
            if not _is_our_link(path):
                raise ConnectorRefused(
                    f"{path} is a symbolic link that DataSync did not create: remove it or choose another table"
                )
            return
        if not path.exists() or (path.is_dir() and not any(path.iterdir())):
            return
        version = read_version(path)
        if version is None or (table not in self._log.state.current and version["table"] == table):
            raise ConnectorRefused(
                f"{path} exists and was not written by DataSync: move it elsewhere or choose another table"
            )
        if version["table"] != table:
            raise ConnectorRefused(
                f"{path} holds the table {version['table']}, which was moved there, or whose name is the same to this "
                "file system: choose another table"
            )
        foreign = foreign_name(path)
        if foreign is not None:
            raise ConnectorRefused(f"{path / foreign} was not written by DataSync: move it elsewhere")

    def shows(self, table: str) -> bool:
        """Whether the path of a published table shows the log's current version."""
        entry = self._log.state.current[table]
        path = self._root / table
        if path.is_symlink():
            return os.readlink(path) == _link_to(entry) and path.is_dir()
        version = read_version(path)
        return version is not None and version["version"] == entry.get("version")

    def reconcile(self, table: str, cleared: dict[str, Any] | None = None) -> None:
        """Bring a table's path up to date with the log, from whichever step a killed run had reached.

        Args:
            cleared: the entry of the version to remove, if the table was cleared.
        """
        path = self._root / table
        if table in self._log.refresh().current:
            path.parent.mkdir(parents=True, exist_ok=True)
        elif not path.parent.exists():
            return
        with self._exclusively(path.parent):
            entry = self._log.refresh().current.get(table)
            if entry is None:
                self._remove(path, cleared)
            elif not self.shows(table):
                self._show(path, table, entry)
            elif not path.is_symlink():
                release(path)

    def _exclusively(self, folder: Path) -> contextlib.AbstractContextManager[None]:
        """Links need no lock: one is replaced atomically, and the log is checked again afterwards."""
        return locked(folder) if self.can_swap else contextlib.nullcontext()

    @property
    def can_swap(self) -> bool:
        """Whether the file system can swap names; then it is a local one, on which locks work."""
        if self._can_swap is None:
            self._trash.mkdir(parents=True, exist_ok=True)
            self._can_swap = can_swap(self._trash)
        return self._can_swap

    def _show(self, path: Path, table: str, entry: dict[str, Any]) -> None:
        self._refuse_others(path, table)
        if "version" not in entry or not self.can_swap:
            self._show_link(path, table)
            return
        staged = self._root / entry["folder"]
        anchor(staged, path.name)
        if os.path.lexists(path):
            self._swap(staged, path)
        else:
            staged.rename(path)
        sync_folder(path.parent)
        release(path)

    def _swap(self, staged: Path, path: Path) -> None:
        before = _linked(path)
        if before is None:
            anchor(path, path.name)
        swap(staged, path)
        if before is None:
            shutil.rmtree(staged, ignore_errors=True)
        else:
            staged.unlink()
            shutil.rmtree(before, ignore_errors=True)

    def _show_link(self, path: Path, table: str) -> None:
        """Point the link to the current version; repeat if a slower run has changed it meanwhile."""
        while True:
            entry = self._log.refresh().current.get(table)
            if entry is None:
                return
            wanted = path.parent / _link_to(entry)
            if path.is_symlink() and os.readlink(path) == _link_to(entry):
                return
            if "version" in entry and not wanted.exists():
                wanted.parent.mkdir(parents=True, exist_ok=True)
                staged = self._root / entry["folder"]
                release(staged)
                staged.rename(wanted)
                sync_folder(wanted.parent)
            self._replace_link(path, _link_to(entry))

    def _replace_link(self, path: Path, target: str) -> None:
        before = _linked(path)
        if before is None and path.exists():
            self._discard(path)
        draft = path.parent / f".{path.name}-{uuid.uuid4().hex}"
        draft.symlink_to(target)
        draft.replace(path)
        sync_folder(path.parent)
        # Open files remain readable; the job's next run removes the folder. Another run may have hidden it already.
        if before is not None:
            with contextlib.suppress(FileNotFoundError):
                hide(before)

    def _remove(self, path: Path, cleared: dict[str, Any] | None) -> None:
        if cleared is None:
            return
        before = _linked(path)
        if before is None:
            version = read_version(path)
            if version is not None and version["version"] == cleared.get("version"):
                self._discard(path)
        elif os.readlink(path) == _link_to(cleared):
            path.unlink()
            sync_folder(path.parent)
            shutil.rmtree(before, ignore_errors=True)

    def _discard(self, path: Path) -> None:
        self._trash.mkdir(parents=True, exist_ok=True)
        trash = self._trash / uuid.uuid4().hex
        anchor(path, path.name)
        path.rename(trash)
        sync_folder(path.parent)
        shutil.rmtree(trash, ignore_errors=True)

    def _refuse_others(self, path: Path, table: str) -> None:
        """Refuse to remove what others put there after the run had checked the path."""
        if path.is_symlink() and _is_our_link(path):
            return
        version = read_version(path)
        if version is not None and version["table"] == table:
            return
        if path.is_symlink() or (path.exists() and not (path.is_dir() and not any(path.iterdir()))):
            raise ConnectorRefused(f"{path} exists and was not written by DataSync: move it elsewhere")

    def behind(self) -> list[str]:
        """Tables whose link a killed run did not update; folders that were not swapped yet are found in staging."""
        return [table for table, entry in self._log.state.current.items() if self._link_is_behind(table, entry)]

    def _link_is_behind(self, table: str, entry: dict[str, Any]) -> bool:
        if "version" in entry and (self.can_swap or (self._root / entry["folder"]).exists()):
            return False
        return not self.shows(table)

    def linked_folders(self) -> Iterator[Path]:
        """The folders of versions that the link of a table points to, or has to point to."""
        for table, entry in self._log.state.current.items():
            path = self._root / table
            yield self._root / _home(entry)
            linked = _linked(path)
            if linked is not None:
                yield linked


def _home(entry: dict[str, Any]) -> str:
    """The folder of a version whose table is a symbolic link."""
    if "version" not in entry:
        return str(entry["folder"])
    writer = Path(entry["folder"]).parent.name
    return f"{VERSIONS}/{writer}-{entry['version']}"


def _link_to(entry: dict[str, Any]) -> str:
    return f"../{_home(entry)}"


def _is_our_link(path: Path) -> bool:
    """Whether the link points to a folder directly below the folder of versions."""
    parent, _, name = os.readlink(path).rpartition("/")
    return parent == f"../{VERSIONS}" and name not in ("", ".", "..")


def _linked(path: Path) -> Path | None:
    return Path(os.path.normpath(path.parent / os.readlink(path))) if path.is_symlink() else None
