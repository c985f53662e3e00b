"""Loss weights: how much an error counts at each noise level, as a function of lambda.

Each is the factor on the error of eps, || eps(z) - eps ||^2 at lambda, of which eq. (5) takes the
plain mean over p(lambda). Where a paper weights the error of x, it is multiplied by e^-lambda here,
for || eps - eps' ||^2 = e^lambda || x - x' ||^2 at a given z; a network that says x or the velocity
gets its share by `logsnr.Reading.in_eps`. With p(lambda) uniform, `eps` is the variational bound up
to a factor: the schedule "uniform" is that weight, drawn instead of multiplied.
"""

import jax
import jax.numpy as jnp

from cfg_jax.types import Array


def eps(lam: Array) -> Array:
    """1: eq. (5), whatever the network says (Ho et al., 2020)."""
    return jnp.ones_like(lam)


def x(lam: Array) -> Array:
    """e^-lambda: the plain error of x."""
    return jnp.exp(-lam)


def velocity(lam: Array) -> Array:
    """1 + e^-lambda: the plain error of the velocity, "SNR + 1" of x (Salimans & Ho, 2022)."""
    return 1 + jnp.exp(-lam)


def truncated_snr(lam: Array) -> Array:
    """max(1, e^-lambda): max(SNR, 1) of x (Salimans & Ho, 2022, section 4)."""
    return jnp.maximum(1, jnp.exp(-lam))


def min_snr(lam: Array) -> Array:
    """min(1, 5 e^-lambda): min(SNR, 5) of x (Hang et al., 2023)."""
    return jnp.minimum(1, 5 * jnp.exp(-lam))


def p2(lam: Array) -> Array:
    """1 / (1 + e^lambda): 1 / (k + SNR)^gamma, both 1 (Choi et al., 2022)."""
    return jax.nn.sigmoid(-lam)


def edm(lam: Array) -> Array:
    """1 + 4 e^-lambda: 1 / c_out^2 of x for data of spread 0.5 (Karras et al., 2022, table 1).

    The weight alone: EDM also draws lambda from N(2.4, 2.4^2).
    """
    return 1 + 4 * jnp.exp(-lam)


WEIGHTS = {
    "eps": eps,
    "x": x,
    "velocity": velocity,
    "truncated_snr": truncated_snr,
    "min_snr": min_snr,
    "p2": p2,
    "edm": edm,
}
