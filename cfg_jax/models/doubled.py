"""An image of twice the size, and its convolution, for which a CPU needs no such image.

In a doubled image (nearest neighbour) every pixel stands four times, so the nine taps of a 3 x 3
kernel fall on four different pixels: taps that fall on one are added before they are multiplied,
which saves half of the products (five ninths, less what is said in `_by_parity`). Even and odd rows
see different pixels, and so do columns: four kernels of 2 x 2.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from cfg_jax.models import affine
from cfg_jax.types import Array

# Which taps of three fall on which of two pixels, for even and for odd rows: [parity, 2, 3].
_FALL_ON = np.array([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], np.float32)


def double(x: Array) -> Array:
    """The nearest neighbour, [B, H, W, C] -> [B, 2 H, 2 W, C]."""
    return x.repeat(2, axis=1).repeat(2, axis=2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _apart(kernel: Array, read: jnp.dtype) -> Array:
    """The kernels by parity of row and column, [row, 2, 2, C, column, D], summed in float32.

    As in `affine` the kernel is read in one precision and its gradient comes in its own; over
    several devices the gradients of these parts are summed, in float32.
    """
    kernel = kernel.astype(read).astype(jnp.float32)
    return jnp.einsum("ipr,jqs,rscd->ipqcjd", _FALL_ON, _FALL_ON, kernel, precision="highest")


def _apart_backward(read: jnp.dtype, kernel: Array, g: Array):
    g = jnp.einsum("ipr,jqs,ipqcjd->rscd", _FALL_ON, _FALL_ON, g, precision="highest")
    return (g.astype(kernel.dtype),)


_apart.defvjp(lambda kernel, read: (_apart(kernel, read), kernel), _apart_backward)


def _by_parity(x: Array, kernel: Array) -> Array:
    """Rows apart, columns side by side in the channels, of which each has a pixel too many.

    XLA:CPU is fast so; with all four in one convolution its gradient took 7 to 90 times as long.
    """
    b, h, w, c = x.shape
    rows = []
    for i, part in enumerate(_apart(kernel, x.dtype)):
        pads = ((1 - i, i), (1, 1))  # even rows see the row above, odd ones the row below
        y = affine.convolve(x, part.reshape(2, 2, c, -1), pads=pads).reshape(b, h, w + 1, 2, -1)
        rows.append(jnp.stack([y[:, :, j : j + w, j] for j in range(2)], axis=3))
    return jnp.stack(rows, axis=2).reshape(b, 2 * h, 2 * w, -1)


def _of_doubled(x: Array, kernel: Array) -> Array:
    return affine.convolve(double(x), kernel)


def convolve(x: Array, kernel: Array) -> Array:
    """`affine.convolve` of `double(x)`: x [B, H, W, C], kernel [3, 3, C, D] -> [B, 2 H, 2 W, D].

    Equal to rounding on all platforms. Only a CPU takes the kernel apart, where it was measured;
    other programs are those of the published network.
    """
    return affine.on_cpu(_by_parity, _of_doubled, x, kernel)
