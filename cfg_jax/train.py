"""The training job: one jitted, donated, sharded step, and the loop around it.

    python -m cfg_jax.train --config=digits --workdir=DIR [--config.FIELD=VALUE ...]
        [--init_from=DIR] [--profile=FIRST:LAST] [--distributed] [--unfinished_status=75]

Writes config.json, checkpoints/, metrics.jsonl, TensorBoard events, sample grids and what the
compiler made (compiled/, for the next start) to the workdir.
Run again with the same workdir it goes on where it stopped, to the bit.
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from etils import epath
from jax.sharding import Mesh

from cfg_jax import command, experiment, generator, probes, sample, train_step
from cfg_jax.data import batches as batching
from cfg_jax.data import images
from cfg_jax.models import weights
from cfg_jax.runtime import checkpoint, wandb_run
from cfg_jax.runtime import logging as runlog
from cfg_jax.runtime import mesh as meshes
from cfg_jax.runtime import profile as profiles
from cfg_jax.runtime import stop as stops
from cfg_jax.runtime import window as windows
from cfg_jax.types import Params, UsageError

# A run may go on with other values of these; everything else is what the run is.
MAY_CHANGE = (
    "dataset.data_dir",
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


def check_same_run(workdir: str, config: Mapping[str, Any]) -> None:
    """Raises UsageError where the workdir has checkpoints of another config, naming the fields."""
    if epath.Path(workdir).exists() and not epath.Path(workdir).is_dir():
        raise UsageError(f"--workdir={workdir} is a file: name a folder, new or of this run.")
    if not checkpoint.has_checkpoint(workdir):
        return  # whatever was tried there has left nothing to protect
    there = _flat(experiment.SCHEMA.complete(checkpoint.read_config(workdir) or {}))
    here = _flat(config)
    other = [
        f"{path}={here.get(path)!r} (there {there.get(path)!r})"
        for path in sorted(there.keys() | here.keys())
        if there.get(path) != here.get(path) and not path.startswith(MAY_CHANGE)
    ]
    if other:
        raise UsageError(
            f"--workdir={workdir} holds a run of another config: {', '.join(other)}. Take another "
            "--workdir, or the same config to go on."
        )


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out = {}
    for key, value in config.items():
        path = f"{prefix}{key}"
        out |= _flat(value, f"{path}.") if isinstance(value, Mapping) else {path: value}
    return out


def items(state: train_step.TrainState) -> dict[str, Any]:
    """The state as the two items of a checkpoint."""
    return {
        "state": {"step": state.step, "params": state.params, "opt_state": state.opt_state},
        "ema": state.ema,
    }


def load_start(init_from: str, model: experiment.Experiment, shardings: Any) -> Any:
    """Another run's EMA to start from. Raises UsageError unless it is of the same network."""
    other = experiment.build(generator.saved_config(init_from, "--init_from"))
    ours, theirs = (jax.eval_shape(m.network.init, jax.random.key(0)) for m in (model, other))
    weights.check_shapes(f"--init_from={init_from}", theirs, ours)
    step, ema = generator.load_ema(init_from, model, shardings)
    runlog.say(f"starting from the EMA of {init_from} at step {step}")
    return ema


class Step(NamedTuple):
    """The training step of an experiment on a mesh, and the shapes that it is compiled for."""

    run: Any  # (state, frozen, batch, key) -> (state, metrics), jitted; the state is donated
    init: Callable  # key -> state
    shapes: train_step.TrainState
    shardings: train_step.TrainState
    rows: dict[str, jax.ShapeDtypeStruct]  # a global batch


def make_step(model: experiment.Experiment, mesh: Mesh) -> Step:
    """Shapes, then shardings, and no arrays: the mesh may be of devices that are not here."""
    plan = model.train
    init = functools.partial(
        train_step.init_state, network=model.network, optimizer=model.optimizer
    )
    shapes = jax.eval_shape(init, jax.random.key(0))
    shardings = meshes.state_shardings(mesh, shapes)
    run = jax.jit(
        functools.partial(
            train_step.train_step,
            loss=model.loss,
            optimizer=model.optimizer,
            ema=model.ema,
            gather=meshes.whole(mesh, model.dtypes(), plan.gradient_dtype),
            accumulate=plan.accumulate,
            unroll=meshes.platform(mesh) == "cpu",
        ),
        donate_argnums=0,
        out_shardings=(shardings, meshes.replicated(mesh)),
        compiler_options=meshes.compiler_options(mesh),
    )
    rows = {
        "image": jax.ShapeDtypeStruct((plan.batch_size, *model.dataset.image_shape), np.uint8),
        "label": jax.ShapeDtypeStruct((plan.batch_size,), np.int32),
    }
    return Step(run, init, shapes, shardings, rows)


