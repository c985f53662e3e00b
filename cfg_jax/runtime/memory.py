"""The C library's allocator, set for programs that ask for much at once, again and again.

Without effect but on Linux with glibc (2.33 or later).
"""

import ctypes
import sys

# From <malloc.h>: one pool for all threads, no mapping of its own for what is large, no trimming.
_OPTIONS = (
    (-8, 1),  # M_ARENA_MAX
    (-4, 0),  # M_MMAP_MAX
    (-1, -1),  # M_TRIM_THRESHOLD: none
)
_LARGE = 1 << 20  # bytes: there are few pieces as large as this, and a program's temporaries fit
_SMALL = 128


class _Mallinfo2(ctypes.Structure):
    """`struct mallinfo2` of <malloc.h>. Its `keepcost` bytes are free at the pool's upper end."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


def _glibc() -> ctypes.CDLL | None:
    """The allocator's functions, with their types."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        return None
    libc.mallinfo2.restype = _Mallinfo2
    libc.sbrk.argtypes, libc.sbrk.restype = [ctypes.c_ssize_t], ctypes.c_void_p
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.free.argtypes, libc.free.restype = [ctypes.c_void_p], None
    libc.malloc_trim.argtypes = [ctypes.c_size_t]
    return libc


def keep() -> None:
    """Lets the allocator keep what is freed.

    XLA:CPU allocates a program's temporaries, all in one piece, at each call. Given back to the
    system in between, they are mapped, and zeroed page by page, again at every step. To be called
    before jax starts its threads, whose own pools cannot grow as large. Not for machines with
    accelerators, where many threads read data: they would wait for one another.
    """
    if libc := _glibc():
        for option, value in _OPTIONS:
            libc.mallopt(option, value)


def fill_holes() -> None:
    """Takes what is free in pieces of less than a MiB, for good. To be called after `keep`.

    A compiler leaves the pool in a hundred thousand pieces. Free ones of similar sizes are in one
    list by size, along which glibc goes whenever one is taken or put back: tens of microseconds,
    ten thousand times in a step. So later calls are given whole what the holes would give them in
    pieces. The holes' pages go back to the system, and only their addresses are lost.
    """
    libc = _glibc()
    if libc is None:
        return
    libc.malloc_trim(0)
    end = libc.sbrk(0) - libc.mallinfo2().keepcost

    def take(size: int) -> list[int]:
        """Pieces of `size` bytes until there is no hole for one."""
        pieces = []
        while (piece := libc.malloc(size)) and piece < end:
            pieces.append(piece)
        libc.free(piece)
        return pieces

    large = take(_LARGE)
    size = _LARGE
    while size > _SMALL:
        size = max(_SMALL, size * 5 // 6)
        take(size)
    for piece in large:
        libc.free(piece)
