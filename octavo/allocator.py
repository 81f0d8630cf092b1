"""The C allocator's settings for a process that computes in large temporaries."""

from __future__ import annotations

import ctypes

# From malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
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
