"""Other people's clocks: lambda from and to sigma, the timesteps of a chain of betas, and the steps
of any list of levels.

Nothing in the maths uses them: they are for those who have an interval in another paper's unit. For
the time u in [0, 1] see `schedules`: schedule(u) is lambda, schedule.u(lam) the way back. The data
are meant to be of one scale throughout, for a noise level is relative to them: a sigma for data of
another spread is divided by how much wider these are.
"""

import jax.numpy as jnp

from cfg_jax.diffusion import schedules
from cfg_jax.types import Array, UsageError


def sigma_of(lam: Array) -> Array:
    """sigma = e^(-lam / 2): the noise on data that are not shrunk (Karras et al., 2022). Any
    shape.
    """
    return jnp.exp(-0.5 * jnp.asarray(lam))


def lam_of_sigma(sigma: Array) -> Array:
    """lam = -2 log(sigma). Any shape; sigma = 0 is lam = inf."""
    return -2 * jnp.log(jnp.asarray(sigma))


def step_of(lam: Array, lams: Array) -> Array:
    """Where lam stands among levels lams [T] in or against their order: their index, fractional
    between two, the nearest end outside. Any shape; lams[i] is the way back.
    """
    lams = jnp.asarray(lams)
    index = jnp.arange(len(lams), dtype=lams.dtype)
    rising = lams[-1] > lams[0]
    order = (lams, index) if rising else (lams[::-1], index[::-1])
    return jnp.interp(jnp.asarray(lam), *order)


def interval_of_steps(first: int, last: int, lams: Array) -> tuple[float, float]:
    """(low, high) of the `strengths.Interval` that holds lams[first] to lams[last] and no other.

    Its ends lie halfway to the neighbours, or nowhere where there is none. lams [T] in either
    order. Raises UsageError unless 0 <= first <= last < T.
    """
    if not 0 <= first <= last < len(lams):
        raise UsageError(f"steps {first} to {last}: 0 <= first <= last < {len(lams)} are needed.")
    before = 0.5 * (lams[first - 1] + lams[first]) if first else None
    after = 0.5 * (lams[last] + lams[last + 1]) if last + 1 < len(lams) else None
    low, high = (before, after) if lams[-1] > lams[0] else (after, before)
    return (
        float("-inf") if low is None else float(low),
        float("inf") if high is None else float(high),
    )


def timesteps(betas: str) -> Array:
    """lam [T], decreasing, of the timesteps 0 to T - 1 of a chain of these `schedules.BETAS`."""
    return jnp.asarray(schedules.Discrete(betas).levels())


TIMESTEPS = {betas: lambda betas=betas: timesteps(betas) for betas in schedules.BETAS}
