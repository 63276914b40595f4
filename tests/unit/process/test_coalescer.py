"""Look-ups that meet share a query; each sees what was written before it began."""

import asyncio
from collections.abc import Collection, Mapping

import pytest

from libs.process.coalescer import Coalescer


class Store:
    """Answers queries when the test lets it."""

    def __init__(self) -> None:
        self.values: dict[str, int] = {}
        self.queries: list[list[str]] = []
        self.failure: Exception | None = None
        self._begun = asyncio.Event()
        self._answers = asyncio.Event()
        self._answers.set()

    async def query(self, keys: Collection[str]) -> Mapping[str, int]:
        self.queries.append(sorted(keys))
        found = {key: self.values[key] for key in keys if key in self.values}
        self._begun.set()
        await self._answers.wait()
        if self.failure is not None:
            raise self.failure
        return found

    async def hang(self) -> None:
        """From the next query on, until ``answer``; returns when that one has begun."""
        self._begun.clear()
        self._answers.clear()
        await self._begun.wait()

    def answer(self) -> None:
        self._answers.set()


async def test_look_ups_that_meet_share_a_query() -> None:
    store = Store()
    store.values = {"a": 1, "b": 2}
    coalescer = Coalescer(store.query, 10)
    assert await asyncio.gather(*map(coalescer.get, "abac")) == [1, 2, 1, None]
    assert store.queries == [["a", "b", "c"]]


async def test_a_look_up_during_a_query_waits_for_the_next_and_sees_what_was_written_before() -> None:
    store = Store()
    coalescer = Coalescer(store.query, 10)
    hanging = asyncio.create_task(store.hang())
    first = asyncio.create_task(coalescer.get("a"))
    await hanging
    store.values = {"a": 1, "b": 2}
    later = [asyncio.create_task(coalescer.get(key)) for key in "ab"]
    store.answer()
    assert [await first, *[await each for each in later]] == [None, 1, 2]
    assert store.queries == [["a"], ["a", "b"]]


async def test_a_query_is_bounded() -> None:
    store = Store()
    coalescer = Coalescer(store.query, 2)
    await asyncio.gather(*map(coalescer.get, "abcde"))
    assert store.queries == [["a", "b"], ["c", "d"], ["e"]]


async def test_a_failure_is_raised_to_those_who_share_the_query_and_to_nobody_else() -> None:
    store = Store()
    store.failure = ValueError("no")
    coalescer = Coalescer(store.query, 10)
    assert await asyncio.gather(*map(coalescer.get, "aab"), return_exceptions=True) == [store.failure] * 3
    store.failure = None
    assert await coalescer.get("a") is None


async def test_a_caller_that_is_cancelled_takes_nothing_from_the_others() -> None:
    store = Store()
    store.values = {"a": 1}
    coalescer = Coalescer(store.query, 10)
    hanging = asyncio.create_task(store.hang())
    leaving, staying = (asyncio.create_task(coalescer.get("a")) for _ in range(2))
    await hanging
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    store.answer()
    assert await staying == 1
    assert store.queries == [["a"]]
