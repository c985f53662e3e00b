"""Evaluation during training: a small sweep of the EMA at intervals, and the best one kept.

The same images, extractors and scores as `evaluate`'s, without resamples and without files of
images. Training goes on bit-equal whether or not it is watched.
"""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from cfg_jax import (
    experiment,
    features,
    generator,
    panel,
    reference,
    request,
    schema,
    scores,
    sweep,
)
from cfg_jax.models import weights
from cfg_jax.runtime import logging as runlog
from cfg_jax.runtime import mesh as meshes
from cfg_jax.types import Params, UsageError

BEST = "best.safetensors"


class Watch:
    """The evaluation of a run, as `config.evaluate` has it: called with a step and its EMA.

    Building it reads the extractor and looks at the real images. Raises UsageError for what is
    wrong with either, or an unknown metric to keep the best by.
    """

    def __init__(self, model: experiment.Experiment, mesh: Mesh, workdir: str):
        self._plan, self._model, self._mesh = model.evaluate, model, mesh
        self._file = epath.Path(workdir) / BEST
        request.check_guidance(model, None, self._plan.w)
        prefix = "config.evaluate."
        looks = panel.extractors([self._plan.features], mesh, self._plan.judge, prefix=prefix)
        panel.check_judge(looks, model, prefix=prefix)
        if keep := self._plan.keep_best:
            known = names_of(looks[0])
            if keep not in known:
                raise schema.unknown("config.evaluate.keep_best", keep, known)
        if self._plan.reference:
            how = {"image_shape": model.dataset.image_shape, "resize": model.dataset.resize}
            flag = f"{prefix}reference"
            of = reference.load(self._plan.reference, looks[0], flag=flag, **how)
            self._panel = panel.Panel(looks, [of])
        else:
            folder = epath.Path(workdir) / "evaluation"
            self._panel = panel.Panel.against_dataset(looks, model.dataset, folder)
        if keep == looks[0].called("sfd") and self._panel.references[0].seen.spatial is None:
            raise UsageError(f"config.evaluate.keep_best={keep!r}: the reference has no mu_s.")
        # Values compare only where all that they are of is the same.
        self._of = {
            **dataclasses.asdict(self._plan),
            "w": list(self._plan.w),
            "every": None,
            "extractor": looks[0].fingerprint,
            "real": self._panel.references[0].recipe.get("sha256"),
        }
        self._best = None  # {"of", "value", "w", "step"}, of what is in the file
        if self._file.exists():
            metadata = weights.load_safetensors(self._file)[1]
            self._best = json.loads(metadata.get("best", "null"))
        self._sampled = generator.Generator(model, {}, mesh=mesh)
        self._labels = sweep.balanced_labels(self._plan.num_samples, model.dataset.num_classes)

    def __call__(self, step: int, ema: Params) -> dict[str, float]:
        """{"evaluate/fd_judge_w1": value, ...}, after writing best.safetensors if it is the best.

        All processes must call it.
        """
        self._sampled.params = {"model": ema}
        by_name = {}
        for w in self._plan.w:
            point = sweep.Point(
                sampled=self._sampled,
                w=w,
                seed=self._plan.seed,
                label_rule="balanced",
                labels=self._labels,
                fingerprints={},
            )
            _, seen = point.look(self._panel.looks, keep=np.arange(0))
            for name, score in self._panel.score(seen, self._labels, resample=False).items():
                by_name.setdefault(name, {})[w] = score.value
        if name := self._plan.keep_best:
            choose = max if scores.kind(name).rising else min
            w = choose(by_name[name], key=by_name[name].get)
            best = {"of": self._of, "value": by_name[name][w], "w": w, "step": step}
            if self._is_better(best, choose):
                self._keep(best, ema)
        return {
            f"evaluate/{name}_w{w:g}": value
            for name, of_w in by_name.items()
            for w, value in of_w.items()
        }

    def _is_better(self, best: dict[str, Any], choose: Callable) -> bool:
        there = self._best
        if there is None or there["of"] != best["of"]:
            better = True
        else:
            values = (there["value"], best["value"])
            better = choose(values) != there["value"]
        return meshes.all_agree(better)  # process 0 alone may see the file

    def _keep(self, best: dict[str, Any], ema: Params) -> None:
        """Writes the EMA as an exported model: `--workdir=DIR/best.safetensors` reads it."""
        whole = meshes.gather(ema)
        if jax.process_index() == 0:
            metadata = {
                "config": json.dumps(self._model.config),
                "step": str(best["step"]),
                "best": json.dumps(best),
            }
            weights.save_safetensors(self._file, whole, metadata)
        self._best = best
        name, value = best["of"]["keep_best"], best["value"]
        runlog.say(f"the best {name} so far, {value:.4g} at w={best['w']:g}: {self._file}")


def names_of(look: features.Extractor) -> set[str]:
    """The names of the scores that these features have."""
    names = set(scores.KINDS)
    if "sfd" not in look.names:
        names.remove("sfd")
    if look.judge is None:
        names.remove("accuracy")
    return set(map(look.called, names))
