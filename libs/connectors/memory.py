"""Giving memory back to the operating system."""

import ctypes

_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)


def give_back_free_memory() -> None:
    """Give back what is free within the heap: a long row that came in pieces leaves as many holes there.

    Of glibc only; worth its milliseconds after something of many megabytes.
    """
    if _malloc_trim is not None:
        _malloc_trim(0)
