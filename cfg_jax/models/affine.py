"""Convolution, product and bias, with gradients of our own: their precision, and CPU's layouts.

A parameter is read in the precision of the image, but its gradient comes in the precision that it
was handed over in, as it was accumulated: that is what is summed over the devices. So whoever hands
the parameters to the loss says in what their gradients cross, here and nowhere else. jax's own
rules give both in the one of the image. Reverse mode only.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from cfg_jax.models import once
from cfg_jax.types import Array


def precision(x: Array) -> str | None:
    """Of products of x: float32 is multiplied as such on TPUs, and on GPUs, only where one asks."""
    return "highest" if x.dtype == jnp.float32 else None


Pads = tuple[tuple[int, int], tuple[int, int]]  # zeros above and below, left and right


def _convolve(x: Array, kernel: Array, stride: int, pads: Pads) -> Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        pads,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=precision(x),
    )


def convolve(x: Array, kernel: Array, stride: int = 1, pads: Pads | None = None) -> Array:
    """What all convolutions are made of: NHWC, HWIO, PyTorch's symmetric padding if none is given.

    With stride 1 its gradient by x is a convolution with the kernel turned around. jax's own rule
    says the same in another layout, for which XLA:CPU has no fast code inside a loop: classifier
    guidance takes one such gradient a step. By the kernel, CPU has a form of its own too.
    """
    if pads is None:
        up, left = (side // 2 for side in kernel.shape[:2])
        pads = ((up, up), (left, left))
    return _padded(x, kernel, stride, pads)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _padded(x: Array, kernel: Array, stride: int, pads: Pads) -> Array:
    return _convolve_forward(x, kernel, stride, pads)[0]


def _convolve_forward(x: Array, kernel: Array, stride: int, pads: Pads):
    x = once.once(x)
    return _convolve(x, kernel.astype(x.dtype), stride, pads), (x, kernel)


def _convolve_backward(stride: int, pads: Pads, saved: tuple[Array, Array], g: Array):
    x, kernel = saved
    g, read = once.once(g), kernel.astype(x.dtype)
    shape = jax.ShapeDtypeStruct(kernel.shape, kernel.dtype)
    plain = functools.partial(_by_kernel, kernel=shape, stride=stride, pads=pads)
    if stride == 1:
        sides = zip(kernel.shape[:2], pads)
        back = tuple((k - 1 - before, k - 1 - after) for k, (before, after) in sides)
        by_x = _convolve(g, read[::-1, ::-1].swapaxes(2, 3), 1, back)
        over_rows = functools.partial(_by_kernel_over_rows, kernel=shape, pads=pads)
        by_kernel = jax.lax.platform_dependent(x, g, cpu=over_rows, default=plain)
    else:
        (by_x,) = jax.vjp(lambda x: _convolve(x, read, stride, pads), x)[1](g)
        by_kernel = plain(x, g)
    return by_x, by_kernel  # what is not asked for is not computed


def _by_kernel(
    x: Array, g: Array, *, kernel: jax.ShapeDtypeStruct, stride: int, pads: Pads
) -> Array:
    """Every tap of the kernel is a product over images and pixels, g spread out by the stride."""
    sides = list(zip(kernel.shape[:2], x.shape[1:3], g.shape[1:3], pads))
    return jax.lax.conv_general_dilated(
        x,
        g,
        (1, 1),
        [(pad[0], k + (out - 1) * stride - side - pad[0]) for k, side, out, pad in sides],
        rhs_dilation=(stride, stride),
        dimension_numbers=("CHWN", "IHWO", "HWNC"),
        precision=precision(x),
        preferred_element_type=kernel.dtype,
    )


def _by_kernel_over_rows(x: Array, g: Array, *, kernel: jax.ShapeDtypeStruct, pads: Pads) -> Array:
    """The gradient of `convolve` by its kernel as a convolution along one axis, stride 1.

        out[i, j, c, d] = sum over b, p, q of x[b, p + i, q + j, c] g[b, p, q, d],

    x with its zeros around, is, with g moved by each j side by side in its channels, a convolution
    along p whose "channels" are (b, q). The plain form has only b there, whose short runs XLA:CPU
    packs slowly.
    x [B, H, W, C], g [B, H', W', D] -> that of the kernel.
    """
    b, h, w, c = x.shape
    tall, wide = kernel.shape[:2]
    up_down, (left, right) = pads
    padded = jnp.pad(g, ((0, 0), (0, 0), (wide - 1 - left, wide - 1 - right), (0, 0)))
    moved = [padded[:, :, wide - 1 - j : wide - 1 - j + w] for j in range(wide)]
    moved = jnp.stack(moved, axis=-2).swapaxes(0, 1).reshape(g.shape[1], b * w, -1)
    out = jax.lax.conv_general_dilated(
        x.transpose(3, 1, 0, 2).reshape(c, h, b * w),
        moved,
        (1,),
        [up_down],
        dimension_numbers=("NHC", "HIO", "NHC"),
        precision=precision(x),
        preferred_element_type=kernel.dtype,
    )
    return out.reshape(c, tall, wide, -1).transpose(1, 2, 0, 3)


_padded.defvjp(_convolve_forward, _convolve_backward)


def on_cpu(form: Callable, elsewhere: Callable, x: Array, kernel: Array) -> Array:
    """Of two functions (x, kernel) -> y that say the same, the one for the platform.

    It is chosen when a program is lowered. The gradient is of the same form; jax keeps nothing but
    x and the kernel for it, whatever either would have kept, and works out the rest again. A CPU's
    form may read x, and the gradient, several times: both are computed once. Reverse mode only.
    """
    return _either(once.settled(x), kernel, form, elsewhere)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _either(x: Array, kernel: Array, form: Callable, elsewhere: Callable) -> Array:
    return jax.lax.platform_dependent(x, kernel, cpu=form, default=elsewhere)


def _either_forward(x: Array, kernel: Array, form: Callable, elsewhere: Callable):
    return _either(x, kernel, form, elsewhere), (x, kernel)


def _either_backward(
    form: Callable, elsewhere: Callable, saved: tuple[Array, Array], g: Array
) -> tuple[Array, Array]:
    def pull(function):
        return lambda x, kernel, g: jax.vjp(function, x, kernel)[1](g)

    g = once.once(g)
    return jax.lax.platform_dependent(*saved, g, cpu=pull(form), default=pull(elsewhere))


_either.defvjp(_either_forward, _either_backward)


def _multiply(x: Array, kernel: Array):
    return jnp.matmul(x, kernel.astype(x.dtype), precision=precision(x)), (x, kernel)


@jax.custom_vjp
def multiply(x: Array, kernel: Array) -> Array:
    """x [..., C] @ kernel [C, D], by the rule above."""
    return _multiply(x, kernel)[0]


def _multiply_backward(saved: tuple[Array, Array], g: Array):
    x, kernel = saved
    by_x = jnp.matmul(g, kernel.astype(g.dtype).T, precision=precision(g))
    # As one axis of rows: over several XLA:CPU would turn x around first.
    x, g = (a.reshape(-1, a.shape[-1]) for a in (x, g))
    by_kernel = jnp.matmul(x.T, g, precision=precision(x), preferred_element_type=kernel.dtype)
    return by_x, by_kernel


multiply.defvjp(_multiply, _multiply_backward)


def _add_bias(x: Array, bias: Array):
    return x + bias.astype(x.dtype), bias


@jax.custom_vjp
def add_bias(x: Array, bias: Array) -> Array:
    """x [..., C] + bias [C], by the rule above."""
    return _add_bias(x, bias)[0]


def _add_bias_backward(bias: Array, g: Array):
    rows = tuple(range(g.ndim - 1))
    return g, g.sum(rows, dtype=jnp.float32).astype(bias.dtype)


add_bias.defvjp(_add_bias, _add_bias_backward)
