"""Memory: what the allocator does with what a process frees.

A run asks for it again at once, so it is kept; a server passes on a megabyte at a time for as many
sites as there are, so all of its threads share it.

Activations are megabytes that come and go with every step. By default glibc hands them back to the
kernel, which clears each page before it gives it out again: up to a tenth of a CNN's time.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Mapping

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD, ARENA_MAX = -1, -2, -3, -8


def keep_freed_memory() -> None:
    """Raise glibc's thresholds for this process, for good; elsewhere do nothing.

    Threads that are started afterwards share one heap, unless there are many already.
    """
    # 32 MiB is the most that glibc takes for the first. What one thread has freed another can take:
    # they ask for few and large pieces.
    _set({MMAP_THRESHOLD: 32 << 20, TRIM_THRESHOLD: 512 << 20, TOP_PAD: 16 << 20, ARENA_MAX: 1})


def share_freed_memory() -> None:
    """Have glibc's threads share one heap, in which pieces of megabytes are used again.

    By itself each thread keeps what passed through it: tens of megabytes for every site. To give it
    back to the kernel each time would cost a page fault for every 4 KiB that come or go.
    """
    _set({MMAP_THRESHOLD: 4 << 20, TRIM_THRESHOLD: 8 << 20, ARENA_MAX: 1})


def _set(options: Mapping[int, int]) -> None:
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in options.items():
            mallopt(option, value)
