"""Samplers: (denoiser, noise, lams) -> path. They own their loop, never clip, and know no label.

Here are those that look at one level at a time, and the table of all of them. Each returns the
clean estimate of its last level; `levels` tells at which levels it asks for one.
"""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from cfg_jax.diffusion import edm, logsnr, multistep
from cfg_jax.types import Array, Denoiser, Noise, Path, PredictionWithV, UsageError


def seeded_noise(keys: Array, shape: tuple[int, ...]) -> Noise:
    """The draws of a batch of trajectories, each from its own key: keys [B], shape of one image.

    Draw i of image b depends on keys[b] and i alone: not on the batch, its order, or the devices.
    """

    size = math.prod(shape)

    def noise(i: Array) -> Array:
        # Drawn flat: XLA:CPU takes ten times as long to compile a draw over many axes.
        draws = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, i), (size,)))(keys)
        return draws.reshape(-1, *shape)

    return noise


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ancestral:
    """Algorithm 2 of the paper: ancestral sampling with reverse variance exponent v, eq. (4).

    v = 0 takes the posterior's variance, v = 1 the forward process's; the paper has 0.3 at 64x64
    and 0.2 at 128x128. One evaluation of the denoiser a level: T of them, the last of which is the
    image. With `learned_v` it is the v of each element that the network tells, as published weights
    do. Raises UsageError unless 0 <= v <= 1, and where the denoiser tells no v.
    """

    order: ClassVar[int] = 1
    needs_pair: ClassVar[bool] = True  # it makes the noise of x and z, and reads no eps
    v: float | Array = 0.3
    learned_v: bool = dataclasses.field(default=False, metadata={"static": True})

    def __post_init__(self):
        if isinstance(self.v, int | float) and not 0 <= self.v <= 1:
            raise UsageError(
                f"sampler.v={self.v}: the variance exponent lies in [0, 1]; the paper has 0.3 at "
                "64x64 and 0.2 at 128x128."
            )

    def levels(self, lams: Array) -> Array:
        """The levels at which it asks its denoiser: what guidance costs is counted over them."""
        return lams

    def __call__(self, denoiser: Denoiser, noise: Noise, lams: Array) -> Path:
        T = lams.shape[0]
        z = noise(0)
        lams = lams.astype(z.dtype)

        def step(z, level):
            t, lam, lam_next = level
            prediction = denoiser(z, lam)
            if self.learned_v and not isinstance(prediction, PredictionWithV):
                raise UsageError(
                    "sampler.learned_v=True, but this model tells no variance: only published "
                    "weights do, with reading='eps_and_v'."
                )
            x = prediction.x
            mean = logsnr.posterior_mean(z, x, lam, lam_next)
            v = prediction.v if self.learned_v else self.v
            std = logsnr.reverse_std(lam, lam_next, v).astype(z.dtype)
            # The last line of Algorithm 2 inside the loop: so the denoiser is compiled once, not
            # twice.
            return jnp.where(t < T, mean + std * noise(t), x), x

        levels = (jnp.arange(1, T + 1), lams, jnp.append(lams[1:], lams[-1]))
        x, xs = jax.lax.scan(step, z, levels)
        return Path(x, xs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DDIM:
    """Denoising diffusion implicit models (Song, Meng & Ermon, 2021), eq. (12) and (16) there.

        z' = alpha' x + sigma' (keep eps + spread n),
        spread^2 = eta^2 (1 - e^(lam - lam')),   keep^2 = 1 - spread^2

    eta = 0 is deterministic, a first-order step of the probability flow; eta = 1 is Ancestral(v=0).
    eps is what the denoiser says, not what z and x leave: so rules that mean to add another noise
    again (CFG++) work with this sampler alone. T evaluations. Raises UsageError unless 0 <= eta <=
    1.
    """

    order: ClassVar[int] = 1
    needs_pair: ClassVar[bool] = False
    eta: float | Array = 0.0

    def __post_init__(self):
        multistep.check_eta(self.eta)

    def levels(self, lams: Array) -> Array:
        """As `Sampler.levels`: the chain's own."""
        return lams

    def __call__(self, denoiser: Denoiser, noise: Noise, lams: Array) -> Path:
        T = lams.shape[0]
        z = noise(0)
        lams = lams.astype(z.dtype)

        def step(z, level):
            t, lam, lam_next = level
            said = denoiser(z, lam)
            x, eps = said.x, said.eps
            # keep^2 as a sum: 1 - spread^2 would lose its digits where eta = 1 and the step is
            # long.
            keep = jnp.sqrt(1 - self.eta**2 + self.eta**2 * jnp.exp(lam - lam_next))
            spread = self.eta * jnp.sqrt(-jnp.expm1(lam - lam_next))
            rest = keep.astype(z.dtype) * eps + spread.astype(z.dtype) * noise(t)
            z = logsnr.alpha(lam_next) * x + logsnr.sigma(lam_next) * rest
            return jnp.where(t < T, z, x), x

        levels = (jnp.arange(1, T + 1), lams, jnp.append(lams[1:], lams[-1]))
        x, xs = jax.lax.scan(step, z, levels)
        return Path(x, xs)


SAMPLERS = {
    "ancestral": Ancestral,
    "ddim": DDIM,
    "dpmpp_2m": multistep.DPMSolver2M,
    "unipc": multistep.UniPC,
    "euler": edm.Euler,
    "heun": edm.Heun,
}
