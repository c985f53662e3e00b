"""Corrections of the guided x against what strong guidance does to it: rules around a rule.

A correction moves x and recomputes eps, but where the rule inside means another noise to be
re-added (`keeps_pair` False): there eps stays. Static thresholding is `denoiser.clipped`, which the
jobs put around everything.
"""

import dataclasses

import jax
import jax.numpy as jnp

from cfg_jax.diffusion import denoiser, strengths
from cfg_jax.types import Array, Denoiser, Guidance, LogProb, Prediction, UsageError


def rescale(x: Array, positive: Array, phi: float | Array) -> Array:
    """x with the spread of `positive`, to a part phi of the way: (phi std(positive) / std(x) + 1 -
    phi) x. The spread is that of each image's elements. x, positive [B, ...].
    """
    axes = tuple(range(1, x.ndim))
    ratio = jnp.std(positive, axes, keepdims=True) / jnp.std(x, axes, keepdims=True)
    return (phi * ratio + (1 - phi)) * x


def dynamic_threshold(x: Array, quantile: float | Array) -> Array:
    """x clipped to [-s, s] and divided by s, where s is the quantile of |x| of each image, but at
    least 1. x [B, ...].
    """
    axes = tuple(range(1, x.ndim))
    s = jnp.maximum(1, jnp.quantile(jnp.abs(x), quantile, axis=axes, keepdims=True))
    return jnp.clip(x, -s, s) / s


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rescale:
    """The guided x with the spread of the conditional one, against saturation (Lin et al., 2023).

        x <- (phi std(x(z, c)) / std(x~) + 1 - phi) x~

    phi = 0.7 is theirs (with w = 6.5); 0 leaves the rule inside alone. They scale what the network
    says, here it is x. The first denoiser is always run, and once. Raises UsageError unless 0 <=
    phi <= 1.
    """

    rule: Guidance
    phi: float | Array = 0.7

    second = property(lambda self: self.rule.second)
    keeps_pair = property(lambda self: self.rule.keeps_pair)
    w = property(lambda self: self.rule.w)

    def __post_init__(self):
        strengths.check_inner(self, self.rule)
        if isinstance(self.phi, int | float) and not 0 <= self.phi <= 1:
            raise UsageError(
                f"guidance.phi={self.phi}: a share from 0, no rescaling, to 1; Lin et al. (2023) "
                "have 0.7."
            )

    def passes(self, lams: Array) -> tuple[int, int]:
        """As `Guidance.passes`: the first one always."""
        return len(lams), self.rule.passes(lams)[1]

    def __call__(self, first: Denoiser, second: Denoiser | LogProb, /) -> Denoiser:
        def denoise(z: Array, lam: Array) -> Prediction:
            positive = first(z, lam)
            guided = self.rule(lambda z, lam: positive, second)(z, lam)
            x = rescale(guided.x, positive.x, self.phi).astype(z.dtype)
            return denoiser.moved(guided, x, z, lam, keeps_pair=self.keeps_pair)

        return denoise


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DynamicThreshold:
    """The guided x pressed into [-1, 1] by its own largest values (Saharia et al., 2022).

        s = max(1, quantile of |x~| of each image),   x <- clip(x~, -s, s) / s

    The quantile 0.995 is what diffusers has; 1 takes the largest. Raises UsageError unless it lies
    in [0, 1].
    """

    rule: Guidance
    quantile: float | Array = 0.995

    second = property(lambda self: self.rule.second)
    keeps_pair = property(lambda self: self.rule.keeps_pair)
    w = property(lambda self: self.rule.w)

    def __post_init__(self):
        strengths.check_inner(self, self.rule)
        if isinstance(self.quantile, int | float) and not 0 <= self.quantile <= 1:
            raise UsageError(
                f"guidance.quantile={self.quantile}: a share of the elements in [0, 1], such as "
                "0.995."
            )

    def passes(self, lams: Array) -> tuple[int, int]:
        """As `Guidance.passes`: those of the rule inside."""
        return self.rule.passes(lams)

    def __call__(self, first: Denoiser, second: Denoiser | LogProb, /) -> Denoiser:
        inner = self.rule(first, second)

        def denoise(z: Array, lam: Array) -> Prediction:
            guided = inner(z, lam)
            x = dynamic_threshold(guided.x, self.quantile).astype(z.dtype)
            return denoiser.moved(guided, x, z, lam, keeps_pair=self.keeps_pair)

        return denoise
