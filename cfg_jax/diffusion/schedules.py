"""Noise levels: schedules u -> lambda, the grids a sampler walks, and what a network is told of
lambda.

In training u ~ U[0, 1], so a schedule is also a distribution p(lambda). In sampling the grid's
values are data: a sampler takes any increasing array.
"""

import dataclasses
import math

import jax.numpy as jnp

from cfg_jax.types import Array, Schedule, UsageError


def _check_range(lambda_min: float, lambda_max: float) -> None:
    if not (math.isfinite(lambda_min) and math.isfinite(lambda_max) and lambda_min < lambda_max):
        raise UsageError(
            f"lambda_min={lambda_min} and lambda_max={lambda_max}: both must be finite, and "
            "lambda_min below lambda_max; the paper has -20 and 20."
        )


@dataclasses.dataclass(frozen=True)
class Cosine:
    """lam = -2 log tan(a u + b), section 2 of the paper: p(lam) is a truncated hyperbolic secant.

    b = arctan(e^(-lambda_max / 2)), a = arctan(e^(-lambda_min / 2)) - b; this is the cosine
    schedule of Nichol & Dhariwal (2021) in continuous time. u of any shape in [0, 1]. Raises
    UsageError unless lambda_min < lambda_max.
    """

    lambda_min: float = -20.0
    lambda_max: float = 20.0

    def __post_init__(self):
        _check_range(self.lambda_min, self.lambda_max)

    def __call__(self, u: Array) -> Array:
        b = math.atan(math.exp(-0.5 * self.lambda_max))
        c = math.atan(math.exp(0.5 * self.lambda_min))  # pi/2 - (a + b), without the cancellation
        a = 0.5 * math.pi - b - c
        u = jnp.asarray(u)
        # Beyond pi/4 the tangent of a float32 angle loses its digits: there, tan(y) = 1 / tan(pi/2
        # - y).
        low, high = a * u + b, a * (1 - u) + c
        lam = jnp.where(low < high, -2 * jnp.log(jnp.tan(low)), 2 * jnp.log(jnp.tan(high)))
        return jnp.clip(lam, self.lambda_min, self.lambda_max)

    def u(self, lam: Array) -> Array:
        """The way back: u in [0, 1] of lam, of any shape; a level outside is the nearest end."""
        b = math.atan(math.exp(-0.5 * self.lambda_max))
        c = math.atan(math.exp(0.5 * self.lambda_min))
        a = 0.5 * math.pi - b - c
        lam = jnp.asarray(lam)
        # From the nearer end, as above.
        low, high = jnp.arctan(jnp.exp(-0.5 * lam)), jnp.arctan(jnp.exp(0.5 * lam))
        return jnp.clip(jnp.where(low < high, (low - b) / a, 1 - (high - c) / a), 0, 1)


@dataclasses.dataclass(frozen=True)
class Uniform:
    """lam uniform on [lambda_min, lambda_max]: eq. (5) is then the variational bound up to a
    factor.

    u of any shape in [0, 1]. Raises UsageError unless lambda_min < lambda_max.
    """

    lambda_min: float = -20.0
    lambda_max: float = 20.0

    def __post_init__(self):
        _check_range(self.lambda_min, self.lambda_max)

    def __call__(self, u: Array) -> Array:
        return self.lambda_max + jnp.asarray(u) * (self.lambda_min - self.lambda_max)

    def u(self, lam: Array) -> Array:
        """The way back: u in [0, 1] of lam, of any shape; a level outside is the nearest end."""
        u = (self.lambda_max - jnp.asarray(lam)) / (self.lambda_max - self.lambda_min)
        return jnp.clip(u, 0, 1)


def _steps(steps: int) -> Array:
    """0 to 1 in as many levels [T]; 0 alone for one. Raises UsageError for fewer than one."""
    if steps < 1:
        raise UsageError(f"steps={steps}: a chain has at least one step.")
    return jnp.arange(steps) / max(steps - 1, 1)


_DISCRETE_STEPS = 1000


def _linear_beta(t: int) -> float:
    """Ho et al. (2020), section 4."""
    return 1e-4 + (0.02 - 1e-4) * t / (_DISCRETE_STEPS - 1)


def _scaled_linear_beta(t: int) -> float:
    """Stable Diffusion's (Rombach et al., 2022): sqrt(beta) is linear."""
    low, high = 0.00085**0.5, 0.012**0.5
    return (low + (high - low) * t / (_DISCRETE_STEPS - 1)) ** 2


def _cosine_beta(t: int) -> float:
    """Nichol & Dhariwal (2021), eq. (17), and the clipping below it."""

    def share(t: int) -> float:
        return math.cos((t / _DISCRETE_STEPS + 0.008) / 1.008 * math.pi / 2) ** 2

    return min(1 - share(t + 1) / share(t), 0.999)


BETAS = {"linear": _linear_beta, "scaled_linear": _scaled_linear_beta, "cosine": _cosine_beta}


