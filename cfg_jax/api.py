"""The door for notebooks and scripts: a trained model as an object that samples.

model = cfg_jax.load("runs/digits")
images = model.sample([0, 3, 7], w=1.0)
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from cfg_jax import experiment
from cfg_jax import generator as generators
from cfg_jax.models import weights
from cfg_jax.runtime import mesh as meshes
from cfg_jax.types import Guidance, Params, UsageError


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
        labels: Sequence[int] | Sequence[Sequence[int]],
        w: float | Sequence[float] = 0.0,
        *,
        seed: int = 0,
        index: Sequence[int] | None = None,
        guidance: Callable[[Any], Guidance] | None = None,
        negative: Sequence[int] = (),
    ) -> np.ndarray:
        """Guided samples, uint8 [N, H, W, C], one a label, or one a mixture of labels [N, K].

        w is the paper's strength (scale - 1), one number or one a label. Image i depends on (seed,
        index[i]), its label and its w alone, with index 0, 1, ... by default. `guidance`, w -> a
        rule, takes the place of the config's; `negative` are labels to move away from in place of
        the null one. One program serves every w, seed, label and number of a rule: lambda w:
        Interval(ClassifierFree(w), low, high) compiles once for all ends. Raises UsageError for a
        label outside the classes, a seed out of range, w < -1, or one that a student was not
        trained for.
        """
        generator = self._generator.guided(guidance, negative)
        return generator(labels, w, seed=seed, index=index)

    def save(self, path: str, *, dtype: str = "float32") -> None:
        """Writes the EMA and its config as .safetensors, which `load` and the jobs read back.

        dtype "float16" halves the file; the images then differ by a level here and there.
        """
        params = jax.device_get(self._generator.params["model"])
        export(path, params, self.config, self.step, dtype=dtype)


def export(
    path: str,
    params: Params,
    config: Mapping[str, Any],
    step: int,
    *,
    dtype: str = "float32",
) -> None:
    """Writes parameters, whole on this host, and their config as .safetensors."""
    # Where the data lay on the machine that trained is of no use elsewhere.
    config = {**config, "dataset": {**config["dataset"], "data_dir": None}}
    metadata = {"config": json.dumps(config), "step": str(step)}
    weights.save_safetensors(path, params, metadata, dtype=dtype)


def load(path: str, classifier: str | None = None, *, weak: str | None = None) -> Model:
    """The model in a training folder, or in a .safetensors file that `Model.save` wrote.

    `classifier` is the folder of a noisy classifier, for a model whose config guides by one; `weak`
    that of a weaker model, which is then the reference to guide by. Raises UsageError where there
    is no model at the path.
    """
    config = generators.saved_config(path, "path")
    meshes.split_cpu(config["sample"]["batch_size"])
    model = experiment.build(config)
    if classifier and weak:
        raise UsageError("classifier and weak: one of them guides, not both.")
    guide = generators.open_guide("classifier", classifier) or generators.open_guide("weak", weak)
    return Model(*generators.load(path, model, classifier or weak, guide))
