"""Distances to nearest neighbours, in blocks. Is a model memorising?

Generated images that lie nearer to the training set than its images lie to one another would be
copies of them.
"""

import numpy as np

from cfg_jax.metrics import features


def nearest(generated, real) -> np.ndarray:
    """The Euclidean distance from each row of features [N, D] to the nearest of [M, D]: [N].

    O(N M D) in float64, in the memory of a few blocks. UsageError where dimensions differ, a set is
    empty, or holds NaN or infinity.
    """
    generated, real = features.checked_pair(generated, real, at_least=1)
    centre = real.mean(0, dtype=np.float64)
    least = np.full(len(generated), np.inf)
    for rows, a in features.blocks(generated, features.BLOCK):
        a -= centre
        for _, b in features.blocks(real, features.BLOCK):
            square = features.squared_distances(a, b - centre)
            least[rows] = np.minimum(least[rows], square.min(1))
    return np.sqrt(least)


def among(real) -> np.ndarray:
    """The distance from each row of features [N, D] to the nearest of the others: [N].

    O(N^2 D / 2). UsageError for a single row, NaN or infinity.
    """
    real = features.checked(real, "features of real images", at_least=2)
    return np.sqrt(squared_radii(real, real.mean(0, dtype=np.float64), 1))


def squared_radii(points: np.ndarray, centre: np.ndarray, k: int) -> np.ndarray:
    """The squared distance of each point [N, D] to its k-th nearest neighbour but itself: [N]."""
    least = np.full((len(points), k), np.inf)

    def meet(rows: slice, square: np.ndarray):
        candidates = np.concatenate([least[rows], square], axis=1)
        least[rows] = np.partition(candidates, k - 1, axis=1)[:, :k]

    for rows, a in features.blocks(points, features.BLOCK):
        a -= centre
        for columns, b in features.blocks(points[: rows.stop], features.BLOCK):
            square = features.squared_distances(a, b - centre)
            if rows == columns:
                np.fill_diagonal(square, np.inf)
            else:
                meet(columns, square.T)
            meet(rows, square)
    return least.max(1)
