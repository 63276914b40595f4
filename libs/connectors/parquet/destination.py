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
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa

from libs.connectors.arrow_types import normalised, normalised_schema
from libs.connectors.comparison import Comparison, compare, no_target, why_not_comparable
from libs.connectors.concurrency import in_thread, share_out
from libs.connectors.parquet.config import ParquetConfig
from libs.connectors.parquet.failures import translated
from libs.connectors.parquet.files import FILE_BYTES_MAX, FileSeries, FileWriter, StagedFile
from libs.connectors.parquet.log import Log
from libs.connectors.parquet.merging import MERGED_FILE_BYTES_MAX, Counts, NextVersion, PresentFile, schema_of
from libs.connectors.parquet.publishing import Publisher
from libs.connectors.parquet.schemas import merged_schema, reconciled
from libs.connectors.parquet.staging import STAGING, Staging
from libs.connectors.parquet.verification import ParquetEnd
from libs.connectors.protocol import (
    ConnectorRefused,
    Preparation,
    Progress,
    RunContext,
    StreamPlan,
    Table,
    Uncounted,
    Written,
)
from libs.connectors.states import StreamState

WRITERS = 2
# The number of the first series of files that hold keys.
KEYS = 400


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

    async def state(self, plan: StreamPlan) -> StreamState | None:
        with translated(self._root):
            return await in_thread(lambda: self._publisher.state(plan))

    async def prepare(self, table: Table) -> Preparation:
        plan = table.plan
        schema = normalised_schema(plan.stream, table.arrow_schema)
        if len(set(schema.names)) != len(schema.names):
            raise ConnectorRefused(f"{plan.stream} has two columns of the same name: leave one of them out")
        if plan.disposition == "merge" and not table.primary_key:
            raise ConnectorRefused(
                f"{plan.stream}: rows can't be merged, because the stream has no primary key among its columns: name "
                "one with primary_key, select append_mode, or choose the mode full_refresh",
                code="key_needed",
            )
        with translated(self._root):
            await in_thread(lambda: self._publisher.refuse_unwritable(plan))
            present = await in_thread(lambda: self._schema_of(plan))
        if present is None:
            return Preparation()
        result = reconciled(plan, present, schema)
        return Preparation(True, result.changes, result.left_out)

    async def write(
        self, table: Table, progress: Progress, *, state: StreamState | None = None, keys: Table | None = None
    ) -> Written:
        plan = table.plan
        with translated(self._root):
            staged = await in_thread(self._publisher.stage)
            try:
                present = None
                if plan.disposition != "replace":
                    present = await in_thread(lambda: self._publisher.present(plan))
                files = await self._stage(table, staged, progress)
                if present is None:
                    rows = sum(file.rows for file in files)
                    version = Version(files, normalised_schema(plan.stream, table.arrow_schema), Counts(inserted=rows))
                else:
                    all_keys = None if keys is None else await self._stage(keys, staged, Uncounted(progress), KEYS)
                    version = await in_thread(lambda: _next_version(table, staged, present, files, all_keys))
                progress.loaded()
                written = await self._written(table, version, files, keys is not None or present is None)
            except BaseException:
                await in_thread(lambda: shutil.rmtree(staged, ignore_errors=True))
                raise
            await in_thread(lambda: self._publisher.publish(plan, staged, version.files, written, state, present))
        return written

    async def compare(self, table: Table) -> Comparison:
        plan = table.plan
        with translated(self._root):
            await in_thread(lambda: self._publisher.refuse_unwritable(plan))
            present = await in_thread(lambda: self._publisher.present(plan))
        if present is None:
            return no_target(plan.target)
        source = table.comparable()
        schema = await in_thread(lambda: schema_of(present[0].path))
        there = ParquetEnd([file.path for file in present], schema, source.columns, source.key)
        return await compare(plan.stream, source, there, circumstances="")

    async def clear(self, plan: StreamPlan) -> None:
        with translated(self._root):
            await in_thread(lambda: self._publisher.clear(plan))

    def _schema_of(self, plan: StreamPlan) -> pa.Schema | None:
        """The columns of the target, None if there is none."""
        if plan.disposition == "replace":
            return self._publisher.present_schema(plan)
        present = self._publisher.present(plan)
        return None if present is None else schema_of(present[0].path)

    async def _stage(self, table: Table, staged: Path, progress: Progress, first_series: int = 0) -> list[StagedFile]:
        # A table without parts still makes a file, which carries the schema.
        parts = table.parts() or [None]
        numbers = itertools.count(first_series)
        schema = normalised_schema(table.plan.stream, table.arrow_schema)
        file_bytes_max = FILE_BYTES_MAX if table.plan.disposition == "replace" else MERGED_FILE_BYTES_MAX
        files: list[StagedFile] = []
        with ThreadPoolExecutor(WRITERS, thread_name_prefix="parquet-write") as pool:

            async def work(remaining: Iterator[Any]) -> None:
                series = FileSeries(staged, next(numbers), schema, file_bytes_max)
                async with FileWriter.open(series, pool) as writer:
                    for part in remaining:
                        if part is not None:
                            await _copy(table, part, schema, writer, progress)
                    await writer.finish()
                files.extend(writer.files)

            await share_out(parts, min(WRITERS, table.connections_max), work)
        return sorted(files, key=lambda file: file.name)

    async def _written(
        self, table: Table, version: "Version", files: Sequence[StagedFile], is_complete: bool
    ) -> Written:
        """Count and compare.

        Args:
            files: of the rows that were read.
            is_complete: the version has all rows of the source and no other.
        """
        plan, counts = table.plan, version.counts
        written = Written(
            sum(file.rows for file in files),
            inserted=counts.inserted,
            updated=counts.updated,
            deleted=counts.deleted,
            unchanged=counts.unchanged,
            values_changed=await table.values_changed(),
        )
        if not self._context.verify:
            return written
        reason = why_not_comparable(plan, is_complete=is_complete)
        if reason is not None:
            return replace(written, verification={"comparable": False, "reason": reason})
        source = table.comparable()
        there = ParquetEnd([file.path for file in version.files], version.schema, source.columns, source.key)
        comparison = await compare(plan.stream, source, there)
        return replace(written, verified=comparison.verified, verification=comparison.document)


@dataclass(frozen=True, slots=True)
class Version:
    """A version of a table that is about to be published."""

    files: Sequence[StagedFile]
    schema: pa.Schema
    counts: Counts


def _next_version(
    table: Table,
    staged: Path,
    present: Sequence[PresentFile],
    files: Sequence[StagedFile],
    keys: Sequence[StagedFile] | None,
) -> Version:
    schema = merged_schema(
        table.plan, schema_of(present[0].path), normalised_schema(table.plan.stream, table.arrow_schema)
    )
    version = NextVersion(staged, schema, present, files)
    if table.plan.disposition == "append":
        version.append()
    else:
        paths = None if keys is None else [file.path for file in keys]
        version.merge(table.primary_key, paths, table.plan.deletes, datetime.now(UTC))
        for path in paths or ():
            path.unlink()
    return Version(version.files, schema, version.counts)


async def _copy(table: Table, part: Any, schema: pa.Schema, writer: FileWriter, progress: Progress) -> None:
    async with contextlib.aclosing(table.batches(part)) as batches:
        async for batch in batches:
            progress.add(rows_read=batch.num_rows, bytes_read=batch.nbytes)
            await writer.write(normalised(table.plan.stream, batch, schema))
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
