"""Improved precision and recall (Kynkaanniemi et al., 2019).

The manifold of a set is the union of balls around its points, each as wide as the way to the
point's k-th nearest neighbour in the set. Precision is the share of generated images on the
manifold of the real ones, recall the share of real images on the manifold of the generated ones.
Compare equal numbers of images: both depend on them.
"""

import warnings
from typing import NamedTuple

import numpy as np

from cfg_jax.metrics import features, neighbours
from cfg_jax.types import UsageError


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1]: of generated images that look real, of real ones that are covered."""

    precision: float
    recall: float


class Inside(NamedTuple):
    """Which images lie on the other set's manifold; their means are precision and recall."""

    generated: np.ndarray  # bool [N]
    real: np.ndarray  # bool [M]


def precision_recall(generated, real, *, k: int = 3) -> PrecisionRecall:
    """Precision and recall of features [N, D] against [M, D]; raises as `inside`."""
    on = inside(generated, real, k=k)
    return PrecisionRecall(float(on.generated.mean()), float(on.real.mean()))


def inside(generated, real, *, k: int = 3) -> Inside:
    """For each image of features [N, D] and [M, D], whether it is on the other set's manifold.

    O((N^2 + M^2 + 2 N M) D / 2) in float64, in the memory of a few blocks. UsageError for k < 1,
    k images or fewer in a set, dimensions that differ, NaN or infinity.
    """
    if k < 1:
        raise UsageError(f"k={k}: the neighbour that sets a radius is the first or later; try 3.")
    generated, real = features.checked_pair(generated, real, at_least=k + 1)
    centre = real.mean(0, dtype=np.float64)
    of_generated = _squared_radii(generated, centre, k, "generated")
    of_real = _squared_radii(real, centre, k, "real")
    on = Inside(np.zeros(len(generated), bool), np.zeros(len(real), bool))
    for rows, a in features.blocks(generated, features.BLOCK):
        a -= centre
        for columns, b in features.blocks(real, features.BLOCK):
            square = features.squared_distances(a, b - centre)
            on.generated[rows] |= (square <= of_real[columns]).any(1)
            on.real[columns] |= (square <= of_generated[rows, None]).any(0)
    return on


def _squared_radii(points: np.ndarray, centre: np.ndarray, k: int, name: str) -> np.ndarray:
    """The squared radius of the ball around each point [N, D]: [N]."""
    radii = neighbours.squared_radii(points, centre, k)
    if not radii.all():
        warnings.warn(
            f"{np.sum(radii == 0)} of {len(radii)} {name} images have {k} or more exact copies: "
            "their balls are points, and precision and recall say little.",
            stacklevel=3,
        )
    return radii
