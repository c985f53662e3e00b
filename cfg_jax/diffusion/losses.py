"""Losses: Algorithm 1 of the paper, and the classification that classifier guidance needs.

A loss is called (params, frozen, batch, key) -> (mean loss, metrics); batch is {"image": float [B,
H, W, C] in [-1, 1], "label": int [B]}, `frozen` a pytree that is not trained. Its options are its
fields; by keyword every loss is told the same four things of the experiment: the network, the
schedule that is p(lambda), what the network's output means, and the null label.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from cfg_jax.diffusion import logsnr
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


@dataclasses.dataclass(frozen=True)
class Denoising:
    """Algorithm 1 of the paper, the joint training of one network with and without its label.

        L = E || network(z, lam, c or null) - target ||^2,   z = alpha x + sigma eps           (5)

    The target is eps in the paper, or what `reading` names. The mean is over images and their
    elements. Metrics: `p_uncond`, the share of labels dropped in this batch. Raises UsageError
    unless 0 <= p_uncond <= 1.
    """

    p_uncond: float = 0.1
    stratified: bool = False

    def __post_init__(self):
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
        loss = jnp.mean((output - reading.target(x, eps, lam)) ** 2)
        return loss, {"p_uncond": jnp.mean(label == null_label)}


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


LOSSES = {"denoising": Denoising, "classification": Classification}
