"""Start-up probes: cheap checks for mistakes that train without an error and never guide.

A label, or a strength, that does not reach the output, a null row that is a class, labels dropped
at another rate than was asked for: each has cost somebody a training run.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from cfg_jax.types import Array, Cond, Network, Params


class ProbeError(RuntimeError):
    """A silent mistake that a probe found, in one line."""


def _wave(shape: tuple[int, ...], phase: int) -> Array:
    """Any fixed numbers in [-1, 1]: hundreds of random draws would take long to compile."""
    return jnp.sin(1e3 * jnp.sin(jnp.arange(math.prod(shape)) + 7.0 * phase)).reshape(shape)


def outputs(
    network: Network, image_shape: tuple[int, ...], cond: Cond
) -> Callable[[Params, float], Array]:
    """A jitted (params, shake) -> outputs [N, H, W, C] for the N conditions of cond.

    The same z at lambda = 0 for all. A fresh network ends in zeros, so that its parameters are
    shaken by up to `shake` to probe its wiring; a shake of 0 probes what it has learned.
    """
    count = len(cond["label"])

    @jax.jit
    def said(params, shake):
        leaves, tree = jax.tree.flatten(params)
        shaken = [p + shake * _wave(p.shape, i) for i, p in enumerate(leaves)]
        z = jnp.broadcast_to(2 * _wave(image_shape, len(leaves)), (count, *image_shape))
        return network.apply(jax.tree.unflatten(tree, shaken), z, jnp.zeros(count), cond)

    return said


def labels_differ(outputs: np.ndarray) -> None:
    """Checks that the outputs of the first, last and null labels [3, ...] are not equal.

    Raises ProbeError where they are: the label does not reach the output, or null is a class.
    """
    first, last, null = outputs
    if np.array_equal(first, null) or np.array_equal(last, null):
        raise ProbeError(
            "probe: the null label gives the output of a class; its row is not its own."
        )
    if np.array_equal(first, last):
        raise ProbeError("probe: two labels give the same output; the label does not reach it.")


def student_listens(outputs: np.ndarray) -> None:
    """Checks the outputs [3, ...] of a student for the first label, the last one, and the first at
    another w.

    Raises ProbeError where two of them are equal that should not be.
    """
    first, last, other = outputs
    if np.array_equal(first, last):
        raise ProbeError("probe: two labels give the same output; the label does not reach it.")
    if np.array_equal(first, other):
        raise ProbeError("probe: two strengths w give the same output; w does not reach it.")


def drop_rate_holds(dropped: float, count: int, p_uncond: float) -> None:
    """Checks the measured share of dropped labels, of `count`, against its binomial band (5 sigma).

    Raises ProbeError outside it.
    """
    band = 5 * math.sqrt(p_uncond * (1 - p_uncond) / count)
    if abs(dropped - p_uncond) > band + 1e-6:
        raise ProbeError(
            f"probe: {dropped:.4f} of {count} labels were dropped where p_uncond={p_uncond} and "
            f"{p_uncond:.4f} +- {band:.4f} were expected."
        )
