"""Parquet files in a directory: a full refresh is staged beside the data and published whole.

``<path>/<namespace>/<table>`` is a symbolic link to the current version's folder, so that readers of
``<path>/<namespace>/<table>/*.parquet`` see one version, old or new. The log beside it is the truth; the link follows.
"""

import asyncio
import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from libs.connectors.parquet.config import ParquetConfig
from libs.connectors.parquet.fingerprint import Fingerprint, fingerprint_of_files
from libs.connectors.parquet.log import FOLDER, Log, LogState, admit, sync_folder
from libs.connectors.protocol import (
    ConnectorRefused,
    ConnectorUnavailable,
    Progress,
    RunContext,
    StreamPlan,
    Table,
    Target,
    TargetShared,
    Written,
)

ROW_GROUP_BYTES = 16 * 1024 * 1024
ROW_GROUP_ROWS_MAX = 131_072
FILE_BYTES_MAX = 512 * 1024 * 1024
COMPRESSION_LEVEL = 1
DICTIONARY_SAMPLE_ROWS = 8_192
DICTIONARY_DISTINCT_SHARE_MAX = 0.2
WRITERS = 2


class ParquetDestination:
    """Files below one directory.

    Args:
        roots: the directories that it has to be in; any will do when empty.
    """

    def __init__(self, config: ParquetConfig, roots: Sequence[str] = ()) -> None:
        self._root = Path(config.writer.local_path)
        self._roots = roots

    async def check(self) -> None:
        await asyncio.to_thread(self._check)

    @contextlib.asynccontextmanager
    async def open(self, context: RunContext) -> AsyncIterator["ParquetRun"]:
        await asyncio.to_thread(self._refuse_outside)
        run = ParquetRun(self._root, context)
        await asyncio.to_thread(run.take_epoch)
        try:
            yield run
        finally:
            await asyncio.to_thread(run.drop_staging)

    def _refuse_outside(self) -> None:
        """Links are followed, so that none leads out."""
        real = Path(os.path.realpath(self._root))
        if self._roots and not any(real.is_relative_to(os.path.realpath(root)) for root in self._roots):
            raise ConnectorRefused(
                f"local_path {self._root} is not below a directory that this installation writes Parquet files to "
                f"({', '.join(self._roots)})",
                code="path_not_allowed",
            )

    def _check(self) -> None:
        self._refuse_outside()
        with _named_errors(self._root):
            _make_folder(self._root)
            probe = self._root / f".datasync-check-{uuid.uuid4().hex}"
            probe.write_bytes(b"check")
            probe.unlink()


