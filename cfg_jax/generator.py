"""A trained model on this machine's devices: the guided reverse chain as one compiled program.

Network, guidance, clipping and sampler meet here, in the four lines that the package is about; the
jobs and the Python API are doors to it.
"""

import functools
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cfg_jax import experiment
from cfg_jax.data import images
from cfg_jax.diffusion import denoiser as denoisers
from cfg_jax.diffusion import guidance, losses, samplers
from cfg_jax.models import weights
from cfg_jax.runtime import checkpoint
from cfg_jax.runtime import mesh as meshes
from cfg_jax.types import Array, Params, UsageError


def reverse_chain(
    params: dict[str, Params],
    label: Array,
    index: Array,
    w: Array,
    seed: Array,
    *,
    model: experiment.Experiment,
    classifier: experiment.Experiment | None = None,
) -> Array:
    """The guided reverse chain from noise to bytes: uint8 [B, H, W, C].

    params {"model": ..., "classifier": ...}; label, index int32 [B]; w [] or [B]; seed []. Image
    i's draws come from fold_in(key(seed), index[i]) alone.
    """
    key = jax.random.key(seed)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(index)

    def bind(label: Array):
        return denoisers.denoiser(
            model.network, params["model"], {"label": label}, reading=model.reading
        )

    if classifier is not None:
        second = losses.classifier_log_prob(classifier.network, params["classifier"], label)
    elif model.null_label is not None:
        second = bind(jnp.full_like(label, model.null_label))
    else:
        second = bind(label)  # w = 0 only: `check_guidance` has refused the rest
    guided = model.guidance(w)(bind(label), second)
    if model.sample.clip:
        guided = denoisers.clipped(guided)
    noise = samplers.seeded_noise(keys, model.dataset.image_shape)
    return images.to_uint8(model.sampler(guided, noise, model.lams()).x)


def check_guidance(
    model: experiment.Experiment, classifier: experiment.Experiment | None, w: Sequence[float]
) -> None:
    """Raises UsageError for strengths, or a classifier, that cannot guide the model."""
    for strength in w:
        guidance.check_w(float(strength))
    rule = model.sample.guidance["name"]
    if model.is_classifier:
        raise UsageError(
            "--workdir holds a classifier: it guides (--classifier), it does not sample."
        )
    if (rule == "classifier") != (classifier is not None):
        raise UsageError(
            f"sample.guidance.name={rule!r}: classifier guidance needs --classifier=DIR and "
            "--config.sample.guidance.name=classifier, and no other rule takes a classifier."
        )
    if classifier is not None:
        if not classifier.is_classifier:
            raise UsageError(
                "--classifier holds no classifier: train one with loss.name=classification."
            )
        for field in ("image_shape", "num_classes"):
            ours, theirs = getattr(model.dataset, field), getattr(classifier.dataset, field)
            if ours != theirs:
                raise UsageError(f"--classifier has {field} {theirs}, the model {ours}.")
    elif model.null_label is None and any(w):
        raise UsageError(
            f"w={[float(s) for s in w if s]}: this model has no null label (p_uncond = 0), so only "
            "w=0 can be sampled; train with loss.p_uncond above 0."
        )


