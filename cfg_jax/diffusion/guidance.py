"""Guidance: denoisers -> a denoiser. The paper's rule, eq. (6), and the rule that it does without.

A rule never meets a label, a network or a sampler: conditions are bound in the denoisers it is
given. So a label to move away from, a mixture of labels (`denoiser.mixed`), and a weaker model
(autoguidance: Karras et al., 2024) are no rules of their own but other arguments of any rule here.
A rule's numbers, w above all, are leaves of a pytree: one compiled program serves every value.

Rules compose: one around a `rule` gives it its own arguments and changes what it says or when it is
asked. What every rule also tells the jobs is in `types.Guidance`.
"""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from cfg_jax.diffusion import corrections, directions, logsnr, strengths
from cfg_jax.types import Array, Denoiser, LogProb, Noise, Prediction, UsageError


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
    pair keeps z = alpha x + sigma eps. A variance that they tell is the conditional one's. With one
    w for all, w = 0 and w = -1 run only the pass that they need.
    """

    second: ClassVar[str | None] = "reference"
    keeps_pair: ClassVar[bool] = True
    w: float | Array = 0.0

    def passes(self, lams: Array) -> tuple[int, int]:
        """As `Guidance.passes`: w = -1 needs no first one, w = 0 no second."""
        return directions.runs(self.w, -1, lams), directions.runs(self.w, 0, lams)

    def __call__(self, conditional: Denoiser, unconditional: Denoiser, /) -> Denoiser:
        w = jnp.asarray(self.w)

        def denoise(z: Array, lam: Array) -> Prediction:
            def mix() -> Prediction:
                a = logsnr.expand(w, z)
                with_c, without = conditional(z, lam), unconditional(z, lam)
                return with_c._replace(
                    x=((1 + a) * with_c.x - a * without.x).astype(z.dtype),
                    eps=((1 + a) * with_c.eps - a * without.eps).astype(z.dtype),
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

    second: ClassVar[str | None] = "classifier"
    keeps_pair: ClassVar[bool] = True
    w: float | Array = 0.0

    def passes(self, lams: Array) -> tuple[int, int]:
        """As `Guidance.passes`; the second is a pass of the classifier and its gradient by z."""
        return len(lams), directions.runs(self.w, 0, lams)

    def __call__(self, denoiser: Denoiser, log_prob: LogProb, /) -> Denoiser:
        w = jnp.asarray(self.w)

        def denoise(z: Array, lam: Array) -> Prediction:
            def step() -> Array:
                # Each image's log-probability depends on that image alone: the sum's gradient is
                # theirs.
                gradient = jax.grad(lambda z: log_prob(z, lam).sum())(z)
                return (logsnr.expand(w, z) * gradient).astype(z.dtype)

            guide = step() if w.ndim else jax.lax.cond(w == 0, lambda: jnp.zeros_like(z), step)
            prediction = denoiser(z, lam)
            level = logsnr.expand(lam, z)
            sigma, alpha = logsnr.sigma(level), logsnr.alpha(level)
            return prediction._replace(
                x=prediction.x + sigma**2 / alpha * guide, eps=prediction.eps - sigma * guide
            )

        return denoise


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScaledScore:
    """A baseline of no merit: the score of a lower temperature, 1 / (1 + w) of it.

        eps~ = (1 + w) eps(z, c)

    What p(z|c)^(1 + w) would ask for, were it diffused; it is not, and samples get worse (Dhariwal
    & Nichol, 2021, appendix G). x is recomputed, so that z = alpha x + sigma eps still holds.
    """

    second: ClassVar[str | None] = None
    keeps_pair: ClassVar[bool] = True
    w: float | Array = 0.0

    def passes(self, lams: Array) -> tuple[int, int]:
        """As `Guidance.passes`: the second is not called."""
        return len(lams), 0

    def __call__(self, denoiser: Denoiser, unused: Denoiser | None = None, /) -> Denoiser:
        del unused
        w = jnp.asarray(self.w)

        def denoise(z: Array, lam: Array) -> Prediction:
            prediction = denoiser(z, lam)
            eps = (1 + logsnr.expand(w, z)).astype(z.dtype) * prediction.eps
            return prediction._replace(x=logsnr.x_from_eps(z, eps, lam), eps=eps)

        return denoise


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScaledNoise:
    """A baseline of no merit: the reverse chain's noise at a lower temperature, 1 / (1 + w) of it.

    The denoiser stays the conditional one; `draws` makes the noise of every step but the start
    smaller. Samples get blurred (Dhariwal & Nichol, 2021, appendix G). Raises UsageError for w <=
    -1, where there is no such noise.
    """

    second: ClassVar[str | None] = None
    keeps_pair: ClassVar[bool] = True
    alone: ClassVar[bool] = True  # no rule goes around it
    w: float | Array = 0.0

    def __post_init__(self):
        if isinstance(self.w, int | float) and not self.w > -1:
            raise UsageError(
                f"w={self.w:g}: scaled_noise divides the noise by 1 + w; give w above -1."
            )

    def passes(self, lams: Array) -> tuple[int, int]:
        """As `Guidance.passes`: the second is not called."""
        return len(lams), 0

    def __call__(self, denoiser: Denoiser, unused: Denoiser | None = None, /) -> Denoiser:
        del unused
        return denoiser

    def draws(self, noise: Noise) -> Noise:
        """The draws of a trajectory, with those after the first divided by 1 + w."""
        w = jnp.asarray(self.w)

        def scaled(i: Array) -> Array:
            draw = noise(i)
            temperature = jnp.where(i == 0, 1, 1 / (1 + logsnr.expand(w, draw)))
            return (draw * temperature).astype(draw.dtype)

        return scaled


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Distilled:
    """No rule at all: a student (`losses.Distillation`) was told w with its label, and has mixed
    the two passes in one.
    """

    second: ClassVar[str | None] = None
    keeps_pair: ClassVar[bool] = True
    alone: ClassVar[bool] = True  # no rule goes around it
    w: float | Array = 0.0

    def passes(self, lams: Array) -> tuple[int, int]:
        """As `Guidance.passes`: the second is not called."""
        return len(lams), 0

    def __call__(self, denoiser: Denoiser, unused: Denoiser | None = None, /) -> Denoiser:
        del unused
        return denoiser


GUIDANCE = {
    "classifier_free": ClassifierFree,
    "classifier": ClassifierGuidance,
    "apg": directions.AdaptiveProjected,
    "cfg_zero_star": directions.ZeroStar,
    "cfg_plus_plus": directions.PlusPlus,
    "interval": strengths.Interval,
    "linear": strengths.linear,
    "cosine": strengths.cosine,
    "power_cosine": strengths.power_cosine,
    "rescale": corrections.Rescale,
    "dynamic_threshold": corrections.DynamicThreshold,
    "scaled_score": ScaledScore,
    "scaled_noise": ScaledNoise,
    "distilled": Distilled,
}
