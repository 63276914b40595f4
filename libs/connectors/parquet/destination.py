"""Parquet files in a directory as a destination: a version of a table is staged beside the data and published whole."""

import asyncio
import contextlib
import errno
import itertools
import os
import shutil
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from libs.connectors.comparison import compare
from libs.connectors.concurrency import in_thread, share_out
from libs.connectors.parquet.config import ParquetConfig
from libs.connectors.parquet.failures import translated
from libs.connectors.parquet.files import FileWriter, StagedFile
from libs.connectors.parquet.log import Log
from libs.connectors.parquet.publishing import Publisher
from libs.connectors.parquet.staging import STAGING, Staging
from libs.connectors.parquet.verification import ParquetEnd
from libs.connectors.protocol import ConnectorRefused, Progress, RunContext, StreamPlan, Table, Written

WRITERS = 2


class ParquetDestination:
    """Files below one directory.

    Args:
        roots: the directories that it must be in or below; empty for any.
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
        publisher = Publisher(self._root, context)
        try:
            with translated(self._root):
                await in_thread(publisher.take_epoch)
            yield ParquetRun(self._root, context, publisher)
        finally:
            await in_thread(publisher.release)

    def _refuse_outside(self) -> None:
        """Symbolic links are resolved, so that none leads out of the allowed directories."""
        real = Path(os.path.realpath(self._root))
        if self._roots and not any(real.is_relative_to(os.path.realpath(root)) for root in self._roots):
            raise ConnectorRefused(
                f"local_path {self._root} is not below a directory that this installation writes Parquet files to "
                f"({', '.join(self._roots)})",
                code="path_not_allowed",
            )

    def _check(self) -> None:
        self._refuse_outside()
        with translated(self._root), _created_temporarily(self._root):
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
        """Sweep here too: a destination whose jobs were all deleted has no further run that would."""
        no_job = RunContext(job_id=0, project_id=0, run_id="check", epoch=0)
        staging = Staging(self._root, no_job, Log(self._root))
        try:
            staging.take()
            staging.sweep()
        finally:
            staging.release()


class ParquetRun:
    """The directory opened for one run: writes the files, in threads; ``Publisher`` decides what becomes of them."""

    def __init__(self, root: Path, context: RunContext, publisher: Publisher) -> None:
        self._root = root
        self._context = context
        self._publisher = publisher

    async def committed(self, plan: StreamPlan) -> Written | None:
        with translated(self._root):
            return await in_thread(lambda: self._publisher.committed(plan))

    async def prepare(self, table: Table) -> None:
        with translated(self._root):
            await in_thread(lambda: self._publisher.refuse_unwritable(table.plan))
        names = table.arrow_schema.names
        if len(set(names)) != len(names):
            raise ConnectorRefused(f"{table.plan.stream} has two columns of the same name: leave one of them out")

    async def write(self, table: Table, progress: Progress) -> Written:
        with translated(self._root):
            staged = await in_thread(self._publisher.stage)
            try:
                files = await self._stage(table, staged, progress)
                progress.loaded()
                written = await self._verified(table, files)
            except BaseException:
                await in_thread(lambda: shutil.rmtree(staged, ignore_errors=True))
                raise
            await in_thread(lambda: self._publisher.publish(table.plan, staged, files, written))
        return written

    async def clear(self, plan: StreamPlan) -> None:
        with translated(self._root):
            await in_thread(lambda: self._publisher.clear(plan))

    async def _stage(self, table: Table, staged: Path, progress: Progress) -> list[StagedFile]:
        # A table without parts still makes a file, which carries the schema.
        parts = table.parts() or [None]
        numbers = itertools.count()
        schema = table.arrow_schema
        files: list[StagedFile] = []
        with ThreadPoolExecutor(WRITERS, thread_name_prefix="parquet-write") as pool:

            async def work(remaining: Iterator[Any]) -> None:
                async with FileWriter.open(staged, next(numbers), schema, pool) as writer:
                    for part in remaining:
                        if part is not None:
                            await _copy(table, part, writer, progress)
                    await writer.finish()
                files.extend(writer.files)

            await share_out(parts, min(WRITERS, table.connections_max), work)
        return sorted(files, key=lambda file: file.name)

    async def _verified(self, table: Table, files: Sequence[StagedFile]) -> Written:
        rows, changed = sum(file.rows for file in files), await table.values_changed()
        if not self._context.verify:
            return Written(rows, inserted=rows, values_changed=changed)
        source = table.comparable()
        there = ParquetEnd([file.path for file in files], table.arrow_schema, source.columns, source.key)
        comparison = await compare(table.plan.stream, source, there)
        return Written(
            rows,
            inserted=rows,
            verified=comparison.verified,
            verification=comparison.document,
            values_changed=changed,
        )


async def _copy(table: Table, part: Any, writer: FileWriter, progress: Progress) -> None:
    async with contextlib.aclosing(table.batches(part)) as batches:
        async for batch in batches:
            progress.add(rows_read=batch.num_rows, bytes_read=batch.nbytes)
            await writer.write(batch)
            progress.add(rows_written=batch.num_rows)
            # Otherwise it stays in memory until the next one has arrived.
            del batch


@contextlib.contextmanager
def _created_temporarily(path: Path) -> Iterator[None]:
    """A directory with its parents; those that did not exist are removed again, unless others put something there."""
    created = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for folder in created:
            try:
                folder.rmdir()
            except FileNotFoundError:
                continue
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                break
