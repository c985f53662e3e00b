"""Extractors: a network that looks at images, for the metrics to compare what it sees.

FEATURES is at the foot. `FEATURES[name](...)` reads the network onto these devices; a new extractor
is a new row.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from cfg_jax import experiment, generator, request
from cfg_jax.data import images
from cfg_jax.runtime import mesh as meshes
from cfg_jax.types import Array, Params, UsageError


@dataclasses.dataclass(frozen=True)
class Extractor:
    """uint8 images -> features and logits, in batches over all devices.

    `look` is (params, uint8 [B, H, W, C]) -> (features [B, D], logits [B, K]). `fd` and `score` are
    what the Frechet distance and the inception score of these features are called: FID and IS are
    names of those of one network only.
    """

    name: str
    fd: str
    score: str
    look: Callable[[Params, Array], tuple[Array, Array]]
    params: Params
    mesh: Mesh
    knows_labels: bool  # whether the logits are those of the data set's own classes
    recipe: Mapping[str, Any]  # what to write beside its numbers
    batch_size: int = 256

    def __call__(
        self, images: np.ndarray, progress: Callable[[int], Any] = lambda n: None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Features [N, D] and logits [N, K], float32, of uint8 images [N, H, W, C]."""
        look = jax.jit(self.look, out_shardings=meshes.batch_sharding(self.mesh))
        size = -(-self.batch_size // self.mesh.size) * self.mesh.size
        parts = []
        for at in range(0, len(images), size):
            rows = images[at : at + size]
            padded = np.pad(rows, ((0, size - len(rows)), (0, 0), (0, 0), (0, 0)))
            seen = meshes.gather(look(self.params, meshes.shard(self.mesh, padded)))
            parts.append([np.asarray(a[: len(rows)], np.float32) for a in seen])
            progress(len(rows))
        features, logits = zip(*parts, strict=True)
        return np.concatenate(features), np.concatenate(logits)


def fingerprint(params: Params) -> str:
    """Sixteen hex digits that are the same for the same parameters, to the bit."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()[:16]


def judge(model: experiment.Experiment, mesh: Mesh, path: str | None) -> Extractor:
    """The judge of a data set: a classifier of clean images, trained with loss.noisy=False.

    Its features are what its logits are an affine map of. Raises UsageError for a path without one,
    and for a classifier that was made to guide.
    """
    if path is None:
        raise UsageError(
            "--features=judge needs --judge=DIR, a classifier of clean images that never guides: "
            "python -m cfg_jax.train --config=digits_judge --workdir=DIR makes one of digits."
        )
    config = generator.saved_config(path, "--judge")
    classifier = experiment.build(config)
    if not classifier.is_classifier or config["loss"]["noisy"]:
        raise UsageError(
            f"--judge={path} is no classifier of clean images: what guides must not judge; train "
            "one with loss.name=classification and loss.noisy=False."
        )
    request.check_same_images("--judge", classifier, model)
    step, params = generator.load_ema(path, classifier)

    def look(params: Params, batch: Array) -> tuple[Array, Array]:
        z = images.to_float(batch)
        lam = classifier.schedule(np.zeros(len(batch), np.float32))  # as `Classification` has it
        features, logits = (
            network.apply(params, z, lam, {})
            for network in (classifier.features, classifier.network)
        )
        return features, logits

    recipe = {"name": "judge", "workdir": path, "step": step, "config": config}
    return Extractor(
        name="judge",
        fd="fd_judge",
        score="is_judge",
        look=look,
        params=params,
        mesh=mesh,
        knows_labels=True,
        recipe=recipe,
    )


FEATURES = {"judge": judge}
