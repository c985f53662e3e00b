"""The operations that take the time, written out with their gradients for the compilers' sake.

The mathematics is the same on every backend. What XLA:CPU alone wants said in another way is behind
`jax.lax.platform_dependent`, here and nowhere else: programs for TPU and GPU do not see it.
Gradients are
written by hand and have reverse mode only.
"""

import functools

import jax
import jax.numpy as jnp

from cfg_jax.types import Array


def _once(x: Array) -> Array:
    """x itself; on CPU, computed once and kept.

    XLA:CPU computes what is cheap again for each that reads it: down a chain of residual additions,
    each reader adds up the whole chain. It must be told to keep barriers: `mesh.compiler_options`.
    """
    return jax.lax.platform_dependent(x, cpu=jax.lax.optimization_barrier, default=lambda x: x)


@jax.custom_vjp
def settled(x: Array) -> Array:
    """x itself, of which nothing is computed twice, on CPU; nor of its gradient."""
    return _once(x)


settled.defvjp(lambda x: (_once(x), None), lambda _, g: (_once(g),))


def _convolve(x: Array, kernel: Array, stride: int) -> Array:
    padding = [(side // 2, side // 2) for side in kernel.shape[:2]]
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolve(x: Array, kernel: Array, stride: int = 1) -> Array:
    """The one convolution of the package: NHWC, HWIO, odd kernels, PyTorch's symmetric padding.

    Its gradient by x is a convolution with the kernel turned around. jax's own rule says the same
    in another layout, for which XLA:CPU has no fast code inside a loop: classifier guidance takes
    one such gradient a step.
    """
    return _convolve(_once(x), kernel, stride)


def _convolve_forward(x: Array, kernel: Array, stride: int):
    x = _once(x)
    return _convolve(x, kernel, stride), (x, kernel)


def _convolve_backward(stride: int, saved: tuple[Array, Array], g: Array):
    x, kernel = saved
    g = _once(g)

    def jaxs_own(x: Array, g: Array) -> Array:
        return jax.vjp(lambda kernel: _convolve(x, kernel, stride), kernel)[1](g)[0]

    if stride == 1:
        by_x = _convolve(g, kernel[::-1, ::-1].swapaxes(2, 3), 1)
        over_rows = functools.partial(_by_kernel_over_rows, sides=kernel.shape[:2])
        by_kernel = jax.lax.platform_dependent(x, g, cpu=over_rows, default=jaxs_own)
    else:
        by_x = jax.vjp(lambda x: _convolve(x, kernel, stride), x)[1](g)[0]
        by_kernel = jaxs_own(x, g)
    return by_x, by_kernel  # what is not asked for is not computed


def _by_kernel_over_rows(x: Array, g: Array, *, sides: tuple[int, int]) -> Array:
    """The gradient of `convolve` by its kernel as a convolution along one axis, stride 1.

        out[i, j, c, d] = sum over b, p, q of x[b, p + i, q + j, c] g[b, p, q, d]

    is, with g moved by each j side by side in its channels, a convolution along p whose "channels"
    are (b, q). jax's own form has only b there, whose short runs XLA:CPU packs slowly.
    x [B, H, W, C], g [B, H, W, D] -> [*sides, C, D].
    """
    b, h, w, c = x.shape
    tall, wide = sides
    half = wide // 2
    padded = jnp.pad(g, ((0, 0), (0, 0), (half, half), (0, 0)))
    moved = [padded[:, :, wide - 1 - j : wide - 1 - j + w] for j in range(wide)]
    moved = jnp.concatenate(moved, axis=-1).swapaxes(0, 1).reshape(h, b * w, -1)
    out = jax.lax.conv_general_dilated(
        x.transpose(3, 1, 0, 2).reshape(c, h, b * w),
        moved,
        (1,),
        [(tall // 2, tall // 2)],
        dimension_numbers=("NHC", "HIO", "NHC"),
    )
    return out.reshape(c, tall, wide, -1).transpose(1, 2, 0, 3)


convolve.defvjp(_convolve_forward, _convolve_backward)


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
    return _once(a)[:, None, None]


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
        g = _once(g * (s * (1 + y * (1 - s))))
    by_bias = g.sum((1, 2))
    along = (g * centred).sum((1, 2)) * inverse  # g against the normalised x
    pixels = x.shape[1] * x.shape[2]
    offset = _over_groups(gain * by_bias, groups) * inverse / pixels
    slope = _over_groups(gain * along, groups) * jnp.square(inverse) / pixels
    by_x = g * _over_pixels(gain * inverse) - centred * _over_pixels(slope) - _over_pixels(offset)
    return by_x.astype(x.dtype), along, by_bias


group_norm.defvjp(_group_norm_forward, _group_norm_backward)
