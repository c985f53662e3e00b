"""What becomes of freed memory, each in a process of its own: the settings last as long as one."""

import subprocess
import sys

import pytest

from cfg_jax.runtime import memory

needs_glibc = pytest.mark.skipif(
    not hasattr(memory._glibc(), "mallinfo2"),
    reason="NOT TESTED: what becomes of freed memory. It needs Linux with glibc 2.33 or later",
)


def told(code: str) -> str:
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-2000:]
    return process.stdout


# A piece of a MiB lies beyond all holes that a fresh process has: what is freed before it is one.
ROW = """
import ctypes
from pathlib import Path
from cfg_jax.runtime import memory

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1024

libc = memory._glibc()
def piece(size):
    address = libc.malloc(size)
    ctypes.memset(address, 1, size)
    return address

memory.keep()
fixed = [piece(1 << 20)]
"""


@needs_glibc
def test_what_is_freed_stays_with_the_process():
    code = f"{ROW}\nbig = piece(64 << 20); libc.free(big); print(resident() > 64)"
    assert told(code) == "True\n"


@needs_glibc
@pytest.mark.parametrize("size", [500, 100_000, 900_000])
def test_holes_are_filled_for_good(size):
    """And their pages given back, but not what is small beside a page."""
    code = f"""{ROW}
size, count = {size}, 64_000_000 // {size}
pieces = [piece(size) for _ in range(count)]
fixed.append(piece(1 << 20))
for address in pieces[::2]:
    libc.free(address)
inside = lambda address: min(pieces) <= address <= max(pieces)
again = piece(size)
assert inside(again), "not a hole, or no search finds it"
libc.free(again)
before = resident()
memory.fill_holes()
print(before - resident() > 25, [inside(piece(size)) for _ in range(3)])
"""
    assert told(code) == f"{size > 5000} [False, False, False]\n"


@needs_glibc
def test_not_without_end():
    """A notebook compiles all day."""
    code = f"""{ROW}
memory._MOST = 15_000_000
for filled in range(3):
    pieces = [piece(100_000) for _ in range(200)]
    fixed.append(piece(1 << 20))
    for address in pieces[::2]:
        libc.free(address)
    memory.fill_holes()
    print(min(pieces) <= piece(90_000) <= max(pieces), memory._taken // 1_000_000)
"""
    first, second, third = (line.split() for line in told(code).splitlines())
    assert first[0] == "False" and third[0] == "True"
    assert int(first[1]) < int(second[1]) == int(third[1]) == 15


@needs_glibc
def test_whole_mebibytes_stay_free():
    code = f"""{ROW}
big = piece(64 << 20)
fixed.append(piece(1 << 20))
libc.free(big)
memory.fill_holes()
print(big <= piece(63 << 20) < big + (1 << 20))
"""
    assert told(code) == "True\n"


@needs_glibc
def test_no_more_than_is_free_is_taken():
    """Where mapped memory lies below the pool, no address tells that there are no more holes."""
    code = f"""{ROW}
import resource
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
libc.sbrk = lambda _: 1 << 60
memory._glibc = lambda: libc
before = libc.mallinfo2().arena
memory.fill_holes()
print(libc.mallinfo2().arena - before < 32 << 20)
"""
    assert told(code) == "True\n"


def test_a_long_compilation_on_a_cpu_is_followed_by_it():
    code = """
import jax
import numpy as np
from cfg_jax.runtime import memory
from cfg_jax.runtime import mesh as meshes
jax.config.update("jax_platforms", "cpu")
filled = []
memory.fill_holes = lambda: filled.append(0)
for _ in range(2):
    meshes.split_cpu(8)
told = []
def compiled(seconds=None):
    filled.clear()
    if seconds is None:
        jax.jit(lambda x: x + 1)(np.ones(3, np.float32))
    else:
        jax.monitoring.record_event_duration_secs(meshes._COMPILED, seconds)
    told.append(len(filled))
compiled(meshes._LONG - 1)
compiled(meshes._LONG + 1)
meshes._LONG = 0
compiled()  # the event has the name that jax gives it
told[-1] = told[-1] > 0
jax.default_backend = lambda: "gpu"
compiled(10)
print(told)
"""
    assert told(code) == "[0, 1, True, 0]\n"
