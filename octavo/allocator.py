"""Settings of a program's memory: the C allocator's, and the garbage collector's."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

# From malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
_KEPT_BYTES = 1 << 30


def keep_freed_memory() -> None:
    """Let glibc reuse freed blocks of up to 1 GiB instead of handing them back to the system.

    By default every large tensor is mapped afresh and its pages fault in one by one as it is
    filled: a quarter to a third of the time of a calibration on the CPU. Memory in use does not
    grow, since a freed block is what the next allocation of that size gets. A setting of the whole
    process, so programs make it, not libraries; without glibc it does nothing.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return
    mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
    mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
    # PyTorch reads this at its first allocation: tensors of 2 MB and more begin at a huge page and
    # use huge pages, which saves faults and misses, and lets freed blocks fit the next tensor.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # The arenas other threads would get are too small for large tensors and map them afresh.
    mallopt(_M_ARENA_MAX, 1)


@contextmanager
def quick_imports() -> Iterator[None]:
    """Import large libraries without the garbage collector, and never look at their objects again.

    PyTorch and ``transformers`` make over a million objects while they load, all of which stay:
    collecting meanwhile, and once more on the way out, costs about a second and frees nothing.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
