"""The training job: one jitted, donated, sharded step, and the loop around it.

    python -m cfg_jax.train --config=digits --workdir=DIR [--config.FIELD=VALUE ...]
        [--init_from=DIR] [--distributed]

Writes config.json, checkpoints/, metrics.jsonl, TensorBoard events and sample grids to the workdir.
Run again with the same workdir it goes on where it stopped, to the bit.
"""

import functools
import itertools
import math
import signal
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from etils import epath

from cfg_jax import command, experiment, generator, probes, sample, train_step
from cfg_jax.data import batches as batching
from cfg_jax.data import images
from cfg_jax.runtime import checkpoint
from cfg_jax.runtime import logging as runlog
from cfg_jax.runtime import mesh as meshes
from cfg_jax.types import Array, UsageError

# A run may go on with other values of these; everything else is what the run is.
MAY_CHANGE = (
    "dataset.data_dir",
    "sample.",
    "train.steps",
    "train.fsdp",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep",
    "train.sample_",
)


class Diverged(RuntimeError):
    """A loss or a gradient that is not finite, and the step it came at."""


def check_same_run(workdir: str, config: Mapping[str, Any]) -> None:
    """Raises UsageError where the workdir holds a run of another config, naming the fields."""
    saved = checkpoint.read_config(workdir)
    if saved is None:
        return
    there, here = _flat(experiment.SCHEMA.complete(saved)), _flat(config)
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


def start_from(state: train_step.TrainState, ema: Any, shardings: Any) -> train_step.TrainState:
    """The state with parameters and EMA from another run's EMA, in buffers of their own."""
    copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=shardings)
    return state._replace(params=copy(ema), ema=copy(ema))


def check_init_from(init_from: str, model: experiment.Experiment) -> None:
    """Raises UsageError unless init_from is a run of the same network and data set."""
    theirs = experiment.SCHEMA.complete(generator.saved_config(init_from))
    for section in ("model", "dataset"):
        if theirs[section] != model.config[section]:
            raise UsageError(
                f"--init_from={init_from} has another {section} than this config: "
                f"{theirs[section]} there, {model.config[section]} here."
            )


class Window:
    """The metrics of the steps since the last look: on the device until then, so no step waits."""

    def __init__(self):
        self._metrics: list[tuple[int, dict[str, Array]]] = []
        self._since = time.monotonic()

    def add(self, step: int, metrics: dict[str, Array]) -> None:
        """Keeps a step's metrics, and lets the host run at most two steps ahead of the devices."""
        self._metrics.append((step, metrics))
        if len(self._metrics) > 2:
            jax.block_until_ready(self._metrics[-3][1])

    def close(self, batch_size: int) -> dict[str, float]:
        """The means over the window and its speed; empties it.

        Raises Diverged, naming the first step whose loss or gradient is not finite.
        """
        steps = [step for step, _ in self._metrics]
        fetched = jax.device_get([metrics for _, metrics in self._metrics])
        for step, metrics in zip(steps, fetched, strict=True):
            if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])):
                raise Diverged(
                    f"loss {metrics['loss']}, gradient norm {metrics['grad_norm']} at step {step}"
                )
        rate = len(steps) / max(time.monotonic() - self._since, 1e-9)
        self._metrics, self._since = [], time.monotonic()
        means = {name: float(np.mean([m[name] for m in fetched])) for name in fetched[0]}
        return {**means, "steps_per_second": rate, "images_per_second": rate * batch_size}

    def __len__(self) -> int:
        return len(self._metrics)


class Stop:
    """Whether to leave between steps: a SIGTERM here, or, of several processes, to any of them."""

    def __init__(self, checkpoints: checkpoint.Checkpoints):
        self._checkpoints = checkpoints
        self._told = False
        # With several processes it is JAX's preemption service that hears the signal.
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self._hear)

    def _hear(self, *_) -> None:
        self._told = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one does not wait

    def __call__(self, step: int) -> bool:
        return self._told or self._checkpoints.preempted(step)


