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
from cfg_jax import chips, command, experiment, programs, sample
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

    def peak(multiple: int) -> float:
        batch = multiple * parts
        runlog.say(f"compiling for {batch} images a chip")
        model = experiment.build(changed(config, "train.batch_size", batch * devices))
        reports[multiple] = compiler.training_step(model)
        return reports[multiple].memory.peak

    first = {multiple: report.memory.peak for multiple, report in reports.items()}
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
    lines = describe(report, model)
    print("\n".join(lines))
    if out:
        (out / "plan.json").write_text(json.dumps(report, indent=1))
        (out / "plan.txt").write_text("\n".join(lines) + "\n")
        print(f"\nall of it: {out / 'plan.json'}")


def describe(report: Mapping[str, Any], model: experiment.Experiment) -> list[str]:
    """The report in words."""
    train, chip, devices = report["config"]["train"], report["chip"], report["devices"]
    parts = ", ".join(f"{name} {v}" for name, v in report["versions"].items() if name != "python")
    lines = [
        f"{report['topology']}: {devices} devices ({report['device_kind']}) on "
        f"{report['hosts']} hosts; batch {train['batch_size']}, {train['batch_size'] // devices} a "
        f"device; fsdp={train['fsdp']}, remat={model.config['model']['remat']}",
        f"{report['date']}: {parts}",
        "",
        "training step",
        *describe_program(report["step"]),
    ]
    if sampler := report["sampler"]:
        passes = "one pass" if model.guidance(1.0).second is None else "two passes"
        lines += [
            "",
            f"sampler: {model.sample.steps} levels, {passes} at each, "
            f"{model.sample.batch_size} images at a time",
            *describe_program(sampler),
        ]
        if sampler["bound"]:
            rate = model.sample.batch_size / sampler["bound"]["seconds"]
            lines.append(f"  at best       {rate:,.0f} images/s")
    lines.append("")
    if run := report["run"]:
        lines += [
            f"the whole run, {run['steps']:,} steps: at least {run['days']:.3g} days and "
            f"{run['chip_hours']:,.0f} chip-hours,",
            f"at most {run['images_per_second']:,.0f} images/s. A bound from published peaks of a "
            f"{chip['name']}, not a measurement: a run reaches a part of it.",
        ]
    elif chip is None:
        lines.append("No peaks are published here for this device: no bound on time is given.")
    rows = {"as configured": report["step"], **report["variants"]}
    if len(rows) > 1:
        lines += ["", *table(rows)]
    if found := report.get("search"):
        rows = {f"{batch} a chip": r for batch, r in found["tried"].items()}
        lines += ["", *table(rows)]
        lines.append(f"largest that was compiled and fits: {found['largest_batch_a_chip']} a chip")
    return lines


def _size(size: float | None) -> str:
    if size is None:
        return "-"
    return f"{size / chips.GIB:.2f} GiB" if size >= chips.GIB / 10 else f"{size / 2**20:.3g} MiB"


def _fits(memory: Mapping[str, Any]) -> str:
    return {None: "", True: ": fits", False: ": DOES NOT FIT"}[memory["fits"]]


def describe_program(program: Mapping[str, Any]) -> list[str]:
    """One program's numbers, a device and a run."""
    memory = program["memory"]
    room = f" of {_size(memory['capacity'])}" if memory["capacity"] else ""
    lines = [
        f"  compiled in   {program['wall_seconds']:.0f} s ({program['cpu_seconds']:.0f} s of CPU)",
        f"  memory        {_size(memory['peak'])}{room} a device{_fits(memory)}",
    ]
    if program["flops"] is None:
        return lines
    names = ("arguments", "outputs", "temporaries", "code")
    parts = ", ".join(f"{name} {_size(memory[name])}" for name in names)
    lines += [
        f"                {parts}",
        f"  products      {program['flops'] / 1e12:.4g} TFLOP compiled, "
        f"{program['model_flops'] / 1e12:.4g} the model's: {program['flops_ratio']:.3f}",
    ]
    for c in program["collectives"]:
        where = ", in a loop" if c["in_loop"] else ""
        lines.append(
            f"  crosses       {c['count']} {c['kind']}, mostly {c['dtype']}, over {c['devices']}"
            f"{where}: {_size(c['bytes'])}"
        )
    if not program["collectives"]:
        lines.append("  crosses       nothing")
    moved = program["moved"]
    filling = 1 - moved["bytes"] / max(moved["padded_bytes"], 1)
    lines.append(
        f"  moves         {_size(moved['padded_bytes'])} to and from memory, "
        f"{filling:.1%} of it to fill tiles up"
    )
    if bound := program["bound"]:
        times = ", ".join(f"{n} {1e3 * bound[n]:.4g}" for n in ("compute", "memory", "network"))
        lines.append(f"  at least      {1e3 * bound['seconds']:.4g} ms ({times})")
    return lines


def table(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Steps side by side, a line each."""
    head = ("", "peak", "temporaries", "FLOPs/model", "moved", "crosses", "at least", "fits")
    lines = [head]
    for name, r in rows.items():
        made = r["flops"] is not None
        lines.append(
            (
                name,
                _size(r["memory"]["peak"]),
                _size(r["memory"]["temporaries"]),
                f"{r['flops_ratio']:.3f}" if made else "-",
                _size(r["moved"]["padded_bytes"]) if made else "-",
                _size(sum(c["bytes"] for c in r["collectives"])),
                f"{1e3 * r['bound']['seconds']:.4g} ms" if r["bound"] else "-",
                {None: "?", True: "yes", False: "no"}[r["memory"]["fits"]],
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in lines]


if __name__ == "__main__":
    _define_flags()
    command.run(main, config=lambda typed: experiment.load_config(typed.get("config", "")))
