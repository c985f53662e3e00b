"""nnx.Module -> Network: the one border between Flax and the rest of the package.

Outside it, parameters are a plain nested dict with string keys, a network is two pure functions.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from cfg_jax.models import classifier, layers, unet
from cfg_jax.types import Array, Cond, Network, Params, UsageError

Build = Callable[[nnx.Rngs], nnx.Module]


def network(
    build: Build, *, sinusoid_input: Callable[[Array], Array], method: str = "__call__"
) -> Network:
    """Network(init, apply) of the module that `build(rngs)` makes: a call (z, s, cond, key).

    s = sinusoid_input(lam), with lam broadcast to [B]: in which reading the network sees lambda.
    `method` names another one of the module with the same arguments, over the same parameters. No
    parameter exists before `init`. Raises the UsageErrors of the module, at once.
    """
    graph, _ = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))))

    def init(key: Array) -> Params:
        return to_params(build(nnx.Rngs(key)))

    def apply(params: Params, z: Array, lam: Array, cond: Cond, key: Array | None = None) -> Array:
        module = nnx.merge(graph, _numbered(params))
        s = sinusoid_input(jnp.broadcast_to(lam, z.shape[:1]))
        return getattr(module, method)(z, s, cond, key)

    return Network(init, apply)


def shapes(build: Build) -> Params:
    """The parameters of `build(rngs)` as ShapeDtypeStructs: counted without being made."""
    return jax.eval_shape(lambda: to_params(build(nnx.Rngs(0))))


def dtypes(build: Build) -> Params:
    """In which precision `apply` reads each parameter: casting to it first changes no bit."""
    module = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
    layer_dtypes = {
        tuple(map(str, path)): jnp.dtype(part.dtype)
        for path, part in nnx.iter_modules(module)
        if isinstance(part, layers.Conv | layers.Linear)
    }

    def dtype_of(path, leaf):
        names = tuple(entry.key for entry in path[:-1])
        return layer_dtypes.get(names, leaf.dtype)

    return jax.tree_util.tree_map_with_path(dtype_of, to_params(module))


def to_params(module: nnx.Module) -> Params:
    """The parameters of a module as a plain nested dict; list items are named "0", "1" ..."""
    return _named(nnx.to_pure_dict(nnx.state(module, nnx.Param)))


def _named(tree: Any) -> Any:
    if not isinstance(tree, Mapping):
        return tree
    return {str(name): _named(child) for name, child in tree.items()}


def _numbered(tree: Any) -> Any:
    if not isinstance(tree, Mapping):
        return tree
    return {int(name) if name.isdigit() else name: _numbered(child) for name, child in tree.items()}


def make(name: str, **fields) -> Build:
    """A `build` from a row of MODELS and the fields of its signature, as a config gives them.

    Raises UsageError for a model or a field that is not known, or a field that is missing.
    """
    if name not in MODELS:
        raise UsageError(f"model {name!r} is not known; it is one of {', '.join(MODELS)}")
    known = inspect.signature(MODELS[name]).parameters
    known = {field: p for field, p in known.items() if p.kind is p.KEYWORD_ONLY}
    if unknown := sorted(fields.keys() - known.keys()):
        raise UsageError(
            f"model {name!r} has no field {', '.join(unknown)}; it has {', '.join(known)}"
        )
    required = {field for field, p in known.items() if p.default is p.empty}
    if missing := sorted(required - fields.keys()):
        raise UsageError(f"model {name!r} needs {', '.join(missing)}")
    return functools.partial(MODELS[name], **fields)


MODELS = {"unet": unet.UNet, "classifier": classifier.Classifier}

# The signature is the schema of `config.model`, but Flax's metaclass hides it from inspect.
for model in MODELS.values():
    model.__signature__ = inspect.signature(functools.partial(model.__init__, None))
