"""The training job: one jitted, donated, sharded step, and the loop around it.

    python -m cfg_jax.train --config=digits --workdir=DIR [--config.FIELD=VALUE ...]
        [--teacher=DIR] [--init_from=DIR] [--profile=FIRST:LAST] [--distributed]
        [--unfinished_status=75]

Writes config.json, checkpoints/, metrics.jsonl, TensorBoard events, sample grids, averages for
`reconstruct` (ema/, where the config asks for them) and what the compiler made (compiled/, for the
next start) to the workdir.
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

from cfg_jax import (
    command,
    experiment,
    generator,
    probes,
    reconstruct,
    request,
    sample,
    start,
    train_step,
    watch,
)
from cfg_jax.data import batches as batching
from cfg_jax.data import images
from cfg_jax.runtime import checkpoint, wandb_run
from cfg_jax.runtime import logging as runlog
from cfg_jax.runtime import mesh as meshes
from cfg_jax.runtime import profile as profiles
from cfg_jax.runtime import stop as stops
from cfg_jax.runtime import window as windows
from cfg_jax.types import Params


def items(state: train_step.TrainState) -> dict[str, Any]:
    """The state as the two items of a checkpoint."""
    rest = {"step": state.step, "params": state.params, "opt_state": state.opt_state}
    if state.profiles:
        rest["profiles"] = state.profiles
    return {"state": rest, "ema": state.ema}


class Step(NamedTuple):
    """The training step on a mesh, and the shapes, with shardings, that it is compiled for."""

    run: Any  # (state, frozen, batch, key) -> (state, metrics), jitted; the state is donated
    init: Callable  # key -> state
    shapes: train_step.TrainState
    shardings: train_step.TrainState
    frozen: Params  # a teacher's; {} where there is none
    rows: dict[str, jax.ShapeDtypeStruct]  # a global batch


def make_step(model: experiment.Experiment, mesh: Mesh) -> Step:
    """Shapes, then shardings, and no arrays: the mesh may be of devices that are not here."""
    plan = model.train
    init = functools.partial(
        train_step.init_state,
        network=model.network,
        optimizer=model.optimizer,
        profiles=len(model.ema.lengths),
    )
    shapes = jax.eval_shape(init, jax.random.key(0))
    shardings = meshes.state_shardings(mesh, shapes)
    shapes = meshes.placed(shapes, shardings)
    frozen, frozen_dtypes = {}, {}
    if model.teacher is not None:
        frozen = jax.eval_shape(model.teacher.network.init, jax.random.key(0))
        frozen = meshes.placed(frozen, meshes.state_shardings(mesh, frozen))
        frozen_dtypes = model.teacher.dtypes()
    whole = meshes.whole(mesh, model.dtypes(), plan.gradient_dtype)
    whole_frozen = meshes.whole(mesh, frozen_dtypes)
    run = jax.jit(
        functools.partial(
            train_step.train_step,
            loss=model.loss,
            optimizer=model.optimizer,
            ema=model.ema,
            gather=lambda params, frozen: (whole(params), whole_frozen(frozen)),
            accumulate=plan.accumulate,
            unroll=meshes.platform(mesh) == "cpu",
        ),
        donate_argnums=0,
        out_shardings=(shardings, meshes.replicated(mesh)),
        compiler_options=meshes.compiler_options(mesh),
    )
    row = functools.partial(jax.ShapeDtypeStruct, sharding=meshes.batch_sharding(mesh))
    rows = {
        "image": row((plan.batch_size, *model.dataset.image_shape), np.uint8),
        "label": row((plan.batch_size,), np.int32),
    }
    return Step(run, init, shapes, shardings, frozen, rows)


def train(
    config: Mapping[str, Any],
    workdir: str,
    *,
    init_from: str | None = None,
    teacher: str | None = None,
    profile: str | None = None,
) -> bool:
    """Trains to the config's last step, from the newest checkpoint in workdir if there is one.

    A student learns from `teacher`, and starts from it unless `init_from` names another student.
    `profile` is a window of steps to trace, "FIRST:LAST". Returns whether the last step was made:
    it is not where the run was told to leave before. Raises UsageError for what is wrong with the
    config or the folders, before anything is written; Diverged for what is not finite; ProbeError
    for a silent mistake; NotSaved where a checkpoint cannot be written.
    """
    model = experiment.build(config)
    config = model.config
    start.check_same_run(workdir, config)
    plan = model.train
    shows = plan.sample_every > 0 and not model.is_classifier
    if shows:
        request.check_guidance(model, None, plan.sample_w)
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
    step_fn, init, shapes, shardings, frozen, rows = make_step(model, mesh)
    # What only a trace finds wrong, here; of the arrays' types, so that the first step takes it up.
    step_fn.eval_shape(shapes, frozen, rows, key_train)
    new = not checkpoint.has_checkpoint(workdir)
    begin = start.load_start(init_from, model, shardings.ema) if init_from and new else None
    watched = watch.Watch(model, mesh, workdir) if model.evaluate.every else None
    frozen = start.load_teacher(workdir, teacher, model, frozen)
    if new:
        reconstruct.forget(workdir)
    checkpoint.write_config(workdir, config)
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(stops.Stop())
        # Closing waits, on an error too: what has started to be saved is good, and is finished.
        checkpoints = stack.enter_context(
            contextlib.closing(checkpoint.Checkpoints(workdir, keep=plan.keep))
        )
        found = checkpoints.restore(**items(shapes))
        if found is not None:
            state = train_step.TrainState(ema=found[1]["ema"], **found[1]["state"])
        else:
            state = jax.jit(init, out_shardings=shardings)(key_init)
        if new and (begin or frozen):
            copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=shardings.ema)
            begin = {**state.params, **(begin or frozen)}  # what reads w is no teacher's
            state = state._replace(params=copy(begin), ema=copy(begin))
        first = int(state.step)
        if first >= plan.steps:
            runlog.say(f"at step {first} already: nothing is left of {plan.steps}")
            return True
        if first:
            runlog.say(f"going on from step {first} of {plan.steps}")
        parameters = sum(leaf.size for leaf in jax.tree.leaves(shapes.params))
        kind = jax.devices()[0].device_kind
        runlog.say(f"{parameters:,} parameters on {mesh.size} devices ({kind})")

        checks = start.StartProbes(model) if model.null_label is not None or frozen else None
        if checks:
            checks.at_start(state.params)
        sampled = generator.Generator(model, {}, mesh=mesh) if shows else None
        told = {"start": first, "steps": plan.steps, "config": config, "wandb": plan.wandb}
        log = stack.enter_context(contextlib.closing(runlog.RunLog(workdir, **told)))
        reading = batching.iterate(
            batches, first, threads=plan.read_threads, processes=plan.read_processes
        )
        feed = stack.enter_context(contextlib.closing(reading))
        window = windows.Window()
        stack.enter_context(tracer)
        for step, rows in window.fed_by(feed):
            tracer.before(step)
            state, metrics = step_fn(state, frozen, meshes.shard_local(mesh, rows), key_train)
            tracer.after(step, metrics)
            done = step + 1
            if step == first:
                jax.block_until_ready(metrics)
                window.restart_clock()  # that was the compiler
            window.add(step, metrics)
            log.advance()
            leaving = stop(step, checkpoints)
            last = leaving or done == plan.steps
            look = last or done % plan.log_every == 0
            save = last or done % plan.checkpoint_every == 0
            show = shows and (done == plan.steps or done % plan.sample_every == 0) and not leaving
            watches = watched and (last or done % model.evaluate.every == 0) and not leaving
            every = model.ema.snapshot_every
            average = state.profiles and (done == plan.steps or done % every == 0)
            if not (look or save or show or watches or average):
                continue
            count = len(window) * plan.batch_size
            means = window.close(plan.batch_size)
            log.scalars(done, means)
            if save:
                checkpoints.save(done, **items(state))
            if watches:
                log.scalars(done, watched(done, state.ema))
            if average:
                reconstruct.keep(workdir, model, state.profiles, done)
            if checks:
                checks.after(done, state.params, means, count)
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
    flags.DEFINE_string("teacher", None, "The folder of the model that a student learns from.")
    flags.DEFINE_string("profile", None, "Steps to trace, as 100:110, into WORKDIR/profile.")
    flags.DEFINE_bool("distributed", False, "Join the other processes of a cluster.")
    flags.DEFINE_integer(
        "unfinished_status",
        0,
        "Exit status when told to leave before the last step, for what starts the run again.",
    )


def main(config: dict[str, Any]) -> None:
    """Trains. What stops a run that was well begun is one line and exit status 1."""
    meshes.initialize_distributed(FLAGS.distributed, saves=True)
    model = experiment.build(config)
    meshes.split_cpu(model.train.batch_size, model.cpu_devices)
    meshes.keep_compiled(FLAGS.workdir)
    try:
        done = train(
            config,
            FLAGS.workdir,
            init_from=FLAGS.init_from,
            teacher=FLAGS.teacher,
            profile=FLAGS.profile,
        )
    except (windows.Diverged, probes.ProbeError, checkpoint.NotSaved, OSError) as error:
        print(f"stopped: {error}; checkpoints from before it are kept.", file=sys.stderr)
        command.leave(1)
    if not done:
        sys.exit(FLAGS.unfinished_status)


if __name__ == "__main__":
    _define_flags()
    command.run(main, config=lambda typed: experiment.load_config(typed.get("config", "")))
