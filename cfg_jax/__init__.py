"""Classifier-free diffusion guidance (Ho & Salimans, 2022) in JAX.

`cfg_jax.load("digits")`, or the folder of a run, opens a trained model; everything else is imported
from its module.
"""

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["Model", "UsageError", "load"]

if TYPE_CHECKING:
    from cfg_jax.api import Model, load
    from cfg_jax.types import UsageError


def __getattr__(name: str):
    # Lazily, so that importing one module of the package does not import all of them.
    if name in ("Model", "load"):
        from cfg_jax import api

        return getattr(api, name)
    if name == "UsageError":
        from cfg_jax.types import UsageError

        return UsageError
    raise AttributeError(f"module 'cfg_jax' has no attribute {name!r}")
