"""What may be asked of a model, and what it costs: labels, strengths, seeds, rules, and a second
network that guides it.

The jobs and `cfg_jax.load` ask alike, so a mistake names the setting and no flag: `weak` is --weak
to the one and weak= to the other, `sample.negative` --config.sample.negative and negative=.
"""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from cfg_jax import experiment
from cfg_jax.diffusion import guidance
from cfg_jax.types import UsageError

FEW = 256  # levels: with so many the paper's grid serves any sampler


def role(guide: experiment.Experiment) -> str:
    """What the second network is: "classifier", or "weak", a weaker model (autoguidance)."""
    return "classifier" if guide.is_classifier else "weak"


def check_guidance(
    model: experiment.Experiment, guide: experiment.Experiment | None, w: Sequence[float]
) -> None:
    """Raises UsageError for strengths, a rule, or a second network that cannot guide the model."""
    rule = model.guidance(0.0)
    for strength in w:
        model.guidance(guidance.check_w(float(strength)))  # some rules take fewer
    experiment.check_pair(rule, model.sampler)
    if model.is_classifier:
        raise UsageError(
            "this is a classifier: it guides another model (classifier=DIR), it does not sample."
        )
    name, kind = model.sample.guidance["name"], guide and role(guide)
    if (rule.second == "classifier") != (kind == "classifier"):
        raise UsageError(
            f"sample.guidance.name={name!r}: classifier guidance needs classifier=DIR and "
            "sample.guidance.name=classifier, and no other rule takes a classifier."
        )
    if rule.second != "reference" and (kind == "weak" or model.sample.negative):
        given = "weak" if kind == "weak" else "sample.negative"
        raise UsageError(
            f"{given} with sample.guidance.name={name!r}: it takes the place of the unconditional "
            "model, of which this rule makes no use; classifier_free does."
        )
    if guide is not None:
        check_same_images(kind, guide, model)
    if (type(rule) is guidance.Distilled) != (model.w_range is not None):
        raise UsageError(
            f"sample.guidance.name={name!r}: a student has its guidance inside and is sampled by "
            "'distilled' alone, and nothing else is."
        )
    if kind == "weak" and guide.w_range is not None:
        raise UsageError("weak holds a student, which is guided itself: take its teacher.")
    if kind == "weak" and guide.reading.outputs != model.reading.outputs:
        raise UsageError(
            "weak: one of the two networks tells a variance and the other does not, and so they "
            "are no pair; take two of one kind."
        )
    null = rule.second == "reference" and kind is None and not model.sample.negative
    if null and model.null_label is None and any(w):
        raise UsageError(
            f"w={[float(s) for s in w if s]}: this model has no null label (p_uncond = "
            f"{model.config['loss']['p_uncond']:g}), so only w=0 can be sampled; train with "
            "loss.p_uncond between 0 and 1, or guide by weak=DIR or away from "
            "sample.negative=LABEL."
        )
    if model.w_range is not None:
        low, high = np.float32(model.w_range)
        if outside := [float(s) for s in w if not low <= np.float32(s) <= high]:
            raise UsageError(
                f"w={outside}: this student was trained for w from {low:g} to {high:g}; take one "
                "of these, or its teacher."
            )


def check_same_images(
    flag: str, other: experiment.Experiment, model: experiment.Experiment
) -> None:
    """Raises UsageError unless a second network is of the images and classes of the model."""
    for field in ("image_shape", "num_classes"):
        ours, theirs = getattr(model.dataset, field), getattr(other.dataset, field)
        if ours != theirs:
            raise UsageError(f"{flag} has {field} {theirs}, the model {ours}.")


def check(
    model: experiment.Experiment,
    guide: experiment.Experiment | None,
    labels: Sequence[int] | Sequence[Sequence[int]],
    w: float | Sequence[float],
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """labels [N] or [N, K] and w as arrays. Raises UsageError for one, or a seed, out of range."""
    labels, w = np.asarray(labels), np.asarray(w, np.float32)
    classes = model.dataset.num_classes
    if labels.ndim not in (1, 2) or not labels.size or labels.dtype.kind not in "iu":
        raise UsageError("labels must be a list of whole numbers, at least one.")
    for what, some in {"labels": labels, "negative": np.asarray(model.sample.negative)}.items():
        if outside := sorted({int(c) for c in some.flat if not 0 <= c < classes}):
            raise UsageError(f"{what} {outside} are outside the classes 0 to {classes - 1}.")
    if labels.ndim == 2 and guide is not None and guide.is_classifier:
        raise UsageError("labels: a classifier knows no mixture of labels; give one an image.")
    if not 0 <= seed < 2**32:
        raise UsageError(f"seed={seed}: must lie in 0 to 2^32 - 1.")
    check_guidance(model, guide, np.unique(w))
    return labels, w


def reference(
    model: experiment.Experiment, guide: experiment.Experiment | None, labels: np.ndarray
) -> np.ndarray:
    """The labels of the reference, int32 [N], or [N, K] where several are mixed.

    Those to move away from where there are any; else an image's own for a weaker model, and the
    null label for the model itself.
    """
    labels = np.asarray(labels, np.int32)
    if away := model.sample.negative:
        rows = np.tile(np.asarray(away, np.int32), (len(labels), 1))
        return rows[:, 0] if len(away) == 1 else rows
    if guide is not None or model.null_label is None:
        return labels  # without a null label w is 0: `check_guidance` has refused the rest
    return np.full(len(labels), model.null_label, np.int32)


def levels(model: experiment.Experiment) -> np.ndarray:
    """The noise levels of the chain [T], the same to the bit in a program and on the host.

    Raises UsageError where two are equal: a chain of 1,000 levels has no more to walk.
    """
    with jax.ensure_compile_time_eval():
        lams = np.asarray(model.lams())
    if (np.diff(lams) <= 0).any():
        raise UsageError(
            f"sample.steps={len(lams)}: on the grid {model.sample.grid['name']!r} some of these "
            "levels of this model's schedule are equal; take fewer steps."
        )
    name, grid = (section["name"] for section in (model.sample.sampler, model.sample.grid))
    if grid == "uniform_u" and model.sampler.order > 1 and len(lams) < FEW:
        warnings.warn(
            f"sample.sampler {name!r} on sample.grid 'uniform_u' with {len(lams)} steps: the first "
            "and the last of them are too long for it. sample.grid=uniform_lambda is "
            "better, below 64 steps edm.",
            stacklevel=2,
        )
    return lams


class Evaluations(NamedTuple):
    """Network evaluations an image: of the model, and of what guides it."""

    model: int
    classifier: int = 0  # each with its gradient
    weak: int = 0

    def __str__(self) -> str:
        return " + ".join(str(n) for n in self if n) or "0"


def evaluations(
    model: experiment.Experiment,
    guide: experiment.Experiment | None,
    w: float,
    labels: Sequence[int] | Sequence[Sequence[int]] = (0,),
) -> Evaluations:
    """How many passes an image of one w takes, which has one of these labels [N] or [N, K]."""
    rule = model.guidance(np.float32(w))
    first, second = rule.passes(model.sampler.levels(levels(model)))
    if rule.second == "classifier":
        return Evaluations(first, classifier=second)
    labels = np.asarray(labels)
    mixed, away = (a[:1].size for a in (labels, reference(model, guide, labels)))
    if guide is not None:
        return Evaluations(mixed * first, weak=away * second)
    return Evaluations(mixed * first + away * second)
