"""The scores of a set of images: features in, named numbers with their uncertainty out."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from cfg_jax.metrics import (
    bootstrap,
    frechet,
    inception_score,
    kid,
    neighbours,
    precision_recall,
)

K = 3  # neighbours of precision and recall
REPLICATES = 1000
WIDE_REPLICATES = 200  # of what costs a product of all features, or of many logits
LEAST_STRATUM = 10  # images: resampling within n of them understates a variance by 1 / n
LEAST_KID = 4  # images: half of them are a subset
WIDEST = 512  # features: above it the bootstrap of the Frechet distance takes hours


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a score is called in words, and whether more of it is better."""

    title: str
    rising: bool = False


# By what `score` calls them.
KINDS = {
    "fd": Kind("Fréchet distance"),
    "sfd": Kind("Fréchet distance of places"),
    "is": Kind("inception score", rising=True),
    "precision": Kind("precision", rising=True),
    "recall": Kind("recall", rising=True),
    "kid": Kind("KID"),
    "nn": Kind("nearest reference image"),
    "accuracy": Kind("accuracy", rising=True),
}
# What two of them are called of the features of one network only.
OF_INCEPTION = {"fid": Kind("FID"), "sfid": Kind("sFID")}


def kind(name: str) -> Kind:
    """That of a score by its name in a panel: "fd_judge" is of the judge's features, and a "fd"."""
    return (KINDS | OF_INCEPTION)[name.partition("_")[0]]


@dataclasses.dataclass(frozen=True)
class Score:
    """A number, and what it would have been on each resample of the images [R], or None.

    Resamples of sets of equal size are the same: `Score.difference` is paired. `error` is a
    standard error that was come by otherwise.
    """

    value: float
    resampled: np.ndarray | None = None
    error: float | None = None

    def summary(self) -> dict[str, float]:
        """{"value", "low", "high", "error"}: with its 95 % interval and standard error."""
        if self.resampled is None:
            error = {} if self.error is None else {"error": self.error}
            return {"value": self.value, **error}
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
    """What real images look like.

    The moments of all of their features, and of features of places where there are any; features
    [M, D] of as many of them as the metrics of neighbours are to meet.
    """

    features: np.ndarray
    moments: frechet.Moments
    spatial: frechet.Moments | None = None

    @classmethod
    def of(cls, features: np.ndarray) -> "Reference":
        """Of the features of all images."""
        return cls(features, frechet.moments(features))


def score(
    seen: Mapping[str, np.ndarray],
    labels: np.ndarray | None,
    reference: Reference,
    *,
    knows_labels: bool = False,
    resample: bool = True,
) -> dict[str, Score]:
    """The scores of images, by their "features" [N, D], "logits" [N, K] and, if there are any, the
    features of places "spatial" [N, S].

    "fd": Frechet distance to the reference; "sfd": that of places; "is": inception score;
    "precision" and "recall" (k = 3); "kid": with the standard error of its subsets; "nn": mean
    distance to the nearest reference image; and where the labels [N] that they were made for are
    classes of the logits, "accuracy". Resamples are of these images, for recall of the reference's;
    where labels have ten images or more, each label keeps its number of them, which was no
    accident; none are made unless `resample`. Raises the UsageErrors of the metrics.
    """
    features, logits = seen["features"], seen["logits"]
    many = labels is not None and np.unique(labels, return_counts=True)[1].min() >= LEAST_STRATUM
    strata = labels if many else None
    out = {"fd": Score(frechet.distance(frechet.moments(features), reference.moments))}
    if resample and features.shape[1] <= WIDEST:
        again = frechet.resampled(
            features, reference.moments, replicates=WIDE_REPLICATES, strata=strata
        )
        out["fd"] = dataclasses.replace(out["fd"], resampled=again)
    if reference.spatial is not None and "spatial" in seen:
        places = frechet.moments(seen["spatial"])
        out["sfd"] = Score(frechet.distance(places, reference.spatial))
    again = None
    if resample:
        few = logits.shape[1] > WIDEST
        replicates = WIDE_REPLICATES if few else REPLICATES
        again = inception_score.resampled(logits, replicates=replicates, strata=strata)
    out["is"] = Score(inception_score.inception_score(logits).mean, again)
    on = precision_recall.inside(features, reference.features, k=K)
    drawn = _drawn(len(features), strata) if resample else None
    out["precision"] = _mean(on.generated, drawn)
    out["recall"] = _mean(on.real, _drawn(len(on.real)) if resample else None)
    if min(len(features), len(reference.features)) >= LEAST_KID:
        of_kid = kid.kid(features, reference.features)
        out["kid"] = Score(of_kid.value, error=of_kid.error)
    out["nn"] = _mean(neighbours.nearest(features, reference.features), drawn)
    if knows_labels:
        out["accuracy"] = _mean(logits.argmax(1) == labels, drawn)
    return out


def _drawn(count: int, strata: np.ndarray | None = None) -> np.ndarray:
    """The resamples of means [R, count]; of as many images, the same."""
    return bootstrap.resamples(count, replicates=REPLICATES, seed=0, strata=strata)


def _mean(values: np.ndarray, drawn: np.ndarray | None) -> Score:
    """The mean of values [N], and on the resamples `drawn` [R, N]."""
    again = None if drawn is None else bootstrap.means(values, drawn)
    return Score(float(np.mean(values, dtype=np.float64)), again)
