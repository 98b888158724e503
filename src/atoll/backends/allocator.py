"""Memory: let the allocator keep what a run frees, because it is asked for again at once.

Activations are megabytes that come and go with every step. By default glibc hands them back to the
kernel, which clears each page before it gives it out again: up to a tenth of a CNN's time.
"""

from __future__ import annotations

import ctypes
import platform

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD, ARENA_MAX = -1, -2, -3, -8


def keep_freed_memory() -> None:
    """Raise glibc's thresholds for this process, for good; elsewhere do nothing.

    Threads that are started afterwards share one heap, unless there are many already.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        # 32 MiB is the most that glibc takes for the first.
        for option, value in (
            (MMAP_THRESHOLD, 32 << 20),
            (TRIM_THRESHOLD, 512 << 20),
            (TOP_PAD, 16 << 20),
            # What one thread has freed another can take: they ask for few and large pieces.
            (ARENA_MAX, 1),
        ):
            mallopt(option, value)
