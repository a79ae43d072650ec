"""Has the C library keep the memory of freed tensors, so that the next step finds it instead of asking the kernel.

A step on the CPU allocates and frees the same large buffers again and again. glibc maps each large one anew from the
kernel and gives it back when it is freed, so that every page is faulted in and zeroed at every use.

Page faults of repeated steps fall to less than a fifth (a test holds it). What it gives in time is told apart in
`benchmarks/accumulation.py` by a peer with and without it.
"""

from __future__ import annotations

import ctypes
import platform
import sys

M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4
"""Numbers of mallopt's options in glibc's malloc.h."""


def reuse_large_buffers() -> bool:
    """Keep what is freed within this process. Of use on Linux with glibc; elsewhere it does nothing.

    Large buffers then come from the heap (M_MMAP_MAX = 0) and the heap is never given back (M_TRIM_THRESHOLD = -1).
    Results do not change, and the process stays as large as it ever was. To be called by whoever owns the process,
    before its first step, which should run in the main thread: only the main thread's heap can grow without limit.

    Returns:
        Whether the C library took the settings.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return mallopt(M_MMAP_MAX, 0) == 1 and mallopt(M_TRIM_THRESHOLD, -1) == 1
