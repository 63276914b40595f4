"""Concurrent work of a transfer: parts shared out among workers, and blocking work in threads."""

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from typing import Any, TypeVar

from libs.core.errors import first_error

PartT = TypeVar("PartT")
ResultT = TypeVar("ResultT")


async def all_of(work: Iterable[Coroutine[Any, Any, ResultT]]) -> list[ResultT]:
    """Run concurrently; if one fails the others are cancelled and its error is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in work]
    except BaseExceptionGroup as errors:
        raise first_error(errors) from errors
    return [task.result() for task in tasks]


async def share_out(
    parts: Sequence[PartT], workers: int, work: Callable[[Iterator[PartT]], Coroutine[Any, Any, None]]
) -> None:
    """Run up to ``workers`` workers; each takes its next part from the shared iterator when it has finished one."""
    remaining = iter(parts)
    await all_of(work(remaining) for _ in range(min(workers, len(parts))))


async def in_thread(work: Callable[[], ResultT], executor: Executor | None = None) -> ResultT:
    """Run blocking work in a thread. A cancelled caller waits for its end, as it may be changing files."""
    future = asyncio.get_running_loop().run_in_executor(executor, work)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        await asyncio.wait({future})
        raise
