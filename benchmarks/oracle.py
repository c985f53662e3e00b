"""The oracle table: every sampler, guidance rule and grid against known answers, as distributions.

    python -m benchmarks.oracle [--rules=NAME,NAME] [--points=1500] [--out=docs/oracle.md]

Whole chains in float64 with exact denoisers, no clipping and no network, on the two targets of
tests/oracle.py: (b) two Gaussians of unequal spreads, (c) a mixture of three classes in the plane.
What a chain makes is compared with the limit of many steps of the equation that it discretises,
solved finely for the same rule from the same start and, where there is noise, along the same
Brownian path: so what differs is the sampler's error, and little of it chance.
"""

import argparse
import datetime
import functools
import importlib.metadata
import inspect
import itertools
import platform
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from cfg_jax.diffusion import edm, guidance, mixture, multistep, samplers, schedules

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "tests"))
import oracle  # noqa: E402  the answers that the tests have

W = 1.0
STEPS = (16, 32, 64, 256)
FITTED = (64, 128, 256, 512)
# Each with the share of the reverse equation's noise that it adds: see tests/oracle.py.
SAMPLERS = {
    "ancestral, v = 0.3": (samplers.Ancestral(0.3), 1.0),
    "ddim, eta = 0": (samplers.DDIM(0.0), 0.0),
    "ddim, eta = 1": (samplers.DDIM(1.0), 1.0),
    "dpmpp_2m, eta = 0": (multistep.DPMSolver2M(0.0), 0.0),
    "dpmpp_2m, eta = 1": (multistep.DPMSolver2M(1.0), 1.0),
    "unipc": (multistep.UniPC(), 0.0),
    "euler": (edm.Euler(), 0.0),
    "heun": (edm.Heun(), 0.0),
}
GRIDS = {name: grid for name, grid in schedules.GRIDS.items() if name != "explicit"}
CELLS = 2000  # of lambda, for the fine solution
FINE = np.linspace(-20, 20, CELLS + 1)
LEFT_OUT = {
    "cfg_plus_plus": "it re-adds another noise than z has, moves by as much in every step, however "
    "short, and so has no limit of many steps",
    "distilled": "it is what a network was trained to say, and has no formula",
}
TARGETS = {"b": "two Gaussians of unequal spreads", "c": "a mixture of three classes in the plane"}


def rule_of(name: str):
    """The table's rule at strength W; around the paper's rule where it goes around another.

    None for what is LEFT_OUT.
    """
    if name in LEFT_OUT:
        return None
    entry = guidance.GUIDANCE[name]
    first = next(iter(inspect.signature(entry).parameters))
    return entry(guidance.ClassifierFree(W) if first == "rule" else W)


def target(name: str, points: int):
    """(the class of each point [N], its conditional Mixture, the unconditional one).

    Both targets have three components in the plane, so that one program serves both; those of (b)
    coincide, and its two coordinates are two draws.
    """
    label = np.arange(points) % (3 if name == "c" else 1)
    if name == "c":
        means, stds, weights = oracle.MEANS, oracle.STDS, oracle.WEIGHTS
        given = np.where(label[:, None] == np.arange(3), 0.0, -np.inf)
        conditional = mixture.Mixture(jnp.array(means), jnp.array(stds), jnp.array(given))
        unconditional = mixture.Mixture(
            jnp.array(means), jnp.array(stds), jnp.log(jnp.array(weights))
        )
        return label, conditional, unconditional
    conditional, unconditional = (
        mixture.Mixture(jnp.full((3, 2), mean), jnp.full(3, std), jnp.zeros(shape))
        for (mean, std), shape in (
            (oracle.CONDITIONAL, (points, 3)),
            (oracle.UNCONDITIONAL, (3,)),
        )
    )
    return label, conditional, unconditional


def guided(rule, conditional, unconditional):
    """The rule on exact denoisers; its classifier is p(c|z) up to a factor, p(z|c) / p(z)."""

    def log_prob(z, lam):
        return conditional.log_density(z, lam) - unconditional.log_density(z, lam)

    second = log_prob if rule.second == "classifier" else unconditional.denoiser()
    return rule(conditional.denoiser(), second)


