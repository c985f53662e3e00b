"""From a network to a denoiser: the one callable at which everything else meets."""

import jax.numpy as jnp

from cfg_jax.diffusion import logsnr
from cfg_jax.types import Array, Cond, Denoiser, Network, Params, Prediction


def denoiser(
    network: Network,
    params: Params,
    cond: Cond,
    *,
    reading: logsnr.Reading = logsnr.EPS,
    key: Array | None = None,
) -> Denoiser:
    """The network with its parameters and its condition bound: (z, lam) -> Prediction.

    `reading` says what the network's output means; `key` turns its dropout on (training only).
    Called with lam as a scalar or [B].
    """

    def denoise(z: Array, lam: Array) -> Prediction:
        lam = jnp.broadcast_to(lam, z.shape[:1])
        return reading.read(z, network.apply(params, z, lam, cond, key), lam)

    return denoise


def clipped(inner: Denoiser, low: float = -1.0, high: float = 1.0) -> Denoiser:
    """The denoiser with x clipped to the range of the data and eps recomputed from it.

    To be wrapped around the guided denoiser, not its parts: the mixture is what leaves the range.
    Not in the paper's text, but at lam = -20 an error of eps is multiplied by 22,026, and its
    authors' code clips (`eval_clip_denoised` of Meng et al., 2023).
    """

    def denoise(z: Array, lam: Array) -> Prediction:
        prediction = inner(z, lam)
        x = jnp.clip(prediction.x, low, high)
        return prediction._replace(x=x, eps=logsnr.eps_from_x(z, x, lam))

    return denoise
