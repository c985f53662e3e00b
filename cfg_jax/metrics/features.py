"""What every metric takes: features [N, D], one row an image, in any real dtype, on disk or off.

N counts images and D features; K classes, as everywhere. A metric reads its rows in blocks of
float64, so that a float32 memory map of any length costs the memory of a few blocks.
"""

from collections.abc import Iterator

import numpy as np

from cfg_jax.types import UsageError

BLOCK = 1024  # images a side of a block of distances: 8 MiB, whatever the number of images


def checked(features, name: str, *, at_least: int) -> np.ndarray:
    """The features [N, D], if a metric can be made of them.

    `name` says whose they are, in the one line of a UsageError: raised where they are no matrix of
    real numbers, have fewer than `at_least` rows, or hold NaN or infinity.
    """
    features = np.asarray(features)
    if features.ndim != 2 or features.shape[1] == 0 or features.dtype.kind not in "fiu":
        raise UsageError(
            f"{name}: an array {list(features.shape)} of {features.dtype} was given; a matrix "
            "[images, features] of real numbers is needed."
        )
    if len(features) < at_least:
        raise UsageError(
            f"{name}: {len(features)} images were given; this metric needs {at_least} or more."
        )
    # The two ends tell of every NaN and infinity, and allocate nothing.
    if not (np.isfinite(features.min()) and np.isfinite(features.max())):
        bad = next(i for i, row in enumerate(features) if not np.isfinite(row).all())
        raise UsageError(
            f"{name}: NaN or infinity at image {bad}; look whether the network or the sampler "
            "diverged there."
        )
    return features


def checked_pair(generated, real, *, at_least: int) -> tuple[np.ndarray, np.ndarray]:
    """Features [N, D] of generated images and [M, D] of real ones; UsageError where D differs."""
    generated = checked(generated, "features of generated images", at_least=at_least)
    real = checked(real, "features of real images", at_least=at_least)
    if generated.shape[1] != real.shape[1]:
        raise UsageError(
            f"features of generated images have {generated.shape[1]} dimensions and those of real "
            f"images {real.shape[1]}: extract both with the same network."
        )
    return generated, real


def blocks(features: np.ndarray, size: int) -> Iterator[tuple[slice, np.ndarray]]:
    """(rows, features[rows] as float64) for consecutive blocks of `size` rows, in order."""
    for start in range(0, len(features), size):
        rows = slice(start, min(start + size, len(features)))
        yield rows, features[rows].astype(np.float64)


def squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """|a|^2 + |b|^2 - 2 a.b for a [N, D] and b [M, D] in float64: [N, M].

    What rounding cannot tell from 0 is 0, so that copies of an image are at 0 in every block.
    Centred features lose fewer digits.
    """
    squares = np.square(a).sum(1)[:, None] + np.square(b).sum(1)
    distances = squares - 2 * a @ b.T
    distances[distances <= 4 * a.shape[1] * np.finfo(np.float64).eps * squares] = 0
    return distances