def draws_of(rule, normals):
    """i -> normals[i], as the rule would have them."""
    noise = lambda i: normals[i]  # noqa: E731
    return rule.draws(noise) if hasattr(rule, "draws") else noise


# The kinds are static: jax (0.10) now and then takes the program of one dataclass for another's, of
# as many fields.
@functools.partial(jax.jit, static_argnames="kinds")
def chain(rule, sampler, models, normals, lams, *, kinds):
    del kinds
    return sampler(guided(rule, *models), draws_of(rule, normals), lams).x


@functools.partial(jax.jit, static_argnames="kind")
def estimate(rule, models, z, lam, *, kind):
    del kind
    return guided(rule, *models)(z, lam).x


def limit(rule, models, share, start, normals):
    """The image [N, 2] of the fine solution."""

    def x_of(z, lam):
        return np.asarray(estimate(rule, models, z, lam, kind=type(rule)))

    if share == 0:
        return oracle.flow(x_of, start, FINE[::2])
    draw = jax.jit(lambda i: draws_of(rule, jnp.array(normals))(i + 1))
    return oracle.heun(x_of, start, (np.asarray(draw(i)) for i in range(CELLS)), FINE, share)


def coarse(lams, start, normals):
    """The draws [T + 1, N, 2] of a chain on lams, from a start [N, 2] and normals [CELLS, N, 2].

    With one denoiser for all z, what a kick at lam adds to z is e^(lam / 2) sigma at the end of its
    step: the kicks of a step, so weighed, summed and scaled to a unit normal, are its draw. A chain
    that begins above lambda_min begins with what the path has become by then.
    """
    cell = np.rint((np.asarray(lams) + 20) / 40 * CELLS).astype(int)
    cell = np.minimum(
        np.maximum.accumulate(cell - np.arange(len(cell))) + np.arange(len(cell)), CELLS
    )
    weights = np.exp(0.5 * FINE[:-1])
    squares = np.concatenate([[0], np.cumsum(weights**2)])
    sums = [start]
    if cell[0]:
        before, h = slice(0, cell[0]), FINE[1] - FINE[0]
        pushed = np.exp(-10) * start + np.sqrt(h) * np.tensordot(
            weights[before], normals[before], 1
        )
        sums = [pushed / np.sqrt(np.exp(-20) + h * squares[cell[0]])]
    for a, b in itertools.pairwise(cell):
        whole = np.tensordot(weights[a:b], normals[a:b], 1)
        sums.append(whole / np.sqrt(squares[b] - squares[a]))
    # The last draw has no step: it is one that nothing else reads.
    return np.stack([*sums, np.random.default_rng(1).standard_normal(start.shape)])


def errors(x, true, label):
    """The largest over classes of the errors of mean, spread (both in spreads) and share."""
    rows = []
    for c in np.unique(label):
        ours, theirs = x[label == c], true[label == c]
        spread, wanted = (np.sqrt(np.trace(np.cov(a.T)) / 2) for a in (ours, theirs))
        shares = [np.mean(oracle.likely_class(a) == c) for a in (ours, theirs)]
        mean = np.abs(ours.mean(0) - theirs.mean(0)).max() / wanted
        rows.append([mean, spread / wanted - 1, shares[0] - shares[1]])
    rows = np.array(rows)
    return rows[np.abs(rows).argmax(0), np.arange(3)]


