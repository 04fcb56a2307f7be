"""The C library's memory of freed tensors."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Of glibc's <malloc.h>."""


def keep_freed_memory() -> None:
    """Let the process keep the memory of tensors that are freed, for the tensors of the next step.

    glibc gives blocks of tens of megabytes back to the system at once, and the system zeroes the pages of the next one:
    with 18,000 tokens in a micro-batch of the demo's model that was a third of a training step. GPUs have an allocator
    of their own. Does nothing where the C library is another one.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_MAX, 0)  # from the heap, not in mappings of their own
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
