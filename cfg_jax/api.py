"""The door for notebooks and scripts: a trained model as an object that samples.

    model = cfg_jax.load("digits")
    images = model.sample([0, 3, 7], w=1.0)

The jobs do the same from a command line.
"""

import copy
import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from cfg_jax import card, experiment, request, stored
from cfg_jax import generator as generators
from cfg_jax.runtime import mesh as meshes
from cfg_jax.types import Guidance, Params, UsageError

# A name of SAMPLERS, GRIDS or GUIDANCE, or its options: {"name": "ancestral", "v": 0.0}. Options
# alone are of the entry that the model's config has.
Entry = str | Mapping[str, Any]
Rule = Callable[[Any], Guidance]  # w -> a guidance rule


class Model:
    """A trained model on this machine's devices. Made by `load`.

    `sample` and `trajectory` run the program of `python -m cfg_jax.sample`, compiled when it is
    first needed: once for all w, labels, seeds and numbers of a rule, and again only for other
    steps, another sampler or a rule of another kind (and for each power of two of images, up to the
    config's batch).
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        params: Mapping[str, Params],
        step: int,
        guide: experiment.Experiment | None = None,
    ):
        self.step = step  # of training
        self._config, self._params, self._guide = config, params, guide
        self._models, self._generators = {}, {}
        # Here a model that cannot sample, or a guide that cannot guide it, is refused: nothing is
        # compiled yet.
        self._generator(guidance="classifier" if guide and guide.is_classifier else None)
        self._generator()

    @property
    def config(self) -> dict[str, Any]:
        """The complete config that made the model: a copy."""
        return copy.deepcopy(dict(self._config))

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes; a label is a place in this tuple."""
        return tuple(self._model({}).dataset.classes)

    def __repr__(self) -> str:
        dataset = self._model({}).dataset
        shape = "x".join(map(str, dataset.image_shape))
        return f"<Model of {dataset.name}: {len(self.classes)} classes, {shape}, step {self.step}>"

    def sample(
        self,
        labels: Sequence[int] | Sequence[Sequence[int]],
        w: float | Sequence[float] = 0.0,
        *,
        seed: int = 0,
        index: Sequence[int] | None = None,
        steps: int | None = None,
        sampler: Entry | None = None,
        grid: Entry | None = None,
        guidance: Entry | Rule | None = None,
        negative: Sequence[int] = (),
    ) -> np.ndarray:
        """Guided samples, uint8 [N, H, W, C], one a label, or one a mixture of labels [N, K].

        w is the paper's strength (scale - 1), one number or one a label. Image i depends on (seed,
        index[i]), its label and its w alone, with index 0, 1, ... by default. `steps`, `sampler`,
        `grid` and `guidance` take the place of what the config's `sample` section says; a guidance
        is a name, options, or a function of w: lambda w: Interval(ClassifierFree(w), low, high).
        `negative` are labels to move away from in place of the null one. Raises UsageError for a
        label outside the classes, a seed out of range, w < -1 or one that a student was not trained
        for, and names that are not known.
        """
        generator = self._generator(steps, sampler, grid, guidance, negative)
        return generator(labels, w, seed=seed, index=index)

    def trajectory(
        self,
        labels: Sequence[int] | Sequence[Sequence[int]],
        w: float | Sequence[float] = 0.0,
        *,
        every: int = 1,
        seed: int = 0,
        index: Sequence[int] | None = None,
        steps: int | None = None,
        sampler: Entry | None = None,
        grid: Entry | None = None,
        guidance: Entry | Rule | None = None,
        negative: Sequence[int] = (),
    ) -> np.ndarray:
        """The clean estimates along the chain, uint8 [T, N, H, W, C]: what x is thought to be.

        Of T noise levels the last is kept, which is the image that `sample` returns, and each
        `every`-th before it. The device holds all T of a batch at once. Else as `sample`.
        """
        if every < 1:
            raise UsageError(f"every={every}: 1 keeps every estimate, 2 every second one.")
        generator = self._generator(steps, sampler, grid, guidance, negative, along=True)
        estimates = generator(labels, w, seed=seed, index=index)  # [N, T, H, W, C]
        return np.moveaxis(estimates, 1, 0)[::-1][::every][::-1]

    def save(self, path: str, *, dtype: str = "float32") -> None:
        """Writes the EMA and its config as .safetensors, which `load` and the jobs read back.

        dtype "float16" halves the file; the images then differ by a level here and there. A model
        card is begun beside it, NAME.md, unless there is one: what is left to say is yours.
        """
        params, model = jax.device_get(self._params["model"]), self._model({})
        config = stored.export(path, params, self.config, self.step, dtype=dtype)
        beside = epath.Path(path).with_suffix(".md")
        if not beside.exists():
            known = {"step": self.step, "classes": self.classes}
            known["image_shape"] = model.dataset.image_shape
            known["parameters"] = sum(leaf.size for leaf in jax.tree.leaves(params))
            known["guided"] = model.null_label is not None or model.w_range is not None
            beside.write_text(card.text(epath.Path(path).name, config, **known))

    def _model(self, chain: Mapping[str, Any]) -> experiment.Experiment:
        """The experiment with other fields of `sample`; equal ones are built once."""
        sample = {**self._config["sample"], **chain}
        key = json.dumps(sample, sort_keys=True)
        if key not in self._models:
            self._models[key] = experiment.build({**self._config, "sample": sample})
        return self._models[key]

    def _generator(
        self,
        steps: int | None = None,
        sampler: Entry | None = None,
        grid: Entry | None = None,
        guidance: Entry | Rule | None = None,
        negative: Sequence[int] = (),
        *,
        along: bool = False,
    ) -> generators.Generator:
        """The chain of these settings, the config's where they are None. Those that differ in their
        rule, or in the labels to move away from, share a program.
        """
        own = self._config["sample"]
        chain = {
            "steps": own["steps"] if steps is None else steps,
            "sampler": _merged(own["sampler"], sampler),
            "grid": _merged(own["grid"], grid),
        }
        if not callable(guidance):
            chain["guidance"] = _merged(own["guidance"], guidance)
        model = self._model(chain)
        if callable(guidance):
            model = dataclasses.replace(model, guidance=guidance)
        second, guide = model.guidance(0.0).second, self._guide
        if second == "classifier" and not (guide and guide.is_classifier):
            raise UsageError(
                f"guidance={model.sample.guidance['name']!r} needs a noisy classifier of these "
                "images: cfg_jax.load(PATH, classifier=DIR)."
            )
        if guide is not None and guide.is_classifier and second != "classifier":
            guide = None
        request.check_guidance(model, guide, [])
        kept = {name: model.config["sample"][name] for name in ("steps", "sampler", "grid", "clip")}
        key = json.dumps([kept, along, guide and request.role(guide)], sort_keys=True)
        if key not in self._generators:
            names = ["model", *([request.role(guide)] if guide else [])]
            params = {name: self._params[name] for name in names}
            self._generators[key] = generators.Generator(model, params, guide, along=along)
        return self._generators[key].guided(model.guidance, negative)


