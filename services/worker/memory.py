"""Keeps the worker's memory near what it holds: large buffers go back to the system, others are used again at once."""

import ctypes
import os

# Of <malloc.h>: from the first size on, free memory at the end of a heap is given back; from the second on, a buffer is
# mapped alone and unmapped when it is freed. Each page of a mapping costs a fault, so only few and large ones get one.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
TRIMMED_BYTES_MIN = 16 * 1024 * 1024
MAPPED_BYTES_MIN = 1024 * 1024
ARENAS_MAX = 2


def bound_memory() -> None:
    """Call once, before Arrow or NumPy is imported; ``make bench ONLY=postgres_to_parquet`` shows what it is worth."""
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    # There is no algebra here: its threads would hold stacks and wait busily.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, TRIMMED_BYTES_MIN)
        mallopt(_M_MMAP_THRESHOLD, MAPPED_BYTES_MIN)
        mallopt(_M_ARENA_MAX, ARENAS_MAX)