def train(config: Mapping[str, Any], workdir: str, init_from: str | None = None) -> None:
    """Trains to the config's last step, from the newest checkpoint in workdir if there is one.

    Raises UsageError for what is wrong with the config or the folders, before anything is written;
    Diverged for a loss that is not finite; ProbeError for a silent mistake.
    """
    config = experiment.SCHEMA.complete(config)
    check_same_run(workdir, config)
    model = experiment.build(config)
    if init_from:
        check_init_from(init_from, model)
    plan = model.train
    mesh = meshes.make_mesh(plan.fsdp)
    meshes.check_batch(mesh, plan.batch_size)
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
    init = functools.partial(
        train_step.init_state, network=model.network, optimizer=model.optimizer
    )
    shapes = jax.eval_shape(init, key_init)
    shardings = meshes.state_shardings(mesh, shapes)
    wanted = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )
    checkpoint.write_config(workdir, config)
    checkpoints = checkpoint.Checkpoints(workdir, keep=plan.keep)
    found = checkpoints.restore(**items(wanted))
    if found is None:
        state = jax.jit(init, out_shardings=shardings)(key_init)
        if init_from:
            step, ema = generator.load_ema(init_from, model)
            state = start_from(state, ema, shardings.ema)
            runlog.say(f"starting from the EMA of {init_from} at step {step}")
    else:
        state = train_step.TrainState(ema=found[1]["ema"], **found[1]["state"])
    start = int(state.step)
    if start:
        runlog.say(f"going on from step {start} of {plan.steps}")
    parameters = sum(leaf.size for leaf in jax.tree.leaves(shapes.params))
    kind = jax.devices()[0].device_kind
    runlog.say(f"{parameters:,} parameters on {mesh.size} devices ({kind})")

    conditional = model.null_label is not None
    if conditional:
        label_outputs = probes.label_outputs(
            model.network, image_shape=model.dataset.image_shape, null_label=model.null_label
        )
        probes.labels_differ(np.asarray(label_outputs(state.params, 0.1)))

    step_fn = jax.jit(
        functools.partial(
            train_step.train_step, loss=model.loss, optimizer=model.optimizer, ema=model.ema
        ),
        donate_argnums=0,
        out_shardings=(shardings, meshes.replicated(mesh)),
    )
    shows = plan.sample_every > 0 and not model.is_classifier
    sampled = generator.Generator(model, {}) if shows else None
    log = runlog.RunLog(workdir, start=start, steps=plan.steps)
    stop, window = Stop(checkpoints), Window()
    rows_of_steps = batching.iterate(batches, start)
    try:
        for step, rows in itertools.takewhile(lambda item: item[0] < plan.steps, rows_of_steps):
            state, metrics = step_fn(state, {}, meshes.shard_local(mesh, rows), key_train)
            done = step + 1
            window.add(step, metrics)
            log.advance()
            leaving = stop(step)
            last = leaving or done == plan.steps
            look = last or done % plan.log_every == 0
            save = last or done % plan.checkpoint_every == 0
            show = shows and (done == plan.steps or done % plan.sample_every == 0)
            if not (look or save or show):
                continue
            count = len(window) * plan.batch_size
            means = window.close(plan.batch_size)
            log.scalars(done, means)
            if conditional and start == 0 and done == count // plan.batch_size:
                probes.drop_rate_holds(means["p_uncond"], count, config["loss"]["p_uncond"])
                probes.labels_differ(np.asarray(label_outputs(state.params, 0.0)))
            if save:
                checkpoints.save(done, **items(state))
            if show:
                show_samples(sampled, state.ema, log, workdir, done)
            if leaving:
                runlog.say(f"told to leave at step {done}: saved, and leaving")
                break
    finally:
        rows_of_steps.close()
        # Also on an error: what has started to be saved is good, and is finished.
        checkpoints.close()
        log.close()


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
    flags.DEFINE_bool("distributed", False, "Join the other processes of a cluster.")


def main(config: dict[str, Any]) -> None:
    """Trains. A loss that is not finite, or a probe that fails, is exit status 1."""
    meshes.initialize_distributed(FLAGS.distributed)
    meshes.split_cpu(config["train"]["batch_size"])
    try:
        train(config, FLAGS.workdir, FLAGS.init_from)
    except (Diverged, probes.ProbeError) as error:
        print(f"stopped: {error}; the last good checkpoint is kept.", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    _define_flags()
    command.run(main, config=lambda typed: experiment.load_config(typed.get("config", "")))
