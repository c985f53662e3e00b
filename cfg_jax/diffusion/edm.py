"""The samplers of Karras et al. (2022), Algorithm 2 there, in lambda.

That paper adds noise of standard deviation s to clean images, and its z is ours without the factor
alpha: z / alpha, with s = sigma / alpha = e^(-lam / 2). There an Euler step of dz / ds = eps goes
from s to s'; here the same step, with h = (lam' - lam) / 2, is

    z' = alpha' (z / alpha + (s' - s) eps) = (sigma' / sigma) z + alpha' (1 - e^(-h)) x,

that of DDIM. Before a step, churn makes z noisier: s (1 + gamma) is lam - 2 log(1 + gamma), and
what is added on the way is the forward process, eq. (2) of the paper.
"""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from cfg_jax.diffusion import logsnr
from cfg_jax.types import Array, Denoiser, Noise, Path, UsageError


def _check(churn: float, churn_noise: float) -> None:
    for name, value in (("churn", churn), ("churn_noise", churn_noise)):
        if isinstance(value, int | float) and not 0 <= value < math.inf:
            raise UsageError(
                f"sampler.{name}={value}: must be at least 0; churn 0 is deterministic, and Karras "
                "et al. (2022) have churn 40 with noise 1.003 over 256 levels at 64x64."
            )


def _churned(lams: Array, churn: Array, low: Array, high: Array) -> Array:
    """The levels [T] down to which noise is added: lam - 2 log(1 + gamma), by Algorithm 2.

    gamma = min(churn / T, sqrt(2) - 1) for levels in [low, high], 0 elsewhere. Never noisier than
    the first level, that a network be not asked beyond it.
    """
    gamma = jnp.minimum(churn / lams.shape[0], math.sqrt(2) - 1)
    back = jnp.where((low <= lams) & (lams <= high), 2 * jnp.log1p(gamma), 0)
    return jnp.maximum(lams - back, lams[0]).astype(lams.dtype)


def _churn(lams: Array, noisier: Array, churn_noise: Array) -> tuple[Array, Array]:
    """The weights on z and on a unit draw that carry z from lams to the levels below, eq. (2)."""
    on_z = logsnr.alpha(noisier) / logsnr.alpha(lams)
    on_noise = churn_noise * jnp.sqrt(logsnr.forward_variance(noisier, lams))
    return on_z, on_noise.astype(lams.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Euler:
    """The first-order sampler of Karras et al. (2022), with churn; without it, DDIM with eta = 0.

    churn (S_churn there) over churn_low <= lam <= churn_high (S_tmax and S_tmin), with noise of
    standard deviation churn_noise (S_noise). T evaluations. Raises UsageError for a negative churn.
    """

    order: ClassVar[int] = 1
    needs_pair: ClassVar[bool] = True
    churn: float | Array = 0.0
    churn_low: float | Array = -20.0
    churn_high: float | Array = 20.0
    churn_noise: float | Array = 1.0

    def __post_init__(self):
        _check(self.churn, self.churn_noise)

    def levels(self, lams: Array) -> Array:
        """As `Sampler.levels`: the chain's own, noisier where it churns."""
        return _churned(lams, self.churn, self.churn_low, self.churn_high)

    def __call__(self, denoiser: Denoiser, noise: Noise, lams: Array) -> Path:
        T = lams.shape[0]
        z = noise(0)
        lams = lams.astype(z.dtype)
        here, after = self.levels(lams), jnp.append(lams[1:], lams[-1])
        back, spread = _churn(lams, here, self.churn_noise)
        on_z = logsnr.sigma(after) / logsnr.sigma(here)
        on_x = -logsnr.alpha(after) * jnp.expm1((here - after) / 2)

        def step(z, level):
            t, lam, back, spread, on_z, on_x = level
            z = back * z + spread * noise(t)
            x = denoiser(z, lam).x
            return jnp.where(t < T, on_z * z + on_x * x, x), x

        levels = (jnp.arange(1, T + 1), here, back, spread, on_z, on_x)
        x, xs = jax.lax.scan(step, z, levels)
        return Path(x, xs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Heun:
    """The second-order sampler of Karras et al. (2022), Algorithm 2, with churn as `Euler` has it.

    An Euler step to z', and from the clean estimate x' there the mean of both slopes, which is

        z'' = z' + alpha' (e^h - 1) / 2 (x' - x).

    Two evaluations a step and one for the last level: 2 T - 1. Raises UsageError for a negative
    churn.
    """

    order: ClassVar[int] = 2
    needs_pair: ClassVar[bool] = True
    churn: float | Array = 0.0
    churn_low: float | Array = -20.0
    churn_high: float | Array = 20.0
    churn_noise: float | Array = 1.0

    def __post_init__(self):
        _check(self.churn, self.churn_noise)

    def levels(self, lams: Array) -> Array:
        """As `Sampler.levels`, [2 T - 1]: each, noisier where it churns, and the next in turn."""
        here = _churned(lams, self.churn, self.churn_low, self.churn_high)
        return _in_turn(here, jnp.append(lams[1:], lams[-1]))

    def __call__(self, denoiser: Denoiser, noise: Noise, lams: Array) -> Path:
        T = lams.shape[0]
        z = noise(0)
        lams = lams.astype(z.dtype)
        levels = self.levels(lams)
        here, after = levels[::2], jnp.append(lams[1:], lams[-1])
        h = (after - here) / 2
        back, spread = _churn(lams, here, self.churn_noise)
        zero, one = jnp.zeros_like(lams), jnp.ones_like(lams)
        # One body for both halves of a step, so that the denoiser is compiled once: the first
        # churns and goes to z', the second stays there and adds what x has changed by.
        halves = (
            (back, one),
            (spread, zero),
            (logsnr.sigma(after) / logsnr.sigma(here), one),
            (-logsnr.alpha(after) * jnp.expm1(-h), zero),
            (zero, 0.5 * logsnr.alpha(after) * jnp.expm1(h)),
        )

        def half(carry, level):
            z, x_before = carry
            i, lam, back, spread, on_z, on_x, on_change = level
            z = back * z + spread * noise(i // 2 + 1)
            x = denoiser(z, lam).x
            z = on_z * z + on_x * x + on_change * (x - x_before)
            return (jnp.where(i < 2 * T - 2, z, x), x), x

        (x, _), xs = jax.lax.scan(
            half,
            (z, jnp.zeros_like(z)),
            (jnp.arange(2 * T - 1), levels, *(_in_turn(*pair) for pair in halves)),
        )
        return Path(x, xs[::2])


def _in_turn(first: Array, second: Array) -> Array:
    """first[0], second[0], first[1], ... up to the last of the first: [T], [T] -> [2 T - 1]."""
    return jnp.stack([first, second], 1).reshape(-1)[:-1]
