"""The inception score (Salimans et al., 2016): IS = exp(E KL(p(c|x) || p(c))).

E is over a set of images, p(c|x) a classifier's softmax and p(c) its mean over the set. The
published numbers are means over ten consecutive sets of 5,000. Never feed them images sorted by
class.
"""

from typing import NamedTuple

import numpy as np

from cfg_jax.metrics import bootstrap, features
from cfg_jax.types import UsageError

SPLIT = 5000  # images of a set
BLOCK = 1000  # rows of logits in float64 at once


class InceptionScore(NamedTuple):
    """Mean and standard deviation over the splits; over a single one the deviation is 0."""

    mean: float
    std: float


def inception_score(logits, splits: int | None = None) -> InceptionScore:
    """The IS of logits [N, K], over consecutive sets of images, without shuffling.

    They are of SPLIT images each, a last one with what is left, as in the evaluator of Dhariwal &
    Nichol (2021); or `splits` equal ones. UsageError where these do not divide N or leave fewer
    than 2 images each.
    """
    logits = features.checked(logits, "logits", at_least=2)
    count = len(logits)
    if splits is None:
        starts = [at for at in range(0, count, SPLIT) if count - at > 1]
        scores = [_score(part) for part in np.split(logits, starts[1:])]
        return InceptionScore(float(np.mean(scores)), float(np.std(scores)))
    if splits < 1 or count % splits or count // splits < 2:
        raise UsageError(
            f"splits={splits}: must divide the {count} images into equal parts of 2 or more; "
            "splits=1 always does."
        )
    scores = [_score(part) for part in logits.reshape(splits, -1, logits.shape[1])]
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)))


def resampled(logits, *, replicates: int = 1000, seed: int = 0, strata=None) -> np.ndarray:
    """The IS in one split on each resample of logits [N, K]: [R], in O(R N K).

    `strata` as in `bootstrap.resamples`.
    """
    logits = features.checked(logits, "logits", at_least=2)
    drawn = bootstrap.resamples(len(logits), replicates=replicates, seed=seed, strata=strata)
    marginal = np.zeros((replicates, logits.shape[1]))
    information = np.zeros(replicates)
    for rows, block in features.blocks(logits, BLOCK):
        p, of_block = _softmax(block)
        weight = drawn[:, rows].astype(np.float64)
        marginal += weight @ p
        information += weight @ of_block
    return _from_sums(marginal, information, len(logits))


def _score(logits: np.ndarray) -> float:
    marginal, information = np.zeros(logits.shape[1]), 0.0
    for _, block in features.blocks(logits, BLOCK):
        p, of_block = _softmax(block)
        marginal += p.sum(0)
        information += of_block.sum()
    return float(_from_sums(marginal, information, len(logits)))


def _softmax(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """p(c|x) [N, K], and sum_c p log p [N]."""
    log_p = logits - logits.max(1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(1, keepdims=True))
    p = np.exp(log_p)
    return p, (p * log_p).sum(1)


def _from_sums(marginal: np.ndarray, information, count: int):
    """exp(E sum_c p(c|x) log p(c|x) - sum_c p(c) log p(c)) of the sums [..., K] and [...]."""
    p = marginal / count
    log_p = np.log(p, out=np.zeros_like(p), where=p > 0)
    return np.exp(information / count - (p * log_p).sum(-1))