class ParquetRun:
    """The directory under one run's epoch."""

    def __init__(self, root: Path, context: RunContext) -> None:
        self._root = root
        self._context = context
        self._log = Log(root)
        self._staging = root / FOLDER / "staging" / f"job-{context.job_id}-epoch-{context.epoch}"

    def take_epoch(self) -> None:
        """Enter the epoch into the log, remove what older epochs of the job left, mend the links."""
        with _named_errors(self._root):
            _make_folder(self._root / FOLDER / "staging")
            _make_folder(self._root / FOLDER / "versions")
            state = self._append({"kind": "epoch"})
            prefix = f"job-{self._context.job_id}-epoch-"
            for left in (self._root / FOLDER / "staging").iterdir():
                if left.name.startswith(prefix) and _epoch_of(left.name, prefix) <= self._context.epoch:
                    shutil.rmtree(left, ignore_errors=True)
            named = {entry["folder"] for entry in state.current.values()} | set(state.previous.values())
            for folder in (self._root / FOLDER / "versions").iterdir():
                ours = folder.name.startswith(prefix) and _epoch_of(folder.name, prefix) < self._context.epoch
                if ours and f"{FOLDER}/versions/{folder.name}" not in named:
                    shutil.rmtree(folder, ignore_errors=True)
            for table in state.current:
                self._link(table)

    def drop_staging(self) -> None:
        shutil.rmtree(self._staging, ignore_errors=True)

    async def committed(self, plan: StreamPlan) -> Written | None:
        state = await asyncio.to_thread(self._log.refresh)
        entry = state.committed.get((self._context.job_id, str(plan.stream)))
        if entry is None or entry["run_id"] != self._context.run_id:
            return None
        return Written(entry["rows"], entry.get("verified"), entry.get("verification"))

    async def prepare(self, table: Table) -> None:
        key = _key(table.plan.target)
        self._admit(key)(await asyncio.to_thread(self._log.refresh))
        path = self._root / key
        if not path.is_symlink() and path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ConnectorRefused(
                f"{path} exists and was not written by DataSync: move it away or choose another table"
            )
        if path.is_symlink() and not os.readlink(path).startswith(f"../{FOLDER}/versions/"):
            raise ConnectorRefused(f"{path} is a link that was not made by DataSync: remove it or choose another table")
        folded = [field.name for field in table.arrow_schema]
        if len(set(folded)) != len(folded):
            raise ConnectorRefused(f"{table.plan.stream} has two columns of one name")

    async def write(self, table: Table, progress: Progress) -> Written:
        staging = self._staging / uuid.uuid4().hex
        with _named_errors(self._root):
            await asyncio.to_thread(_make_folder, staging)
            try:
                files = await self._stage(table, staging, progress)
                progress.loaded()
                verified, verification = await self._verify(table, staging, files)
                await asyncio.to_thread(self._publish, table.plan, staging, files, verified, verification)
            finally:
                await asyncio.to_thread(shutil.rmtree, staging, True)
        return Written(sum(file.rows for file in files), verified, verification)

    async def clear(self, plan: StreamPlan) -> None:
        with _named_errors(self._root):
            await asyncio.to_thread(self._clear, plan)

    async def _stage(self, table: Table, staging: Path, progress: Progress) -> list["StagedFile"]:
        waiting = list(enumerate(table.parts()))
        waiting.reverse()
        schema = table.arrow_schema
        files: list[StagedFile] = []
        with ThreadPoolExecutor(WRITERS, thread_name_prefix="parquet-write") as pool:

            async def work(number: int) -> None:
                async with FileWriter.open(staging, number, schema, pool, self._context.verify) as writer:
                    while waiting:
                        _, part = waiting.pop()
                        async with contextlib.aclosing(table.batches(part)) as batches:
                            async for batch in batches:
                                progress.add(rows_read=batch.num_rows, bytes_read=batch.nbytes)
                                await writer.write(batch)
                                progress.add(rows_written=batch.num_rows)
                    await writer.finish()
                files.extend(writer.files)

            async with asyncio.TaskGroup() as tasks:
                for number in range(max(1, min(WRITERS, table.connections_max, len(waiting)))):
                    tasks.create_task(work(number))
        return sorted(files, key=lambda file: file.name)

    async def _verify(
        self, table: Table, staging: Path, files: Sequence["StagedFile"]
    ) -> tuple[bool | None, dict[str, Any] | None]:
        if not self._context.verify:
            return None, None
        counted = await table.count()
        read_back = await asyncio.to_thread(fingerprint_of_files, [staging / file.name for file in files])
        as_read = Fingerprint.joined([file.fingerprint for file in files if file.fingerprint is not None])
        verification = {
            "source": {"rows": counted, "buckets": as_read.buckets()},
            "destination": {"rows": read_back.rows, "buckets": read_back.buckets()},
        }
        verified = counted == as_read.rows == read_back.rows and as_read.buckets() == read_back.buckets()
        if not verified:
            raise ConnectorUnavailable(
                f"{table.plan.stream}: the files differ from what was read", code="verification_failed"
            )
        return verified, verification

    def _publish(
        self,
        plan: StreamPlan,
        staging: Path,
        files: Sequence["StagedFile"],
        verified: bool | None,
        verification: dict[str, Any] | None,
    ) -> None:
        key = _key(plan.target)
        self._admit(key)(self._log.refresh())
        folder = f"{FOLDER}/versions/{self._staging.name}-{uuid.uuid4().hex}"
        sync_folder(staging)
        staging.rename(self._root / folder)
        sync_folder(self._root / FOLDER / "versions")
        entry = {
            "kind": "publish",
            "stream": str(plan.stream),
            "table": key,
            "folder": folder,
            "rows": sum(file.rows for file in files),
            "files": [{"name": file.name, "rows": file.rows, "size_bytes": file.size_bytes} for file in files],
            "verified": verified,
            "verification": verification,
        }
        try:
            self._append(entry)
        except BaseException:
            if self._is_named(folder):
                raise
            shutil.rmtree(self._root / folder, ignore_errors=True)
            raise
        self._link(key)
        self._collect_garbage()

    def _clear(self, plan: StreamPlan) -> None:
        key = _key(plan.target)
        state = self._log.refresh()
        self._admit(key)(state)
        if key not in state.current:
            return
        self._append({"kind": "clear", "stream": str(plan.stream), "table": key})
        path = self._root / key
        if path.is_symlink():
            path.unlink()
        self._collect_garbage()

    def _append(self, entry: dict[str, Any]) -> LogState:
        context = self._context
        who = {
            "job_id": context.job_id,
            "project_id": context.project_id,
            "epoch": context.epoch,
            "run_id": context.run_id,
        }
        return self._log.append(entry | who, self._admit(entry.get("table")))

    def _admit(self, key: str | None) -> Callable[[LogState], None]:
        """Raises ``Fenced`` under a younger epoch, ``TargetShared`` when the table is another job's."""
        context = self._context
        fence = admit(context.job_id, context.epoch)

        def admitted(state: LogState) -> None:
            fence(state)
            entry = state.current.get(key) if key is not None else None
            if entry is None:
                return
            # Entries of before projects were written down name the job alone.
            if not context.may_write(entry["job_id"], entry.get("project_id")):
                raise TargetShared(str(entry["table"]), entry["job_id"])

        return admitted

    def _is_named(self, folder: str) -> bool:
        """Whether the log names the folder, when adding the entry failed and may have succeeded all the same."""
        state = self._log.refresh()
        return any(entry["folder"] == folder for entry in state.current.values())

    def _link(self, key: str) -> None:
        """Point the table's link at the current version, and look again: a slower writer may have come between."""
        path = self._root / key
        while True:
            entry = self._log.refresh().current.get(key)
            if entry is None:
                return
            wanted = f"../{entry['folder']}"
            if path.is_symlink() and os.readlink(path) == wanted:
                return
            _make_folder(path.parent)
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            draft = path.parent / f".{path.name}-{uuid.uuid4().hex}"
            draft.symlink_to(wanted)
            draft.replace(path)
            sync_folder(path.parent)

    def _collect_garbage(self) -> None:
        """Remove what the log has retired; the version before the current one stays, readers may have it open."""
        retired = self._log.refresh().retired
        for folder in (self._root / FOLDER / "versions").iterdir():
            if f"{FOLDER}/versions/{folder.name}" in retired:
                shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class StagedFile:
    name: str
    rows: int
    size_bytes: int
    fingerprint: Fingerprint | None


