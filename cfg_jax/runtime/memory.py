"""The C library's allocator, set for programs that ask for much at once, again and again.

Without effect but on Linux with glibc.
"""

import ctypes
import sys

# From <malloc.h>: one pool for all threads, no mapping of its own for what is large, no trimming.
_OPTIONS = (
    (-8, 1),  # M_ARENA_MAX
    (-4, 0),  # M_MMAP_MAX
    (-1, -1),  # M_TRIM_THRESHOLD: none
)
_LARGE = 1 << 20  # bytes: there are few holes as large as this, and temporaries may fit into them
_SMALL = 128
_MOST = 4 << 30  # what may be taken in all, a third of it resident
_taken = 0


class _Mallinfo2(ctypes.Structure):
    """`struct mallinfo2` of <malloc.h>: fordblks bytes are free, keepcost of them at the end."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


def _glibc() -> ctypes.CDLL | None:
    """glibc's own functions, whatever allocator is preloaded, with their types."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return None
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    libc.malloc.argtypes, libc.malloc.restype = [size], pointer
    libc.free.argtypes, libc.free.restype = [pointer], None
    libc.malloc_trim.argtypes = [size]
    libc.sbrk.argtypes, libc.sbrk.restype = [ctypes.c_ssize_t], pointer
    if hasattr(libc, "mallinfo2"):  # from 2.33
        libc.mallinfo2.restype = _Mallinfo2
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
    """Takes what is free in small holes, for good. To be called after `keep`.

    A compiler leaves the pool in a hundred thousand pieces. Free ones of similar sizes are in one
    list by size, along which glibc goes whenever one is taken or put back: tens of microseconds,
    ten thousand times in a step. So later calls are given whole what the holes would give them in
    pieces. Of a hole of a MiB or more the whole MiB stay free. All pages that are free go to the
    system first, so what is lost are addresses and the holes of less than a page: 4 GiB of
    addresses at most in a process's life, as it may compile again and again. Needs glibc 2.33.
    """
    global _taken
    libc = _glibc()
    if libc is None or not hasattr(libc, "mallinfo2"):
        return
    libc.malloc_trim(0)
    info = libc.mallinfo2()
    end, room = libc.sbrk(0) - info.keepcost, info.fordblks - info.keepcost
    large, size = [], _LARGE
    while size >= _SMALL:
        while room > 0 and _taken < _MOST and (piece := libc.malloc(size)):
            if piece >= end:  # no hole has room for it
                libc.free(piece)
                break
            room -= size
            if size == _LARGE:
                large.append(piece)
            else:
                _taken += size
        size = size * 5 // 6
    for piece in large:
        libc.free(piece)
