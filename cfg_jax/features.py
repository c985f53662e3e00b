"""Extractors: a network that looks at images, for the metrics to compare what it sees.

FEATURES is at the foot. `FEATURES[name](mesh)` reads the network onto these devices, that of the
judge from a folder; a new extractor is a new row.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from cfg_jax import experiment, stored
from cfg_jax.data import images
from cfg_jax.models import efficientnet_lite0, inception, published
from cfg_jax.runtime import mesh as meshes
from cfg_jax.types import Array, Params, UsageError

VERSION = b""  # of what is done with parameters: another one when features change without them
# What an extractor says of B images: "features" [B, D] and "logits" [B, K], and "spatial" [B, S]
# where it has features of places as well; float32.
Seen = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Extractor:
    """uint8 images -> features and logits, in batches over all devices.

    `look` is (params, uint8 [B, H, W, C]) -> Seen. `names` are what the Frechet distances and the
    inception score of these features are called: FID, sFID and IS are names of those of one network
    only.
    """

    name: str
    names: Mapping[str, str]  # of "fd", "is" and "sfd"
    look: Callable[[Params, Array], dict[str, Array]]
    params: Params
    mesh: Mesh
    recipe: Mapping[str, Any]  # what to write beside its numbers
    judge: experiment.Experiment | None = None  # whose logits are of the data set's own classes
    batch_size: int = 128

    @property
    def fingerprint(self) -> str:
        """The same for the same features: of the parameters, to the bit."""
        return self.recipe["parameters"]

    def called(self, score: str) -> str:
        """What a score is called when these features were used."""
        return self.names.get(score, score)

    @functools.cached_property
    def _program(self):
        return jax.jit(
            self.in_parts,
            out_shardings=meshes.batch_sharding(self.mesh),
            compiler_options=meshes.compiler_options(self.mesh),
        )

    def in_parts(self, params: Params, batch: Array) -> dict[str, Array]:
        """`look`, at no more than `batch_size` images at a time, in turn.

        Part k of n has rows k, k + n, ...: an equal share of what each device has.
        """
        rows = len(batch) // self.mesh.size
        most = max(self.batch_size // self.mesh.size, 1)
        count = next(n for n in range(-(-rows // most), rows + 1) if rows % n == 0)
        if count == 1:
            return self.look(params, batch)
        parts = batch.reshape(-1, count, *batch.shape[1:]).swapaxes(0, 1)
        seen = jax.lax.map(lambda part: self.look(params, part), parts)
        return jax.tree.map(lambda a: a.swapaxes(0, 1).reshape(len(batch), *a.shape[2:]), seen)

    def batch(self, batch: Array) -> dict[str, np.ndarray]:
        """What it sees in uint8 [B, H, W, C] that lie over the mesh, B a multiple of its size."""
        seen = meshes.gather(self._program(self.params, batch))
        return {name: np.asarray(rows, np.float32) for name, rows in seen.items()}

    def __call__(
        self, images: np.ndarray, progress: Callable[[int], Any] = lambda n: None
    ) -> dict[str, np.ndarray]:
        """What it sees in uint8 images [N, H, W, C] of any number."""
        size = -(-self.batch_size // self.mesh.size) * self.mesh.size
        parts = []
        for at in range(0, len(images), size):
            rows = images[at : at + size]
            padded = np.pad(rows, ((0, size - len(rows)), (0, 0), (0, 0), (0, 0)))
            seen = self.batch(meshes.shard(self.mesh, padded))
            parts.append({name: a[: len(rows)] for name, a in seen.items()})
            progress(len(rows))
        return joined(parts)


def joined(parts: Sequence[Seen]) -> dict[str, np.ndarray]:
    """What was seen in consecutive sets of images, as what was seen in all."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def fingerprint(params: Params) -> str:
    """Sixteen hex digits that are the same for the same parameters, to the bit."""
    digest = hashlib.sha256(VERSION)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()[:16]


def judge(mesh: Mesh, path: str | None, *, flag: str = "--judge") -> Extractor:
    """The judge of a data set: a classifier of clean images, trained with loss.noisy=False.

    Its features are what its logits are an affine map of. Raises UsageError for a path without one,
    and for a classifier that was made to guide.
    """
    if path is None:
        raise UsageError(
            f"the judge needs {flag}=DIR, a classifier of clean images that never guides: "
            "python -m cfg_jax.train --config=digits_judge --workdir=DIR makes one of digits."
        )
    config = stored.saved_config(path, flag)
    classifier = experiment.build(config)
    if not classifier.is_classifier or config["loss"]["noisy"]:
        raise UsageError(
            f"{flag}={path} is no classifier of clean images: what guides must not judge; train "
            "one with loss.name=classification and loss.noisy=False."
        )
    shapes = jax.eval_shape(classifier.network.init, jax.random.key(0))
    everywhere = jax.tree.map(lambda _: meshes.replicated(mesh), shapes)
    step, params = stored.load_ema(path, classifier, everywhere)

    def look(params: Params, batch: Array) -> dict[str, Array]:
        z = images.to_float(batch)
        lam = classifier.schedule(np.zeros(len(batch), np.float32))  # as `Classification` has it
        networks = {"features": classifier.features, "logits": classifier.network}
        return {name: network.apply(params, z, lam, {}) for name, network in networks.items()}

    return Extractor(
        name="judge",
        names={"fd": "fd_judge", "is": "is_judge"},
        look=look,
        params=params,
        mesh=mesh,
        recipe={
            "name": "judge",
            "parameters": fingerprint(params),
            "workdir": path,
            "step": step,
            "config": config,
        },
        judge=classifier,
    )


def _published(
    mesh: Mesh, *, name: str, file: published.File, convert: Callable, look: Callable, names: dict
) -> Extractor:
    """A published network, whose arrays `convert` renames to ours."""
    params = jax.device_put(convert(file.read()), meshes.replicated(mesh))
    recipe = {"name": name, "parameters": fingerprint(params), "weights": file.name}
    return Extractor(name=name, names=names, look=look, params=params, mesh=mesh, recipe=recipe)


def _inception(params: Params, batch: Array) -> dict[str, Array]:
    seen = inception.apply(params, batch)
    spatial = seen.spatial.reshape(len(batch), -1)
    return {"features": seen.pool3, "logits": seen.logits, "spatial": spatial}


def _efficientnet_lite0(params: Params, batch: Array) -> dict[str, Array]:
    features, logits = efficientnet_lite0.apply(params, batch)
    return {"features": features, "logits": logits}


FEATURES = {
    "judge": judge,
    # The network of FID, sFID and IS, as the published evaluators have it.
    "inception": functools.partial(
        _published,
        name="inception",
        file=published.INCEPTION,
        convert=inception.from_published,
        look=_inception,
        names={"fd": "fid", "sfd": "sfid", "is": "is"},
    ),
    # One that can be had from a package index: its distances are no FIDs.
    "efficientnet_lite0": functools.partial(
        _published,
        name="efficientnet_lite0",
        file=published.EFFICIENTNET_LITE0,
        convert=efficientnet_lite0.from_published,
        look=_efficientnet_lite0,
        names={"fd": "fd_efficientnet_lite0", "is": "is_efficientnet_lite0"},
    ),
}
