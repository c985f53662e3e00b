"""The network of FID: Inception-v3 as TensorFlow published it on 2015-12-05.

    Szegedy et al. (2016); as a judge of images, Heusel et al. (2017) and Salimans et al. (2016).

It is not the Inception-v3 of other libraries: it resizes without half-pixel centres, its averages
leave the padding out, its last block has a maximum where the others have an average, and it tells
1,008 classes apart. A number is an FID only where these features are looked at, in float32 at full
precision on every backend.

Parameters are {published block: {published branch: {"kernel", "bias"}}}, with the batch norms
folded into the convolutions that they follow.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cfg_jax.types import Array, Params, UsageError

SIDE = 299  # pixels, of what the network sees
SPATIAL = 7  # channels of sFID: 17 x 17 x 7 = 2,023 features (Nash et al., 2021)
EPSILON = 1e-3  # of the batch norms


class Looked(NamedTuple):
    """What the network says of B images."""

    pool3: Array  # [B, 2048]: the features of FID, precision and recall
    spatial: Array  # [B, 17, 17, 7]: the features of sFID
    logits: Array  # [B, 1008], without the bias: as the published inception scores take them
    mixed_6e: Array  # [B, 768]: the mean of the last layer at 17 x 17


def apply(params: Params, images: Array) -> Looked:
    """images uint8 [B, H, W, 3], or [B, H, W, 1] as grey -> Looked. Any H and W."""
    return look(params, preprocess(images))


def preprocess(images: Array) -> Array:
    """uint8 [B, H, W, 3 or 1] -> float32 [B, 299, 299, 3] in [-1, 1)."""
    x = jnp.broadcast_to(images, (*images.shape[:3], 3)).astype(jnp.float32)
    return (resize(x, SIDE) - 128) / 128


def look(params: Params, x: Array) -> Looked:
    """x float32 [B, 299, 299, 3] -> Looked."""
    x = _conv(params["Conv2d_1a_3x3"], x, stride=2, pad="VALID")
    x = _conv(params["Conv2d_2a_3x3"], x, pad="VALID")
    x = _maximum(_conv(params["Conv2d_2b_3x3"], x), stride=2, pad="VALID")
    x = _conv(params["Conv2d_3b_1x1"], x)
    x = _maximum(_conv(params["Conv2d_4a_3x3"], x, pad="VALID"), stride=2, pad="VALID")
    for name in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        x = _block_35(params[name], x)
    x = _to_17(params["Mixed_6a"], x)
    for name in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        x, of_1x1 = _block_17(params[name], x)
        if name == "Mixed_6d":
            spatial = of_1x1[..., :SPATIAL]
    mixed_6e = x.mean((1, 2))
    x = _to_8(params["Mixed_7a"], x)
    x = _block_8(params["Mixed_7b"], x, _average)
    x = _block_8(params["Mixed_7c"], x, _maximum)
    pool3 = x.mean((1, 2))
    logits = jnp.matmul(pool3, params["fc"]["kernel"], precision="highest")
    return Looked(pool3, spatial, logits, mixed_6e)


def resize(x: Array, side: int) -> Array:
    """[B, H, W, C] -> [B, side, side, C], bilinear as TensorFlow 1 has it.

    Pixel i of the result lies at i H / side of the image: its corner, not its centre, and nothing
    is averaged where it shrinks.
    """
    for axis in (1, 2):
        matrix = _bilinear(x.shape[axis], side)
        x = jnp.moveaxis(jnp.tensordot(matrix, x, (1, axis), precision="highest"), 0, axis)
    return x


def _bilinear(old: int, new: int) -> np.ndarray:
    at = np.arange(new, dtype=np.float32) * np.float32(old / new)
    low = np.floor(at).astype(int)
    share = at - low
    matrix = np.zeros((new, old), np.float32)
    np.add.at(matrix, (np.arange(new), low), 1 - share)
    np.add.at(matrix, (np.arange(new), np.minimum(low + 1, old - 1)), share)
    return matrix


def _conv(params: Params, x: Array, *, stride: int = 1, pad: str = "SAME") -> Array:
    x = jax.lax.conv_general_dilated(
        x,
        params["kernel"],
        (stride, stride),
        pad,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision="highest",
    )
    return jax.nn.relu(x + params["bias"])


def _maximum(x: Array, *, stride: int = 1, pad: str = "SAME") -> Array:
    return jax.lax.reduce_window(
        x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, stride, stride, 1), pad
    )


def _average(x: Array) -> Array:
    """Over the 3 x 3 neighbours that are in the image."""

    def total(y):
        return jax.lax.reduce_window(y, 0.0, jax.lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "SAME")

    return total(x) / total(jnp.ones((1, *x.shape[1:3], 1), x.dtype))


def _chain(params: Params, x: Array, *names: str) -> Array:
    for name in names:
        x = _conv(params[name], x)
    return x


def _numbered(stem: str, count: int) -> list[str]:
    return [f"{stem}_{i}" for i in range(1, count + 1)]


def _block_35(params: Params, x: Array) -> Array:
    branches = [
        _chain(params, x, "branch1x1"),
        _chain(params, x, *_numbered("branch5x5", 2)),
        _chain(params, x, *_numbered("branch3x3dbl", 3)),
        _chain(params, _average(x), "branch_pool"),
    ]
    return jnp.concatenate(branches, -1)


def _to_17(params: Params, x: Array) -> Array:
    double = _chain(params, x, *_numbered("branch3x3dbl", 2))
    branches = [
        _conv(params["branch3x3"], x, stride=2, pad="VALID"),
        _conv(params["branch3x3dbl_3"], double, stride=2, pad="VALID"),
        _maximum(x, stride=2, pad="VALID"),
    ]
    return jnp.concatenate(branches, -1)


def _block_17(params: Params, x: Array) -> tuple[Array, Array]:
    """The block, and its first branch alone."""
    of_1x1 = _chain(params, x, "branch1x1")
    branches = [
        of_1x1,
        _chain(params, x, *_numbered("branch7x7", 3)),
        _chain(params, x, *_numbered("branch7x7dbl", 5)),
        _chain(params, _average(x), "branch_pool"),
    ]
    return jnp.concatenate(branches, -1), of_1x1


def _to_8(params: Params, x: Array) -> Array:
    single = _chain(params, x, "branch3x3_1")
    seven = _chain(params, x, *_numbered("branch7x7x3", 3))
    branches = [
        _conv(params["branch3x3_2"], single, stride=2, pad="VALID"),
        _conv(params["branch7x7x3_4"], seven, stride=2, pad="VALID"),
        _maximum(x, stride=2, pad="VALID"),
    ]
    return jnp.concatenate(branches, -1)


def _block_8(params: Params, x: Array, pool: Callable[[Array], Array]) -> Array:
    single = _chain(params, x, "branch3x3_1")
    double = _chain(params, x, *_numbered("branch3x3dbl", 2))
    branches = [
        _chain(params, x, "branch1x1"),
        *(_chain(params, single, f"branch3x3_2{side}") for side in "ab"),
        *(_chain(params, double, f"branch3x3dbl_3{side}") for side in "ab"),
        _chain(params, pool(x), "branch_pool"),
    ]
    return jnp.concatenate(branches, -1)


def from_published(state: Mapping[str, np.ndarray]) -> Params:
    """The published arrays, under pytorch-fid's names, as parameters of `apply`.

    Each batch norm is folded in float64 into its convolution. UsageError where they are another
    network's.
    """
    params = {}
    try:
        for name, weight in state.items():
            if not name.endswith(".conv.weight"):
                continue
            path = name.removesuffix(".conv.weight")
            norm = {
                part: state[f"{path}.bn.{part}"].astype(np.float64)
                for part in ("weight", "bias", "running_mean", "running_var")
            }
            gain = norm["weight"] / np.sqrt(norm["running_var"] + EPSILON)
            *block, branch = path.split(".")
            node = params.setdefault(block[0], {}) if block else params
            node[branch] = {
                "kernel": np.float32((weight * gain[:, None, None, None]).transpose(2, 3, 1, 0)),
                "bias": np.float32(norm["bias"] - norm["running_mean"] * gain),
            }
        params["fc"] = {"kernel": np.float32(state["fc.weight"].T), "bias": state["fc.bias"]}
        jax.eval_shape(look, params, jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), np.float32))
    except (KeyError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"these are not the weights of the Inception graph of 2015-12-05: {reason}"
        ) from error
    return params
