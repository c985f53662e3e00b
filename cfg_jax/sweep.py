"""The images of one point of a sweep, on disk as they are made: a killed sweep goes on within it.

Image i is made from (seed, i) and label i mod K, so that any number of images is balanced to within
one, never sorted by class, and a part of what a larger number would be.
"""

import dataclasses
import hashlib
import json
import zipfile
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

from cfg_jax import generator, sample
from cfg_jax.runtime import logging as runlog
from cfg_jax.runtime import mesh as meshes


def labels_of(count: int, num_classes: int) -> np.ndarray:
    """The labels of images 0 to count - 1: i mod K."""
    return np.arange(count) % num_classes


@dataclasses.dataclass(frozen=True)
class Point:
    """One guidance rule at one w, and the folder of its images.

    The name of the images' folder holds a hash of all that decides them: parameters to the bit,
    networks, rule, sampler, grid, steps, clipping, seed and w. Another recipe is another folder.
    """

    sampled: generator.Generator
    w: float
    seed: int
    fingerprints: dict[str, str]  # of the parameters of the sampler's networks
    folder: epath.Path  # of the sweep

    @property
    def rule(self) -> str:
        return self.sampled.model.sample.guidance["name"]

    @property
    def title(self) -> str:
        return f"{self.rule} {sample.name_w(self.w)}"

    @property
    def passes(self) -> tuple[int, int]:
        """Network evaluations an image: of the model, and of a classifier with its gradient."""
        model = self.sampled.model
        rule = model.guidance()
        first, second = rule.passes(self.w)
        levels = len(model.sampler.levels(model.lams()))
        if rule.second == "classifier":
            return levels * first, levels * second
        return levels * (first + second), 0

    def images(self, count: int, progress: Callable[[int], Any]) -> np.ndarray:
        """Images 0 to count - 1, uint8 [N, H, W, C]: read where they are, made where they are not.

        `progress` is told how many more there are.
        """
        store = self._store()
        found = _read(store, count)
        # All processes go on from one place, whatever each of them could see of the folder.
        have = meshes.least(sum(map(len, found)))
        found = [np.concatenate(found)[:have]] if have else []
        if have:
            runlog.say(f"{self.title}: {have} of {count} images are there already")
        progress(have)
        labels = labels_of(count, self.sampled.model.dataset.num_classes)
        while have < count:
            index = np.arange(have, min(have + self.sampled.batch_size, count))
            made = self.sampled.batch(labels[index], index, self.w, self.seed)
            if jax.process_index() == 0:
                _write(store, have, made)
            found.append(made)
            have += len(made)
            progress(len(made))
        return np.concatenate(found)

    def _store(self) -> epath.Path:
        recipe = {
            "networks": [
                {key: network.config[key] for key in ("model", "schedule", "reading")}
                for network in (self.sampled.model, self.sampled.classifier)
                if network is not None
            ],
            "params": self.fingerprints,
            "sample": {**self.sampled.model.config["sample"], "batch_size": None},
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


def _read(store: epath.Path, count: int) -> list[np.ndarray]:
    """The consecutive files of images from the first one on, up to `count` images."""
    found, have = [], 0
    while have < count and (path := store / f"{have:08d}.npz").exists():
        try:
            with path.open("rb") as file:
                found.append(np.load(file)["images"][: count - have])
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            runlog.say(f"{path} cannot be read ({error}): its images are made again")
            break
        have += len(found[-1])
    return found


def _write(store: epath.Path, first: int, images: np.ndarray) -> None:
    path = store / f"{first:08d}.npz"
    beside = path.with_name(path.name + ".tmp")
    with beside.open("wb") as file:
        np.savez_compressed(file, images=images)
    beside.replace(path)
