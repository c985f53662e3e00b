"""The job that makes an average of any length from those that a run kept: post-hoc EMA.

    python -m cfg_jax.reconstruct --workdir=DIR --length=0.02,0.05,0.15 [--step=N] [--out=DIR]

Karras et al. (2024), section 3. A run keeps averages with --config.ema.lengths="(0.05,0.1)", in
WORKDIR/ema/STEP_LENGTH.safetensors. What is made of them is a file, one a length, that `sample`,
`evaluate` and `cfg_jax.load` take in place of the folder. The mathematics are `power_ema`'s.
"""

import jax
import numpy as np
from absl import flags
from etils import epath

from cfg_jax import command, experiment, power_ema, sample, stored
from cfg_jax.models import weights
from cfg_jax.runtime import logging as runlog
from cfg_jax.runtime import mesh as meshes
from cfg_jax.types import Params, UsageError


def keep(
    workdir: str, model: experiment.Experiment, profiles: tuple[Params, ...], step: int
) -> None:
    """Writes a run's averages of a step: all processes call it, process 0 writes."""
    for sigma, average in zip(model.ema.lengths, profiles, strict=True):
        whole = meshes.gather(average)
        if jax.process_index() == 0:
            path = _folder(workdir) / f"{step:08d}_{sigma!r}.safetensors"
            path.parent.mkdir(parents=True, exist_ok=True)
            stored.export(str(path), whole, model.config, step)


def forget(workdir: str) -> None:
    """Removes the averages of a run that has left no checkpoint, for the one that begins there."""
    if jax.process_index() == 0:
        for path in kept(workdir).values():
            path.unlink()
    meshes.barrier("forget")


def kept(workdir: str) -> dict[tuple[int, float], epath.Path]:
    """{(step, length): file} of the averages that a run has kept, in order."""
    found = {}
    for path in _folder(workdir).glob("[0-9]*_*.safetensors"):
        step, _, sigma = path.name.removesuffix(".safetensors").partition("_")
        found[int(step), float(sigma)] = path
    return dict(sorted(found.items()))


def _folder(workdir: str) -> epath.Path:
    return epath.Path(workdir) / "ema"


def make(workdir: str, sigma: float, step: int | None = None) -> tuple[Params, int, float]:
    """(parameters, step, error) of the average of length sigma at a step, the last if None is
    given.

    The error is that of `power_ema.coefficients`. Files are read one at a time. Raises UsageError
    where nothing was kept, or not at that step.
    """
    power_ema.check_length("--length", sigma)
    there = kept(workdir)
    steps = sorted({at for at, _ in there})
    if not steps:
        raise UsageError(
            f'{_folder(workdir)} holds no averages: train with --config.ema.lengths="(0.05,0.1)".'
        )
    step = steps[-1] if step is None else step
    if step not in steps:
        raise UsageError(
            f"--step={step}: averages were kept at {', '.join(map(str, steps))}; take one of these."
        )
    there = {profile: path for profile, path in there.items() if profile[0] <= step}
    factors, error = power_ema.coefficients(list(there), (step, sigma))
    total = None
    for factor, path in zip(factors, there.values(), strict=True):
        params, _ = weights.load_safetensors(path)
        part = jax.tree.map(lambda a, factor=factor: factor * a.astype(np.float64), params)
        total = part if total is None else jax.tree.map(np.add, total, part)
    return jax.tree.map(lambda a: a.astype(np.float32), total), step, error


FLAGS = flags.FLAGS


def _define_flags() -> None:
    flags.DEFINE_string("workdir", None, "The folder of a run that kept averages.", required=True)
    flags.DEFINE_string("length", None, "Relative lengths, one file each.", required=True)
    flags.DEFINE_integer("step", None, "Of which step; the last that was kept if absent.")
    flags.DEFINE_string("out", None, "Where the files go; WORKDIR/ema if absent.")


def main() -> None:
    """Makes and writes the averages, and says how near they come."""
    lengths = sample.parse_numbers("length", FLAGS.length, float)
    config = stored.saved_config(FLAGS.workdir)
    for sigma in lengths:
        power_ema.check_length("--length", sigma)
    for sigma in lengths:
        params, step, error = make(FLAGS.workdir, sigma, FLAGS.step)
        out = epath.Path(FLAGS.out) if FLAGS.out else _folder(FLAGS.workdir)
        sample.make_folder(out)
        path = out / f"length_{sigma!r}_step_{step:08d}.safetensors"
        stored.export(str(path), params, config, step)
        print(f"{path}: length {sigma:g} at step {step}, its profile to within {error:.1e}")
    runlog.say(f"each is a model: python -m cfg_jax.sample --workdir={path}")


if __name__ == "__main__":
    _define_flags()
    command.run(main)