class FileWriter:
    """Writes one sequence of files: batches are gathered into row groups, encoded in a thread."""

    def __init__(self, folder: Path, number: int, schema: pa.Schema, pool: ThreadPoolExecutor, verify: bool) -> None:
        self._folder = folder
        self._number = number
        self._schema = schema
        self._pool = pool
        self._verify = verify
        self._gathered: list[pa.RecordBatch] = []
        self._gathered_bytes = 0
        self._gathered_rows = 0
        self._writer: pq.ParquetWriter | None = None
        self._path = Path()
        self._rows = 0
        self._sequence = 0
        self._fingerprint: Fingerprint | None = None
        self.files: list[StagedFile] = []

    @classmethod
    @contextlib.asynccontextmanager
    async def open(
        cls, folder: Path, number: int, schema: pa.Schema, pool: ThreadPoolExecutor, verify: bool
    ) -> AsyncIterator["FileWriter"]:
        writer = cls(folder, number, schema, pool, verify)
        try:
            yield writer
        finally:
            await asyncio.get_running_loop().run_in_executor(pool, writer.abandon)

    async def write(self, batch: pa.RecordBatch) -> None:
        self._gathered.append(batch)
        self._gathered_bytes += batch.nbytes
        self._gathered_rows += batch.num_rows
        if self._gathered_bytes >= ROW_GROUP_BYTES or self._gathered_rows >= ROW_GROUP_ROWS_MAX:
            await self._flush()

    async def finish(self) -> None:
        """Write what is gathered and close; a sequence without rows still makes one file, which carries the schema."""
        await self._flush()
        await self._in_thread(self._close)

    def abandon(self) -> None:
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.close()
            self._writer = None

    async def _flush(self) -> None:
        gathered, self._gathered = self._gathered, []
        self._gathered_bytes = self._gathered_rows = 0
        await self._in_thread(lambda: self._write(gathered))

    async def _in_thread(self, work: Any) -> None:
        """A cancelled caller waits for the thread, which holds the file."""
        future = asyncio.get_running_loop().run_in_executor(self._pool, work)
        try:
            await asyncio.shield(future)
        except asyncio.CancelledError:
            await asyncio.wait({future})
            raise

    def _write(self, batches: Sequence[pa.RecordBatch]) -> None:
        if self._writer is None:
            self._path = self._folder / f"part-{self._number}-{self._sequence:05d}.parquet"
            self._writer = pq.ParquetWriter(
                self._path,
                self._schema,
                compression="zstd",
                compression_level=COMPRESSION_LEVEL,
                use_dictionary=repetitive_columns(batches),  # type: ignore[arg-type]
            )
            self._fingerprint = Fingerprint() if self._verify else None
        if not batches:
            return
        rows = pa.Table.from_batches(batches, self._schema)
        if self._fingerprint is not None:
            self._fingerprint.add(rows)
        self._writer.write_table(rows, row_group_size=rows.num_rows)
        self._rows += rows.num_rows
        if self._path.stat().st_size >= FILE_BYTES_MAX:
            self._close()

    def _close(self) -> None:
        if self._writer is None:
            return
        self._writer.close()
        self._writer = None
        with self._path.open("rb") as file:
            os.fsync(file.fileno())
        size = self._path.stat().st_size
        self.files.append(StagedFile(self._path.name, self._rows, size, self._fingerprint))
        self._rows = 0
        self._sequence += 1


