"""Parquet files in a directory: a full refresh is staged beside the data and published whole.

``<path>/<namespace>/<table>`` is a folder that is exchanged with the next version's in one step. The log in
``<path>/_datasync`` is the truth; what is shown follows.
"""

import asyncio
import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from libs.connectors.comparison import compare
from libs.connectors.failures import Verdict, code_of, verdict_of
from libs.connectors.parquet.config import ParquetConfig
from libs.connectors.parquet.folders import hidden_name, write_version
from libs.connectors.parquet.log import Log, LogState, admit, sync_folder
from libs.connectors.parquet.names import table_path
from libs.connectors.parquet.staging import STAGING, Staging
from libs.connectors.parquet.verification import ParquetEnd
from libs.connectors.protocol import (
    ConnectorRefused,
    ConnectorUnavailable,
    Progress,
    RunContext,
    StreamName,
    StreamPlan,
    Table,
    TargetShared,
    Written,
)
from libs.core.errors import first_error

Result = TypeVar("Result")

ROW_GROUP_BYTES = 16 * 1024 * 1024
ROW_GROUP_ROWS_MAX = 131_072
LONG_GROUP_BYTES = 32 * 1024 * 1024
LONG_ROW_BYTES = 4 * 1024 * 1024
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

    async def check(self) -> Sequence[str]:
        await asyncio.to_thread(self._check)
        return ()

    @contextlib.asynccontextmanager
    async def open(self, context: RunContext) -> AsyncIterator["ParquetRun"]:
        await asyncio.to_thread(self._refuse_outside)
        run = ParquetRun(self._root, context)
        try:
            await _in_thread(run.take_epoch)
            yield run
        finally:
            await _in_thread(run.drop_staging)

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
        with _named_errors(self._root), _made_for_now(self._root):
            probe, link = (self._root / f".datasync-check-{uuid.uuid4().hex}" for _ in range(2))
            try:
                probe.write_bytes(b"check")
                os.link(probe, link)
            finally:
                probe.unlink(missing_ok=True)
                link.unlink(missing_ok=True)
            if (self._root / STAGING).is_dir():
                self._sweep()

    def _sweep(self) -> None:
        """Clean up here too: a destination whose jobs are gone has no next run that would."""
        nobody = RunContext(job_id=0, project_id=0, run_id="check", epoch=0)
        staging = Staging(self._root, nobody, Log(self._root))
        try:
            staging.take()
            staging.sweep()
        finally:
            staging.release()


