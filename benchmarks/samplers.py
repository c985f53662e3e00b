"""Quality against network evaluations: the samplers on a trained run, as a judge sees them.

    python -m benchmarks.samplers --workdir=runs/digits --judge=runs/digits_judge [--w=0.3]
        [--images=500] [--evaluations=16,32,64,128] [--grids=uniform_lambda,edm]
        [--out=docs/samplers.png]

Draws fd_judge and is_judge over the evaluations of the network an image, and prints the table. All
start from the same noise. A point has as many levels as its evaluations pay for: with guidance each
costs two, and Heun asks twice a level.
"""

import argparse
import bisect
import itertools

import numpy as np
from matplotlib import figure

from cfg_jax import experiment, features, generator, panel, reference, request, stored, sweep
from cfg_jax.runtime import logging as runlog
from cfg_jax.runtime import mesh as meshes

# As the config's section `sampler` has them. Euler is DDIM with eta = 0.
SAMPLERS = {
    "ancestral, v = 0.3": {"name": "ancestral", "v": 0.3},
    "ddim": {"name": "ddim"},
    "dpmpp_2m": {"name": "dpmpp_2m"},
    "dpmpp_2m, eta = 1": {"name": "dpmpp_2m", "eta": 1.0},
    "unipc": {"name": "unipc"},
    "heun": {"name": "heun"},
}


def cost(model: experiment.Experiment, w: float) -> int:
    """Evaluations of the network an image."""
    return sum(request.evaluations(model, None, w))


def with_budget(
    config: dict, sampler: dict, grid: str, w: float, budget: int
) -> experiment.Experiment:
    """The experiment with as many levels as a number of evaluations pays for."""

    def build(steps: int) -> experiment.Experiment:
        sample = {**config["sample"], "sampler": sampler, "grid": grid, "steps": steps}
        return experiment.build({**config, "sample": sample})

    # A level costs one at least, and more levels cost more.
    steps = bisect.bisect(range(1, budget + 1), budget, key=lambda T: cost(build(T), w))
    return build(steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--judge", required=True)
    parser.add_argument("--w", type=float, default=0.3)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--evaluations", default="16,32,64,128")
    parser.add_argument("--grids", default="uniform_lambda,edm")
    parser.add_argument("--out", default="docs/samplers.png")
    options = parser.parse_args()
    budgets, grids = [int(e) for e in options.evaluations.split(",")], options.grids.split(",")

    config = stored.saved_config(options.workdir)
    meshes.split_cpu(config["sample"]["batch_size"])
    meshes.keep_compiled(options.workdir)
    model, mesh = experiment.build(config), meshes.make_mesh()
    look = features.FEATURES["judge"](mesh, options.judge)
    judges = panel.Panel([look], [reference.of_dataset(look, model.dataset)])
    held_out = judges.held_out(model.dataset)
    _, params = stored.load_ema(options.workdir, model)
    labels = sweep.balanced_labels(options.images, model.dataset.num_classes)

    found = {}
    print(
        "| grid | sampler | levels | evaluations | fd_judge | is_judge |\n|---|---|---|---|---|---|"
    )
    for done, grid in enumerate(grids, start=1):
        for (name, sampler), budget in itertools.product(SAMPLERS.items(), budgets):
            some = with_budget(config, sampler, grid, options.w, budget)
            images = generator.Generator(some, {"model": params}, mesh=mesh)(labels, options.w)
            scored = judges.score([look(images)], labels)
            spent = cost(some, options.w)
            fd, of_is = (scored[key].summary() for key in ("fd_judge", "is_judge"))
            found.setdefault((grid, name), []).append((spent, fd["value"], of_is["value"]))
            print(
                f"| {grid} | {name} | {some.sample.steps} | {spent} | {fd['value']:.3f} ± "
                f"{fd['error']:.3f} | {of_is['value']:.3f} ± {of_is['error']:.3f} |",
                flush=True,
            )
        draw(found, grids[:done], held_out, options)
    runlog.say(options.out)


def draw(found: dict, grids: list[str], held_out: dict | None, options) -> None:
    """A column a grid; above the distance, below the score; grey what held-out real images get.

    The score's axis begins a little below the best: what is far from it is not on the page.
    """
    page = figure.Figure(figsize=(5.2 * len(grids), 7.5), layout="constrained")
    axes = page.subplots(2, len(grids), sharex=True, sharey="row", squeeze=False)
    for (grid, name), points in found.items():
        spent, *values = np.array(points).T
        for axis, value in zip(axes[:, grids.index(grid)], values, strict=True):
            style = "--" if "eta = 1" in name or "ancestral" in name else "-"
            axis.plot(spent, value, style, marker="o", markersize=4, label=name)
    for row, (score, title) in enumerate((("fd_judge", "distance"), ("is_judge", "score"))):
        for axis, grid in zip(axes[row], grids, strict=True):
            if held_out:
                real = held_out["scores"][score]["value"]
                axis.axhline(real, color="0.6", linewidth=0.8, zorder=0)
            axis.set_xscale("log", base=2)
            axis.grid(alpha=0.25, linewidth=0.5)
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_title(f"{grid}: {title} ({score})", loc="left", fontsize=10)
        axes[row, 0].set_ylabel(score)
    for axis in axes[0]:
        axis.set_yscale("log")
    best = max(score for points in found.values() for *_, score in points)
    for axis in axes[1]:
        axis.set_ylim(0.98 * best, best + 0.002 * best)
        axis.set_xlabel(f"network evaluations an image, w = {options.w:g}")
    axes[0, -1].legend(frameon=False, fontsize=8)
    page.savefig(options.out, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
