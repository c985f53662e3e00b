"""Guidance of a strength that depends on the noise level: rules around a rule.

    w(lam) = w on an interval of lam and 0 elsewhere, or w times a shape of lam

Where the strength is 0 the rule inside is not run, and with it the pass of its second argument.
Like every rule around a rule, these take `second` and `keeps_pair` from the one inside, and so w.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from cfg_jax.diffusion import logsnr
from cfg_jax.types import Array, Denoiser, Guidance, LogProb, Prediction, UsageError


def check_inner(outer: object, rule: Guidance) -> None:
    """Raises UsageError for a rule that nothing can be put around: what it does is not done to a
    denoiser, but to the chain's noise, or inside a student's network.
    """
    if getattr(rule, "alone", False):
        raise UsageError(
            f"{type(outer).__name__} around {type(rule).__name__}: that rule leaves the denoiser "
            "as it is, so nothing can be put around it."
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Interval:
    """Guidance in a limited interval of noise levels (Kynkaanniemi et al., 2024).

        the rule inside where low <= lam < high, the first denoiser alone elsewhere

    Theirs is (sigma_lo, sigma_hi] in sigma = e^(-lam / 2), which is low = -2 log(sigma_hi), high =
    -2 log(sigma_lo); `clocks` converts other units. The ends are traced: a sweep over them compiles
    once. The defaults are their best for EDM2-S at 512x512, sigma in (0.28, 2.90], with w = 1.1.
    With lam [B] both are run, and each image takes its own. Raises UsageError unless low <= high.
    """

    rule: Guidance
    low: float | Array = -2.13
    high: float | Array = 2.55

    second = property(lambda self: self.rule.second)
    keeps_pair = property(lambda self: self.rule.keeps_pair)
    w = property(lambda self: self.rule.w)

    def __post_init__(self):
        check_inner(self, self.rule)
        ends = (self.low, self.high)
        if all(isinstance(end, int | float) for end in ends) and not self.low <= self.high:
            raise UsageError(
                f"guidance.low={self.low} and guidance.high={self.high}: the ends of an interval "
                "of lambda, low <= high; high lambda is clean, lambda = -2 log(sigma)."
            )

    def contains(self, lam: Array) -> Array:
        """Whether a level lies in the interval. Any shape."""
        lam = jnp.asarray(lam)
        return (lam >= self.low) & (lam < self.high)

    def passes(self, lams: Array) -> tuple[int, int]:
        """As `Guidance.passes`: outside the interval the first one alone."""
        inside = self.contains(lams)
        first, second = self.rule.passes(lams[inside])
        return first + int(jnp.sum(~inside)), second

    def __call__(self, first: Denoiser, second: Denoiser | LogProb, /) -> Denoiser:
        guided = self.rule(first, second)

        def denoise(z: Array, lam: Array) -> Prediction:
            inside = self.contains(lam)
            if inside.ndim == 0:
                return jax.lax.cond(inside, guided, first, z, lam)
            inside = logsnr.expand(inside, z)
            return jax.tree.map(
                lambda within, alone: jnp.where(inside, within, alone),
                guided(z, lam),
                first(z, lam),
            )

        return denoise


def _scaled(rule: Guidance, factor: Array) -> Guidance:
    """The rule with its strength w multiplied, also where it stands inside others."""
    if hasattr(rule, "rule"):
        return dataclasses.replace(rule, rule=_scaled(rule.rule, factor))
    return dataclasses.replace(rule, w=jnp.asarray(rule.w) * factor)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scheduled:
    """Guidance whose strength is a function of the noise level (Wang et al., 2024).

        w(lam) = w shape(lam)

    `shape` is any callable of lam [] or [B]; theirs are below. It is static: another object is
    another program, so a function is defined once, not anew for each w.
    """

    rule: Guidance
    shape: Callable[[Array], Array] = dataclasses.field(metadata={"static": True})

    second = property(lambda self: self.rule.second)
    keeps_pair = property(lambda self: self.rule.keeps_pair)
    w = property(lambda self: self.rule.w)

    def __post_init__(self):
        check_inner(self, self.rule)
        if not self.rule.keeps_pair:
            raise UsageError(
                f"a schedule of w around {type(self.rule).__name__}: its w stays in [-1, 0], and a "
                "schedule goes up to twice as far."
            )

    def passes(self, lams: Array) -> tuple[int, int]:
        """As `Guidance.passes`, by the strength at each level."""
        each = [self._at(lam).passes(lam[None]) for lam in lams]
        return sum(first for first, _ in each), sum(second for _, second in each)

    def __call__(self, first: Denoiser, second: Denoiser | LogProb, /) -> Denoiser:
        def denoise(z: Array, lam: Array) -> Prediction:
            return self._at(lam)(first, second)(z, lam)

        return denoise

    def _at(self, lam: Array) -> Guidance:
        return _scaled(self.rule, self.shape(jnp.asarray(lam)))


# Written in 1 - t / T and with squares of sines, the shapes cancel nowhere: near the noise they are
# small, and not 0 by rounding.
def _clean(lam: Array) -> Array:
    """1 - t / T in [0, 1] of the cosine schedule without its truncation: 0 noise, 1 clean."""
    return jnp.arctan(jnp.exp(0.5 * lam)) / (0.5 * jnp.pi)


def _linear_shape(lam: Array) -> Array:
    return 2 * _clean(lam)


def _cosine_shape(lam: Array) -> Array:
    return 2 * jnp.sin(0.5 * jnp.pi * _clean(lam)) ** 2


@dataclasses.dataclass(frozen=True)
class _PowerCosineShape:
    power: float

    def __call__(self, lam: Array) -> Array:
        return jnp.sin(0.5 * jnp.pi * _clean(lam) ** self.power) ** 2


def linear(rule: Guidance) -> Scheduled:
    """w(lam) = 2 (1 - t / T) w: increasing towards the image (Wang et al., 2024)."""
    return Scheduled(rule, _linear_shape)


def cosine(rule: Guidance) -> Scheduled:
    """w(lam) = (1 + cos(pi t / T)) w: increasing towards the image (Wang et al., 2024)."""
    return Scheduled(rule, _cosine_shape)


def power_cosine(rule: Guidance, power: float = 4.0) -> Scheduled:
    """w(lam) = (1 - cos(pi (1 - t / T)^power)) w / 2, late and steep for a large power.

    Gao et al. (2023) have it with power 4; Wang et al. (2024) compare it. Its area is not that of a
    constant w, but less. Raises UsageError unless power is finite and above 0.
    """
    if not 0 < power < math.inf:
        raise UsageError(f"guidance.power={power}: must be above 0; Gao et al. (2023) have 4.")
    return Scheduled(rule, _PowerCosineShape(float(power)))
