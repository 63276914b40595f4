"""Bounds the memory that requests use for what they read; requests beyond the bound are told to retry.

A page of a list may be large, and many may be requested at once. What a request reads counts until its answer is
sent.
"""

import threading
from collections.abc import AsyncGenerator, AsyncIterable, Mapping
from contextvars import ContextVar
from typing import Any

from aiohttp import web

from libs.core.errors import RetryLater
from libs.core.sizes import text_bytes

READ_BYTES_MAX = 256 * 1024 * 1024
SMALL_BYTES = 64 * 1024

_held: "ContextVar[Held | None]" = ContextVar("held", default=None)


class ReadBudget:
    """The bytes that all requests of a process share. Thread-safe."""

    def __init__(self, size_bytes_max: int = READ_BYTES_MAX) -> None:
        self.size_bytes_max = size_bytes_max
        self.used_bytes = 0
        self._lock = threading.Lock()

    def take(self, size_bytes: int) -> None:
        """Take bytes; raises ``RetryLater`` if other requests hold too many."""
        with self._lock:
            if self.used_bytes and self.used_bytes + size_bytes > self.size_bytes_max:
                message = "too many large answers are being made at the moment"
                raise RetryLater(message, code="overloaded", retry_after_seconds=1)
            self.used_bytes += size_bytes

    def give_back(self, size_bytes: int) -> None:
        with self._lock:
            self.used_bytes -= size_bytes


BUDGET = ReadBudget()


class Held:
    """The bytes that one request has taken."""

    def __init__(self, budget: ReadBudget) -> None:
        self._budget = budget
        self._taken_bytes = 0
        self._small_bytes = 0

    def add(self, size_bytes: int) -> None:
        """Count a read; small reads are summed up to ``SMALL_BYTES`` before they are taken."""
        self._small_bytes += size_bytes
        if self._small_bytes > SMALL_BYTES:
            self._budget.take(self._small_bytes)
            self._taken_bytes += self._small_bytes
            self._small_bytes = 0

    def give_back(self) -> None:
        # Most requests took nothing and need no lock.
        if self._taken_bytes:
            self._budget.give_back(self._taken_bytes)
        self._taken_bytes = self._small_bytes = 0


HELD: web.RequestKey[Held] = web.RequestKey("held", Held)
"""The request's share of the budget."""


def count_reads() -> Held:
    """Start counting the reads of this task; the caller gives the bytes back."""
    held = Held(BUDGET)
    _held.set(held)
    return held


def note_read(size_bytes: int) -> None:
    """Count bytes that the current request has read; raises ``RetryLater`` if the budget is exhausted."""
    held = _held.get()
    if held is not None:
        held.add(size_bytes)


def note_document(document: Mapping[str, Any]) -> None:
    """Count an entity's document by the texts of its state; raises as ``note_read``."""
    note_read(text_bytes(document["state"]))


async def counted(documents: AsyncIterable[dict[str, Any]]) -> AsyncGenerator[dict[str, Any], None]:
    """The documents of a cursor, counted by the texts of their states."""
    async for document in documents:
        note_document(document)
        yield document