def repetitive_columns(batches: Sequence[pa.RecordBatch]) -> list[str]:
    """The text columns worth a dictionary, by a sample; for others it costs much time and larger files."""
    if not batches:
        return []
    sample = batches[0].slice(0, DICTIONARY_SAMPLE_ROWS)
    distinct_max = sample.num_rows * DICTIONARY_DISTINCT_SHARE_MAX
    return [
        field.name
        for field, column in zip(sample.schema, sample.columns, strict=True)
        if isinstance(column, pa.StringArray | pa.BinaryArray) and pc.count_distinct(column).as_py() <= distinct_max
    ]


def _key(target: Target) -> str:
    """``namespace/table`` as folder names: what a file system can't hold is percent-encoded."""
    return f"{_folder_name(target.namespace)}/{_folder_name(target.table)}"


def _folder_name(name: str) -> str:
    encoded = quote(name, safe=" !#$&'()+,;=@[]{}~", encoding="utf-8") if not name.isalnum() else name
    if encoded.startswith((".", FOLDER)):
        encoded = f"%{ord(encoded[0]):02X}{encoded[1:]}"
    if len(encoded.encode()) > 200:
        raise ConnectorRefused(f"the name {name!r} is too long for a folder")
    return encoded


def _epoch_of(folder: str, prefix: str) -> int:
    return int(folder.removeprefix(prefix).split("-", 1)[0])


def _make_folder(path: Path) -> None:
    path.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def _named_errors(root: Path) -> Iterator[None]:
    """A full, read-only or forbidden directory in words."""
    try:
        yield
    except BaseExceptionGroup as group:
        raise _first(group, root) from group
    except OSError as error:
        raise _in_words(error, root) from error


def _first(group: BaseExceptionGroup[BaseException], root: Path) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return _in_words(error, root) if isinstance(error, OSError) else error


def _in_words(error: OSError, root: Path) -> ConnectorRefused | ConnectorUnavailable:
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return ConnectorUnavailable(f"no space is left in {root}", code="disk_full")
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return ConnectorRefused(f"{root} can't be written to: {error.strerror}", code="read_only")
        case errno.ENOTDIR | errno.EEXIST:
            return ConnectorRefused(f"{root} can't be used: {error.strerror} ({error.filename})")
        case _:
            return ConnectorUnavailable(f"writing to {root} failed: {error.strerror or error}")
