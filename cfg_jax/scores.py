"""The scores of a set of images: features in, named numbers with their uncertainty out."""

import dataclasses

import numpy as np

from cfg_jax.metrics import (
    bootstrap,
    frechet,
    inception_score,
    neighbours,
    precision_recall,
)

K = 3  # neighbours of precision and recall
REPLICATES = 1000
FRECHET_REPLICATES = 200
LEAST_STRATUM = 10  # images: resampling within n of them understates a variance by 1 / n
WIDEST = 512  # features: above it the bootstrap of the Frechet distance takes hours


@dataclasses.dataclass(frozen=True)
class Score:
    """A number, and what it would have been on each resample of the images [R], or None.

    Resamples of sets of equal size are the same: `Score.difference` is paired.
    """

    value: float
    resampled: np.ndarray | None = None

    def summary(self) -> dict[str, float]:
        """{"value", "low", "high", "error"}: with its 95 % interval and standard error."""
        if self.resampled is None:
            return {"value": self.value}
        low, high = bootstrap.interval(self.value, self.resampled)
        error = float(np.std(self.resampled, ddof=1))
        return {"value": self.value, "low": low, "high": high, "error": error}

    def difference(self, base: "Score") -> dict[str, float]:
        """{"difference", "error"}: how far above `base`, and the paired standard error of that."""
        out = {"difference": self.value - base.value}
        if self.resampled is not None and base.resampled is not None:
            out["error"] = float(np.std(self.resampled - base.resampled, ddof=1))
        return out


@dataclasses.dataclass(frozen=True)
class Reference:
    """What real images look like: their features [M, D], and the moments of these."""

    features: np.ndarray
    moments: frechet.Moments

    @classmethod
    def of(cls, features: np.ndarray) -> "Reference":
        return cls(features, frechet.moments(features))


def score(
    features: np.ndarray,
    logits: np.ndarray,
    labels: np.ndarray,
    reference: Reference,
    *,
    knows_labels: bool,
) -> dict[str, Score]:
    """The scores of images made for labels [N], by their features [N, D] and logits [N, K].

    "fd": Frechet distance to the reference; "is": inception score; "precision" and "recall" (k =
    3); "nn": mean distance to the nearest reference image; and where the labels are classes of the
    logits, "accuracy". Resamples are of these images, for recall of the reference's; where labels
    have ten images or more, each label keeps its number of them, which was no accident. Raises the
    UsageErrors of the metrics.
    """
    many = np.unique(labels, return_counts=True)[1].min() >= LEAST_STRATUM
    strata = labels if many else None
    wide = features.shape[1] > WIDEST
    fd = Score(
        frechet.distance(frechet.moments(features), reference.moments),
        None
        if wide
        else frechet.resampled(
            features, reference.moments, replicates=FRECHET_REPLICATES, strata=strata
        ),
    )
    of_is = inception_score.inception_score(logits)
    on = precision_recall.inside(features, reference.features, k=K)
    out = {
        "fd": fd,
        "is": Score(
            of_is.mean, inception_score.resampled(logits, replicates=REPLICATES, strata=strata)
        ),
        "precision": _mean(on.generated, strata),
        "recall": _mean(on.real),
        "nn": _mean(neighbours.nearest(features, reference.features), strata),
    }
    if knows_labels:
        out["accuracy"] = _mean(logits.argmax(1) == labels, strata)
    return out


def _mean(values: np.ndarray, strata: np.ndarray | None = None) -> Score:
    values = np.asarray(values, np.float64)
    again = bootstrap.resampled_mean(values, replicates=REPLICATES, strata=strata)
    return Score(float(values.mean()), again)
