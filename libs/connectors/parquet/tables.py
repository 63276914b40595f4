"""The places of tables, where readers look: any writer brings a place up to date with the log.

A table's place is a real folder that is exchanged with the next version, or, on file systems that can't exchange, a
symbolic link to the version's folder. Destinations of earlier versions hold such links; they become folders with the
next publication.
"""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from libs.connectors.parquet.folders import (
    can_exchange,
    exchange,
    foreign_name,
    hide,
    locked,
    read_version,
    unveil,
    veil,
)
from libs.connectors.parquet.log import Log, sync_folder
from libs.connectors.parquet.names import FOLDER
from libs.connectors.protocol import ConnectorRefused

VERSIONS = f"{FOLDER}/versions"


class Tables:
    """The places of all tables of a destination.

    Args:
        trash: a folder on the same file system, for what is removed.
    """

    def __init__(self, root: Path, log: Log, trash: Path) -> None:
        self._root = root
        self._log = log
        self._trash = trash
        self._exchanges: bool | None = None

    def refuse_foreign(self, table: str) -> None:
        """Raises ``ConnectorRefused`` if the place holds files that the log does not know, or another table's."""
        path = self._root / table
        if path.is_symlink():
            if not _is_our_link(path):
                raise ConnectorRefused(
                    f"{path} is a link that was not made by DataSync: remove it or choose another table"
                )
            return
        if not path.exists() or (path.is_dir() and not any(path.iterdir())):
            return
        version = read_version(path)
        if version is None or (table not in self._log.state.current and version["table"] == table):
            raise ConnectorRefused(
                f"{path} exists and was not written by DataSync: move it away or choose another table"
            )
        if version["table"] != table:
            raise ConnectorRefused(
                f"{path} holds the table {version['table']}: it was moved there, or this file system takes both names "
                "for the same; choose another table"
            )
        foreign = foreign_name(path)
        if foreign is not None:
            raise ConnectorRefused(f"{path / foreign} was not written by DataSync: move it away")

    def shows(self, table: str) -> bool:
        """Whether the place of a published table shows the log's current version."""
        entry = self._log.state.current[table]
        path = self._root / table
        if path.is_symlink():
            return os.readlink(path) == _link_to(entry) and path.is_dir()
        version = read_version(path)
        return version is not None and version["version"] == entry.get("version")

    def settle(self, table: str, cleared: dict[str, Any] | None = None) -> None:
        """Bring a table's place up to date with the log, finishing what was interrupted at any point.

        Args:
            cleared: the entry of the version to remove, if the log has none for the table any more.
        """
        path = self._root / table
        if table in self._log.refresh().current:
            path.parent.mkdir(parents=True, exist_ok=True)
        elif not path.parent.exists():
            return
        with self._alone(path.parent):
            entry = self._log.refresh().current.get(table)
            if entry is None:
                self._remove(path, cleared)
            elif not self.shows(table):
                self._show(path, table, entry)
            elif not path.is_symlink():
                unveil(path)

    def _alone(self, folder: Path) -> contextlib.AbstractContextManager[None]:
        """Links need no lock: replacing one is atomic, and the writer checks the log again afterwards."""
        return locked(folder) if self.exchanges else contextlib.nullcontext()

    @property
    def exchanges(self) -> bool:
        """Whether the file system can exchange names; if so it is a local one, where locks work."""
        if self._exchanges is None:
            self._trash.mkdir(parents=True, exist_ok=True)
            self._exchanges = can_exchange(self._trash)
        return self._exchanges

    def _show(self, path: Path, table: str, entry: dict[str, Any]) -> None:
        self._refuse_others(path, table)
        if "version" not in entry or not self.exchanges:
            self._show_link(path, table)
            return
        staged = self._root / entry["folder"]
        veil(staged, path.name)
        if os.path.lexists(path):
            self._exchange(staged, path)
        else:
            staged.rename(path)
        sync_folder(path.parent)
        unveil(path)

    def _exchange(self, staged: Path, path: Path) -> None:
        before = _linked(path)
        if before is None:
            veil(path, path.name)
        exchange(staged, path)
        if before is None:
            shutil.rmtree(staged, ignore_errors=True)
        else:
            staged.unlink()
            shutil.rmtree(before, ignore_errors=True)

    def _show_link(self, path: Path, table: str) -> None:
        """Point the table's link at the current version, and check again: a slower writer may have changed it."""
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
                unveil(staged)
                staged.rename(wanted)
                sync_folder(wanted.parent)
            self._turn_link(path, _link_to(entry))

    def _turn_link(self, path: Path, target: str) -> None:
        before = _linked(path)
        if before is None and path.exists():
            self._discard(path)
        draft = path.parent / f".{path.name}-{uuid.uuid4().hex}"
        draft.symlink_to(target)
        draft.replace(path)
        sync_folder(path.parent)
        # Open files stay readable; the job's next run removes the folder. Another writer may have hidden it first.
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
        veil(path, path.name)
        path.rename(trash)
        sync_folder(path.parent)
        shutil.rmtree(trash, ignore_errors=True)

    def _refuse_others(self, path: Path, table: str) -> None:
        """Refuse to destroy what others put there since the run checked."""
        if path.is_symlink() and _is_our_link(path):
            return
        version = read_version(path)
        if version is not None and version["table"] == table:
            return
        if path.is_symlink() or (path.exists() and not (path.is_dir() and not any(path.iterdir()))):
            raise ConnectorRefused(f"{path} exists and was not written by DataSync: move it away")

    def behind(self) -> list[str]:
        """Tables whose link a killed writer did not update; a sweep finds folders that wait for an exchange."""
        return [table for table, entry in self._log.state.current.items() if self._link_is_behind(table, entry)]

    def _link_is_behind(self, table: str, entry: dict[str, Any]) -> bool:
        if "version" in entry and (self.exchanges or (self._root / entry["folder"]).exists()):
            return False
        return not self.shows(table)

    def linked_folders(self) -> Iterator[Path]:
        """The folders of versions that a table's link points to or should point to."""
        for table, entry in self._log.state.current.items():
            path = self._root / table
            yield self._root / _home(entry)
            linked = _linked(path)
            if linked is not None:
                yield linked


def _home(entry: dict[str, Any]) -> str:
    """The folder of a version whose table is a link."""
    if "version" not in entry:
        return str(entry["folder"])
    writer = Path(entry["folder"]).parent.name
    return f"{VERSIONS}/{writer}-{entry['version']}"


def _link_to(entry: dict[str, Any]) -> str:
    return f"../{_home(entry)}"


def _is_our_link(path: Path) -> bool:
    """Whether the link points to a folder directly below that of the versions."""
    parent, _, name = os.readlink(path).rpartition("/")
    return parent == f"../{VERSIONS}" and name not in ("", ".", "..")


def _linked(path: Path) -> Path | None:
    return Path(os.path.normpath(path.parent / os.readlink(path))) if path.is_symlink() else None
