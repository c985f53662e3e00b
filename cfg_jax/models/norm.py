"""Group norm with its own gradient, SiLU inside: few passes over the image. Reverse mode only."""

import functools

import jax
import jax.numpy as jnp

from cfg_jax.models import once
from cfg_jax.types import Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def group_norm(x: Array, gain: Array, bias: Array, groups: int, activate: bool) -> Array:
    """Each group of channels of each image normalised, times gain, plus bias; then SiLU if asked.

    x [B, H, W, C]; gain, bias float32 [B, C]. Float32 inside, the result in the dtype of x. Wu & He
    (2018).
    """
    return _group_norm_forward(x, gain, bias, groups, activate)[0]


def _over_groups(moments: Array, groups: int) -> Array:
    """The mean over each group's channels, for each of them: [B, C] -> [B, C]."""
    grouped = moments.reshape(len(moments), groups, -1)
    return grouped.mean(-1).repeat(grouped.shape[-1], axis=-1)


def _over_pixels(a: Array) -> Array:
    """One number a channel, [B, C] -> [B, 1, 1, C], computed apart: in the loop over pixels
    XLA:CPU would work out each again, and not in vectors."""
    return once.once(a)[:, None, None]


def _group_norm_forward(x: Array, gain: Array, bias: Array, groups: int, activate: bool):
    # Channels first, groups second: the image is read with no group axis in sight, which would
    # cost XLA:CPU a relayout. Two passes, since mean(x^2) - mean(x)^2 cancels under an offset.
    pixels = x.astype(jnp.float32)
    mean_c = pixels.mean((1, 2))  # [B, C]
    var_c = jnp.square(pixels - _over_pixels(mean_c)).mean((1, 2))
    mean = _over_groups(mean_c, groups)
    var = _over_groups(var_c + jnp.square(mean_c - mean), groups)
    inverse = jax.lax.rsqrt(var + 1e-5)
    saved = (x, mean, inverse, gain, bias)
    y = _scaled(*saved)[1]
    return (jax.nn.silu(y) if activate else y).astype(x.dtype), saved


def _scaled(x: Array, mean: Array, inverse: Array, gain: Array, bias: Array):
    centred = x.astype(jnp.float32) - _over_pixels(mean)
    return centred, centred * _over_pixels(gain * inverse) + _over_pixels(bias)


def _group_norm_backward(groups: int, activate: bool, saved, g: Array):
    x, _, inverse, gain, _ = saved
    centred, y = _scaled(*saved)
    g = g.astype(jnp.float32)
    if activate:
        s = jax.nn.sigmoid(y)
        g = once.once(g * (s * (1 + y * (1 - s))))
    by_bias = g.sum((1, 2))
    along = (g * centred).sum((1, 2)) * inverse  # g against the normalised x
    pixels = x.shape[1] * x.shape[2]
    offset = _over_groups(gain * by_bias, groups) * inverse / pixels
    slope = _over_groups(gain * along, groups) * jnp.square(inverse) / pixels
    by_x = g * _over_pixels(gain * inverse) - centred * _over_pixels(slope) - _over_pixels(offset)
    return by_x.astype(x.dtype), along, by_bias


group_norm.defvjp(_group_norm_forward, _group_norm_backward)
