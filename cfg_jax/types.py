"""The vocabulary of cfg_jax on one page.

Shapes in comments use these letters everywhere: B images in a batch, H W C an image, T noise levels
of a reverse chain, K classes. `[B, ...]` is a batch of anything (images, or points in the plane).

The one clock of the maths is `lam`, the log signal-to-noise ratio lambda of section 2 of Ho &
Salimans (2022), "the paper" in all that follows: high is clean, low is noise.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol

import jax

Array = jax.Array
Params = Mapping[str, Any]  # a plain nested dict of arrays
Cond = Mapping[str, Array]  # {"label": [B]}, {"label": [B], "w": [B]}, {"context": [B, ...]}
Batch = Mapping[str, Array]  # {"image": uint8 [B, H, W, C], "label": int32 [B]}


class UsageError(ValueError):
    """A user's mistake, told in one line: what was given, what would be right, and how to get
    there.

    The jobs print it without a traceback and leave with exit status 2.
    """


class Prediction(NamedTuple):
    """A denoiser's reading of z: the clean estimate and the noise.

    What a network says of z satisfies z = alpha x + sigma eps, to rounding; so does any mixture of
    such pairs whose weights sum to one. Who changes x and eps writes `_replace`, so that what else
    a denoiser tells is handed on.
    """

    x: Array  # [B, ...]
    eps: Array  # [B, ...]


class PredictionWithV(NamedTuple):
    """A Prediction that also tells the exponent of the reverse variance, eq. (4), of each element.

    That is the learned variance of Nichol & Dhariwal (2021).
    """

    x: Array  # [B, ...]
    eps: Array  # [B, ...]
    v: Array  # [B, ...]


class Network(NamedTuple):
    """Two pure functions over a plain nested dict of parameters.

    init(key) -> params
    apply(params, z [B, ...], lam [B], cond, key=None) -> output [B, ...]; a key turns dropout on.
    """

    init: Callable[[Array], Params]
    apply: Callable[..., Array]


class Schedule(Protocol):
    """u in [0, 1] -> lam, decreasing: u = 0 is the cleanest level, u = 1 pure noise."""

    def __call__(self, u: Array) -> Array: ...


class Denoiser(Protocol):
    """(z [B, ...], lam [] or [B]) -> Prediction. The condition is bound already."""

    def __call__(self, z: Array, lam: Array) -> Prediction | PredictionWithV: ...


class LogProb(Protocol):
    """(z [B, ...], lam [] or [B]) -> log p(c|z) [B]: a classifier with the class c bound."""

    def __call__(self, z: Array, lam: Array) -> Array: ...


class Guidance(Protocol):
    """Denoisers (or a denoiser and a LogProb) -> a denoiser; and what the jobs ask of a rule."""

    @property
    def second(self) -> str | None:
        """What its second argument is: "reference", a denoiser in place of the unconditional one;
        "classifier", a LogProb; or None, it is not called.
        """

    @property
    def keeps_pair(self) -> bool:
        """Whether what it says satisfies z = alpha x + sigma eps, as its arguments do."""

    @property
    def w(self) -> float | Array:
        """Its strength: a number, or one an image [B]."""

    def passes(self, lams: Array) -> tuple[int, int]:
        """How often a chain that asks it at each of lams [T] runs its first argument, and its
        second, where w is one number.
        """

    def __call__(self, first: Denoiser, second: Denoiser | LogProb, /) -> Denoiser: ...


class Noise(Protocol):
    """i -> the i-th unit normal draw of every trajectory of the batch, [B, ...]; i = 0 is the
    start.
    """

    def __call__(self, i: Array) -> Array: ...


class Path(NamedTuple):
    """What a sampler returns: the images, and the clean estimates along the way."""

    x: Array  # [B, ...]
    xs: Array  # [T, B, ...]


class Sampler(Protocol):
    """(denoiser, noise, lams [T] increasing) -> Path. It owns its loop.

    `levels(lams)` [N] are the levels at which it calls the denoiser, in order: N evaluations are
    what a chain costs. `needs_pair`: whether it reads x alone, on the faith that z = alpha x +
    sigma eps. `order`: of the error in the length of the steps, where it adds no noise.
    """

    needs_pair: ClassVar[bool]
    order: ClassVar[int]

    def levels(self, lams: Array) -> Array: ...

    def __call__(self, denoiser: Denoiser, noise: Noise, lams: Array) -> Path: ...
