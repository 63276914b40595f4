"""Bounds the worker's memory: large buffers are returned to the operating system, small ones are reused."""

import ctypes
import os

# From <malloc.h>. Free memory at the end of a heap is returned above the first threshold. Buffers above the second get
# a mapping of their own, unmapped when they are freed. That costs a page fault per page, so few buffers get one.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
TRIMMED_BYTES_MIN = 16 * 1024 * 1024
MAPPED_BYTES_MIN = 1024 * 1024
ARENAS_MAX = 2


def bound_memory() -> None:
    """Call once, before Arrow or NumPy is imported. ``make bench ONLY=postgres_to_parquet`` measures the effect."""
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    # No linear algebra is done, so OpenBLAS needs no threads, which would only use memory and spin.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, TRIMMED_BYTES_MIN)
        mallopt(_M_MMAP_THRESHOLD, MAPPED_BYTES_MIN)
        mallopt(_M_ARENA_MAX, ARENAS_MAX)
