"""A trained model as it lies in a workdir or in an exported file: its config and its EMA."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from cfg_jax import experiment
from cfg_jax.models import weights
from cfg_jax.runtime import checkpoint
from cfg_jax.runtime import mesh as meshes
from cfg_jax.types import Params, UsageError

# The models that come with the package, by name; trained/README.md says what made them.
SHIPPED = {f.stem: f for f in (Path(__file__).parent / "trained").glob("*.safetensors")}


def _is_export(path: str) -> bool:
    """Whether the path names a .safetensors file that `export` wrote."""
    return str(path).endswith(".safetensors")


def saved_config(path: str, flag: str = "--workdir") -> dict[str, Any]:
    """The complete config of a run or an exported file. Raises UsageError if there is none.

    `flag` is what the user gave the path by.
    """
    if path and _is_export(path):
        _, metadata = weights.load_safetensors(path)
        if "config" not in metadata:
            raise UsageError(f"{path} holds no config: it was not written by this package.")
        config = json.loads(metadata["config"])
    else:
        config = checkpoint.read_config(path) if path else None
    if config is None:
        if path in SHIPPED:
            out = " --out=DIR" if flag == "--workdir" else ""
            raise UsageError(
                f"{flag}={path} holds no trained model; the one that ships with the package is "
                f"{flag}={SHIPPED[path]}{out}"
            )
        raise UsageError(
            f"{flag}={path} holds no trained model: "
            "python -m cfg_jax.train --config=digits --workdir=DIR makes one."
        )
    return experiment.SCHEMA.complete(config)


def load_ema(path: str, model: experiment.Experiment, shardings: Any = None) -> tuple[int, Params]:
    """(step, EMA parameters) of a run's newest checkpoint or an exported file.

    They lie as `shardings` says, on every device whole by default. Raises UsageError where there
    are none, or where they are another network's.
    """
    shapes = jax.eval_shape(model.network.init, jax.random.key(0))
    if shardings is None:
        everywhere = meshes.replicated(meshes.make_mesh())
        shardings = jax.tree.map(lambda _: everywhere, shapes)
    if _is_export(path):
        params, metadata = weights.load_safetensors(path)
        weights.check_shapes(path, params, shapes)
        return int(metadata["step"]), jax.device_put(params, shardings)
    checkpoints = checkpoint.Checkpoints(path, read_only=True)
    found = checkpoints.restore(ema=meshes.placed(shapes, shardings))
    checkpoints.close()
    if found is None:
        raise UsageError(f"{path} has no checkpoint yet: train there first.")
    step, items = found
    return step, items["ema"]


def open_guide(flag: str, path: str | None) -> experiment.Experiment | None:
    """What --classifier or --weak names, None for no path. Raises UsageError where that holds no
    model, or the other kind.
    """
    if not path:
        return None
    guide = experiment.build(saved_config(path, flag))
    if flag.endswith("classifier") and not guide.is_classifier:
        raise UsageError(
            f"{flag}={path} holds no classifier: train one with loss.name=classification."
        )
    if flag.endswith("weak") and guide.is_classifier:
        raise UsageError(
            f"{flag}={path} holds a classifier: a weaker model of the same images is needed, with "
            "fewer channels or steps; a classifier guides as classifier=DIR."
        )
    return guide


def export(
    path: str,
    params: Params,
    config: Mapping[str, Any],
    step: int,
    *,
    dtype: str = "float32",
) -> dict[str, Any]:
    """Writes parameters, whole on this host, and their config as .safetensors: the config there."""
    # Where the data lay on the machine that trained is of no use elsewhere.
    config = {**config, "dataset": {**config["dataset"], "data_dir": None}}
    metadata = {"config": json.dumps(config), "step": str(step)}
    weights.save_safetensors(path, params, metadata, dtype=dtype)
    return config
