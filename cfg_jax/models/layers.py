"""The layers of the U-Net of Dhariwal & Nichol (2021): images NHWC, parameters float32.

`dtype` is the precision of convolutions and matrix products, bfloat16 on TPU; norm statistics are
float32 whatever it is. Weights start as PyTorch's do, uniform with variance 1 / (3 fan_in), but
biases start at zero; the last layer of every residual branch starts at zero, so that a network
begins as the identity plus its skips.

Every layer of a `unet.Block` is called as `layer(h [B, H, W, C], embedding [B, E], key)`. A key
turns dropout on; there is no mode flag.
"""

import itertools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from cfg_jax.models import affine, doubled, draws, norm, once, winograd
from cfg_jax.types import Array, UsageError

CONVOLVED = "convolved"  # what `unet.REMAT` calls results of convolutions

_uniform = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def _kernel(rngs: nnx.Rngs, shape: tuple[int, ...], zero: bool) -> nnx.Param:
    if zero:
        return nnx.Param(jnp.zeros(shape, jnp.float32))
    matrix = (math.prod(shape[:-1]), shape[-1])  # XLA:CPU compiles a draw in four axes 10 x slower
    return nnx.Param(_uniform(rngs.params(), matrix, jnp.float32).reshape(shape))


def keys(key: Array | None) -> Iterator[Array | None]:
    """One key after another for layers in a fixed order; Nones where there is none."""
    for i in itertools.count():
        yield None if key is None else jax.random.fold_in(key, i)


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """x [B, ...] with elements put to zero, the others divided by the share that is kept.

    16 bits decide on an element, two elements share a random word: the rate is rounded to 2^-16.
    """
    if key is None or rate == 0:
        return x
    kept = max(round((1 - rate) * 2**16), 1)
    size = math.prod(x.shape[1:])
    drawn = draws.draws(key, x.shape[0], size)
    return jnp.where((drawn < kept).reshape(x.shape), x * (2**16 / kept), 0)


def sinusoid(s: Array, dim: int) -> Array:
    """[cos(f s), sin(f s)] of s [B], where f_i = 10000^(-i / (dim / 2)) -> [B, dim].

    Raises UsageError for an odd dim. Vaswani et al. (2017), ordered as in Dhariwal & Nichol (2021).
    """
    if dim % 2:
        raise UsageError(f"channels={dim} is odd; the sinusoid needs an even number")
    half = dim // 2
    angles = s.astype(jnp.float32)[:, None] * jnp.exp(-math.log(1e4) * jnp.arange(half) / half)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class Conv(nnx.Module):
    """A 3 x 3 convolution with a bias, of the image or, if it `doubles`, of twice its size."""

    def __init__(
        self, rngs, c_in, c_out, *, stride=1, doubles=False, zero=False, dtype=jnp.float32
    ):
        if doubles and stride != 1:
            raise ValueError("a convolution has a stride or doubles its image, not both")
        self.kernel = _kernel(rngs, (3, 3, c_in, c_out), zero)
        self.bias = nnx.Param(jnp.zeros(c_out, jnp.float32))
        self.stride, self.doubles, self.dtype = stride, doubles, dtype

    def __call__(self, x: Array) -> Array:
        x, kernel = x.astype(self.dtype), self.kernel[...]
        if self.doubles:
            x = doubled.convolve(x, kernel)
        elif self.stride == 1:
            x = winograd.convolve(x, kernel)
        else:
            x = affine.convolve(x, kernel, self.stride)
        x = checkpoint_name(x, CONVOLVED)
        return affine.add_bias(x, self.bias[...])


class Linear(nnx.Module):
    """An affine map of the last axis: on an image, a 1 x 1 convolution."""

    def __init__(self, rngs, c_in, c_out, *, zero=False, dtype=jnp.float32):
        self.kernel = _kernel(rngs, (c_in, c_out), zero)
        self.bias = nnx.Param(jnp.zeros(c_out, jnp.float32))
        self.dtype = dtype

    def __call__(self, x: Array) -> Array:
        x = affine.multiply(once.settled(x.astype(self.dtype)), self.kernel[...])
        return affine.add_bias(x, self.bias[...])


