"""Random draws for dropout, which a CPU makes in one pass.

`jax.random.bits` on CPU is a loop over Threefry's rounds that writes all words to memory and reads
them again at each; here the rounds are written out, and become one pass. The draws are the same on
every platform, and other platforms' programs are made of jax's own words.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from cfg_jax.types import Array

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))  # of four rounds, and of the next four


def draws(key: Array, count: int, size: int) -> Array:
    """Uniform integers below 2^16, uint32 [count, size]: halves of the words of `jax.random.bits`.

    In a row the lower halves come first, then the upper ones.
    """
    shape = (count, -(-size // 2))
    known = jax.random.key_impl(key) == "threefry2x32" and jax.config.jax_threefry_partitionable
    known &= math.prod(shape) < 2**32
    split = jax.lax.platform_dependent(
        key,
        cpu=functools.partial(_written_out if known else _halves, shape=shape),
        default=functools.partial(_halves, shape=shape),
    )
    return split[:, :size]


def _halves(key: Array, shape: tuple[int, int]) -> Array:
    words = jax.random.bits(key, shape)
    return jnp.concatenate([words & 0xFFFF, words >> 16], axis=1)


@functools.partial(jax.jit, static_argnames="shape")  # traced once for blocks of one shape
def _written_out(key: Array, shape: tuple[int, int]) -> Array:
    """`_halves` by Threefry-2x32 with 20 rounds (Salmon et al., 2011, section 3.3) of 0, 1, 2, ...

    Both words of a counter are folded into one, as in jax.random. The halves are made by shifts:
    XLA:CPU is slow in a concatenation. The barrier has each word made once: see `once`.
    """
    key = jax.random.key_data(key)
    row, column = (jax.lax.broadcasted_iota(jnp.uint32, shape, axis) for axis in (0, 1))
    schedule = (key[0], key[1], key[0] ^ key[1] ^ np.uint32(0x1BD11BDA))
    a, b = jnp.broadcast_to(key[0], shape), row * np.uint32(shape[1]) + column + key[1]
    for i in range(5):
        for distance in _ROTATIONS[i % 2]:
            a = a + b
            b = a ^ (b << np.uint32(distance) | b >> np.uint32(32 - distance))
        a = a + schedule[(i + 1) % 3]
        b = b + schedule[(i + 2) % 3] + np.uint32(i + 1)
    words = jax.lax.optimization_barrier(a ^ b)
    return (words[:, None] >> np.uint32([[0], [16]]) & 0xFFFF).reshape(shape[0], -1)
