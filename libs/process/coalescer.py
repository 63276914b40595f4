"""Concurrent look-ups by key, answered with few queries."""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Generic, TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


class Coalescer(Generic[Key, Value]):
    """Gathers the keys that arrive while a query runs, and looks them up together with the next query.

    A look-up is never answered by a query that had started before it, so it sees everything that was written before.

    Args:
        query: looks up several keys; a key without a value is left out of its result.
        keys_max: how many keys go into one query.
    """

    def __init__(self, query: Callable[[Collection[Key]], Awaitable[Mapping[Key, Value]]], keys_max: int) -> None:
        self._query = query
        self._keys_max = keys_max
        self._waiting: dict[Key, list[asyncio.Future[Value | None]]] = {}
        self._task: asyncio.Task[None] | None = None

    async def get(self, key: Key) -> Value | None:
        """The key's value, or None; raises what the query raises."""
        future: asyncio.Future[Value | None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(key, []).append(future)
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        return await future

    async def _run(self) -> None:
        try:
            while self._waiting:
                await self._look_up({key: self._waiting.pop(key) for key in list(self._waiting)[: self._keys_max]})
        finally:
            self._task = None

    async def _look_up(self, callers: "dict[Key, list[asyncio.Future[Value | None]]]") -> None:
        try:
            values = await self._query(callers.keys())
        except BaseException as error:
            for future in _open(callers.values()):
                future.set_exception(error)
            if not isinstance(error, Exception):
                raise
            return
        for key, futures in callers.items():
            for future in _open([futures]):
                future.set_result(values.get(key))


def _open(futures: "Collection[list[asyncio.Future[Value | None]]]") -> "list[asyncio.Future[Value | None]]":
    """Those whose callers still wait."""
    return [future for each in futures for future in each if not future.done()]
