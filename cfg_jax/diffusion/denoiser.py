"""From a network to a denoiser: the one callable at which everything else meets."""

from collections.abc import Sequence

import jax
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


def mixed(denoisers: Sequence[Denoiser]) -> Denoiser:
    """The mean of denoisers, such as those of several labels: a pass of each (Liu et al., 2022).

        eps~ = (1 / K) sum_k eps(z, c_k)

    The weights sum to one, so x mixes as eps does, and the pair is kept. At each level it is the
    score of the geometric mean of the densities, an image of all labels at once; an image of any
    one of them, the arithmetic mean, would need the weights p(c|z), which eps does not tell.
    """

    def denoise(z: Array, lam: Array) -> Prediction:
        readings = [inner(z, lam) for inner in denoisers]
        return jax.tree.map(lambda *sides: sum(sides) / len(sides), *readings)

    return denoise


def moved(guided: Prediction, x: Array, z: Array, lam: Array, *, keeps_pair: bool) -> Prediction:
    """The Prediction with another x [B, ...], and the eps that it leaves of z.

    With `keeps_pair` False eps was meant to be another noise than that, and stays (CFG++).
    """
    return guided._replace(x=x, eps=logsnr.eps_from_x(z, x, lam) if keeps_pair else guided.eps)


def clipped(
    inner: Denoiser, low: float = -1.0, high: float = 1.0, *, keeps_pair: bool = True
) -> Denoiser:
    """The denoiser with x clipped to the range of the data, and eps as `moved` has it.

    To be wrapped around the guided denoiser, not its parts: the mixture is what leaves the range.
    Not in the paper's text, but at lam = -20 an error of eps is multiplied by 22,026, and its
    authors' code clips (`eval_clip_denoised` of Meng et al., 2023). It is the static thresholding
    of Saharia et al. (2022); `corrections.DynamicThreshold` is their other one.
    """

    def denoise(z: Array, lam: Array) -> Prediction:
        guided = inner(z, lam)
        x = jnp.clip(guided.x, low, high)
        return moved(guided, x, z, lam, keeps_pair=keeps_pair)

    return denoise
