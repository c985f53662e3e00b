"""A plan in words: what plan.json holds -> the lines of plan.txt."""

from collections.abc import Mapping
from typing import Any

from cfg_jax import chips, experiment


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
        largest = found["largest_batch_a_chip"]
        told = f"{largest} a chip" if largest else "none"
        lines.append(f"largest that was compiled and fits: {told}")
    return lines


def _size(size: float | None) -> str:
    if size is None:
        return "-"
    return f"{size / chips.GIB:.2f} GiB" if size >= chips.GIB / 10 else f"{size / 2**20:.3g} MiB"


def _peak(memory: Mapping[str, Any]) -> str:
    return ("asked for " if memory["refused"] else "") + _size(memory["peak"])


def _fits(memory: Mapping[str, Any]) -> str:
    return {None: "", True: ": fits", False: ": DOES NOT FIT"}[memory["fits"]]


def describe_program(program: Mapping[str, Any]) -> list[str]:
    """One program's numbers, a device and a run."""
    memory = program["memory"]
    room = f" of {_size(memory['capacity'])}" if memory["capacity"] else ""
    lines = [
        f"  compiled in   {program['wall_seconds']:.0f} s ({program['cpu_seconds']:.0f} s of CPU)",
        f"  memory        {_peak(memory)}{room} a device{_fits(memory)}",
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
                _peak(r["memory"]),
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
