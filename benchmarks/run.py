"""How fast training and guided sampling are here, beside PyTorch doing the same on the same cores.

    python -m benchmarks.run [--configs=digits,adm32] [--tasks=train,sample] [--out=FILE.json]
        [--threads=2] [--rounds=7] [--seconds=2] [--levels=T] [--no-torch] [--no-compile]

Ours is what `train` and `sample` run, on as many XLA devices: the train job's program and the
Generator's. PyTorch's is `torch_adm` in channels-last memory, eager and through torch.compile; the
faster of the two is the opponent. What makes the ratio honest:

- One set of parameters, and outputs, gradients and the parameters after one update are compared
  before anything is timed: the run fails where they differ.
- Both are pinned to the same cores, in float32, from the same numpy rows, to the end of the work.
- Both have the C library's allocator keep what is freed, and fill the holes that compiling left
  (`cfg_jax.runtime.memory`).
- Each side is a process of its own, blocked on its input while another is measured: in one
  process the pools of threads of two libraries spin against each other, and share an allocator and
  a peak of memory. The CPU time that the others use in a side's turns is measured, and reported.
- Sides take turns; a figure is the median of the rounds, with the least and the most beside it, and
  a ratio is the median of the rounds' ratios.

Dropout and the draws of noise are on in both, each by its library's own generator: ours also keeps
the promise that draws depend neither on the batch nor on the devices, which costs it something.
FLOP/s are those of the network's convolutions and matrix products, as `plan` counts them in the
program before it is optimised, over the time of the whole step: the same work for all sides.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from importlib import util
from pathlib import Path

from benchmarks import turns

# Largest relative error in the L2 norm. Adam divides each element of a gradient by about its own
# size, so rounding in the smallest elements shows in what the parameters moved.
AGREE = {"output": 1e-5, "gradient": 1e-4, "moved": 5e-2, "ema moved": 5e-2, "images": 1e-2}


def measure(config: str, task: str, options: argparse.Namespace) -> dict:
    """One config and one task, all sides. Raises RuntimeError where the sides disagree."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = [f"--config={config}", f"--task={task}", f"--folder={folder}"]
        if options.levels:
            arguments.append(f"--steps={options.levels}")
        workers = {"ours": turns.Worker("benchmarks.ours", arguments, options.threads)}
        try:
            result = workers["ours"]("describe")
            sides = {"ours": workers["ours"]("prepare")}
            workers["ours"]("check")
            for name, extra in _opponents(options).items():
                arguments = [f"--task={task}", f"--folder={folder}", f"--threads={options.threads}"]
                worker = turns.Worker("benchmarks.theirs", [*arguments, *extra], options.threads)
                workers[name] = worker
                sides[name] = worker("prepare")
                sides[name]["errors"] = worker("check")
                _demand_agreement(f"{config}, {task}, {name}", sides[name]["errors"])
            turned = turns.alternate(workers, rounds=options.rounds, seconds=options.seconds)
        finally:
            for worker in workers.values():
                worker.close()
    images = result["batch_size"]
    for name, side in sides.items():
        side |= turned[name]
        side["median_s"] = statistics.median(side["seconds"])
        side["images_per_s"] = images / side["median_s"]
        side["gflops"] = result["flops"] / side["median_s"] / 1e9
    opponents = [name for name in sides if name != "ours"]
    if opponents:
        best = min(opponents, key=lambda name: sides[name]["median_s"])
        pairs = zip(sides[best]["seconds"], sides["ours"]["seconds"])
        result |= {"opponent": best, "ratio": statistics.median(t / o for t, o in pairs)}
    return {"config": config, "task": task, **result, "sides": sides}


def _opponents(options: argparse.Namespace) -> dict[str, list[str]]:
    if options.no_torch:
        return {}
    eager = {"torch eager": []}
    return eager if options.no_compile else eager | {"torch compiled": ["--compile"]}


def _demand_agreement(where: str, errors: dict[str, list[float]]) -> None:
    for what, (_, _, relative) in errors.items():
        if not relative <= AGREE[what]:
            raise RuntimeError(f"{where}: {what} differs by {relative:.1e}, over {AGREE[what]:.0e}")


