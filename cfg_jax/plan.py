"""The planning job: what a config needs of a TPU slice, from the real compiler and without a TPU.

    python -m cfg_jax.plan --config=imagenet64 --topology=v5e:16x16 [--config.FIELD=VALUE ...]
        [--variants=remat=products,fsdp=8] [--search=2] [--nosampler] [--out=DIR]

Compiles the training step and the guided sampler for the slice, prints what they need, and says how
long the config's run takes at the least. With --out it writes plan.json and plan.txt there, and
keeps what was compiled: the same command goes on where it was stopped, and reports in seconds.
A compilation of the paper's networks takes minutes. `--topology=cpu`, `cpu:8` and `gpu` report on
this machine's devices.
"""

import dataclasses
import datetime
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from typing import Any

from absl import flags
from etils import epath

import cfg_jax
from cfg_jax import chips, command, experiment, plan_report, programs, sample
from cfg_jax.runtime import logging as runlog
from cfg_jax.runtime import mesh as meshes
from cfg_jax.types import UsageError

# What --variants may change, and the field that each stands for.
VARIANTS = {
    "remat": "model.remat",
    "fsdp": "train.fsdp",
    "accumulate": "train.accumulate",
    "gradient_dtype": "train.gradient_dtype",
    "batch_size": "train.batch_size",
}


def versions() -> dict[str, str]:
    """Of what decides on the compiled programs."""
    out = {"cfg_jax": cfg_jax.__version__, "python": platform.python_version()}
    for name in ("jax", "jaxlib", "libtpu", "flax", "optax"):
        try:
            out[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return out


def changed(config: Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
    """The config with one field of a section set."""
    section, field = path.split(".")
    return {**config, section: {**config[section], field: value}}


def parse_variants(text: str, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """{"fsdp=8": config} from "fsdp=8,remat=products". Raises UsageError for what is none."""
    out = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        if name not in VARIANTS or not value:
            raise UsageError(
                f"--variants={text}: {part!r} is none; write fields of {', '.join(VARIANTS)} as in "
                "--variants=remat=products,fsdp=8."
            )
        path = VARIANTS[name]
        section, field = path.split(".")
        now = config[section].get(field)
        if isinstance(now, int) and not value.isdigit():
            raise UsageError(f"--variants={text}: {name} takes a whole number.")
        out[part] = changed(config, path, int(value) if isinstance(now, int) else value)
        experiment.build(out[part])
    return out


@dataclasses.dataclass(frozen=True)
class Run:
    """The config's whole run at the least: a bound from published peaks, not a measurement."""

    steps: int
    step_seconds: float
    images_per_second: float
    days: float
    chip_hours: float


def whole_run(model: experiment.Experiment, step: programs.Report, devices: int) -> Run | None:
    """None where the step does not fit or the chip's peaks are not known."""
    if step.bound is None:
        return None
    seconds = step.bound.seconds * model.train.steps
    return Run(
        steps=model.train.steps,
        step_seconds=step.bound.seconds,
        images_per_second=model.train.batch_size / step.bound.seconds,
        days=seconds / 86400,
        chip_hours=seconds / 3600 * devices,
    )


def search(
    compiler: programs.Compiler, config: Mapping[str, Any], step: programs.Report, tries: int
) -> dict[str, Any]:
    """The largest batch a chip that fits: what was compiled, and what fits of it."""
    devices = len(compiler.target.devices)
    parts = config["train"]["accumulate"]  # a batch a chip is a multiple of them
    reports = {config["train"]["batch_size"] // devices // parts: step}

    def peak_of(report: programs.Report) -> float | None:
        return None if report.memory.refused else report.memory.peak

    def peak(multiple: int) -> float | None:
        batch = multiple * parts
        runlog.say(f"compiling for {batch} images a chip")
        model = experiment.build(changed(config, "train.batch_size", batch * devices))
        reports[multiple] = compiler.training_step(model)
        return peak_of(reports[multiple])

    first = {multiple: peak_of(report) for multiple, report in reports.items()}
    programs.largest_batch(peak, first, compiler.target.capacity, tries)
    fits = [multiple * parts for multiple, report in reports.items() if report.memory.fits]
    return {
        "largest_batch_a_chip": max(fits, default=None),
        "tried": {m * parts: report.json() for m, report in sorted(reports.items())},
    }


FLAGS = flags.FLAGS


def _define_flags() -> None:
    flags.DEFINE_string(
        "topology", None, "What to compile for: v5e:16x16, v4:4x4x4, cpu:8, gpu.", required=True
    )
    flags.DEFINE_string("variants", "", "Fields to compile the step with as well: fsdp=8, ...")
    flags.DEFINE_integer(
        "search", 0, "Compilations to spend on the largest batch that fits.", lower_bound=0
    )
    flags.DEFINE_bool("sampler", True, "Whether to compile the sampler too.")
    flags.DEFINE_string("out", None, "Where plan.json, plan.txt and what was compiled go.")


def main(config: dict[str, Any]) -> None:
    """Compiles, prints and writes the report."""
    model = experiment.build(config)
    variants = parse_variants(FLAGS.variants, config)
    if FLAGS.topology == "cpu":
        meshes.split_cpu(model.train.batch_size)
    target = chips.target(FLAGS.topology)
    devices = len(target.devices)
    if FLAGS.search and target.capacity is None:
        raise UsageError(f"--search: how much memory {target.name} has is not known here.")
    for name, one in {"": config, **variants}.items():
        train = one["train"]
        try:
            mesh = meshes.make_mesh(train["fsdp"], target.devices)
            meshes.check_batch(mesh, train["batch_size"], train["accumulate"])
        except UsageError as error:
            raise UsageError(f"--variants={name}: {error}" if name else str(error)) from error
    out = epath.Path(FLAGS.out) if FLAGS.out else None
    if out:
        sample.make_folder(out)
    told = versions()
    compiler = programs.Compiler(target, told, out and str(out / "compiled"))

    runlog.say(f"compiling the training step for {devices} devices")
    step = compiler.training_step(model)
    sampler = None
    if FLAGS.sampler and not model.is_classifier and model.guidance().second != "classifier":
        runlog.say("compiling the sampler")
        sampler = compiler.sampler(model)
    run = whole_run(model, step, devices)
    report = {
        "topology": target.name,
        "devices": devices,
        "hosts": target.hosts,
        "device_kind": target.devices[0].device_kind,
        "chip": target.chip and dataclasses.asdict(target.chip),
        "date": datetime.date.today().isoformat(),
        "versions": told,
        "config": config,
        "step": step.json(),
        "sampler": sampler and sampler.json(),
        "run": run and dataclasses.asdict(run),
        "variants": {},
    }
    for name, one in variants.items():
        runlog.say(f"compiling the training step with {name}")
        report["variants"][name] = compiler.training_step(experiment.build(one)).json()
    if FLAGS.search:
        report["search"] = search(compiler, config, step, FLAGS.search)
    lines = plan_report.describe(report, model)
    print("\n".join(lines))
    if out:
        (out / "plan.json").write_text(json.dumps(report, indent=1))
        (out / "plan.txt").write_text("\n".join(lines) + "\n")
        print(f"\nall of it: {out / 'plan.json'}")


if __name__ == "__main__":
    _define_flags()
    command.run(main, config=lambda typed: experiment.load_config(typed.get("config", "")))
