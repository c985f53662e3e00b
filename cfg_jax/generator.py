"""A trained model on this machine's devices: the guided reverse chain as one compiled program.

Network, guidance, clipping and sampler meet here, in the four lines that the package is about; the
jobs and the Python API are doors to it.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from cfg_jax import experiment, request, stored
from cfg_jax.data import images
from cfg_jax.diffusion import denoiser as denoisers
from cfg_jax.diffusion import losses, samplers
from cfg_jax.runtime import mesh as meshes
from cfg_jax.types import Array, Guidance, Params, UsageError

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
    reference: Array,
    index: Array,
    rule: Guidance,
    seed: Array,
    *,
    model: experiment.Experiment,
    guide: experiment.Experiment | None = None,
    along: bool = False,
) -> Array:
    """The guided reverse chain from noise to bytes: uint8 [B, H, W, C].

    params {"model": ..., and "classifier" or "weak": ...}; label, reference int32 [B], or [B, K]
    where K labels are mixed; index int32 [B]; rule with its w [] or [B]; seed []. The reference is
    the denoiser of its labels, of the weak model where there is one. Image i's draws come from
    (seed, index[i]) alone. With `along`, all clean estimates along the chain, [B, T, H, W, C], the
    image last.
    """

    def bind(labels: Array, of: experiment.Experiment = model, name: str = "model"):
        def one(label: Array):
            cond = {"label": label}
            if of.w_range is not None:  # a student, told of w with its label
                cond["w"] = jnp.broadcast_to(rule.w, label.shape)
            return denoisers.denoiser(of.network, params[name], cond, reading=of.reading)

        if labels.ndim == 1:
            return one(labels)
        return denoisers.mixed([one(labels[:, k]) for k in range(labels.shape[1])])

    if rule.second == "classifier":
        second = losses.classifier_log_prob(guide.network, params["classifier"], label)
    elif guide is not None:
        second = bind(reference, guide, "weak")
    else:
        second = bind(reference)
    guided = rule(bind(label), second)
    if model.sample.clip:
        guided = denoisers.clipped(guided, keeps_pair=rule.keeps_pair)
    noise = samplers.seeded_noise(keys(seed, index), model.dataset.image_shape)
    if hasattr(rule, "draws"):
        noise = rule.draws(noise)
    path = model.sampler(guided, noise, request.levels(model))
    return images.to_uint8(jnp.moveaxis(path.xs, 0, 1) if along else path.x)


def batch_size(model: experiment.Experiment, mesh: Mesh) -> int:
    """Images at a time: the config's, filled up to a multiple of the devices."""
    return -(-model.sample.batch_size // mesh.size) * mesh.size


def program(
    model: experiment.Experiment,
    mesh: Mesh,
    guide: experiment.Experiment | None = None,
    *,
    along: bool = False,
):
    """`reverse_chain`, jitted for a mesh: (params, label, reference, index, rule, seed) -> uint8
    [B, H, W, C].

    The parameters are made whole, in the precision that they are used in, before the chain: no step
    of it gathers or rounds them again. The mesh may be of devices that are not here.
    """
    networks = {"model": model} | ({request.role(guide): guide} if guide else {})
    whole = {name: meshes.whole(mesh, of.dtypes()) for name, of in networks.items()}

    def run(params: dict[str, Params], *asked: Any) -> Array:
        params = {name: whole[name](tree) for name, tree in params.items()}
        return reverse_chain(params, *asked, model=model, guide=guide, along=along)

    return jax.jit(
        run,
        out_shardings=meshes.batch_sharding(mesh),
        compiler_options=meshes.compiler_options(mesh),
    )


class Generator:
    """A model on this machine's devices, its reverse chain compiled once for all w, seeds, labels
    and numbers of its guidance rule.

    params {"model": ...} and, where a second network guides, "classifier" or "weak"; on `mesh`, all
    devices if none is given. With `along`, all that it makes has the chain's levels as an axis
    more: uint8 [N, T, H, W, C], the clean estimates, of which the last is the image.
    """

    def __init__(
        self,
        model: experiment.Experiment,
        params: dict[str, Params],
        guide: experiment.Experiment | None = None,
        *,
        mesh: Mesh | None = None,
        along: bool = False,
    ):
        self.model, self.guide = model, guide
        self.mesh = mesh or meshes.make_mesh()
        self.params = params
        self.batch_size = batch_size(model, self.mesh)
        self._program = functools.partial(program, model, self.mesh, guide, along=along)
        self._programs = {}  # by kind of rule; shared by the copies of `guided`

    def filled(self, count: int) -> int:
        """How many rows a batch of `count` has on the devices: a power of two on each, so that few
        sizes are compiled, and batch_size at most.
        """
        each = -(-count // self.mesh.size)
        return min(self.batch_size, self.mesh.size << (each - 1).bit_length())

    def on_device(self, labels: np.ndarray, index: np.ndarray, w, seed: int) -> Array:
        """Images for up to batch_size labels, uint8 [filled(N), H, W, C] over the mesh; w a number
        or one a label [N].

        The rows beyond N repeat the last one.
        """
        pad = np.minimum(np.arange(self.filled(len(labels))), len(labels) - 1)
        w = np.asarray(w, np.float32)
        rows = {
            "label": np.asarray(labels, np.int32)[pad],
            "reference": request.reference(self.model, self.guide, labels)[pad],
            "index": np.asarray(index, np.int32)[pad],
        }
        if w.ndim:
            rows["w"] = w[pad]
        rows = meshes.shard(self.mesh, rows)
        rule = self.model.guidance(rows.pop("w", w))
        # Of one type each, so that another value is no other program.
        rule = jax.tree.map(lambda a: a if isinstance(a, jax.Array) else np.float32(a), rule)
        conditions = rows["label"], rows["reference"], rows["index"]
        # One jitted function must not see two kinds: jax 0.10.2 holds the structures of different
        # dataclasses with as many leaves to be equal, and may run the program of the other.
        kind = str(jax.tree.structure(rule))
        if kind not in self._programs:
            self._programs[kind] = self._program()
        return self._programs[kind](self.params, *conditions, rule, np.uint32(seed))

    def batch(self, labels: np.ndarray, index: np.ndarray, w, seed: int) -> np.ndarray:
        """`on_device`, as uint8 [N, H, W, C] on the host."""
        return meshes.gather(self.on_device(labels, index, w, seed))[: len(labels)]

    def __call__(
        self,
        labels: Sequence[int] | Sequence[Sequence[int]],
        w: float | Sequence[float] = 0.0,
        *,
        seed: int = 0,
        index: Sequence[int] | None = None,
        progress: Callable[[int], Any] = lambda n: None,
    ) -> np.ndarray:
        """Images for any number of labels [N], or mixtures of labels [N, K], uint8 [N, H, W, C].

        Image i has draws of its own, made from (seed, index[i]), index 0, 1, ... by default: the
        same image alone, in any batch and on any devices. w is one number, or one a label.
        `progress` is told how many images are done. Raises UsageError for a label outside the
        classes or a bad w.
        """
        labels, w = request.check(self.model, self.guide, labels, w, seed)
        index = np.arange(len(labels)) if index is None else np.asarray(index)
        if index.shape != labels.shape[:1] or (w.ndim and w.shape != labels.shape[:1]):
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

    def guided(
        self, guidance: Callable[[Any], Guidance] | None = None, negative: Sequence[int] = ()
    ) -> "Generator":
        """The same program with another rule, w -> rule, or other labels to move away from, where
        they are given. It is compiled anew for a rule of another kind, not for other numbers.
        """
        model = self.model
        sample = dataclasses.replace(
            model.sample, negative=tuple(negative) or model.sample.negative
        )
        other = copy.copy(self)
        other.model = dataclasses.replace(model, sample=sample, guidance=guidance or model.guidance)
        return other

    def compilations(self) -> int:
        """How many programs were compiled so far: one a batch size and kind of rule, for all w,
        seeds, labels and numbers of the rule.
        """
        return sum(run._cache_size() for run in self._programs.values())


def load(
    path: str,
    model: experiment.Experiment,
    guide_path: str | None = None,
    guide: experiment.Experiment | None = None,
) -> tuple[Generator, int]:
    """A generator from the EMA of a run or an exported file, and the step it was saved at.

    The experiments are what `experiment.build` makes of their saved configs; the guide is a
    classifier or a weaker model, with its own EMA. Raises UsageError where there is no model, or
    the two do not go together.
    """
    request.check_guidance(model, guide, [])
    step, ema = stored.load_ema(path, model)
    params = {"model": ema}
    if guide is not None:
        params[request.role(guide)] = stored.load_ema(guide_path, guide)[1]
    return Generator(model, params, guide), step
