"""The start of a run: whose run a folder is, what a new one starts from and learns from, and
whether it begins well.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from cfg_jax import experiment, probes, request, stored
from cfg_jax.models import weights
from cfg_jax.runtime import checkpoint
from cfg_jax.runtime import logging as runlog
from cfg_jax.runtime import mesh as meshes
from cfg_jax.types import Params, UsageError

# A run may go on with other values of these; everything else is what the run is.
MAY_CHANGE = (
    "dataset.data_dir",
    "evaluate.",
    "ema.snapshot_every",
    "sample.",
    "train.steps",
    "train.fsdp",
    "model.remat",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep",
    "train.sample_",
    "train.read_",
    "train.wandb",
)

# A teacher may have others of these than its student, which has its own.
MAY_DIFFER = ("dropout", "dtype", "remat")


def check_same_run(workdir: str, config: Mapping[str, Any]) -> None:
    """Raises UsageError where the workdir has checkpoints of another config, naming the fields."""
    if epath.Path(workdir).exists() and not epath.Path(workdir).is_dir():
        raise UsageError(f"--workdir={workdir} is a file: name a folder, new or of this run.")
    if not checkpoint.has_checkpoint(workdir):
        return  # whatever was tried there has left nothing to protect
    there = experiment.SCHEMA.complete(checkpoint.read_config(workdir) or {})
    if other := _differing(there, config, lambda path: path.startswith(MAY_CHANGE)):
        raise UsageError(
            f"--workdir={workdir} holds a run of another config: {other}. Take another "
            "--workdir, or the same config to go on."
        )


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out = {}
    for key, value in config.items():
        path = f"{prefix}{key}"
        out |= _flat(value, f"{path}.") if isinstance(value, Mapping) else {path: value}
    return out


def _differing(
    there: Mapping[str, Any], here: Mapping[str, Any], may: Callable[[str], bool]
) -> str:
    """The fields in which two configs differ, but for those that may; "" where there are none."""
    there, here = _flat(there), _flat(here)
    return ", ".join(
        f"{path}={here.get(path)!r} (there {there.get(path)!r})"
        for path in sorted(there.keys() | here.keys())
        if there.get(path) != here.get(path) and not may(path)
    )


def load_start(init_from: str, model: experiment.Experiment, shardings: Any) -> Params:
    """Another run's EMA to start from. Raises UsageError unless it is of the same network."""
    other = experiment.build(stored.saved_config(init_from, "--init_from"))
    ours, theirs = (jax.eval_shape(m.network.init, jax.random.key(0)) for m in (model, other))
    weights.check_shapes(f"--init_from={init_from}", theirs, ours)
    step, ema = stored.load_ema(init_from, model, shardings)
    runlog.say(f"starting from the EMA of {init_from} at step {step}")
    return ema


def load_teacher(
    workdir: str, given: str | None, model: experiment.Experiment, wanted: Params
) -> Params:
    """The EMA that a student learns from, with the shardings of `wanted`; {} for other models.

    A new run takes it from the folder or file `given`, and keeps it: teacher.safetensors in the
    workdir is what a run goes on with, whatever became of the teacher. Raises UsageError where
    there is no teacher, or one of another network, reading or data; nothing was written then.
    """
    if model.teacher is None:
        if given is not None:
            raise UsageError(
                f"--teacher={given}: loss.name={model.config['loss']['name']!r} learns from images "
                "alone; --config=digits_distilled is a student."
            )
        return {}
    shardings = jax.tree.map(lambda leaf: leaf.sharding, wanted)
    kept = epath.Path(workdir) / "teacher.safetensors"
    if checkpoint.has_checkpoint(workdir) and kept.exists():
        _, ema = stored.load_ema(str(kept), model.teacher, shardings)
        runlog.say(f"learning from {kept}, kept since this run began")
        return ema
    if given is None:
        raise UsageError(
            "loss.name='distillation' learns from a trained model: --teacher=DIR names its folder "
            "or exported file. Once the run has begun it is not asked for again."
        )
    theirs = experiment.build(stored.saved_config(given, "--teacher"))
    _check_teacher(given, theirs, model.teacher)
    step, ema = stored.load_ema(given, model.teacher, shardings)
    runlog.say(f"learning from the EMA of {given} at step {step}")
    whole = meshes.gather(ema)
    if jax.process_index() == 0:
        kept.parent.mkdir(parents=True, exist_ok=True)
        stored.export(str(kept), whole, theirs.config, step)
    meshes.barrier("teacher")
    return ema


def _check_teacher(
    given: str, theirs: experiment.Experiment, wanted: experiment.Experiment
) -> None:
    if theirs.null_label is None:
        raise UsageError(
            f"--teacher={given} cannot be guided: it has no null label that was trained."
        )
    request.check_same_images(f"--teacher={given}", theirs, wanted)
    there, here = ({k: m.config[k] for k in ("model", "reading")} for m in (theirs, wanted))
    if other := _differing(there, here, lambda path: path.split(".")[-1] in MAY_DIFFER):
        raise UsageError(f"--teacher={given} is another network than this student's: {other}.")


class StartProbes:
    """The start-up probes of a run that is told labels, or w: each once, as soon as it can tell."""

    STEPS = 10  # a network that starts at zero says nothing of its label in the first few

    def __init__(self, model: experiment.Experiment):
        self._p_uncond = model.config["loss"].get("p_uncond", 0.0)
        last = model.dataset.num_classes - 1
        if model.null_label is not None:
            self._differ = probes.labels_differ
            cond = {"label": [0, last, model.null_label]}
        else:
            self._differ = probes.student_listens
            low, high = model.w_range
            cond = {"label": [0, last, 0], "w": [high, high, low]}
        self._outputs = probes.outputs(
            model.network, model.dataset.image_shape, {k: jnp.array(v) for k, v in cond.items()}
        )
        self._rate_told = self._label_told = False

    def at_start(self, params: Params) -> None:
        """Are label and w wired to the output? Raises ProbeError."""
        self._differ(meshes.gather(self._outputs(params, 0.1)))

    def after(self, step: int, params: Params, means: Mapping[str, float], count: int) -> None:
        """Do they move what was learned, and were as many labels dropped as asked?

        means are over `count` images. Raises ProbeError.
        """
        if not self._label_told and step >= self.STEPS:
            self._label_told = True
            self._differ(meshes.gather(self._outputs(params, 0.0)))
        if not self._rate_told and count * min(self._p_uncond, 1 - self._p_uncond) >= 10:
            self._rate_told = True
            probes.drop_rate_holds(means["p_uncond"], count, self._p_uncond)
