"""Other directions than eq. (6)'s, out of the same two readings of z.

Each takes a conditional denoiser and a reference, as `guidance.ClassifierFree` does, and is eq. (6)
where its own idea has nothing to do. With one w for all, a pass that w leaves without weight is not
run.
"""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from cfg_jax.diffusion import denoiser, logsnr
from cfg_jax.types import Array, Denoiser, Prediction, UsageError


def _inner(a: Array, b: Array) -> Array:
    """<a, b> of each image, shaped so that it multiplies them. a, b [B, ...]."""
    return jnp.sum(a * b, axis=tuple(range(1, a.ndim)), keepdims=True)


def _over(a: Array, b: Array) -> Array:
    """a / b, and 0 where b = 0: what has no length has no share in anything."""
    return jnp.where(b == 0, 0, a / jnp.where(b == 0, 1, b))


def _unless(w: Array, value: float, mix, alone) -> Prediction:
    """mix(), but alone() where the one w for all is `value`: the scan skips the other branch."""
    return mix() if w.ndim else jax.lax.cond(w == value, alone, mix)


def runs(w: float | Array, value: float, lams: Array) -> int:
    """In how many of the levels lams [T] a pass is run that one w = value makes needless."""
    return len(lams) if jnp.ndim(w) or w != value else 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdaptiveProjected:
    """APG, adaptive projected guidance without its momentum (Sadat et al., 2024).

        d = x(z, c) - x(z),   d <- d min(1, bound / |d|),   x~ = x(z, c) + w (d_perp + eta d_par)

    d_par is the part of d along x(z, c), which saturates colours; eta = 0, theirs, leaves it out.
    `bound` is the largest length of d, None for any; it scales with the image: theirs are 2.5 (EDM2
    latents of 64x64x4) to 15 (SDXL). eta = 1 and no bound is eq. (6). eps is recomputed. Their
    reverse momentum needs a memory of the steps before, which a denoiser has not. w is a number,
    or one an image [B].
    """

    second: ClassVar[str | None] = "reference"
    keeps_pair: ClassVar[bool] = True
    w: float | Array = 0.0
    eta: float | Array = 0.0
    bound: float | Array | None = None

    def __post_init__(self):
        if isinstance(self.eta, int | float) and not math.isfinite(self.eta):
            raise UsageError(f"guidance.eta={self.eta}: a finite number; 0 projects, 1 does not.")
        if isinstance(self.bound, int | float) and not self.bound > 0:
            raise UsageError(
                f"guidance.bound={self.bound}: the largest length of the difference, above 0, or "
                "None for any."
            )

    def passes(self, lams: Array) -> tuple[int, int]:
        """As `Guidance.passes`: w = 0 needs no second one."""
        return len(lams), runs(self.w, 0, lams)

    def __call__(self, conditional: Denoiser, reference: Denoiser, /) -> Denoiser:
        w = jnp.asarray(self.w)

        def denoise(z: Array, lam: Array) -> Prediction:
            with_c = conditional(z, lam)

            def mix() -> Prediction:
                d = with_c.x - reference(z, lam).x
                if self.bound is not None:
                    length = jnp.maximum(jnp.sqrt(_inner(d, d)), jnp.finfo(d.dtype).tiny)
                    d = d * jnp.minimum(1, self.bound / length)
                along = _over(_inner(d, with_c.x), _inner(with_c.x, with_c.x)) * with_c.x
                x = with_c.x + logsnr.expand(w, z) * (d + (self.eta - 1) * along)
                return denoiser.moved(with_c, x.astype(z.dtype), z, lam, keeps_pair=True)

            return _unless(w, 0, mix, lambda: with_c)

        return denoise


def scale_of(said: Array, without: Array) -> Array:
    """s = <said, without> / |without|^2 of each image: what s without explains of said is most.
    said, without [B, ...].
    """
    return _over(_inner(said, without), _inner(without, without))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ZeroStar:
    """CFG-Zero*: the reference scaled to explain most of the condition (Fan et al., 2025).

        v~ = (1 + w) v(z, c) - w s v(z),   s = <v(z, c), v(z)> / |v(z)|^2 of each image

    v is the velocity alpha eps - sigma x, for the flow of their paper; s = 1 is eq. (6). w = -1 is
    s v(z), not the unconditional model. Their zero velocity in the first steps, which helps models
    that are trained too little, is not part of it. The pair is kept. w is a number, or one an image
    [B].
    """

    second: ClassVar[str | None] = "reference"
    keeps_pair: ClassVar[bool] = True
    w: float | Array = 0.0

    def passes(self, lams: Array) -> tuple[int, int]:
        """As `Guidance.passes`: w = 0 needs no second one."""
        return len(lams), runs(self.w, 0, lams)

    def __call__(self, conditional: Denoiser, reference: Denoiser, /) -> Denoiser:
        w = jnp.asarray(self.w)

        def denoise(z: Array, lam: Array) -> Prediction:
            with_c = conditional(z, lam)

            def mix() -> Prediction:
                said, without = (
                    logsnr.VELOCITY.target(side.x, side.eps, lam)
                    for side in (with_c, reference(z, lam))
                )
                a = logsnr.expand(w, z)
                velocity = (1 + a) * said - a * scale_of(said, without) * without
                x, eps = logsnr.VELOCITY.read(z, velocity.astype(z.dtype), lam)
                return with_c._replace(x=x, eps=eps)

            return _unless(w, 0, mix, lambda: with_c)

        return denoise


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PlusPlus:
    """CFG++: the image between the two readings, the noise that of the reference (Chung et al.,
    2024).

        x~ = (1 + w) x(z, c) - w x(z),   eps~ = eps(z),   -1 <= w <= 0

    Their lambda is 1 + w in [0, 1]: 0 is unconditional, and 1 is already strong, for the push comes
    anew at every step and so grows with their number. The pair z = alpha x + sigma eps is broken on
    purpose: only a sampler that re-adds the eps that it is told samples it (DDIM). Raises
    UsageError for a w outside [-1, 0].
    """

    second: ClassVar[str | None] = "reference"
    keeps_pair: ClassVar[bool] = False
    w: float | Array = 0.0

    def __post_init__(self):
        if isinstance(self.w, int | float) and not -1 <= self.w <= 0:
            raise UsageError(
                f"w={self.w:g}: CFG++ lies between the unconditional model, w=-1, and the "
                "conditional one's image, w=0; its lambda is 1 + w."
            )

    def passes(self, lams: Array) -> tuple[int, int]:
        """As `Guidance.passes`: w = -1 needs no first one."""
        return runs(self.w, -1, lams), len(lams)

    def __call__(self, conditional: Denoiser, reference: Denoiser, /) -> Denoiser:
        w = jnp.asarray(self.w)

        def denoise(z: Array, lam: Array) -> Prediction:
            without = reference(z, lam)

            def mix() -> Prediction:
                a = logsnr.expand(w, z)
                x = (1 + a) * conditional(z, lam).x - a * without.x
                return without._replace(x=x.astype(z.dtype))

            return _unless(w, -1, mix, lambda: without)

        return denoise
