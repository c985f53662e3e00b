"""Guidance: denoisers -> a denoiser. The paper's rule, eq. (6), and the rule that it does without.

A rule never meets a label, a network or a sampler: conditions are bound in the denoisers it is
given. Its strength w is a leaf of a pytree, so that one compiled program serves every w.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from cfg_jax.diffusion import logsnr
from cfg_jax.types import Array, Denoiser, LogProb, Prediction, UsageError


def check_w(w: float) -> float:
    """w itself, if it is a strength: finite and at least -1. Raises UsageError otherwise."""
    if not (math.isfinite(w) and w >= -1):
        raise UsageError(
            f"w={w}: the guidance strength is a finite number >= -1 (-1 unconditional, 0 "
            "conditional; the guidance scale of other papers is 1 + w)."
        )
    return w


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ClassifierFree:
    """Classifier-free guidance, eq. (6) of the paper.

        eps~ = (1 + w) eps(z, c) - w eps(z)

    w = 0 is the conditional model, w = -1 the unconditional one; "guidance scale" elsewhere is 1 +
    w. w is a number, or one an image [B]. The weights sum to one, so x mixes as eps does, and the
    pair keeps z = alpha x + sigma eps. With one w for all, w = 0 and w = -1 run only the pass that
    they need.
    """

    w: float | Array = 0.0

    def __call__(self, conditional: Denoiser, unconditional: Denoiser, /) -> Denoiser:
        w = jnp.asarray(self.w)

        def denoise(z: Array, lam: Array) -> Prediction:
            def mix() -> Prediction:
                a = logsnr.expand(w, z)
                return jax.tree.map(
                    lambda with_c, without: ((1 + a) * with_c - a * without).astype(z.dtype),
                    conditional(z, lam),
                    unconditional(z, lam),
                )

            if w.ndim:
                return mix()
            # A conditional on a scalar inside a scan really skips the branches not taken.
            which = jnp.where(w == 0, 0, jnp.where(w == -1, 1, 2))
            return jax.lax.switch(
                which, [lambda: conditional(z, lam), lambda: unconditional(z, lam), mix]
            )

        return denoise


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ClassifierGuidance:
    """Classifier guidance (Dhariwal & Nichol, 2021), section 3.1 of the paper.

        eps~ = eps(z, c) - w sigma grad_z log p(c|z)

    The denoiser may be conditional or not: weight w on the conditional model is, in theory, weight
    w + 1 on the unconditional one. x moves with eps: x~ = x + w (sigma^2 / alpha) grad_z log
    p(c|z). w is a number, or one an image [B]; with one w for all, w = 0 does not run the
    classifier.
    """

    w: float | Array = 0.0

    def __call__(self, denoiser: Denoiser, log_prob: LogProb, /) -> Denoiser:
        w = jnp.asarray(self.w)

        def denoise(z: Array, lam: Array) -> Prediction:
            def step() -> Array:
                # Each image's log-probability depends on that image alone: the sum's gradient is
                # theirs.
                gradient = jax.grad(lambda z: log_prob(z, lam).sum())(z)
                return (logsnr.expand(w, z) * gradient).astype(z.dtype)

            guide = step() if w.ndim else jax.lax.cond(w == 0, lambda: jnp.zeros_like(z), step)
            x, eps = denoiser(z, lam)
            level = logsnr.expand(lam, z)
            sigma, alpha = logsnr.sigma(level), logsnr.alpha(level)
            return Prediction(x=x + sigma**2 / alpha * guide, eps=eps - sigma * guide)

        return denoise


GUIDANCE = {"classifier_free": ClassifierFree, "classifier": ClassifierGuidance}
