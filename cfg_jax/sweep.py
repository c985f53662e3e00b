"""The images of one point of a sweep and what is seen in them, on disk as they are made: a killed
sweep goes on within a point.

Image i is made from (seed, i) and its label, so that a part of them is what a smaller number would
be. A chunk is a batch: its images in one file, what each extractor saw in them in another, float32.
"""

import dataclasses
import hashlib
import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from cfg_jax import features, generator, request, sample
from cfg_jax.runtime import logging as runlog
from cfg_jax.runtime import mesh as meshes


def balanced_labels(count: int, num_classes: int) -> np.ndarray:
    """The labels of images 0 to count - 1, balanced to within one: i mod K, never sorted."""
    return np.arange(count) % num_classes


def training_labels(count: int, dataset: Any) -> np.ndarray:
    """The labels of `count` examples of the data set's own split, in a random order that is always
    the same: as often as in training.
    """
    examples = dataset.load()
    rng = np.random.default_rng(0)
    rounds = -(-count // len(examples))
    order = np.concatenate([rng.permutation(len(examples)) for _ in range(rounds)])[:count]
    parts = [examples[order[at : at + 1024]]["label"] for at in range(0, count, 1024)]
    return np.concatenate(parts)


LABELS = {
    "balanced": lambda count, dataset: balanced_labels(count, dataset.num_classes),
    "training": training_labels,
}


@dataclasses.dataclass(frozen=True)
class Point:
    """One guidance rule at one w, and the folder of its images; without one, nothing is kept.

    The name of the images' folder holds a hash of all that decides them: parameters to the bit,
    networks, rule, sampler, grid, steps, clipping, labels, seed and w. Another recipe is another
    folder.
    """

    sampled: generator.Generator
    w: float
    seed: int
    label_rule: str  # where they come from, and so what they are
    labels: np.ndarray  # [N], what that gives
    fingerprints: dict[str, str]  # of the parameters of the sampler's networks
    folder: epath.Path | None = None  # of the sweep

    @property
    def rule(self) -> str:
        """The name of the guidance rule."""
        return self.sampled.model.sample.guidance["name"]

    @property
    def title(self) -> str:
        """The rule and w, as progress bars and logs call the point."""
        return f"{self.rule} {sample.name_w(self.w)}"

    @property
    def evaluations(self) -> request.Evaluations:
        """Network evaluations an image."""
        return request.evaluations(self.sampled.model, self.sampled.guide, self.w)

    def look(
        self,
        looks: Sequence[features.Extractor],
        *,
        keep: np.ndarray,
        progress: Callable[[int], Any] = lambda n: None,
    ) -> tuple[np.ndarray, list[dict[str, np.ndarray]]]:
        """Images `keep` [n], uint8 [n, H, W, C], and what each extractor sees in all N of them.

        What is on disk is read, and only the rest is made: images go from the reverse chain to the
        extractors on the devices. `progress` is told how many more are done. Memory: 4 N (D + K +
        S) bytes for features, logits and features of places, the images kept, and a batch.
        """
        store = self._store()
        count, (have, found) = len(self.labels), (0, 0)
        kept = np.empty((len(keep), *self.sampled.model.dataset.image_shape), np.uint8)
        seen = [{} for _ in looks]
        while have < count:
            made, on_device, was_there = self._chunk(store, have)
            rows = slice(have, have + len(made))
            for look, whole in zip(looks, seen, strict=True):
                place = store / f"{look.name}_{look.fingerprint}" if store else None
                for name, part in self._seen(place, rows, look, on_device).items():
                    if name not in whole:
                        whole[name] = np.empty((count, *part.shape[1:]), part.dtype)
                    whole[name][rows] = part
            here = (keep >= rows.start) & (keep < rows.stop)
            kept[here] = made[keep[here] - have]
            have = rows.stop
            found += was_there * len(made)
            progress(len(made))
        if found:
            runlog.say(f"{self.title}: {found} of {have} images were there already")
        return kept, seen

    def _chunk(self, store: epath.Path | None, first: int):
        """Images from `first` on, read or made; them on the devices; and whether they were read."""
        left = len(self.labels) - first
        found = _read(store / _name(first)) if store else None
        # All processes go on from one place, whatever each of them could see of the folder.
        size = meshes.least(min(len(found["images"]), left) if found else 0) if store else 0
        if size:
            made = found["images"][:size]
            return made, self._on_device(made), True
        index = np.arange(first, first + min(left, self.sampled.batch_size))
        on_device = self.sampled.on_device(self.labels[index], index, self.w, self.seed)
        made = meshes.gather(on_device)[: len(index)]
        if store and jax.process_index() == 0:
            _write(store / _name(first), {"images": made})
        return made, on_device, False

    def _on_device(self, images: np.ndarray) -> jax.Array:
        """As `on_device` of the generator gives them: of the same shape, for the same bits."""
        filled = self.sampled.filled(len(images))
        return meshes.shard(
            self.sampled.mesh, images[np.minimum(np.arange(filled), len(images) - 1)]
        )

    def _seen(
        self,
        place: epath.Path | None,
        rows: slice,
        look: features.Extractor,
        on_device: jax.Array,
    ) -> Mapping[str, np.ndarray]:
        count = rows.stop - rows.start
        found = _read(place / _name(rows.start)) if place else None
        if place and meshes.least(0 if found is None else len(found["features"])) >= count:
            return {name: array[:count] for name, array in found.items()}
        found = {name: array[:count] for name, array in look.batch(on_device).items()}
        if place and jax.process_index() == 0:
            place.mkdir(parents=True, exist_ok=True)
            _write(place / _name(rows.start), found)
        return found

    def _store(self) -> epath.Path | None:
        if self.folder is None:
            return None
        recipe = {
            "networks": [
                {key: network.config[key] for key in ("model", "schedule", "reading")}
                for network in (self.sampled.model, self.sampled.guide)
                if network is not None
            ],
            "params": self.fingerprints,
            "sample": {**self.sampled.model.config["sample"], "batch_size": None},
            "labels": self.label_rule,
            "seed": self.seed,
            "w": self.w,
        }
        text = json.dumps(recipe, sort_keys=True)
        name = f"{self.rule}_w{self.w:g}_{hashlib.sha256(text.encode()).hexdigest()[:12]}"
        store = self.folder / "images" / name
        if jax.process_index() == 0:
            store.mkdir(parents=True, exist_ok=True)
            (store / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n")
        return store


def _name(first: int) -> str:
    return f"{first:08d}.npz"


def _read(path: epath.Path) -> dict[str, np.ndarray] | None:
    """The arrays of a chunk; None where there is none that can be read."""
    if not path.exists():
        return None
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            return dict(arrays)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        runlog.say(f"{path} cannot be read ({error}): it is made again")
        return None


def _write(path: epath.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a chunk, whole or not at all."""
    beside = path.with_name(path.name + ".tmp")
    with beside.open("wb") as file:
        np.savez(file, **arrays)
    beside.replace(path)
