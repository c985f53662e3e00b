"""How far a number would move with other images: the bootstrap (Efron, 1979).

A metric's `resampled` gives its value on R resamples of the images. One seed and one number of
images is one set of resamples, so where image i of two sets was made from one seed the differences
of their `resampled` are paired, and np.std(ours - theirs, ddof=1) is the paired standard error.
"""

import numpy as np

from cfg_jax.types import UsageError


def resamples(count: int, *, replicates: int, seed: int, strata=None) -> np.ndarray:
    """How often each of `count` images is drawn in each resample, int32 [R, count].

    `strata` [count], where given, are groups whose sizes are no accident, such as labels that were
    dealt out evenly: each is resampled within itself. More replicates only append rows. Memory: 4 R
    N bytes, 200 MB for 1,000 of 50,000 images.
    """
    if replicates < 2:
        raise UsageError(f"replicates={replicates}: a bootstrap needs 2 or more; try 1000.")
    rng = np.random.default_rng(seed)
    groups = [np.arange(count)]
    if strata is not None:
        groups = [np.flatnonzero(np.equal(strata, value)) for value in np.unique(strata)]
    drawn = np.empty((replicates, count), np.int32)
    for row in drawn:
        for group in groups:
            size = len(group)
            row[group] = np.bincount(rng.integers(size, size=size), minlength=size)
    return drawn


def means(values, drawn: np.ndarray) -> np.ndarray:
    """The mean of values [N], one an image, on each of the resamples [R, N]: [R]."""
    values = np.asarray(values, np.float64)
    return drawn @ values / len(values)


def resampled_mean(values, *, replicates: int = 1000, seed: int = 0, strata=None) -> np.ndarray:
    """The mean of values [N], one an image, on each resample: [R]."""
    return means(values, resamples(len(values), replicates=replicates, seed=seed, strata=strata))


def interval(estimate: float, resampled, *, level: float = 0.95) -> tuple[float, float]:
    """The interval of an estimate: the quantiles of resampled [R] about their own mean, around it.

    A metric biased at N images is biased once more on resamples of them. Centring takes that second
    bias out; the first stays, as in the estimate: compare numbers of images that are equal.
    """
    if not 0 < level < 1:
        raise UsageError(f"level={level}: the share of the interval lies between 0 and 1.")
    resampled = np.asarray(resampled, np.float64)
    ends = np.quantile(resampled - resampled.mean(), [(1 - level) / 2, (1 + level) / 2])
    return float(estimate + ends[0]), float(estimate + ends[1])
