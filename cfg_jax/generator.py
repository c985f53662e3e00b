"""A trained model on this machine's devices: the guided reverse chain as one compiled program.

Network, guidance, clipping and sampler meet here, in the four lines that the package is about; the
jobs and the Python API are doors to it.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from cfg_jax import experiment
from cfg_jax.data import images
from cfg_jax.diffusion import denoiser as denoisers
from cfg_jax.diffusion import guidance, losses, samplers
from cfg_jax.models import weights
from cfg_jax.runtime import checkpoint
from cfg_jax.runtime import mesh as meshes
from cfg_jax.types import Array, Params, UsageError

# fold_in(key, 0) and (key, 1) are what training makes of an equal seed: its parameters and its
# steps.
_STREAM = 2


def keys(seed: Array, index: Array) -> Array:
    """The keys of the trajectories, a function of (seed, index[i]) alone. seed []; index [B]."""
    key = jax.random.fold_in(jax.random.key(seed), _STREAM)
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(index)


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
    i's draws come from (seed, index[i]) alone.
    """

    def bind(label: Array):
        return denoisers.denoiser(
            model.network, params["model"], {"label": label}, reading=model.reading
        )

    rule = model.guidance(w)
    if rule.second == "classifier":
        second = losses.classifier_log_prob(classifier.network, params["classifier"], label)
    elif rule.second == "unconditional" and model.null_label is not None:
        second = bind(jnp.full_like(label, model.null_label))
    else:
        second = bind(label)  # not called, or w = 0 only: `check_guidance` has refused the rest
    guided = rule(bind(label), second)
    if model.sample.clip:
        guided = denoisers.clipped(guided)
    noise = samplers.seeded_noise(keys(seed, index), model.dataset.image_shape)
    if hasattr(rule, "draws"):
        noise = rule.draws(noise)
    return images.to_uint8(model.sampler(guided, noise, model.lams()).x)


