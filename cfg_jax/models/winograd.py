"""A 3 x 3 convolution with half of the products, which a CPU takes for large ones.

Of four numbers a and three numbers k, as coefficients of polynomials, the convolution is the
coefficients of the product. Six points determine those, and at a point the values are simply
multiplied: with E_n the values of a polynomial of n coefficients at five points and at infinity,

    a convolved with k = E_6^-1 ((E_4 a) * (E_3 k)),     6 products in place of 12.

A network's convolution is the transposed map from six pixels x in a row to four:

    y = E_4^T ((E_3 k) * (E_6^-T x)).

Here this is done along the rows of an image and of its kernel: every fourth column of pixels, with
its neighbours, makes the six images E_6^-T x of a quarter of the width, which are convolved along
the columns by the six kernels E_3 k, of 3 x 1 taps. Winograd (1980); for networks Lavin & Gray
(2016), F(4, 3), with points that round less: by 8e-7 of a result in float32 (L2), where the plain
sums do by 4e-7.
"""

import functools
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from cfg_jax.models import affine, once
from cfg_jax.types import Array

_TILE = 4  # results of a row at a time
_POINTS = (0, 0.5**0.5, -(0.5**0.5), 2**0.5, -(2**0.5))


def _values(coefficients: int) -> np.ndarray:
    """E_n [6, n]; at infinity a polynomial is its leading coefficient."""
    powers = np.vander(_POINTS, coefficients, increasing=True)
    return np.vstack([powers, np.eye(coefficients)[-1]])


_FROM_PIXELS = np.linalg.inv(_values(6)).T.round(12)  # [6, 6]; without rounding's near zeros
_FROM_TAPS = _values(3)  # [6, 3]
_TO_RESULTS = _values(_TILE).T  # [4, 6]


def _combine(matrix: np.ndarray, arrays: Sequence[Array]) -> list[Array]:
    """The matrix times a vector of arrays."""
    return [
        functools.reduce(operator.add, (float(m) * x for m, x in zip(row, arrays) if m))
        for row in matrix
    ]


def _neighbours(pixels: Array, by: int) -> Array:
    """Of each tile the pixel of the tile before it (1) or after it (-1), zero at the end."""
    return jax.lax.pad(
        pixels, jnp.zeros((), pixels.dtype), [(0, 0, 0), (0, 0, 0), (by, -by, 0), (0, 0, 0)]
    )


def by_columns(x: Array, kernel: Array) -> Array:
    """`affine.convolve` of half of the products: x [B, H, W, C], W a multiple of 4, by kernel
    [3, 3, C, D] -> [B, H, W, D]."""
    b, h, w, c = x.shape
    tiles = jnp.split(x.reshape(b, h, w // _TILE, _TILE, c), _TILE, axis=3)
    first, *_, last = pixels = [p.squeeze(3) for p in tiles]
    pixels = [_neighbours(last, 1), *pixels, _neighbours(first, -1)]
    taps = [k.squeeze(1) for k in jnp.split(kernel.astype(x.dtype), 3, axis=1)]
    pairs = zip(_combine(_FROM_PIXELS, pixels), _combine(_FROM_TAPS, taps))
    products = [affine.convolve(once.settled(v), once.settled(u)[:, None]) for v, u in pairs]
    return jnp.stack(_combine(_TO_RESULTS, products), axis=3).reshape(b, h, w, -1)


def convolve(x: Array, kernel: Array) -> Array:
    """`affine.convolve`, equal to rounding: x [B, H, W, C], kernel [3, 3, C, D] -> [B, H, W, D].

    A CPU makes half of the products of float32 images from 16 pixels wide between 64 channels or
    more. Measured to pay at 16 and 32 pixels and 64 to 256 channels, and not below (docs/speed.md).
    """
    w, c, d = x.shape[2], *kernel.shape[2:]
    if x.dtype != jnp.float32 or w < 16 or w % _TILE or min(c, d) < 64:
        return affine.convolve(x, kernel)
    return affine.on_cpu(by_columns, affine.convolve, x, kernel)
