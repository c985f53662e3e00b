"""The door for notebooks and scripts: a trained model as an object that samples.

model = cfg_jax.load("runs/digits")
images = model.sample([0, 3, 7], w=1.0)
"""

import json
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from cfg_jax import card, experiment
from cfg_jax import generator as generators
from cfg_jax.models import weights
from cfg_jax.runtime import mesh as meshes


class Model:
    """A trained model on this machine's devices. Made by `load`."""

    def __init__(self, generator: generators.Generator, step: int):
        self._generator = generator
        self.step = step

    @property
    def config(self) -> dict[str, Any]:
        """The complete config that made the model."""
        return dict(self._generator.model.config)

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes; a label is a place in this tuple."""
        return tuple(self._generator.model.dataset.classes)

    def sample(
        self,
        labels: Sequence[int],
        w: float | Sequence[float] = 0.0,
        *,
        seed: int = 0,
        index: Sequence[int] | None = None,
    ) -> np.ndarray:
        """Guided samples, uint8 [N, H, W, C], one a label.

        w is the paper's strength (scale - 1), one number or one a label; sweeping it compiles once.
        Image i depends on (seed, index[i]), its label and its w alone, with index 0, 1, ... by
        default. Raises UsageError for a label outside the classes, w < -1, or a seed out of range.
        """
        return self._generator(labels, w, seed=seed, index=index)

    def save(self, path: str, *, dtype: str = "float32") -> None:
        """Writes the EMA and its config as .safetensors, which `load` and the jobs read back.

        dtype "float16" halves the file; the images then differ by a level here and there. A model
        card is begun beside it, NAME.md, unless there is one: what is left to say is yours.
        """
        # Where the data lay on the machine that trained is of no use elsewhere.
        dataset = {**self.config["dataset"], "data_dir": None}
        config = {**self.config, "dataset": dataset}
        metadata = {"config": json.dumps(config), "step": str(self.step)}
        params = jax.device_get(self._generator.params["model"])
        weights.save_safetensors(path, params, metadata, dtype=dtype)
        beside = epath.Path(path).with_suffix(".md")
        if not beside.exists():
            known = {"step": self.step, "classes": self.classes}
            known["image_shape"] = self._generator.model.dataset.image_shape
            known["parameters"] = sum(leaf.size for leaf in jax.tree.leaves(params))
            known["guided"] = self._generator.model.null_label is not None
            beside.write_text(card.text(epath.Path(path).name, config, **known))


def load(path: str, classifier: str | None = None) -> Model:
    """The model in a training folder, or in a .safetensors file that `Model.save` wrote.

    `classifier` is the folder of a noisy classifier, for a model whose config guides by one. Raises
    UsageError where there is no model at the path.
    """
    config = generators.saved_config(path, "path")
    meshes.split_cpu(config["sample"]["batch_size"])
    model, guide = experiment.build(config), None
    if classifier:
        guide = experiment.build(generators.saved_config(classifier, "classifier"))
    return Model(*generators.load(path, model, classifier, guide))