class ParquetRun:
    """The directory under one run's epoch."""

    def __init__(self, root: Path, context: RunContext) -> None:
        self._root = root
        self._context = context
        self._log = Log(root)
        self._staging = Staging(root, context, self._log)
        self._tables = self._staging.tables

    def take_epoch(self) -> None:
        """Enter the epoch into the log, then finish or remove what killed writers left."""
        with _named_errors(self._root):
            _make_folder(self._root / STAGING)
            self._append({"kind": "epoch"})
            self._staging.take()
            self._staging.sweep()

    def drop_staging(self) -> None:
        self._staging.release()

    async def committed(self, plan: StreamPlan) -> Written | None:
        with _named_errors(self._root):
            return await _in_thread(lambda: self._committed(plan))

    async def prepare(self, table: Table) -> None:
        with _named_errors(self._root):
            await _in_thread(lambda: self._refuse(table.plan))
        names = table.arrow_schema.names
        if len(set(names)) != len(names):
            raise ConnectorRefused(f"{table.plan.stream} has two columns of one name")

    async def write(self, table: Table, progress: Progress) -> Written:
        version = uuid.uuid4().hex
        staged = self._staging.folder / version
        with _named_errors(self._root):
            await _in_thread(lambda: _make_folder(staged))
            try:
                files = await self._stage(table, staged, progress)
                progress.loaded()
                written = await self._verified(table, files)
            except BaseException:
                await _in_thread(lambda: shutil.rmtree(staged, ignore_errors=True))
                raise
            await _in_thread(lambda: self._publish(table.plan, version, files, written))
        return written

    async def clear(self, plan: StreamPlan) -> None:
        with _named_errors(self._root):
            await _in_thread(lambda: self._clear(plan))

    async def _stage(self, table: Table, staging: Path, progress: Progress) -> list["StagedFile"]:
        waiting = list(enumerate(table.parts()))
        waiting.reverse()
        schema = table.arrow_schema
        files: list[StagedFile] = []
        with ThreadPoolExecutor(WRITERS, thread_name_prefix="parquet-write") as pool:

            async def work(number: int) -> None:
                async with FileWriter.open(staging, number, schema, pool) as writer:
                    while waiting:
                        _, part = waiting.pop()
                        async with contextlib.aclosing(table.batches(part)) as batches:
                            async for batch in batches:
                                progress.add(rows_read=batch.num_rows, bytes_read=batch.nbytes)
                                await writer.write(batch)
                                progress.add(rows_written=batch.num_rows)
                                # Else it stays in memory until the next one has arrived.
                                del batch
                    await writer.finish()
                files.extend(writer.files)

            async with asyncio.TaskGroup() as tasks:
                for number in range(max(1, min(WRITERS, table.connections_max, len(waiting)))):
                    tasks.create_task(work(number))
        return sorted(files, key=lambda file: file.name)

    async def _verified(self, table: Table, files: Sequence["StagedFile"]) -> Written:
        rows, changed = sum(file.rows for file in files), await table.values_changed()
        if not self._context.verify:
            return Written(rows, values_changed=changed)
        source = table.comparable()
        there = ParquetEnd([file.path for file in files], table.arrow_schema, source.columns, source.key)
        comparison = await compare(table.plan.stream, source, there)
        return Written(rows, comparison.verified, comparison.document, changed)

    def _committed(self, plan: StreamPlan) -> Written | None:
        path = self._path(plan)
        entry = self._log.state.current.get(path)
        if entry is None or (entry["job_id"], entry["run_id"]) != (self._context.job_id, self._context.run_id):
            return None
        if not _is_of(entry, plan.stream):
            return None
        try:
            self._tables.settle(path)
        except FileNotFoundError:
            # Somebody has removed the folder since.
            return None
        if not all((self._root / path / file["name"]).exists() for file in entry.get("files", ())):
            return None
        return Written(
            entry["rows"], entry.get("verified"), entry.get("verification"), entry.get("values_changed") or {}
        )

    def _refuse(self, plan: StreamPlan) -> None:
        path = self._path(plan)
        self._admit(path)(self._log.state)
        self._tables.refuse_foreign(path)

    def _publish(self, plan: StreamPlan, version: str, files: Sequence["StagedFile"], written: Written) -> None:
        """The log entry publishes; this run or the next sweep then updates the table's place."""
        path = self._path(plan)
        self._admit(path)(self._log.state)
        staged = self._staging.folder / version
        write_version(staged, path, version)
        sync_folder(staged.parent)
        entry = {
            "kind": "publish",
            # For earlier versions, which don't know ``stream_parts``.
            "stream": str(plan.stream),
            "stream_parts": [plan.stream.namespace, plan.stream.name],
            "table": path,
            "folder": str(staged.relative_to(self._root)),
            "version": version,
            "rows": written.rows,
            "files": [{"name": file.name, "rows": file.rows, "size_bytes": file.size_bytes} for file in files],
            "verified": written.verified,
            "verification": written.verification,
            "values_changed": dict(written.values_changed),
        }
        try:
            self._append(entry)
        except BaseException:
            # The entry may have been added despite the error.
            current = self._log.refresh().current.get(path)
            if current is None or current.get("version") != version:
                shutil.rmtree(staged, ignore_errors=True)
            raise
        self._tables.settle(path)

    def _clear(self, plan: StreamPlan) -> None:
        path = self._path(plan)
        self._admit(path)(self._log.state)
        cleared = self._log.state.current.get(path)
        if cleared is None:
            return
        # Made before the entry, so that a sweep finds what is left to do.
        clearing = self._staging.folder / uuid.uuid4().hex
        _make_folder(clearing)
        write_version(clearing, path, "", cleared)
        sync_folder(clearing.parent)
        self._append(
            {
                "kind": "clear",
                "stream": str(plan.stream),
                "stream_parts": [plan.stream.namespace, plan.stream.name],
                "table": path,
            }
        )
        self._tables.settle(path, cleared)

    def _path(self, plan: StreamPlan) -> str:
        return table_path(plan.target, self._log.refresh().current)

    def _append(self, entry: dict[str, Any]) -> LogState:
        context = self._context
        who = {
            "job_id": context.job_id,
            "project_id": context.project_id,
            "epoch": context.epoch,
            "run_id": context.run_id,
        }
        return self._log.append(entry | who, self._admit(entry.get("table")))

    def _admit(self, path: str | None) -> Callable[[LogState], None]:
        """Raises ``Fenced`` under a younger epoch, ``TargetShared`` when the table is another job's."""
        context = self._context
        fence = admit(context.job_id, context.epoch)

        def admitted(state: LogState) -> None:
            fence(state)
            entry = state.current.get(path) if path is not None else None
            # Entries of earlier versions have no project.
            if entry is not None and not context.may_write(entry["job_id"], entry.get("project_id")):
                raise TargetShared(str(entry["table"]), entry["job_id"])

        return admitted