def measure(points: int, rules: list[str]):
    """{(rule, target, sampler, grid): {T: errors}}, T of FITTED too on uniform lambda."""
    rng = np.random.default_rng(0)
    start = rng.standard_normal((points, 2))
    normals = rng.standard_normal((CELLS, points, 2))

    @functools.cache
    def levels(grid, steps):
        return np.asarray(GRIDS[grid](schedules.Cosine(), steps), np.float64)

    @functools.cache
    def draws(grid, steps):
        return coarse(levels(grid, steps), start, normals)

    found = {}
    for name in rules:
        rule = rule_of(name)
        for which in TARGETS if rule is not None else ():
            label, *models = target(which, points)
            true = functools.cache(lambda share: limit(rule, models, share, start, normals))  # noqa: B023
            for sampler, (run, share) in SAMPLERS.items():
                for grid in GRIDS:
                    steps = sorted({*STEPS, *(FITTED if grid == "uniform_lambda" else ())})
                    cell = found[name, which, sampler, grid] = {}
                    for T in steps:
                        z = draws(grid, T)
                        z = z if share else np.concatenate([start[None], z[1:]])
                        kinds = (type(rule), type(run))
                        x = np.asarray(chain(rule, run, models, z, levels(grid, T), kinds=kinds))
                        cell[T] = errors(x, true(share), label)
            print(f"{name} ({which})", file=sys.stderr, flush=True)
        jax.clear_caches()  # a process may map so many programs and no more
    return found


def order(cell) -> str:
    """The fitted order of the distance made of the errors of mean and spread."""
    if not set(FITTED) <= set(cell):
        return ""
    return f"{oracle.order(FITTED, [np.hypot(*cell[T][:2]) for T in FITTED]):.2f}"


def number(value: float) -> str:
    percent = 100 * value
    return f"{percent:.0f}" if abs(percent) >= 10 else f"{percent:.2g}"


def report(found, points: int, seconds: float) -> str:
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("jax", "jaxlib", "numpy"))
    rules = dict.fromkeys(rule for rule, *_ in found)
    lines = [
        "# The oracle table",
        "",
        f"Made by `python -m benchmarks.oracle` on {datetime.date.today()} in {seconds / 60:.0f} "
        f"minutes on one core ({platform.machine()}): Python {platform.python_version()}, "
        f"{versions}.",
        "",
        f"Whole chains at w = {W:g} in float64, {points} points from one set of draws, with exact "
        "denoisers, no clipping and no network, against the limit of many steps of the same rule: "
        "the probability flow for samplers without noise, the reverse equation for the others "
        "(`tests/oracle.py`). Cells are errors in per cent at "
        f"{', '.join(map(str, STEPS))} levels: of the mean / of the spread, both in units of the "
        "spread, and for (c) / of the share of points that the exact classifier reads as their "
        "class; of three classes, the largest. Heun asks its denoiser 2 T - 1 times, the others T "
        "times. The order is fitted to the distance made of mean and spread at "
        f"{', '.join(map(str, FITTED))} levels uniform in lambda. Where there is noise, chance is "
        "left: some 0.3 per cent at 256 levels, so that an order of theirs is rough.",
        "",
    ]
    lines += [f"`{name}` is left out: {why}." for name, why in LEFT_OUT.items()]
    lines += ["", "## The fitted orders, (b) / (c)", ""]
    lines += [f"| rule | {' | '.join(SAMPLERS)} |", "|" + "---|" * (1 + len(SAMPLERS))]
    for rule in rules:
        cells = [[found[rule, which, s, "uniform_lambda"] for which in TARGETS] for s in SAMPLERS]
        orders = ["\u00a0/\u00a0".join(map(order, pair)) for pair in cells]
        lines.append(f"| {' | '.join([rule, *orders])} |")
    lines.append("")
    for rule, (which, title) in itertools.product(rules, TARGETS.items()):
        lines += [f"## {rule}, ({which}) {title}", ""]
        head = ["sampler", "grid", *map(str, STEPS), "order"]
        lines += [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
        for sampler, grid in itertools.product(SAMPLERS, GRIDS):
            cell = found[rule, which, sampler, grid]
            parts = 3 if which == "c" else 2
            values = ["\u00a0/\u00a0".join(number(v) for v in cell[T][:parts]) for T in STEPS]
            lines.append(f"| {' | '.join([sampler, grid, *values, order(cell)])} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rules", default=",".join(guidance.GUIDANCE))
    parser.add_argument("--points", type=int, default=1500)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "oracle.md")
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_disable_most_optimizations", True)  # small programs, and many of them
    begin = time.perf_counter()
    found = measure(options.points, options.rules.split(","))
    options.out.write_text(report(found, options.points, time.perf_counter() - begin))
    print(options.out)


if __name__ == "__main__":
    main()
