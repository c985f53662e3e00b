"""The forward process and its posterior on the log signal-to-noise ratio lambda (section 2 of the
paper).

    q(z_lam | x)       = N(alpha x, sigma^2 I),  alpha^2 = sigmoid(lam), sigma^2 = sigmoid(-lam) (1)
    q(z_lam | z_lam')  = N((alpha / alpha') z', (1 - e^(lam - lam')) sigma^2 I),  lam < lam'     (2)
    q(z_lam'| z_lam, x) = N(mean, (1 - e^(lam - lam')) sigma'^2 I)                               (3)

and the three things a network may say of z: the noise eps, the clean x, or the velocity between
them. Everything is written with log_sigmoid and expm1, so that it holds at lam = +-20 in float32.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cfg_jax.types import Array, Prediction, PredictionWithV, UsageError


def alpha(lam: Array) -> Array:
    """The signal's share of z: alpha = sqrt(sigmoid(lam)), eq. (1). Any shape."""
    return jnp.exp(0.5 * jax.nn.log_sigmoid(lam))


def sigma(lam: Array) -> Array:
    """The noise's share of z: sigma = sqrt(sigmoid(-lam)), eq. (1). Any shape."""
    return jnp.exp(0.5 * jax.nn.log_sigmoid(-lam))


def expand(a: Array, z: Array) -> Array:
    """A number or one number an image, [] or [B], shaped so that it multiplies z [B, ...]."""
    a = jnp.asarray(a)
    return a if a.ndim == 0 else a.reshape(a.shape + (1,) * (z.ndim - 1))


def diffuse(x: Array, eps: Array, lam: Array) -> Array:
    """z = alpha x + sigma eps: a draw of q(z|x) from a unit normal eps, eq. (1). x, eps, z [B,
    ...].
    """
    lam = expand(lam, x)
    return alpha(lam) * x + sigma(lam) * eps


def eps_from_x(z: Array, x: Array, lam: Array) -> Array:
    """The noise that x leaves unexplained: eps = (z - alpha x) / sigma. All [B, ...]."""
    lam = expand(lam, z)
    return (z - alpha(lam) * x) / sigma(lam)


def x_from_eps(z: Array, eps: Array, lam: Array) -> Array:
    """The clean estimate: x = (z - sigma eps) / alpha, section 2. All [B, ...].

    At lam = -20 an error in eps is multiplied by 1/alpha = 22,026: see `denoiser.clipped`.
    """
    lam = expand(lam, z)
    return (z - sigma(lam) * eps) / alpha(lam)


def posterior_mean(z: Array, x: Array, lam: Array, lam_next: Array) -> Array:
    """The mean of q(z_next | z, x) for lam_next >= lam, eq. (3). All [B, ...].

    mean = e^(lam - lam') (alpha'/alpha) z + (1 - e^(lam - lam')) alpha' x
    """
    lam, lam_next = expand(lam, z), expand(lam_next, z)
    # e^(lam - lam') alpha' / alpha, in one exponent: neither factor is small or large alone.
    on_z = jnp.exp(lam - lam_next + 0.5 * (jax.nn.log_sigmoid(lam_next) - jax.nn.log_sigmoid(lam)))
    on_x = -jnp.expm1(lam - lam_next) * alpha(lam_next)
    return on_z * z + on_x * x


def forward_variance(lam: Array, lam_prev: Array) -> Array:
    """The variance of q(z_lam | z_prev) for lam <= lam_prev, eq. (2). Any shape."""
    return -jnp.expm1(lam - lam_prev) * jax.nn.sigmoid(-lam)


def posterior_variance(lam: Array, lam_next: Array) -> Array:
    """The variance of q(z_next | z_lam, x) for lam_next >= lam, eq. (3). Any shape."""
    return -jnp.expm1(lam - lam_next) * jax.nn.sigmoid(-lam_next)


def reverse_std(lam: Array, lam_next: Array, v: Array) -> Array:
    """The standard deviation of p(z_next | z), eq. (4): between eq. (3) at v = 0 and eq. (2) at v =
    1.

    std^2 = (posterior variance)^(1-v) (forward variance)^v. Both hold the factor 1 - e^(lam -
    lam'), so only sigma' and sigma are interpolated in the logarithm, and lam = lam' gives 0, not
    NaN.
    """
    log_sigma_sq = (1 - v) * jax.nn.log_sigmoid(-lam_next) + v * jax.nn.log_sigmoid(-lam)
    return jnp.sqrt(-jnp.expm1(lam - lam_next)) * jnp.exp(0.5 * log_sigma_sq)


class Reading(NamedTuple):
    """What a network's output means.

    target(x, eps, lam) is what it is trained to say; read(z, output, lam) turns it into a
    Prediction. in_eps(lam) is the square error of eps for a square error of 1 in the output, at a
    given z. The output has `outputs` times the channels of z.
    """

    target: Callable[[Array, Array, Array], Array]
    read: Callable[[Array, Array, Array], Prediction | PredictionWithV]
    in_eps: Callable[[Array], Array]
    outputs: int = 1


def _read_eps(z, output, lam):
    return Prediction(x_from_eps(z, output, lam), output)


def _read_x(z, output, lam):
    return Prediction(output, eps_from_x(z, output, lam))


def _velocity(x, eps, lam):
    lam = expand(lam, x)
    return alpha(lam) * eps - sigma(lam) * x


def _read_velocity(z, output, lam):
    lam = expand(lam, z)
    return Prediction(
        x=alpha(lam) * z - sigma(lam) * output,
        eps=sigma(lam) * z + alpha(lam) * output,
    )


def _read_eps_and_v(z, output, lam):
    eps, v = jnp.split(output, 2, axis=-1)
    return PredictionWithV(x_from_eps(z, eps, lam), eps, (v + 1) / 2)


def _no_target(x, eps, lam):
    raise UsageError(
        "reading='eps_and_v' is for published weights: no loss here trains a variance; train with "
        "reading='eps'."
    )


EPS = Reading(target=lambda x, eps, lam: eps, read=_read_eps, in_eps=jnp.ones_like)
X = Reading(target=lambda x, eps, lam: x, read=_read_x, in_eps=jnp.exp)
# velocity = alpha eps - sigma x, the "v-prediction" of Salimans & Ho (2022).
VELOCITY = Reading(target=_velocity, read=_read_velocity, in_eps=jax.nn.sigmoid)

# The learned variance of Nichol & Dhariwal (2021), eq. (15): their interpolation between log
# beta~ and log beta is eq. (4) of the paper, with a v in [0, 1] for each element.
EPS_AND_V = Reading(target=_no_target, read=_read_eps_and_v, in_eps=jnp.ones_like, outputs=2)

READINGS = {"eps": EPS, "x": X, "velocity": VELOCITY, "eps_and_v": EPS_AND_V}
