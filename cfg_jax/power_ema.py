"""Averages of parameters by power functions of the step, and any other length made from a few.

    average_t = integral of theta(tau) p(tau) dtau,   p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1)

over tau in [0, t]: Karras et al. (2024, "EDM2"), section 3. Unlike an exponential one it forgets
the start of training altogether. Its length is `sigma`, the standard deviation of p over t: with
0.05 most of it is of the last tenth of training. Averages of two lengths, kept at intervals, span
others so well that those can be made once training is over.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from cfg_jax.types import Array, Params, UsageError

LONGEST = 12**-0.5  # gamma = 0: the plain mean of all parameters so far


def check_length(what: str, sigma: float) -> None:
    """Raises UsageError unless 0 < sigma < LONGEST."""
    if not 0 < sigma < LONGEST:
        raise UsageError(
            f"{what}={sigma:g}: a relative length lies above 0 and below {LONGEST:.4f}, which is "
            "the plain mean over all of training; 0.05 and 0.1 are common."
        )


def exponent(sigma: float) -> float:
    """gamma of a length: the root of sigma^2 (gamma + 2)^2 (gamma + 3) = gamma + 1 above 0."""
    inverse = sigma**-2.0
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def track(sigma: float, average: Params, params: Params, step: Array) -> Params:
    """The average after the update that made step + 1 of step.

    average <- beta average + (1 - beta) params with beta = (1 - 1 / (step + 1))^(gamma + 1), so
    that parameters of step i weigh i^(gamma + 1) - (i - 1)^(gamma + 1), whatever it began with.
    """
    share = -jnp.expm1((exponent(sigma) + 1) * jnp.log1p(-1 / (step.astype(jnp.float32) + 1)))
    return jax.tree.map(lambda a, p: a + share * (p - a), average, params)


def products(a: Sequence[tuple[float, float]], b: Sequence[tuple[float, float]]) -> np.ndarray:
    """The integrals of p_i p_j for two lists of (step, sigma), [len(a), len(b)], float64."""

    def columns(profiles):
        t, sigma = np.array(profiles, np.float64).T
        return t, np.array([exponent(s) for s in sigma])

    (t, g), (u, h) = columns(a), columns(b)
    t, g = t[:, None], g[:, None]
    # p_i p_j = ... tau^(g + h) up to the earlier of the two steps.
    first = np.minimum(t, u)
    logs = (g + h + 1) * np.log(first) - (g + 1) * np.log(t) - (h + 1) * np.log(u)
    return (g + 1) * (h + 1) / (g + h + 1) * np.exp(logs)


def coefficients(
    kept: Sequence[tuple[float, float]], wanted: tuple[float, float]
) -> tuple[np.ndarray, float]:
    """What to multiply the averages of the profiles `kept` with, so that their sum is `wanted`'s.

    Profiles are (step, sigma). The least squares of p over [0, t], scaled to a sum of 1, and its
    relative error, the norm of what is left over that of p.
    """
    by_kept, by_wanted = products(kept, kept), products(kept, [wanted])[:, 0]
    out, *_ = np.linalg.lstsq(by_kept, by_wanted, rcond=None)
    out = out / out.sum()
    norm = products([wanted], [wanted])[0, 0]
    left = norm - 2 * out @ by_wanted + out @ by_kept @ out
    return out, math.sqrt(max(left, 0.0) / norm)
