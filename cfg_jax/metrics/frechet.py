"""The Frechet distance between two sets of features (Heusel et al., 2017).

    d^2 = |m_a - m_b|^2 + tr(A) + tr(B) - 2 tr((A^(1/2) B A^(1/2))^(1/2))

of the Gaussians with the sets' means m and covariances A, B (Dowson & Landau, 1982). It is the FID
only where the features are the pool3 of the 2015 Inception graph.
"""

import dataclasses
import functools
import warnings

import numpy as np

from cfg_jax.metrics import bootstrap, features
from cfg_jax.types import UsageError

CHUNK = 1000  # rows summed at once; another size gives other last bits
# A covariance stored in float32 has eigenvalues down to about -1e-7 of the largest.
NEGATIVE = 1e-6


@dataclasses.dataclass(frozen=True)
class Moments:
    """Mean [D] and unbiased covariance [D, D] of features, float64, and of how many images.

    count is None where a published file does not say. Raises UsageError on shapes that disagree,
    NaN or infinity, and on a covariance that is not symmetric.
    """

    mean: np.ndarray
    covariance: np.ndarray
    count: int | None = None

    def __post_init__(self):
        mean, covariance = np.shape(self.mean), np.shape(self.covariance)
        if len(mean) != 1 or covariance != mean * 2:
            raise UsageError(
                f"moments with a mean {list(mean)} and a covariance {list(covariance)}: [D] and "
                "[D, D] are needed."
            )
        if not (np.isfinite(self.mean).all() and np.isfinite(self.covariance).all()):
            raise UsageError("moments: NaN or infinity in the mean or the covariance.")
        skew = np.abs(self.covariance - self.covariance.T).max()
        if skew > NEGATIVE * np.abs(self.covariance).max():
            raise UsageError(f"moments: the covariance is not symmetric, by up to {skew:.2g}.")


@dataclasses.dataclass(frozen=True)
class Sums:
    """What chunks of features add up to: count, mean [D], and scatter sum (x - mean)(x - mean)^T.

    Float64, and all the state there is: stored and read back between two chunks, a sum goes on to
    the same bits.
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    def __add__(self, other: "Sums") -> "Sums":
        """The sums of both sets, without cancellation (Chan, Golub & LeVeque, 1979)."""
        if self.mean.shape != other.mean.shape:
            raise UsageError(
                f"features of {len(self.mean)} and of {len(other.mean)} dimensions cannot be "
                "summed: extract both with the same network."
            )
        count = self.count + other.count
        step = other.mean - self.mean
        return Sums(
            count=count,
            mean=self.mean + step * (other.count / count),
            scatter=self.scatter
            + other.scatter
            + np.outer(step, step) * (self.count * other.count / count),
        )

    def moments(self) -> Moments:
        """Mean and unbiased covariance; UsageError for a single image."""
        if self.count < 2:
            raise UsageError(f"{self.count} image has no covariance: 2 or more are needed.")
        return Moments(self.mean, self.scatter / (self.count - 1), self.count)


def sums(chunk) -> Sums:
    """The sums of one chunk of features [N, D], N >= 1; those of more chunks are added in order."""
    chunk = features.checked(chunk, "features", at_least=1).astype(np.float64)
    mean = chunk.mean(0)
    chunk -= mean
    return Sums(len(chunk), mean, chunk.T @ chunk)


def moments(rows) -> Moments:
    """The moments of features [N, D], N >= 2, summed in chunks of 1,000 rows: O(N D^2)."""
    rows = features.checked(rows, "features", at_least=2)
    chunks = (rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK))
    return functools.reduce(Sums.__add__, map(sums, chunks)).moments()


def distance(a: Moments, b: Moments) -> float:
    """The squared Frechet distance d^2 of the two Gaussians, in O(D^3).

    The last trace is the sum of the singular values of A^(1/2) B^(1/2): taken so, no root is drawn
    from a rounding error, as it is from the eigenvalues of the product when a covariance has not
    full rank. Rounding leaves an error of the order of D eps (tr A + tr B), eps = 2.2e-16; a sum
    that it makes negative is 0. UsageError where dimensions differ, or a covariance has an
    eigenvalue below -1e-6 of its largest.
    """
    return _distance(a, _root(a), b, _root(b))


def resampled(
    rows, reference: Moments, *, replicates: int = 200, seed: int = 0, strata=None
) -> np.ndarray:
    """The distance to a fixed reference on each resample of features [N, D]: [R].

    `strata` as in `bootstrap.resamples`. Each costs O(N D^2 + D^3): meant for features of some
    hundred dimensions.
    """
    rows = features.checked(rows, "features", at_least=2).astype(np.float64)
    root = _root(reference)
    offset = rows.mean(0)
    rows -= offset
    distances = []
    for drawn in bootstrap.resamples(len(rows), replicates=replicates, seed=seed, strata=strata):
        weighted = drawn[:, None] * rows
        mean = weighted.mean(0)
        scatter = rows.T @ weighted - len(rows) * np.outer(mean, mean)
        ours = Moments(mean + offset, scatter / (len(rows) - 1), len(rows))
        distances.append(_distance(ours, _root(ours), reference, root))
    return np.array(distances)


def _root(of: Moments) -> np.ndarray:
    """R [D, rank] with covariance = R R^T: the eigenvectors, each times the root of its eigenvalue.

    Eigenvalues up to D eps of the largest, which are rounding, are left out. Where they were not,
    d^2 grows by at most 2 sum sqrt(value) |B|^(1/2).
    """
    values, vectors = np.linalg.eigh(np.asarray(of.covariance, np.float64))
    largest = values[-1]
    if values[0] < -NEGATIVE * abs(largest):
        raise UsageError(
            f"moments: the covariance has the eigenvalue {values[0]:.2g} beside {largest:.2g}; "
            "a covariance has none below 0."
        )
    if largest <= 0:
        warnings.warn(
            "all images have the same features: their Frechet distance says nothing of variety.",
            stacklevel=3,
        )
    kept = values > len(values) * np.finfo(np.float64).eps * max(largest, 0)
    return vectors[:, kept] * np.sqrt(values[kept])


def _distance(a: Moments, root_a: np.ndarray, b: Moments, root_b: np.ndarray) -> float:
    if len(a.mean) != len(b.mean):
        raise UsageError(
            f"features of {len(a.mean)} and of {len(b.mean)} dimensions have no distance: extract "
            "both with the same network."
        )
    cross = root_a.T @ root_b
    overlap = np.linalg.svd(cross, compute_uv=False).sum() if cross.size else 0.0
    means = np.square(np.subtract(a.mean, b.mean, dtype=np.float64)).sum()
    # The traces of what is kept of either covariance, so that equal sets are at 0.
    traces = np.square(root_a).sum() + np.square(root_b).sum()
    return float(max(means + traces - 2 * overlap, 0.0))
