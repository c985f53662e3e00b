"""The kernel inception distance (Binkowski et al., 2018).

KID is the squared maximum mean discrepancy of two sets of features under the polynomial kernel
k(x, y) = (x.y / D + 1)^3, estimated without bias for independent draws: it does not depend on the
number of images, and may come out below 0.

Sets with the same number of images of each class are no independent draws. In each of them an image
meets fewer others of its class than it does in the other set, so that KID comes out too low: for C
classes and n images by 2 (C - 1) / (C (n - 1)) of what the kernel is larger within a class than
between two. With few images, and features that tell classes apart, that is all one sees.
"""

from typing import NamedTuple

import numpy as np

from cfg_jax.metrics import features
from cfg_jax.types import UsageError


class Kid(NamedTuple):
    """The distance and its standard error."""

    value: float
    error: float


def kid(
    generated, real, *, subsets: int = 100, subset_size: int | None = None, seed: int = 0
) -> Kid:
    """The mean KID of random subsets of features [N, D] and [M, D], in O(subsets subset_size^2 D).

    subset_size is 1,000, or half of the smaller set if that is less, unless told. The subsets are
    drawn without replacement, each afresh; they share images, so the spread of their values is
    turned into a standard error as in the jackknife that leaves out N - subset_size images (Shao &
    Wu, 1989). Where the sets hardly differ the true error is smaller. UsageError for fewer than 4
    images, fewer than 2 subsets, or subsets of less than 2 or of all images.
    """
    generated, real = features.checked_pair(generated, real, at_least=4)
    count = min(len(generated), len(real))
    size = min(1000, count // 2) if subset_size is None else subset_size
    if not 2 <= size < count:
        raise UsageError(f"subset_size={size}: from 2 to {count - 1}, of {count} images, is right.")
    if subsets < 2:
        raise UsageError(f"subsets={subsets}: a standard error needs 2 or more; try 100.")
    rng = np.random.default_rng(seed)

    def draw(rows):
        return rows[rng.choice(len(rows), size, replace=False)].astype(np.float64)

    values = [discrepancy(draw(generated), draw(real)) for _ in range(subsets)]
    error = np.std(values, ddof=1) * np.sqrt(size / (count - size) + 1 / subsets)
    return Kid(float(np.mean(values)), float(error))


def discrepancy(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased squared discrepancy of x [N, D] and y [M, D] (Gretton et al., 2012, eq. 3)."""
    within = _mean_of_kernel(x, x, but_diagonal=True) + _mean_of_kernel(y, y, but_diagonal=True)
    return float(within - 2 * _mean_of_kernel(x, y))


def _mean_of_kernel(x: np.ndarray, y: np.ndarray, *, but_diagonal: bool = False) -> float:
    base = (x / x.shape[1]) @ y.T
    base += 1
    if but_diagonal:
        np.fill_diagonal(base, 0)
    # A power, or a product stored, would take several times as long as this sum of cubes.
    return np.vdot(base * base, base) / (base.size - but_diagonal * len(x))
