"""The extractors of an evaluation side by side, each with what it compares with: sets of images in,
named scores out.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from cfg_jax import experiment, features, reference, request, schema, scores
from cfg_jax.runtime import logging as runlog
from cfg_jax.types import UsageError


def extractors(names: Sequence[str], mesh: Mesh, judge: str | None) -> list[features.Extractor]:
    """The extractors of these names, read onto the mesh; `judge` is the folder of the one that has
    none of its own. Raises UsageError for a name that is not known.
    """
    make = {name: schema.entry("--features", features.FEATURES, name) for name in names}
    if judge and "judge" not in make:
        raise UsageError(f"--judge={judge} is not looked through: --features has no 'judge'.")
    return [m(mesh, judge) if name == "judge" else m(mesh) for name, m in make.items()]


@dataclasses.dataclass(frozen=True)
class Panel:
    """Extractors, and the references of each."""

    looks: Sequence[features.Extractor]
    references: Sequence[reference.Reference]

    @classmethod
    def against_dataset(cls, looks: Sequence[features.Extractor], dataset: Any) -> "Panel":
        """With the images of the data set's split as the reference of all."""
        runlog.say(f"looking at the real images of {dataset.name}, {dataset.split}")
        return cls(looks, [reference.of_dataset(look, dataset) for look in looks])

    def score(
        self, seen: Sequence[features.Seen], labels: np.ndarray | None, *, resample: bool = True
    ) -> dict[str, scores.Score]:
        """The scores of images by what each extractor saw in them, under their names.

        Those of the first extractor have plain names, as `precision`; those of the others say whose
        they are, as `precision_judge`.
        """
        out = {}
        for look, of, saw in zip(self.looks, self.references, seen, strict=True):
            knows = labels is not None and look.judge is not None
            scored = scores.score(saw, labels, of.seen, knows_labels=knows, resample=resample)
            for name, score in scored.items():
                called = look.called(name)
                if called == name and look is not self.looks[0]:
                    called = f"{name}_{look.name}"
                out[called] = score
        return out

    def held_out(self, dataset: Any) -> dict[str, Any] | None:
        """The scores of real images held out: what to expect of images that are real.

        None where the reference is that very split. The judge's accuracy is among them.
        """
        if dataset.split == dataset.held_out:
            return None
        examples = dataset.load(dataset.held_out)
        labels, seen = [], [[] for _ in self.looks]
        for start in range(0, len(examples), 1024):
            some = examples[start : start + 1024]
            labels.append(some["label"])
            for look, parts in zip(self.looks, seen, strict=True):
                parts.append(look(some["image"]))
        scored = self.score([features.joined(parts) for parts in seen], np.concatenate(labels))
        return {
            "split": dataset.held_out,
            "images": len(examples),
            "scores": {name: score.summary() for name, score in scored.items()},
        }

    def recipe(self) -> dict[str, Any]:
        """How the scores came about, to be written beside them."""
        return {
            "features": [look.recipe for look in self.looks],
            "reference": [of.recipe for of in self.references],
            "precision_recall": {"k": scores.K},
            "resamples": {"all": scores.REPLICATES, "wide": scores.WIDE_REPLICATES},
        }


def check_judge(looks: Sequence[features.Extractor], model: experiment.Experiment) -> None:
    """Raises UsageError unless the judge is one of the model's images and classes."""
    for look in looks:
        if look.judge is not None:
            request.check_same_images("--judge", look.judge, model)
