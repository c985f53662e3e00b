"""The C library's allocator, set for programs that ask for much at once, again and again."""

import ctypes
import sys

# From <malloc.h>: one pool for all threads, no mapping of its own for what is large, no trimming.
_OPTIONS = (
    (-8, 1),  # M_ARENA_MAX
    (-4, 0),  # M_MMAP_MAX
    (-1, -1),  # M_TRIM_THRESHOLD: none
)


def keep() -> None:
    """Lets the allocator keep what is freed. Without effect but on Linux with glibc.

    XLA:CPU allocates a program's temporaries, all in one piece, at each call. Given back to the
    system in between, they are mapped, and zeroed page by page, again at every step. To be called
    before jax starts its threads, whose own pools cannot grow as large. Not for machines with
    accelerators, where many threads read data: they would wait for one another.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in _OPTIONS:
            mallopt(option, value)