def _merged(own: Mapping[str, Any], given: Entry | None) -> Mapping[str, Any]:
    """The section of a table's entry; the config's options stay where the entry is the same."""
    given = {"name": given} if isinstance(given, str) else given or {}
    return {**own, **given} if given.get("name", own["name"]) == own["name"] else given


def load(
    path: str | os.PathLike,
    classifier: str | os.PathLike | None = None,
    *,
    weak: str | os.PathLike | None = None,
) -> Model:
    """The model in a training folder (gs://BUCKET/DIR as well, with the extra [gcs]), in a
    .safetensors file that `Model.save` wrote, or of a name that ships: "digits".

    A folder of such a name is ./digits. `classifier` is a noisy classifier, a folder or a file, for
    `guidance="classifier"` or a model whose config guides by one; `weak` a weaker model of the same
    images, which is then the reference to guide by. Raises UsageError where there is no model at a
    path, or the two do not go together.

    `load` changes the process, as the jobs do: jax gets up to one CPU device a core, unless it has
    started or their number was chosen; and where there is nothing but a CPU, on Linux with glibc,
    the C library's allocator keeps what is freed, so that the process shrinks no more but after
    jax took over five seconds to compile something, when what is free goes to the system.
    """
    if classifier and weak:
        raise UsageError("classifier and weak: one of them guides, not both.")
    path = _find(path)
    config = stored.saved_config(path, "path")
    meshes.split_cpu(config["sample"]["batch_size"])
    model, guide = experiment.build(config), None
    if model.is_classifier:
        raise UsageError(
            f"{path} holds a classifier: it guides, cfg_jax.load(MODEL, classifier={path!r}), and "
            "does not sample."
        )
    step, params = stored.load_ema(path, model)
    networks = {"model": params}
    for flag, given in (("classifier", classifier), ("weak", weak)):
        if given is not None:
            where = _find(given)
            guide = stored.open_guide(flag, where)
            networks[flag] = stored.load_ema(where, guide)[1]
    return Model(config, networks, step, guide)


def _find(path: str | os.PathLike) -> str:
    path = str(stored.SHIPPED.get(str(path), path))
    try:
        found = epath.Path(path).exists()
    except ImportError as error:  # gcsfs, for gs://
        raise UsageError(f"{path}: {error}: pip install 'cfg_jax[gcs]'.") from error
    if not found:
        raise UsageError(
            f"{path!r} is no training folder, no .safetensors file, and not the name of a model "
            f"that ships ({', '.join(sorted(stored.SHIPPED))})."
        )
    return path
