"""Samplers that remember: second order in lambda at one evaluation a level.

With x given between two levels, the probability flow is solved exactly. For h = (lam' - lam) / 2

    z' = (sigma' / sigma) z + alpha' int_0^h e^(s - h) x(s) ds,

x(s) being the clean estimate s beyond lam, in units of lam / 2 = log(alpha / sigma). What is put
for x(s), from estimates at hand, makes the sampler; with x constant it is DDIM.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from cfg_jax.diffusion import logsnr
from cfg_jax.types import Array, Denoiser, Noise, Path, UsageError


def _steps(lams: Array) -> tuple[Array, Array]:
    """h [T] of the step that leaves each level (0 from the last), and its ratio to the one before.

    No step comes before the first: it counts as infinite, and the ratio is 0.
    """
    h = jnp.diff(lams) / 2
    out = jnp.pad(h, (0, 1))
    return out, out / jnp.pad(h, (1, 0), constant_values=jnp.inf)


def check_eta(eta: float | Array) -> None:
    """Raises UsageError unless 0 <= eta <= 1: eta is the share of the reverse equation's noise."""
    if isinstance(eta, int | float) and not 0 <= eta <= 1:
        raise UsageError(
            f"sampler.eta={eta}: the share of the reverse equation's noise lies in [0, 1]; 0 is "
            "deterministic, 1 the SDE form, which for ddim is ancestral sampling with v = 0."
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DPMSolver2M:
    """DPM-Solver++ (2M) and its SDE form (Lu et al., 2022, arXiv 2211.01095), Algorithm 2 there.

        z' = (sigma' / sigma) e^(-g) z + alpha' (1 - e^(-h - g)) (x + (h / 2) x_slope)
             + sigma' sqrt(1 - e^(-2 g)) n,
        x_slope = (x - x_before) / h_before,   g = eta^2 h

    eta = 0 solves the probability flow, eta = 1 is the SDE form; between them eta is, as in DDIM,
    the share of the reverse equation's noise (that of k-diffusion is its square). The first step
    has no slope. T evaluations. Raises UsageError unless 0 <= eta <= 1.
    """

    order: ClassVar[int] = 2
    needs_pair: ClassVar[bool] = True
    eta: float | Array = 0.0

    def __post_init__(self):
        check_eta(self.eta)

    def levels(self, lams: Array) -> Array:
        """As `Sampler.levels`: the chain's own."""
        return lams

    def __call__(self, denoiser: Denoiser, noise: Noise, lams: Array) -> Path:
        T = lams.shape[0]
        z = noise(0)
        lams = lams.astype(z.dtype)
        after = jnp.append(lams[1:], lams[-1])
        h, ratio = _steps(lams)
        g = (self.eta**2 * h).astype(z.dtype)
        on_z = logsnr.sigma(after) / logsnr.sigma(lams) * jnp.exp(-g)
        on_x = -logsnr.alpha(after) * jnp.expm1(-h - g)
        on_noise = logsnr.sigma(after) * jnp.sqrt(-jnp.expm1(-2 * g))

        def step(carry, level):
            z, x_before = carry
            t, lam, on_z, on_x, on_noise, ratio = level
            x = denoiser(z, lam).x
            middle = x + 0.5 * ratio * (x - x_before)
            z = on_z * z + on_x * middle + on_noise * noise(t)
            return (jnp.where(t < T, z, x), x), x

        levels = (jnp.arange(1, T + 1), lams, on_z, on_x, on_noise, ratio)
        (x, _), xs = jax.lax.scan(step, (z, jnp.zeros_like(z)), levels)
        return Path(x, xs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class UniPC:
    """UniPC-2 with B(h) = e^h - 1 (Zhao et al., 2023): 2M, whose every step is taken again.

    Once x is known at the step's end too, the step is taken again from where it began, with the
    parabola through the last three estimates for x(s); for UniC-2 that is what its equations say,
    whatever B is. (The first has two estimates, weighed equally: UniC-1.) The estimate is not made
    again at the better z. Of order 3; T evaluations, as the last level is only read.
    """

    order: ClassVar[int] = 3
    needs_pair: ClassVar[bool] = True

    def levels(self, lams: Array) -> Array:
        """As `Sampler.levels`: the chain's own."""
        return lams

    def __call__(self, denoiser: Denoiser, noise: Noise, lams: Array) -> Path:
        T = lams.shape[0]
        z = noise(0)
        lams = lams.astype(z.dtype)
        after = jnp.append(lams[1:], lams[-1])
        h, ratio = _steps(lams)
        first = jnp.arange(T) == 0
        on_z, alpha = logsnr.sigma(after) / logsnr.sigma(lams), logsnr.alpha(after)
        # What a constant, a line and a parabola weigh: the integrals of (s / h)^k e^(s - h).
        flat = -jnp.expm1(-h)
        line = jnp.where(first, 0.5 * flat, 1 - flat / h)
        parabola = jnp.where(first, 0, 1 - 2 * line / h)
        to_next = (on_z, alpha * flat, ratio)
        # The step that led here, at the level where it ends; to the first level none did.
        led_here = (on_z, alpha * flat, alpha * line, alpha * parabola, ratio)
        led_here = tuple(jnp.pad(a[:-1], (1, 0)) for a in led_here)

        def step(carry, level):
            guess, begin, x_1, x_2 = carry  # z here, z where the last step began, the x before
            t, lam, led_here, to_next = level
            x = denoiser(guess, lam).x
            on_z, flat, line, parabola, ratio = led_here
            rise, rise_before = x - x_1, ratio * (x_1 - x_2)
            bend = ratio / (1 + ratio) * (rise - rise_before)
            again = on_z * begin + flat * x_1 + line * (rise - bend) + parabola * bend
            z = jnp.where(t > 1, again, guess)
            on_z, flat, ratio = to_next
            guess = on_z * z + flat * (x + 0.5 * ratio * (x - x_1))
            return (jnp.where(t < T, guess, x), z, x, x_1), x

        zero = jnp.zeros_like(z)
        levels = (jnp.arange(1, T + 1), lams, led_here, to_next)
        (x, *_), xs = jax.lax.scan(step, (z, z, zero, zero), levels)
        return Path(x, xs)
