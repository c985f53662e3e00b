"""How near an image lies to those that a model was trained on: is it memorising?

Generated images nearer to the training set than held-out real ones are would be copies of it.
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
