"""Bounds the memory of rows of many megabytes: only one reader at a time holds such rows.

The driver may hold three long rows at once: the previous one, the pieces of the next, and the row assembled from them.
"""

import asyncio
import ctypes

LONG_ROW_BYTES = 8 * 1024 * 1024
COPY_HEADER_BYTES = 19

_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)


class LongRowsTurn:
    """One reader's turn: from its start, or from a long row, until its next short row.

    A reader begins with the turn because its first row may be a long one.
    """

    def __init__(self, lock: asyncio.Lock) -> None:
        self._lock = lock
        self._mine = False

    async def begin(self) -> None:
        if not self._mine:
            await self._lock.acquire()
            self._mine = True

    async def arrived(self, size_bytes: int) -> bool:
        """Wait for the turn if the row is long, otherwise end the turn; returns whether the row is long."""
        if size_bytes < LONG_ROW_BYTES:
            # A COPY's header precedes the first row and tells nothing about its size.
            if size_bytes > COPY_HEADER_BYTES:
                self.end()
            return False
        _trim_heap()
        await self.begin()
        return True

    def end(self) -> None:
        if self._mine:
            self._mine = False
            self._lock.release()


def _trim_heap() -> None:
    """Return free memory within the heap to the operating system (glibc only).

    A long row that arrived in pieces leaves as many holes there. It takes milliseconds: only long rows are worth it.
    """
    if _malloc_trim is not None:
        _malloc_trim(0)