@dataclass(frozen=True, slots=True)
class StagedFile:
    """A staged file: its final name, and where it is until it is published."""

    name: str
    path: Path
    rows: int
    size_bytes: int


class FileWriter:
    """Writes one sequence of files: batches are gathered into row groups, encoded in a thread."""

    def __init__(self, folder: Path, number: int, schema: pa.Schema, pool: ThreadPoolExecutor) -> None:
        self._folder = folder
        self._number = number
        self._schema = schema
        self._pool = pool
        self._gathered: list[pa.RecordBatch] = []
        self._gathered_bytes = 0
        self._gathered_rows = 0
        self._writer: pq.ParquetWriter | None = None
        self._for_long_rows = False
        self._name = ""
        self._path = Path()
        self._rows = 0
        self._sequence = 0
        self.files: list[StagedFile] = []

    @classmethod
    @contextlib.asynccontextmanager
    async def open(
        cls, folder: Path, number: int, schema: pa.Schema, pool: ThreadPoolExecutor
    ) -> AsyncIterator["FileWriter"]:
        writer = cls(folder, number, schema, pool)
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
        await finished(asyncio.get_running_loop().run_in_executor(self._pool, work))

    def _write(self, batches: Sequence[pa.RecordBatch]) -> None:
        long = any(batch.nbytes > LONG_ROW_BYTES * batch.num_rows for batch in batches)
        if long and not self._for_long_rows:
            self._close()
        if self._writer is None:
            self._for_long_rows = long
            self._name = f"part-{self._number}-{self._sequence:05d}-{self._folder.name}.parquet"
            self._path = self._folder / hidden_name(self._name)
            self._writer = pq.ParquetWriter(
                self._path,
                self._schema,
                compression="zstd",
                compression_level=COMPRESSION_LEVEL,
                # Of long values six copies would be made for statistics, which are then left out for their size.
                write_statistics=not long,
                use_dictionary=[] if long else repetitive_columns(batches),  # type: ignore[arg-type]
            )
        if not batches:
            return
        rows = pa.Table.from_batches(batches, self._schema)
        self._writer.write_table(rows, row_group_size=rows.num_rows)
        self._rows += rows.num_rows
        # The writer keeps the pages of its last row group until the next or the end.
        if rows.nbytes >= LONG_GROUP_BYTES or self._path.stat().st_size >= FILE_BYTES_MAX:
            self._close()

    def _close(self) -> None:
        if self._writer is None:
            return
        self._writer.close()
        self._writer = None
        with self._path.open("rb") as file:
            os.fsync(file.fileno())
        size = self._path.stat().st_size
        self.files.append(StagedFile(self._name, self._path, self._rows, size))
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


def _is_of(entry: Mapping[str, Any], stream: StreamName) -> bool:
    """Entries of earlier versions have only the joined text, which two streams of a job may share."""
    parts = entry.get("stream_parts")
    return bool(entry["stream"] == str(stream) if parts is None else parts == [stream.namespace, stream.name])


async def _in_thread(work: Callable[[], Result]) -> Result:
    """A cancelled caller waits for the thread, which may be in the middle of a publication."""
    return await finished(asyncio.get_running_loop().run_in_executor(None, work))


async def finished(future: "asyncio.Future[Result]") -> Result:
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        await asyncio.wait({future})
        raise


def _make_folder(path: Path) -> None:
    path.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def _made_for_now(path: Path) -> Iterator[None]:
    """A folder with its parents; those of them that were not there are removed, unless somebody put something there."""
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        _make_folder(path)
        yield
    finally:
        for folder in made:
            try:
                folder.rmdir()
            except FileNotFoundError:
                continue
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                break


@contextlib.contextmanager
def _named_errors(root: Path) -> Iterator[None]:
    """A full, read-only or forbidden directory in words."""
    try:
        yield
    except BaseExceptionGroup as group:
        error = first_error(group)
        raise (_in_words(error, root) if isinstance(error, OSError) else error) from group
    except OSError as error:
        raise _in_words(error, root) from error


def _in_words(error: OSError, root: Path) -> ConnectorRefused | ConnectorUnavailable:
    code = code_of(error)
    match code:
        case "disk_full":
            words = f"no space is left in {root}"
        case "read_only":
            words = f"{root} can't be written to: {error.strerror}"
        case _ if verdict_of(error) is Verdict.PERMANENT:
            words = f"{root} can't be used: {error.strerror} ({error.filename})"
        case _:
            words = f"writing to {root} failed: {error.strerror or error}"
    kind = ConnectorRefused if verdict_of(error) is Verdict.PERMANENT else ConnectorUnavailable
    return kind(words, code=code)