class LabelProbes:
    """The start-up probes of a run that drops labels: each once, as soon as it can tell."""

    STEPS = 10  # a network that starts at zero says nothing of its label in the first few

    def __init__(self, model: experiment.Experiment):
        self._p_uncond = model.config["loss"]["p_uncond"]
        self._outputs = probes.label_outputs(
            model.network, image_shape=model.dataset.image_shape, null_label=model.null_label
        )
        self._rate_told = self._label_told = False

    def at_start(self, params: Params) -> None:
        """Is the label wired to the output? Raises ProbeError."""
        probes.labels_differ(meshes.gather(self._outputs(params, 0.1)))

    def after(self, step: int, params: Params, means: Mapping[str, float], count: int) -> None:
        """Does it move what was learned, and were as many dropped as asked? Raises ProbeError.

        means are over `count` images.
        """
        if not self._label_told and step >= self.STEPS:
            self._label_told = True
            probes.labels_differ(meshes.gather(self._outputs(params, 0.0)))
        if not self._rate_told and count * min(self._p_uncond, 1 - self._p_uncond) >= 10:
            self._rate_told = True
            probes.drop_rate_holds(means["p_uncond"], count, self._p_uncond)


def train(
    config: Mapping[str, Any],
    workdir: str,
    *,
    init_from: str | None = None,
    profile: str | None = None,
) -> bool:
    """Trains to the config's last step, from the newest checkpoint in workdir if there is one.

    `profile` is a window of steps to trace, "FIRST:LAST". Returns whether the last step was made:
    it is not where the run was told to leave before. Raises UsageError for what is wrong with
    the config or the folders, before anything is written; Diverged for what is not finite;
    ProbeError for a silent mistake; NotSaved where a checkpoint cannot be written.
    """
    model = experiment.build(config)
    config = model.config
    check_same_run(workdir, config)
    plan = model.train
    shows = plan.sample_every > 0 and not model.is_classifier
    if shows:
        generator.check_guidance(model, None, plan.sample_w)
    mesh = meshes.make_mesh(plan.fsdp)
    meshes.check_batch(mesh, plan.batch_size, plan.accumulate)
    wandb_run.check(plan.wandb)
    tracer = profiles.Profile(profile, epath.Path(workdir) / "profile")
    batches = batching.Batches(
        examples=model.dataset.load(),
        batch_size=plan.batch_size,
        seed=plan.seed,
        flip=model.dataset.flip,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )

    # Shapes, then shardings, then arrays: nothing is ever whole on one device.
    key_init, key_train = jax.random.split(jax.random.key(plan.seed))
    step_fn, init, shapes, shardings, rows = make_step(model, mesh)
    step_fn.eval_shape(shapes, {}, rows, key_train)  # what only a trace finds wrong is found here
    new = not checkpoint.has_checkpoint(workdir)
    start_from = load_start(init_from, model, shardings.ema) if init_from and new else None

    checkpoint.write_config(workdir, config)
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(stops.Stop())
        # Closing waits, on an error too: what has started to be saved is good, and is finished.
        checkpoints = stack.enter_context(
            contextlib.closing(checkpoint.Checkpoints(workdir, keep=plan.keep))
        )
        found = checkpoints.restore(**items(meshes.placed(shapes, shardings)))
        if found is not None:
            state = train_step.TrainState(ema=found[1]["ema"], **found[1]["state"])
        else:
            state = jax.jit(init, out_shardings=shardings)(key_init)
        if start_from is not None:
            copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=shardings.ema)
            state = state._replace(params=copy(start_from), ema=copy(start_from))
        start = int(state.step)
        if start >= plan.steps:
            runlog.say(f"at step {start} already: nothing is left of {plan.steps}")
            return True
        if start:
            runlog.say(f"going on from step {start} of {plan.steps}")
        parameters = sum(leaf.size for leaf in jax.tree.leaves(shapes.params))
        kind = jax.devices()[0].device_kind
        runlog.say(f"{parameters:,} parameters on {mesh.size} devices ({kind})")

        label_probes = LabelProbes(model) if model.null_label is not None else None
        if label_probes:
            label_probes.at_start(state.params)
        sampled = generator.Generator(model, {}, mesh=mesh) if shows else None
        told = {"start": start, "steps": plan.steps, "config": config, "wandb": plan.wandb}
        log = stack.enter_context(contextlib.closing(runlog.RunLog(workdir, **told)))
        reading = batching.iterate(
            batches, start, threads=plan.read_threads, processes=plan.read_processes
        )
        feed = stack.enter_context(contextlib.closing(reading))
        window = windows.Window()
        stack.enter_context(tracer)
        for step, rows in window.fed_by(feed):
            tracer.before(step)
            state, metrics = step_fn(state, {}, meshes.shard_local(mesh, rows), key_train)
            tracer.after(step, metrics)
            done = step + 1
            if step == start:
                jax.block_until_ready(metrics)
                window.restart_clock()  # that was the compiler
            window.add(step, metrics)
            log.advance()
            leaving = stop(step, checkpoints)
            last = leaving or done == plan.steps
            look = last or done % plan.log_every == 0
            save = last or done % plan.checkpoint_every == 0
            show = shows and (done == plan.steps or done % plan.sample_every == 0)
            if not (look or save or show):
                continue
            count = len(window) * plan.batch_size
            means = window.close(plan.batch_size)
            log.scalars(done, means)
            if save:
                checkpoints.save(done, **items(state))
            if label_probes:
                label_probes.after(done, state.params, means, count)
            if show:
                show_samples(sampled, state.ema, log, workdir, done)
            window.restart_clock()
            if leaving:
                runlog.say(f"told to leave at step {done}: saved, and leaving")
            if last:
                break
        return done == plan.steps


