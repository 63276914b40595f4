"""Runs that write Parquet files, in their own processes, which are killed at the step that a test chooses."""

import asyncio
import multiprocessing
import os
import sys
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from libs.connectors import registry
from libs.connectors.parquet import files, tables
from libs.connectors.parquet.publishing import Publisher
from libs.connectors.protocol import RunContext, StreamName, StreamPlan, Target, Written
from tests.integration.connectors.moving import Counts

ROWS = 40
KILLED = 77
_CHANGES = {"os.rename", "os.link", "os.symlink", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"}
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload([__name__])


@dataclass
class Numbers:
    """A table in two parts, whose rows all hold the same version."""

    plan: StreamPlan
    version: int
    primary_key: tuple[str, ...] = ()
    rows_estimated: int | None = None
    connections_max: int = 2
    arrow_schema = pa.schema([("version", pa.int64()), ("id", pa.int64())])

    def parts(self) -> Sequence[Any]:
        return (0, 1)

    async def batches(self, part: Any) -> AsyncGenerator[pa.RecordBatch, None]:
        for start in range(part * ROWS // 2, (part + 1) * ROWS // 2, ROWS // 4):
            ids = range(start, start + ROWS // 4)
            yield pa.record_batch([[self.version] * len(ids), list(ids)], schema=self.arrow_schema)

    async def values_changed(self) -> Mapping[str, int]:
        return {}


def plan_of_numbers(table: str = "t", namespace: str = "s") -> StreamPlan:
    return StreamPlan(StreamName(namespace, table), Target(namespace, table))


def context_of(epoch: int, job_id: int = 1, run_id: str = "run") -> RunContext:
    return RunContext(job_id=job_id, project_id=1, run_id=f"{run_id}-{epoch}", epoch=epoch)


def open_lake(root: Path) -> Any:
    return registry.open_destination("parquet", {"local_path": str(root)})


async def publish(root: Path, version: int, context: RunContext, plan: StreamPlan | None = None) -> Written:
    async with open_lake(root).open(context) as run:
        table = Numbers(plan or plan_of_numbers(), version)
        await run.prepare(table)
        written: Written = await run.write(table, Counts())
        return written


async def clear(root: Path, context: RunContext, plan: StreamPlan | None = None) -> None:
    async with open_lake(root).open(context) as run:
        await run.clear(plan or plan_of_numbers())


def killed_at(step: int, work: Callable[..., None], *arguments: Any) -> bool:
    """Run ``work`` and kill its process at a step of its publishing or clearing; returns whether it got that far."""
    process = _processes.Process(target=_killed_at, args=(step, work, *arguments))
    process.start()
    process.join(30)
    assert process.exitcode in (0, KILLED), process.exitcode
    return process.exitcode == KILLED


def start(work: Callable[..., None], *arguments: Any) -> Any:
    process = _processes.Process(target=work, args=arguments, daemon=True)
    process.start()
    return process


def publish_version(root: Path, version: int, epoch: int, swaps: bool = True) -> None:
    _without_swaps(swaps)
    asyncio.run(publish(root, version, context_of(epoch)))


def clear_table(root: Path, epoch: int, swaps: bool = True) -> None:
    _without_swaps(swaps)
    asyncio.run(clear(root, context_of(epoch)))


def publish_many(root: Path, versions: int) -> None:
    files.ROW_GROUP_ROWS_MAX = ROWS // 4
    files.FILE_BYTES_MAX = 1
    for version in range(1, versions + 1):
        asyncio.run(publish(root, version, context_of(version)))


def stage_and_wait(root: Path, connection: Any) -> None:
    """Stage a version, send "staged", and wait before publishing it until the process is killed."""

    def stop(*_: Any) -> None:
        connection.send("staged")
        connection.poll(None)

    Publisher.publish = stop  # type: ignore[assignment,method-assign]
    asyncio.run(publish(root, 1, context_of(1, job_id=9)))


def pipe() -> tuple[Any, Any]:
    return _processes.Pipe()


def _without_swaps(swaps: bool) -> None:
    if not swaps:
        tables.can_swap = lambda folder: False  # type: ignore[attr-defined]


def _killed_at(step: int, work: Callable[..., None], *arguments: Any) -> None:
    counted = 0
    counting = False

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal counted
        # Folders are opened to be synced after a change. Counting these covers changes that raise no audit event.
        opened = event == "open" and arguments[2] & (os.O_CREAT | os.O_DIRECTORY)
        if counting and (opened or event in _CHANGES):
            counted += 1
            if counted == step:
                os._exit(KILLED)

    def counted_from(method: Callable[..., None]) -> Callable[..., None]:
        def begin(*given: Any) -> None:
            nonlocal counting
            counting = True
            method(*given)

        return begin

    Publisher.publish = counted_from(Publisher.publish)  # type: ignore[method-assign]
    Publisher.clear = counted_from(Publisher.clear)  # type: ignore[method-assign]
    sys.addaudithook(count)
    work(*arguments)