class Generator:
    """A model on this machine's devices, its reverse chain compiled once for all w, seeds and
    labels.

    params {"model": ...} and, for classifier guidance, "classifier".
    """

    def __init__(
        self,
        model: experiment.Experiment,
        params: dict[str, Params],
        classifier: experiment.Experiment | None = None,
    ):
        self.model, self.classifier = model, classifier
        self.mesh = meshes.make_mesh()
        self.params = params
        self.batch_size = -(-model.sample.batch_size // self.mesh.size) * self.mesh.size
        rows = meshes.batch_sharding(self.mesh)
        self._program = jax.jit(
            functools.partial(reverse_chain, model=model, classifier=classifier),
            out_shardings=rows,
        )

    def batch(self, labels: np.ndarray, index: np.ndarray, w, seed: int) -> np.ndarray:
        """Images for up to batch_size labels, uint8 [N, H, W, C]; w a number or one a label [N].

        A smaller batch is filled up to a power of two, so that few sizes are compiled; the rows
        added repeat the last one and are dropped.
        """
        n = len(labels)
        filled = min(
            self.batch_size, self.mesh.size * 2 ** math.ceil(math.log2(n / self.mesh.size))
        )
        w = np.asarray(w, np.float32)
        pad = np.minimum(np.arange(max(filled, self.mesh.size)), n - 1)
        rows = {
            "label": np.asarray(labels, np.int32)[pad],
            "index": np.asarray(index, np.int32)[pad],
        }
        if w.ndim:
            rows["w"] = w[pad]
        rows = meshes.shard(self.mesh, rows)
        strength = rows.pop("w", w)
        out = self._program(self.params, rows["label"], rows["index"], strength, np.uint32(seed))
        return meshes.gather(out)[:n]

    def __call__(
        self,
        labels: Sequence[int],
        w: float | Sequence[float] = 0.0,
        *,
        seed: int = 0,
        index: Sequence[int] | None = None,
        progress: Callable[[int], Any] = lambda n: None,
    ) -> np.ndarray:
        """Images for any number of labels, uint8 [N, H, W, C].

        Image i has draws of its own, made from (seed, index[i]), index 0, 1, ... by default: the
        same image alone, in any batch and on any devices. w is one number, or one a label.
        `progress` is told how many images are done. Raises UsageError for a label outside the
        classes or a bad w.
        """
        labels, w = self.check(labels, w, seed)
        index = np.arange(len(labels)) if index is None else np.asarray(index)
        if index.shape != labels.shape or (w.ndim and w.shape != labels.shape):
            raise UsageError(
                f"labels {labels.shape}, index {index.shape} and w {w.shape} must be of one "
                "length; w may be one number."
            )
        out = []
        for at in range(0, len(labels), self.batch_size):
            part = slice(at, at + self.batch_size)
            out.append(self.batch(labels[part], index[part], w[part] if w.ndim else w, seed))
            progress(len(out[-1]))
        return np.concatenate(out)

    def check(
        self, labels: Sequence[int], w: float | Sequence[float], seed: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """labels and w as arrays. Raises UsageError for one, or a seed, out of range."""
        labels, w = np.asarray(labels), np.asarray(w, np.float32)
        classes = self.model.dataset.num_classes
        if labels.ndim != 1 or not len(labels) or labels.dtype.kind not in "iu":
            raise UsageError("labels must be a list of whole numbers, at least one.")
        if outside := sorted({int(c) for c in labels if not 0 <= c < classes}):
            raise UsageError(f"labels {outside} are outside the classes 0 to {classes - 1}.")
        if not 0 <= seed < 2**32:
            raise UsageError(f"seed={seed}: must lie in 0 to 2^32 - 1.")
        check_guidance(self.model, self.classifier, np.unique(w))
        return labels, w

    def compilations(self) -> int:
        """How many programs were compiled so far: one a batch size, for all w, seeds and labels."""
        return self._program._cache_size()


def load_ema(path: str, model: experiment.Experiment) -> tuple[int, Params]:
    """(step, EMA parameters) of a run's newest checkpoint or an exported file, on every device.

    Raises UsageError where there are none, or where they are another network's.
    """
    everywhere = meshes.replicated(meshes.make_mesh())
    wanted = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere),
        jax.eval_shape(model.network.init, jax.random.key(0)),
    )
    if is_export(path):
        params, metadata = weights.load_safetensors(path)
        weights.check_shapes(path, params, wanted)
        return int(metadata["step"]), jax.device_put(params, everywhere)
    checkpoints = checkpoint.Checkpoints(path, read_only=True)
    found = checkpoints.restore(ema=wanted)
    checkpoints.close()
    if found is None:
        raise UsageError(f"{path} has no checkpoint yet: train there first.")
    step, items = found
    return step, items["ema"]


def is_export(path: str) -> bool:
    """Whether the path names a .safetensors file that `api.Model.save` wrote."""
    return str(path).endswith(".safetensors")


def saved_config(path: str) -> dict[str, Any]:
    """The complete config of a run or an exported file. Raises UsageError if there is none."""
    if path and is_export(path):
        _, metadata = weights.load_safetensors(path)
        if "config" not in metadata:
            raise UsageError(f"{path} holds no config: it was not written by this package.")
        config = json.loads(metadata["config"])
    else:
        config = checkpoint.read_config(path) if path else None
    if config is None:
        raise UsageError(
            f"--workdir={path} holds no trained model: "
            "python -m cfg_jax.train --config=digits --workdir=DIR makes one."
        )
    return experiment.SCHEMA.complete(config)


def load(
    path: str, config: dict[str, Any] | None = None, classifier: str | None = None
) -> tuple[Generator, int]:
    """A generator from the EMA of a run or an exported file, and the step it was saved at."""
    model = experiment.build(config or saved_config(path))
    guide = experiment.build(saved_config(classifier)) if classifier else None
    check_guidance(model, guide, [])
    step, ema = load_ema(path, model)
    params = {"model": ema}
    if guide is not None:
        params["classifier"] = load_ema(classifier, guide)[1]
    return Generator(model, params, guide), step
