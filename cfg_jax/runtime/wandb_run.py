"""A run on Weights & Biases beside TensorBoard: the same scalars and pictures, of the same names.

The package `wandb` is optional, and is imported where a run asks for it. Whether it sends what it
is told, or keeps it for `wandb sync`, is its own WANDB_MODE.
"""

import importlib.util
import os
import uuid
from collections.abc import Mapping
from typing import Any

import numpy as np
import PIL.Image
from etils import epath

from cfg_jax.types import UsageError


def check(project: str) -> None:
    """Raises UsageError where a project is named and the package is not there."""
    if project and importlib.util.find_spec("wandb") is None:
        raise UsageError(
            f"train.wandb={project!r} needs its package: pip install 'cfg_jax[wandb]'."
        )


class WandbRun:
    """The run of a workdir in a project; a run that goes on is the same one there."""

    def __init__(self, project: str, workdir: str, config: Mapping[str, Any]):
        import wandb

        self._wandb = wandb
        root = epath.Path(workdir)
        known = root / "wandb_id"
        if not known.exists():
            known.write_text(uuid.uuid4().hex[:16])
        self._run = wandb.init(
            project=project,
            name=root.name,
            id=known.read_text(),
            resume="allow",
            config=dict(config),
            dir=None if "://" in str(workdir) else os.fspath(root),
            settings=wandb.Settings(silent=True),
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds {name: value} to the run at a training step."""
        self._run.log(dict(values), step=step)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """uint8 [H, W, C]."""
        picture = PIL.Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
        self._run.log({name: self._wandb.Image(picture)}, step=step)

    def close(self) -> None:
        """Ends the run once what was logged is written; nothing can be logged after."""
        self._run.finish()