def peak(options: argparse.Namespace) -> dict[str, float]:
    """FLOP/s of a wide convolution in each library; the larger is the machine's."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--config=digits", "--task=sample", f"--folder={folder}", "--steps=1"]
        workers = {"ours": turns.Worker("benchmarks.ours", arguments, options.threads)}
        workers["ours"]("check")
        if not options.no_torch:
            arguments = ["--task=sample", f"--folder={folder}", f"--threads={options.threads}"]
            workers["torch"] = turns.Worker("benchmarks.theirs", arguments, options.threads)
        rates = {name: worker("peak") for name, worker in workers.items()}
        versions = {}
        for worker in workers.values():
            versions |= worker("versions")
            worker.close()
    return {"gflops": {name: rate / 1e9 for name, rate in rates.items()}, "versions": versions}


def machine() -> dict:
    """What the numbers were measured on: {"cpu", "cores", "vectors", "system", "python"}."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    named = dict(map(str.strip, line.split(":", 1)) for line in lines if ":" in line)
    flags = named.get("flags", "").split()
    return {
        "cpu": named.get("model name", platform.processor()),
        "cores": len(os.sched_getaffinity(0)),
        "vectors": next((f for f in ("avx512f", "avx2", "avx") if f in flags), "none of AVX"),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def table(report: dict) -> str:
    """The report as Markdown: a row a side."""
    top = max(report["peak_gflops"].values())
    made = report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [
        f"{report['date']}, {made['cpu']}, {report['threads']} of {made['cores']} cores"
        f" ({made['vectors']}), {versions}. Convolution peak: {top:.0f} GFLOP/s.",
        "",
        "| | side | ms (least to most) | images/s | GFLOP/s (of peak) | first call | MiB | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in report["results"]:
        what = f"{r['config']}, batch {r['batch_size']}, "
        what += "a training step" if r["task"] == "train" else f"w = 1, T = {r['levels']}"
        for name, side in r["sides"].items():
            ms = [1e3 * s for s in (side["median_s"], min(side["seconds"]), max(side["seconds"]))]
            ratio = ""
            if "ratio" in r and name in ("ours", r["opponent"]):
                ratio = f"**{r['ratio']:.2f}**" if name == "ours" else "1"
            lines.append(
                f"| {what} | {name} | {ms[0]:.4g} ({ms[1]:.4g} to {ms[2]:.4g}) "
                f"| {side['images_per_s']:.4g} | {side['gflops']:.0f} ({side['gflops'] / top:.0%}) "
                f"| {side['compile_s']:.1f} s | {side['peak_mib']:.0f} | {ratio} |"
            )
            what = ""
    agree = [
        f"{r['config']}, {r['task']}, {name}: "
        + ", ".join(f"{what} {relative:.0e}" for what, (_, _, relative) in side["errors"].items())
        for r in report["results"]
        for name, side in r["sides"].items()
        if "errors" in side
    ]
    busy = max(side["idle_share"] for r in report["results"] for side in r["sides"].values())
    lines += ["", "Ratio: the opponent's time over ours. Relative differences (L2): "]
    lines[-1] += ("; ".join(agree) or "no opponent") + "."
    lines.append(f"The sides that waited used at most {busy:.3f} of a core.")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict:
    """Measures, prints the table, and writes and returns the report."""
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--configs", default="digits,adm32")
    parser.add_argument("--tasks", default="train,sample")
    parser.add_argument("--out", default="benchmark.json")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=2.0)  # a turn
    parser.add_argument("--levels", type=int)  # of the sampler; the config's if not given
    parser.add_argument("--no-torch", action="store_true")
    parser.add_argument("--no-compile", action="store_true")
    options = parser.parse_args(argv)
    if not options.no_torch and util.find_spec("torch") is None:
        parser.error('there is no PyTorch: pip install -e ".[parity]", or --no-torch')
    measured = peak(options)
    report = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "versions": measured["versions"],
        "threads": options.threads,
        "peak_gflops": measured["gflops"],
        "results": [
            measure(config, task, options)
            for config in options.configs.split(",")
            for task in options.tasks.split(",")
        ],
    }
    Path(options.out).write_text(json.dumps(report, indent=1))
    print(table(report))
    return report


if __name__ == "__main__":
    main(sys.argv[1:])