class GroupNorm(nnx.Module):
    """Normalise over the image and the channels of a group (Wu & He, 2018).

    32 groups, or as many as divide both 32 and the channels, or one a channel below 32. `scale` and
    `shift` [B, C], where given, make it (1 + scale) norm(x) + shift, the AdaGN of Dhariwal & Nichol
    (2021), section 3.1. SiLU follows if `activate`.
    """

    def __init__(self, channels):
        self.groups = channels if channels < 32 else math.gcd(channels, 32)
        self.scale = nnx.Param(jnp.ones(channels, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(channels, jnp.float32))

    def __call__(
        self, x: Array, *, scale: Array = 0, shift: Array = 0, activate: bool = False
    ) -> Array:
        shape = (x.shape[0], x.shape[-1])
        gain = jnp.broadcast_to(self.scale[...] * (1 + scale), shape)
        bias = jnp.broadcast_to(self.bias[...] * (1 + scale) + shift, shape)
        return norm.group_norm(x, gain, bias, self.groups, activate)


def halve(x: Array) -> Array:
    """The means of 2 x 2 pixels, [B, H, W, C] -> [B, H / 2, W / 2, C], for even H and W."""
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))


RESAMPLE = {None: lambda x: x, "down": halve, "up": doubled.double}


class Resample(nnx.Module):
    """Plain resampling: a convolution of stride 2 down, or one after nearest neighbour up."""

    def __init__(self, rngs, channels, resample, *, dtype=jnp.float32):
        up = resample == "up"
        self.conv = Conv(rngs, channels, channels, stride=2 - up, doubles=up, dtype=dtype)

    def __call__(self, h: Array, embedding: Array, key: Array | None = None) -> Array:
        del embedding, key
        return self.conv(h)


class ResBlock(nnx.Module):
    """x + conv(dropout(silu(norm(conv(silu(norm(x))), embedding)))), resampled inside if asked.

    The embedding, already through its SiLU, enters as AdaGN (`scale_shift_norm`) or is added before
    the second norm. `resample` "down" (2 x 2 mean) or "up" (nearest) acts on both branches, before
    the first convolution, as in BigGAN. Dhariwal & Nichol (2021), sections 3 and 3.1.
    """

    def __init__(
        self,
        rngs,
        c_in,
        c_out,
        *,
        embedding,
        resample=None,
        dropout=0.0,
        scale_shift_norm=True,
        dtype=jnp.float32,
    ):
        self.norm1 = GroupNorm(c_in)
        self.conv1 = Conv(rngs, c_in, c_out, doubles=resample == "up", dtype=dtype)
        self.embed = Linear(rngs, embedding, c_out * (1 + scale_shift_norm), dtype=dtype)
        self.norm2 = GroupNorm(c_out)
        self.conv2 = Conv(rngs, c_out, c_out, zero=True, dtype=dtype)
        self.skip = None if c_in == c_out else Linear(rngs, c_in, c_out, dtype=dtype)
        self.resample, self.dropout, self.scale_shift_norm = resample, dropout, scale_shift_norm

    def __call__(self, x: Array, embedding: Array, key: Array | None = None) -> Array:
        h = self.norm1(x, activate=True)
        h = self.conv1(halve(h) if self.resample == "down" else h)  # which doubles where it is "up"
        e = self.embed(embedding)  # [B, C] or [B, 2 C]
        if self.scale_shift_norm:
            scale, shift = jnp.split(e.astype(jnp.float32), 2, axis=-1)
            h = self.norm2(h, scale=scale, shift=shift, activate=True)
        else:
            h = self.norm2(h + e[:, None, None], activate=True)
        h = self.conv2(dropout(h, self.dropout, key))
        x = RESAMPLE[self.resample](x)
        return once.settled(h + (x if self.skip is None else self.skip(x)))


class TimeEmbedding(nnx.Module):
    """s [B] -> MLP(sinusoid(s)) [B, 4 channels], float32 in any case: it is small."""

    def __init__(self, rngs, channels):
        self.hidden = Linear(rngs, channels, 4 * channels)
        self.out = Linear(rngs, 4 * channels, 4 * channels)
        self.channels = channels

    def __call__(self, s: Array) -> Array:
        return self.out(nnx.silu(self.hidden(sinusoid(s, self.channels))))


class StrengthEmbedding(nnx.Module):
    """w [B] -> MLP(sinusoid(250 w)) [B, 4 channels], zero at initialisation, float32 in any case.

    Meng et al. (2023) embed w as the time is; here w = 4, the largest of theirs, takes the place of
    the time 1000.
    """

    def __init__(self, rngs, channels):
        self.hidden = Linear(rngs, channels, 4 * channels)
        self.out = Linear(rngs, 4 * channels, 4 * channels, zero=True)
        self.channels = channels

    def __call__(self, w: Array) -> Array:
        return self.out(nnx.silu(self.hidden(sinusoid(250 * w, self.channels))))


class LabelEmbedding(nnx.Module):
    """label [B] -> its row [B, width]. A label without a row gives NaN, not another label's row."""

    def __init__(self, rngs, rows, width):
        self.table = nnx.Param(jax.random.normal(rngs.params(), (rows, width), jnp.float32))

    def __call__(self, label: Array) -> Array:
        rows = jnp.asarray(self.table[...]).at[label]
        return rows.get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