def show_samples(
    sampled: generator.Generator, ema: Any, log: runlog.RunLog, workdir: str, step: int
) -> None:
    """Saves a grid of samples of the EMA, a row a label, a block for each w."""
    model = sampled.model
    labels = np.repeat(sample.some_labels(model.dataset.num_classes), 4)
    sampled.params = {"model": ema}
    blocks = [sample.label_grid(sampled(labels, w), 4) for w in model.train.sample_w]
    gap = np.full_like(blocks[0][:, :8], 255)
    picture = np.concatenate([part for b in blocks for part in (b, gap)][:-1], axis=1)
    log.image(step, "samples", picture)
    if jax.process_index() == 0:
        folder = epath.Path(workdir) / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        images.save_png(folder / f"step_{step:08d}.png", picture)


FLAGS = flags.FLAGS


def _define_flags() -> None:
    flags.DEFINE_string("workdir", None, "The run's folder; made if absent.", required=True)
    flags.DEFINE_string("init_from", None, "Start a new run from the EMA of this one.")
    flags.DEFINE_string("profile", None, "Steps to trace, as 100:110, into WORKDIR/profile.")
    flags.DEFINE_bool("distributed", False, "Join the other processes of a cluster.")
    flags.DEFINE_integer(
        "unfinished_status",
        0,
        "Exit status when told to leave before the last step, for what starts the run again.",
    )


def main(config: dict[str, Any]) -> None:
    """Trains. What stops a run that was well begun is one line and exit status 1."""
    meshes.initialize_distributed(FLAGS.distributed)
    meshes.split_cpu(config["train"]["batch_size"])
    meshes.keep_compiled(FLAGS.workdir)
    try:
        done = train(config, FLAGS.workdir, init_from=FLAGS.init_from, profile=FLAGS.profile)
    except (windows.Diverged, probes.ProbeError, checkpoint.NotSaved, OSError) as error:
        print(f"stopped: {error}; checkpoints from before it are kept.", file=sys.stderr)
        command.leave(1)
    if not done:
        sys.exit(FLAGS.unfinished_status)


if __name__ == "__main__":
    _define_flags()
    command.run(main, config=lambda typed: experiment.load_config(typed.get("config", "")))
