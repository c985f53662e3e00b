"""Weights in and out: the published PyTorch names renamed to ours, and .safetensors files."""

import json
from collections.abc import Mapping

import jax
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath

from cfg_jax.types import Params, UsageError

# Our path -> the published one, by prefix; a block's layers and a layer's parts follow.
_TOP = {
    "time/hidden": "time_embed.0",
    "time/out": "time_embed.2",
    "label/table": "label_emb.weight",
    "encoder/conv_in": "input_blocks.0.0",
    "encoder/middle/layers": "middle_block",
    "norm_out": "out.0",
    "conv_out": "out.2",
    "pool/position": "out.2.positional_embedding",
    "pool/qkv": "out.2.qkv_proj",
    "pool/proj": "out.2.c_proj",
}
_RES = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "embed": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "skip": "skip_connection",
}
_ATTENTION = {"norm": "norm", "qkv": "qkv", "proj": "proj_out"}
_LEAF = {"kernel": "weight", "scale": "weight", "bias": "bias"}


def adm_name(path: str) -> str:
    """Our path of a parameter -> its name in the published weights of Dhariwal & Nichol (2021)."""
    for ours, theirs in _TOP.items():
        if path == ours:
            return theirs
        if path.startswith(ours + "/"):
            return _inside(theirs, path.removeprefix(ours + "/"))
    match path.split("/"):
        case "encoder", "blocks", i, "layers", *rest:
            return _inside(f"input_blocks.{int(i) + 1}", "/".join(rest))
        case "decoder", i, "layers", *rest:
            return _inside(f"output_blocks.{i}", "/".join(rest))
    raise ValueError(f"{path} has no published counterpart")


def _inside(prefix: str, path: str) -> str:
    match path.split("/"):
        case (leaf,):  # conv_in/kernel
            return f"{prefix}.{_LEAF[leaf]}"
        case layer, "conv", leaf:  # plain resampling: `op` down, `conv` up
            part = "op" if prefix.startswith("input") else "conv"
        case layer, part, leaf:
            part = (_RES | _ATTENTION)[part]
    return f"{prefix}.{layer}.{part}.{_LEAF[leaf]}"


def _theirs(path: str, ours: jax.ShapeDtypeStruct, weight: np.ndarray) -> np.ndarray | None:
    """One published array in our layout; None if it is not of that shape."""
    if path.endswith("kernel"):
        if len(ours.shape) == 4:  # OIHW -> HWIO
            weight = weight.transpose(2, 3, 1, 0) if weight.ndim == 4 else weight
        else:  # [O, I], or a convolution of kernel 1
            while weight.ndim > 2 and weight.shape[-1] == 1:
                weight = weight[..., 0]
            weight = weight.T
    elif path == "pool/position":
        weight = weight.T
    return weight.astype(np.float32, copy=False) if weight.shape == ours.shape else None


def from_adm(state: Mapping[str, np.ndarray], wanted: Params) -> Params:
    """Weights published by Dhariwal & Nichol (2021) -> parameters, of the shapes in `wanted`.

    Every published array is used once and every parameter is filled; else raises UsageError.
    A class-conditional U-Net as published has no null label: `null_row=False`. What is float32
    already is not copied.
    """
    ours = flatten(wanted)
    names = {path: adm_name(path) for path in ours}
    absent = [name for name in names.values() if name not in state]
    unused = sorted(set(state) - set(names.values()))
    wrong = "the weights are of another model than the config's"
    if absent or unused:
        raise UsageError(
            f"{wrong}: {len(absent)} arrays are missing{_first(absent)}, "
            f"{len(unused)} are not wanted{_first(unused)}"
        )
    arrays = {path: _theirs(path, ours[path], np.asarray(state[names[path]])) for path in ours}
    if misfits := [path for path, array in arrays.items() if array is None]:
        path = misfits[0]
        hint = "; published class labels need null_row=False" if path == "label/table" else ""
        raise UsageError(
            f"{wrong}: {len(misfits)} shapes differ, first {names[path]}, which is "
            f"{list(np.shape(state[names[path]]))} where {path} is {list(ours[path].shape)}{hint}"
        )
    return unflatten(arrays)


def _first(names: list[str]) -> str:
    if not names:
        return ""
    return f" ({', '.join(names[:3])}{' ...' if len(names) > 3 else ''})"


def check_shapes(path: epath.PathLike, params: Params, wanted: Params) -> None:
    """Raises UsageError unless params has the arrays of `wanted`, by name and shape."""
    ours = {name: leaf.shape for name, leaf in flatten(wanted).items()}
    theirs = {name: leaf.shape for name, leaf in flatten(params).items()}
    if ours != theirs:
        differ = sorted(n for n in ours.keys() | theirs.keys() if ours.get(n) != theirs.get(n))
        raise UsageError(
            f"{path} holds the weights of another model than the config's: {len(differ)} arrays "
            f"differ{_first(differ)}"
        )


def flatten(params: Params) -> dict[str, jax.Array]:
    """Nested dict -> {"encoder/conv_in/kernel": array}."""
    flat = {}
    for name, child in params.items():
        if isinstance(child, Mapping):
            flat |= {f"{name}/{path}": leaf for path, leaf in flatten(child).items()}
        else:
            flat[name] = child
    return flat


def unflatten(flat: Mapping[str, jax.Array]) -> Params:
    """The inverse of `flatten`."""
    params = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return params


def save_safetensors(
    path: epath.PathLike,
    params: Params,
    metadata: Mapping[str, str],
    *,
    dtype: str = "float32",
) -> None:
    """Write parameters and strings that describe them, whole or not at all. path may be gs://.

    Raises UsageError for a dtype other than float32 and float16.
    """
    if dtype not in ("float32", "float16"):
        raise UsageError(f"dtype={dtype!r}: weights are saved as 'float32' or 'float16'.")
    path = epath.Path(path)
    arrays = {name: _floats_as(dtype, leaf) for name, leaf in flatten(params).items()}
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(safetensors.numpy.save(arrays, metadata=dict(metadata)))
    partial.replace(path)


def _floats_as(dtype: str, leaf) -> np.ndarray:
    array = np.ascontiguousarray(leaf)
    return array.astype(dtype, copy=False) if array.dtype.kind == "f" else array


def load_safetensors(path: epath.PathLike) -> tuple[Params, dict[str, str]]:
    """-> (parameters as numpy arrays, floats as float32, metadata).

    Raises UsageError if path is not such a file.
    """
    path = epath.Path(path)
    try:
        data = path.read_bytes()
        flat = safetensors.numpy.load(data)
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist; give the path of a .safetensors file") from None
    except (OSError, safetensors.SafetensorError) as error:
        raise UsageError(f"{path} is not a whole .safetensors file: {error}") from None
    except KeyError as dtype:  # numpy has no bfloat16; ours are float32
        raise UsageError(f"{path} holds arrays of type {dtype}; save them as F32") from None
    flat = {name: _floats_as("float32", array) for name, array in flat.items()}
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return unflatten(flat), header.get("__metadata__", {})
