"""Losses: Algorithm 1 of the paper, the distillation of guidance, and the classification that
classifier guidance needs.

A loss is called (params, frozen, batch, key) -> (mean loss, metrics); batch is {"image": float [B,
H, W, C] in [-1, 1], "label": int [B]}, `frozen` a pytree that is not trained. Its options are its
fields; by keyword every loss is told the same four things of the experiment: the network, the
schedule that is p(lambda), what the network's output means, and the null label. Distillation is
told a fifth, its teacher's network.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from cfg_jax.diffusion import denoiser, guidance, logsnr, weightings
from cfg_jax.types import Array, Batch, Network, Params, Schedule, UsageError


def drop_labels(key: Array, label: Array, p_uncond: float, null_label: int) -> Array:
    """c <- the null label with probability p_uncond, each image for itself (Algorithm 1). label
    [B].
    """
    return jnp.where(jax.random.bernoulli(key, p_uncond, label.shape), null_label, label)


def sample_lambda(key: Array, schedule: Schedule, batch_size: int, stratified: bool) -> Array:
    """lambda ~ p(lambda) [B]. Stratified: one draw in each of B equal parts of u, for less
    variance.
    """
    u = jax.random.uniform(key, (batch_size,))
    return schedule((jnp.arange(batch_size) + u) / batch_size if stratified else u)


def sample_eps(key: Array, x: Array) -> Array:
    """eps ~ N(0, I) in the shape of x [B, ...]. Two axes: XLA:CPU is slow to compile a draw of
    four.
    """
    return jax.random.normal(key, (x.shape[0], math.prod(x.shape[1:])), x.dtype).reshape(x.shape)


def check_weight(weight: str | None) -> None:
    """Raises UsageError for a loss weight that is not known."""
    if weight is not None and weight not in weightings.WEIGHTS:
        raise UsageError(
            f"loss.weight={weight!r} is not known: there are {', '.join(weightings.WEIGHTS)}; left "
            "out, what the network says counts alike at every level."
        )


def mean_square(
    output: Array, target: Array, lam: Array, *, weight: str | None, reading: logsnr.Reading
) -> Array:
    """The mean of (output - target)^2 over images and their elements; output, target [B, ...].

    A `weight`, a row of `weightings.WEIGHTS`, counts errors of eps at lam [B]; None counts the
    output's own alike at every level.
    """
    square = (output - target) ** 2
    if weight is not None:
        square *= logsnr.expand(weightings.WEIGHTS[weight](lam) * reading.in_eps(lam), output)
    return jnp.mean(square)


@dataclasses.dataclass(frozen=True)
class Denoising:
    """Algorithm 1 of the paper, the joint training of one network with and without its label.

        L = E || network(z, lam, c or null) - target ||^2,   z = alpha x + sigma eps           (5)

    The target is eps in the paper, or what `reading` names; `weight` is that of `mean_square`. The
    mean is over images and their elements. Metrics: `p_uncond`, the share of labels dropped in this
    batch. Raises UsageError unless 0 <= p_uncond <= 1, or for a weight that is not known.
    """

    p_uncond: float = 0.1
    stratified: bool = False
    weight: str | None = None

    def __post_init__(self):
        check_weight(self.weight)
        if not 0 <= self.p_uncond <= 1:
            raise UsageError(
                f"loss.p_uncond={self.p_uncond}: the probability of dropping the label lies in "
                "[0, 1]; the paper has 0.1, 0.2 and 0.5."
            )

    def __call__(
        self,
        params: Params,
        frozen: Params,
        batch: Batch,
        key: Array,
        *,
        network: Network,
        schedule: Schedule,
        reading: logsnr.Reading,
        null_label: int,
    ) -> tuple[Array, dict[str, Array]]:
        del frozen
        key_label, key_lam, key_eps, key_dropout = jax.random.split(key, 4)
        x = batch["image"]
        label = drop_labels(key_label, batch["label"], self.p_uncond, null_label)
        lam = sample_lambda(key_lam, schedule, x.shape[0], self.stratified)
        eps = sample_eps(key_eps, x)
        z = logsnr.diffuse(x, eps, lam)
        output = network.apply(params, z, lam, {"label": label}, key_dropout)
        target = reading.target(x, eps, lam)
        loss = mean_square(output, target, lam, weight=self.weight, reading=reading)
        return loss, {"p_uncond": jnp.mean(label == null_label)}


@dataclasses.dataclass(frozen=True)
class Distillation:
    """Guidance distillation, stage one of Meng et al. (2023): one network that says in one pass
    what its guided teacher says in two.

        L = E || network(z, lam, c, w) - guided(z, lam, c, w) ||^2,   w ~ U[w_min, w_max]

    guided is eq. (6) of the teacher, whose parameters are `frozen`, in what `reading` names; z, lam
    and the mean are Algorithm 1's, and the network is told {"label", "w"}. Nothing is clipped here:
    the chain clips around the guided denoiser, so that it will around the student, and a student
    that says the same makes the same chain. Metrics: none. Raises UsageError unless -1 <= w_min <
    w_max, both finite, or for a weight that is not known.
    """

    w_min: float = 0.0
    w_max: float = 4.0
    stratified: bool = False
    weight: str | None = None

    def __post_init__(self):
        check_weight(self.weight)
        if not -1 <= self.w_min < self.w_max < math.inf:
            raise UsageError(
                f"loss.w_min={self.w_min} and loss.w_max={self.w_max}: strengths from w_min up to "
                "a larger w_max, both finite and at least -1; Meng et al. (2023) have 0 and 4."
            )

    def __call__(
        self,
        params: Params,
        frozen: Params,
        batch: Batch,
        key: Array,
        *,
        network: Network,
        teacher: Network,
        schedule: Schedule,
        reading: logsnr.Reading,
        null_label: int,
    ) -> tuple[Array, dict[str, Array]]:
        key_w, key_lam, key_eps, key_dropout = jax.random.split(key, 4)
        x, label = batch["image"], batch["label"]
        w = jax.random.uniform(key_w, label.shape, minval=self.w_min, maxval=self.w_max)
        lam = sample_lambda(key_lam, schedule, x.shape[0], self.stratified)
        z = logsnr.diffuse(x, sample_eps(key_eps, x), lam)
        conditional, unconditional = (
            denoiser.denoiser(teacher, frozen, {"label": c}, reading=reading)
            for c in (label, jnp.full_like(label, null_label))
        )
        guided = guidance.ClassifierFree(w)(conditional, unconditional)(z, lam)
        target = jax.lax.stop_gradient(reading.target(guided.x, guided.eps, lam))
        output = network.apply(params, z, lam, {"label": label, "w": w}, key_dropout)
        return mean_square(output, target, lam, weight=self.weight, reading=reading), {}


@dataclasses.dataclass(frozen=True)
class Classification:
    """Cross-entropy of a classifier p(c|z), of noisy images to guide with or of clean ones to judge
    by.

    Noisy: z = alpha x + sigma eps with lambda ~ p(lambda) (Dhariwal & Nichol, 2021, section 4);
    clean: z = x at the schedule's cleanest level. Metrics: `accuracy` over the batch.
    """

    noisy: bool = True
    stratified: bool = False

    def __call__(
        self,
        params: Params,
        frozen: Params,
        batch: Batch,
        key: Array,
        *,
        network: Network,
        schedule: Schedule,
        reading: logsnr.Reading,
        null_label: int,
    ) -> tuple[Array, dict[str, Array]]:
        del frozen, reading, null_label
        key_lam, key_eps, key_dropout = jax.random.split(key, 3)
        x, label = batch["image"], batch["label"]
        if self.noisy:
            lam = sample_lambda(key_lam, schedule, x.shape[0], self.stratified)
            z = logsnr.diffuse(x, sample_eps(key_eps, x), lam)
        else:
            lam = jnp.broadcast_to(schedule(jnp.zeros(())), x.shape[:1])
            z = x
        logits = network.apply(params, z, lam, {}, key_dropout)
        loss = -jnp.mean(_log_prob_of(logits, label))
        return loss, {"accuracy": jnp.mean(logits.argmax(-1) == label)}


def _log_prob_of(logits: Array, label: Array) -> Array:
    return jnp.take_along_axis(jax.nn.log_softmax(logits), label[:, None], axis=-1)[:, 0]


def classifier_log_prob(network: Network, params: Params, label: Array):
    """A classifier with its parameters and the class bound: (z, lam) -> log p(label|z) [B]."""

    def log_prob(z: Array, lam: Array) -> Array:
        lam = jnp.broadcast_to(lam, z.shape[:1])
        return _log_prob_of(network.apply(params, z, lam, {}), label)

    return log_prob


LOSSES = {
    "denoising": Denoising,
    "distillation": Distillation,
    "classification": Classification,
}
