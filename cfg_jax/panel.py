"""The extractors of an evaluation side by side, each with what it compares with: sets of images in,
named scores out.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from jax.sharding import Mesh

from cfg_jax import experiment, features, reference, request, schema, scores
from cfg_jax.types import UsageError


def extractors(
    names: Sequence[str], mesh: Mesh, judge: str | None, *, prefix: str = "--"
) -> list[features.Extractor]:
    """The extractors of these names, read onto the mesh; `judge` is the folder of the one that has
    none of its own. `prefix` stands before the names of fields in what is raised: UsageError for a
    name that is not known, and for a judge where none is asked for, or that is none.
    """
    make = {name: schema.entry(f"{prefix}features", features.FEATURES, name) for name in names}
    if judge and "judge" not in make:
        raise UsageError(
            f"{prefix}judge={judge} is not looked through: {prefix}features has no 'judge'."
        )
    return [
        m(mesh, judge, flag=f"{prefix}judge") if name == "judge" else m(mesh)
        for name, m in make.items()
    ]


@dataclasses.dataclass(frozen=True)
class Panel:
    """Extractors, and the references of each."""

    looks: Sequence[features.Extractor]
    references: Sequence[reference.Reference]

    @classmethod
    def against_dataset(
        cls, looks: Sequence[features.Extractor], dataset: Any, folder: epath.Path
    ) -> "Panel":
        """With the images of the data set's split as the reference of all, kept in the folder."""
        return cls(looks, [reference.kept(look, dataset, folder) for look in looks])

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
                plain = name in look.names or look is self.looks[0]
                out[look.called(name) if plain else f"{name}_{look.name}"] = score
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


def check_judge(
    looks: Sequence[features.Extractor], model: experiment.Experiment, *, prefix: str = "--"
) -> None:
    """Raises UsageError unless the judge is one of the model's images and classes."""
    for look in looks:
        if look.judge is not None:
            request.check_same_images(f"{prefix}judge", look.judge, model)