def batch_size(model: experiment.Experiment, mesh: Mesh) -> int:
    """Images at a time: the config's, filled up to a multiple of the devices."""
    return -(-model.sample.batch_size // mesh.size) * mesh.size


def program(
    model: experiment.Experiment, mesh: Mesh, classifier: experiment.Experiment | None = None
):
    """`reverse_chain`, jitted for a mesh: (params, label, index, w, seed) -> uint8 [B, H, W, C].

    The parameters are made whole, in the precision that they are used in, before the chain: no step
    of it gathers or rounds them again. The mesh may be of devices that are not here.
    """
    networks = {"model": model} | ({"classifier": classifier} if classifier else {})
    whole = {name: meshes.whole(mesh, of.dtypes()) for name, of in networks.items()}

    def run(params: dict[str, Params], *request: Array) -> Array:
        params = {name: whole[name](tree) for name, tree in params.items()}
        return reverse_chain(params, *request, model=model, classifier=classifier)

    return jax.jit(
        run,
        out_shardings=meshes.batch_sharding(mesh),
        compiler_options=meshes.compiler_options(mesh),
    )


def check_guidance(
    model: experiment.Experiment, classifier: experiment.Experiment | None, w: Sequence[float]
) -> None:
    """Raises UsageError for strengths, or a classifier, that cannot guide the model."""
    rule, name = model.guidance(), model.sample.guidance["name"]
    for strength in w:
        rule.passes(guidance.check_w(float(strength)))
    if model.is_classifier:
        raise UsageError(
            "--workdir holds a classifier: it guides (--classifier), it does not sample."
        )
    if (rule.second == "classifier") != (classifier is not None):
        raise UsageError(
            f"sample.guidance.name={name!r}: classifier guidance needs --classifier=DIR and "
            "--config.sample.guidance.name=classifier, and no other rule takes a classifier."
        )
    if classifier is not None:
        if not classifier.is_classifier:
            raise UsageError(
                "--classifier holds no classifier: train one with loss.name=classification."
            )
        check_same_images("--classifier", classifier, model)
    elif rule.second == "unconditional" and model.null_label is None and any(w):
        raise UsageError(
            f"w={[float(s) for s in w if s]}: this model has no null label (p_uncond = "
            f"{model.config['loss']['p_uncond']:g}), so only w=0 can be sampled; train with "
            "loss.p_uncond between 0 and 1."
        )


def check_same_images(
    flag: str, classifier: experiment.Experiment, model: experiment.Experiment
) -> None:
    """Raises UsageError unless a classifier sees the images and classes that the model makes."""
    for field in ("image_shape", "num_classes"):
        ours, theirs = getattr(model.dataset, field), getattr(classifier.dataset, field)
        if ours != theirs:
            raise UsageError(f"{flag} has {field} {theirs}, the model {ours}.")


def check_request(
    model: experiment.Experiment,
    classifier: experiment.Experiment | None,
    labels: Sequence[int],
    w: float | Sequence[float],
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """labels and w as arrays. Raises UsageError for one, or a seed, out of range."""
    labels, w = np.asarray(labels), np.asarray(w, np.float32)
    classes = model.dataset.num_classes
    if labels.ndim != 1 or not len(labels) or labels.dtype.kind not in "iu":
        raise UsageError("labels must be a list of whole numbers, at least one.")
    if outside := sorted({int(c) for c in labels if not 0 <= c < classes}):
        raise UsageError(f"labels {outside} are outside the classes 0 to {classes - 1}.")
    if not 0 <= seed < 2**32:
        raise UsageError(f"seed={seed}: must lie in 0 to 2^32 - 1.")
    check_guidance(model, classifier, np.unique(w))
    return labels, w


class Generator:
    """A model on this machine's devices, its reverse chain compiled once for all w, seeds and
    labels.

    params {"model": ...} and, for classifier guidance, "classifier"; on `mesh`, all devices if none
    is given.
    """

    def __init__(
        self,
        model: experiment.Experiment,
        params: dict[str, Params],
        classifier: experiment.Experiment | None = None,
        *,
        mesh: Mesh | None = None,
    ):
        self.model, self.classifier = model, classifier
        self.mesh = mesh or meshes.make_mesh()
        self.params = params
        self.batch_size = batch_size(model, self.mesh)
        self._program = program(model, self.mesh, classifier)

    def batch(self, labels: np.ndarray, index: np.ndarray, w, seed: int) -> np.ndarray:
        """Images for up to batch_size labels, uint8 [N, H, W, C]; w a number or one a label [N].

        A smaller batch is filled up to a power of two, so that few sizes are compiled; the rows
        added repeat the last one and are dropped.
        """
        n = len(labels)
        each = -(-n // self.mesh.size)  # rows a device
        filled = min(self.batch_size, self.mesh.size << (each - 1).bit_length())
        pad = np.minimum(np.arange(filled), n - 1)
        w = np.asarray(w, np.float32)
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
        labels, w = check_request(self.model, self.classifier, labels, w, seed)
        index = np.arange(len(labels)) if index is None else np.asarray(index)
        if index.shape != labels.shape or (w.ndim and w.shape != labels.shape):
            raise UsageError(
                f"labels {labels.shape}, index {index.shape} and w {w.shape} must be of one "
                "length; w may be one number."
            )
        if index.dtype.kind not in "iu" or index.min() < 0 or index.max() >= 2**31:
            raise UsageError("index must hold whole numbers from 0 to 2^31 - 1.")
        out = []
        for at in range(0, len(labels), self.batch_size):
            part = slice(at, at + self.batch_size)
            out.append(self.batch(labels[part], index[part], w[part] if w.ndim else w, seed))
            progress(len(out[-1]))
        return np.concatenate(out)

    def compilations(self) -> int:
        """How many programs were compiled so far: one a batch size, for all w, seeds and labels."""
        return self._program._cache_size()


def is_export(path: str) -> bool:
    """Whether the path names a .safetensors file that `api.Model.save` wrote."""
    return str(path).endswith(".safetensors")


def saved_config(path: str, flag: str = "--workdir") -> dict[str, Any]:
    """The complete config of a run or an exported file. Raises UsageError if there is none.

    `flag` is what the user gave the path by.
    """
    if path and is_export(path):
        _, metadata = weights.load_safetensors(path)
        if "config" not in metadata:
            raise UsageError(f"{path} holds no config: it was not written by this package.")
        config = json.loads(metadata["config"])
    else:
        config = checkpoint.read_config(path) if path else None
    if config is None:
        raise UsageError(
            f"{flag}={path} holds no trained model: "
            "python -m cfg_jax.train --config=digits --workdir=DIR makes one."
        )
    return experiment.SCHEMA.complete(config)


def load_ema(path: str, model: experiment.Experiment, shardings: Any = None) -> tuple[int, Params]:
    """(step, EMA parameters) of a run's newest checkpoint or an exported file.

    They lie as `shardings` says, on every device whole by default. Raises UsageError where there
    are none, or where they are another network's.
    """
    shapes = jax.eval_shape(model.network.init, jax.random.key(0))
    if shardings is None:
        everywhere = meshes.replicated(meshes.make_mesh())
        shardings = jax.tree.map(lambda _: everywhere, shapes)
    if is_export(path):
        params, metadata = weights.load_safetensors(path)
        weights.check_shapes(path, params, shapes)
        return int(metadata["step"]), jax.device_put(params, shardings)
    checkpoints = checkpoint.Checkpoints(path, read_only=True)
    found = checkpoints.restore(ema=meshes.placed(shapes, shardings))
    checkpoints.close()
    if found is None:
        raise UsageError(f"{path} has no checkpoint yet: train there first.")
    step, items = found
    return step, items["ema"]


def load(
    path: str,
    model: experiment.Experiment,
    classifier_path: str | None = None,
    classifier: experiment.Experiment | None = None,
) -> tuple[Generator, int]:
    """A generator from the EMA of a run or an exported file, and the step it was saved at.

    The experiments are what `experiment.build` makes of the `saved_config`s. Raises UsageError
    where there is no model, or the two do not go together.
    """
    check_guidance(model, classifier, [])
    step, ema = load_ema(path, model)
    params = {"model": ema}
    if classifier is not None:
        params["classifier"] = load_ema(classifier_path, classifier)[1]
    return Generator(model, params, classifier), step
