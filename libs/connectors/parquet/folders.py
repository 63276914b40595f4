"""Folders of Parquet files that are swapped so that every scan finds each row exactly once.

A file is called ``_part-….rows`` until its version is published, and ``part-….parquet`` afterwards. A scan that starts
above the tables also enters the staging folder of the version that is about to be swapped in. So both folders are
*anchored* for the swap: ``part-….parquet`` becomes a symbolic link to ``../<table>/_part-….rows``, which only
resolves in the table's own path. After each step the visible names lead to the same rows: a worker may be killed.
"""

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from libs.connectors.parquet.log import sync_folder, write_durably
from libs.connectors.protocol import ConnectorUnavailable

VERSION_FILE = "_datasync_version.json"
LOCK_SECONDS_MAX = 60.0
_LOCK_PAUSE_SECONDS = 0.01
_SHOWN = ".parquet"
_HIDDEN = ".rows"
_PART = "part-"
_LINK_DRAFT, _FILE_DRAFT = "_link", "_file"
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_NOT_SUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


def hidden_name(name: str) -> str:
    """``_part-….rows`` for ``part-….parquet``: readers match neither, whether they go by patterns or scan all files."""
    return f"_{name.removesuffix(_SHOWN)}{_HIDDEN}"


def write_version(folder: Path, table: str, version: str, cleared: Mapping[str, Any] | None = None) -> None:
    """Record which table and version the folder holds; written before the log's entry.

    Args:
        cleared: the log's entry of the version to be removed.
    """
    content = {"table": table, "version": version, "cleared": cleared}
    write_durably(folder / VERSION_FILE, json.dumps(content).encode())
    sync_folder(folder)


def read_version(folder: Path) -> dict[str, Any] | None:
    """``{"table", "version", "cleared"}`` of a folder that DataSync created, None for any other."""
    try:
        found = json.loads((folder / VERSION_FILE).read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return found if isinstance(found, dict) and "table" in found and "version" in found else None


def foreign_name(folder: Path) -> str | None:
    """A file in a table's folder that DataSync did not write, None if there is none."""
    for name in sorted(os.listdir(folder)):
        ours = name in (VERSION_FILE, _LINK_DRAFT, _FILE_DRAFT) or _is_shown(name) or _is_hidden(name)
        # NFS renames a removed file that is still open to .nfs….
        if not ours and not name.startswith(".nfs"):
            return name
    return None


def anchor(folder: Path, name_of_table: str) -> None:
    """Replace the visible files by links that resolve only while the folder has the table's name."""
    for name in os.listdir(folder):
        if _is_shown(name) and not (folder / name).is_symlink():
            with contextlib.suppress(FileExistsError):
                os.link(folder / name, folder / hidden_name(name))
            _put_link(folder / name, name_of_table)
        elif _is_hidden(name) and not os.path.lexists(folder / _shown_name(name)):
            _put_link(folder / _shown_name(name), name_of_table)
    sync_folder(folder)


def release(folder: Path) -> None:
    """Replace the links by the files themselves; a reader that follows a link meanwhile still finds the file."""
    hidden = [name for name in os.listdir(folder) if _is_hidden(name)]
    draft = folder / _FILE_DRAFT
    for name in hidden:
        shown = folder / _shown_name(name)
        if shown.is_symlink() or not shown.exists():
            draft.unlink(missing_ok=True)
            os.link(folder / name, draft)
            draft.replace(shown)
    for name in hidden:
        (folder / name).unlink()
    sync_folder(folder)


def hide(folder: Path) -> None:
    """Rename the visible files, so that scans no longer find them."""
    for name in filter(_is_shown, os.listdir(folder)):
        (folder / name).replace(folder / hidden_name(name))


def swap(first: Path, second: Path) -> None:
    """Exchange two names atomically (renameat2(2), RENAME_EXCHANGE)."""
    arguments = (_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)
    if _renameat2 is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), str(second))
    if _renameat2(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(second))


def can_swap(folder: Path) -> bool:
    """Whether the file system can exchange two names, by trying it."""
    one, other = (folder / f".try-{uuid.uuid4().hex}" for _ in range(2))
    one.mkdir()
    other.mkdir()
    try:
        swap(one, other)
    except OSError as error:
        if error.errno in _NOT_SUPPORTED:
            return False
        raise
    finally:
        one.rmdir()
        other.rmdir()
    return True


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which excludes the other processes of this machine."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        deadline = time.monotonic() + LOCK_SECONDS_MAX
        while not try_lock(descriptor):
            if time.monotonic() > deadline:
                raise ConnectorUnavailable(f"{folder} has been locked by another process for {LOCK_SECONDS_MAX:g} s")
            time.sleep(_LOCK_PAUSE_SECONDS)
        yield
    finally:
        os.close(descriptor)


def try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _put_link(path: Path, name_of_table: str) -> None:
    draft = path.parent / _LINK_DRAFT
    draft.unlink(missing_ok=True)
    draft.symlink_to(f"../{name_of_table}/{hidden_name(path.name)}")
    draft.replace(path)


def _is_shown(name: str) -> bool:
    return name.startswith(_PART) and name.endswith(_SHOWN)


def _is_hidden(name: str) -> bool:
    return name.startswith(f"_{_PART}") and name.endswith(_HIDDEN)


def _shown_name(hidden: str) -> str:
    return f"{hidden.removeprefix('_').removesuffix(_HIDDEN)}{_SHOWN}"


def _load_renameat2() -> Any:
    """None if the C library does not have it."""
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is not None:
        function.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    return function


_renameat2 = _load_renameat2()