@dataclasses.dataclass(frozen=True)
class Discrete:
    """The levels t = 0, ..., 999 of a chain with betas, as published weights know them.

    alpha^2 at level t is the product of 1 - beta up to t; u of any shape in [0, 1] names the level
    nearest to 999 u, so that `uniform_u` walks the respaced chains of Nichol & Dhariwal (2021).
    Raises UsageError for betas that are not known.
    """

    betas: str = "linear"  # of BETAS

    def __post_init__(self):
        if self.betas not in BETAS:
            raise UsageError(f"schedule.betas={self.betas!r}: must be one of {', '.join(BETAS)}.")

    def levels(self) -> list[float]:
        """lambda at t = 0, ..., 999, decreasing. In Python's floats: it sums small logarithms."""
        log_alpha_sq, lams = 0.0, []
        for t in range(_DISCRETE_STEPS):
            log_alpha_sq += math.log1p(-BETAS[self.betas](t))
            lams.append(log_alpha_sq - math.log(-math.expm1(log_alpha_sq)))
        return lams

    def __call__(self, u: Array) -> Array:
        t = jnp.round(jnp.asarray(u) * (_DISCRETE_STEPS - 1)).astype(jnp.int32)
        return jnp.asarray(self.levels())[t]

    def u(self, lam: Array) -> Array:
        """The way back: u in [0, 1] of lam, of any shape; a level outside is the nearest end."""
        return self.sinusoid_input(lam) / (_DISCRETE_STEPS - 1)

    def sinusoid_input(self, lam: Array) -> Array:
        """The t of lambda, what a network of this chain is told; between two levels, between."""
        # From noise to data, for interp wants its points in increasing order.
        t = jnp.arange(_DISCRETE_STEPS - 1.0, -1.0, -1.0)
        return jnp.interp(lam, jnp.asarray(self.levels()[::-1]), t)


def uniform_u(schedule: Schedule, steps: int) -> Array:
    """The paper's grid [T]: u uniform from 1 down to 0, both ends included; increasing in lambda.

    T = 1 is the noisiest level alone. Raises UsageError for fewer than one step.
    """
    return schedule(1 - _steps(steps))


def uniform_lambda(schedule: Schedule, steps: int) -> Array:
    """A grid [T] uniform in lambda between the ends of the schedule: better for few steps.

    Raises UsageError for fewer than one step.
    """
    low, high = schedule(jnp.ones(())), schedule(jnp.zeros(()))
    return low + _steps(steps) * (high - low)


def edm(
    schedule: Schedule,
    steps: int,
    *,
    rho: float = 7.0,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
) -> Array:
    """The grid [T] of Karras et al. (2022), eq. (5): uniform in sigma^(1 / rho).

    sigma is that paper's, e^(-lam / 2): what multiplies the noise where the image is multiplied by
    1. Its last level, 0, is what every sampler here ends with. Where the schedule ends before, as
    those of published weights do, the grid ends there: beyond, the network was told of no level.
    Raises UsageError for fewer than one step, and unless 0 < sigma_min < sigma_max and rho > 0.
    """
    if not (0 < sigma_min < sigma_max < math.inf and 0 < rho < math.inf):
        raise UsageError(
            f"grid.sigma_min={sigma_min}, sigma_max={sigma_max}, rho={rho}: all must be above 0, "
            "and sigma_min below sigma_max; Karras et al. (2022) have 0.002, 80 and 7."
        )
    noisiest, cleanest = schedule(jnp.ones(())), schedule(jnp.zeros(()))
    high = jnp.minimum(sigma_max, jnp.exp(-0.5 * noisiest)) ** (1 / rho)
    low = jnp.maximum(sigma_min, jnp.exp(-0.5 * cleanest)) ** (1 / rho)
    return -2 * rho * jnp.log(high + _steps(steps) * (low - high))


def explicit(schedule: Schedule, steps: int, *, lams: tuple[float, ...]) -> Array:
    """The levels lams [T] as they are given. Raises UsageError unless they are T and increase."""
    del schedule
    if len(lams) != steps:
        raise UsageError(
            f"grid.lams has {len(lams)} levels with steps={steps}: give steps={len(lams)}."
        )
    if not (all(map(math.isfinite, lams)) and list(lams) == sorted(set(lams))):
        raise UsageError(f"grid.lams={lams}: levels are finite and increase, from noise to clean.")
    return jnp.asarray(lams)


def sinusoid_input(lam: Array) -> Array:
    """What enters a network's sinusoid: 1000 arctan(e^(-lam / 2)) / (pi / 2), in [0, 1000].

    For the cosine schedule that is 1000 u but for the truncation, the scale for which the
    sinusoid's frequencies were made (Meng et al., 2023, who share the authors' networks). lam is
    clipped to +-20 as there. Any shape.
    """
    return 1000 * jnp.arctan(jnp.exp(-0.5 * jnp.clip(lam, -20, 20))) / (0.5 * jnp.pi)


SCHEDULES = {"cosine": Cosine, "uniform": Uniform, "discrete": Discrete}
GRIDS = {
    "uniform_u": uniform_u,
    "uniform_lambda": uniform_lambda,
    "edm": edm,
    "explicit": explicit,
}
