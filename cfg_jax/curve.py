"""curve.png: a sweep as curves, beside those of the paper where there are some."""

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epy

from cfg_jax import paper, scores

with epy.lazy_imports():
    from matplotlib import figure as figures
    from matplotlib import ticker

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")  # Okabe & Ito
MARKERS = "osD^vP"

Sweep = Mapping[str, Any]  # {"recipe": {...}, "points": [...]}, as evaluate.py makes it
Point = Mapping[str, Any]


def by_rule(points: Sequence[Point]) -> dict[str, list[Point]]:
    """{rule: its points, by w}."""
    rules = dict.fromkeys(p["guidance"] for p in points)
    return {
        r: sorted((p for p in points if p["guidance"] == r), key=lambda p: p["w"]) for r in rules
    }


def title(name: str) -> str:
    """A score's name in words: "fd_judge" is the Frechet distance of the judge's features."""
    words, features = scores.kind(name).title, name.partition("_")[2]
    return f"{words} ({features})" if features else words


def axes_of_figure(names: Sequence[str]) -> tuple[str, str]:
    """Which scores the large curve is of: (Frechet distance, inception score)."""
    if "fid" in names:
        return "fid", "is"
    return names[0], next(name for name in names if name.startswith("is_"))


def of_paper(sweep: Sweep) -> dict[str, list[paper.Row]]:
    """The paper's curves, where the sweep's scores are of the same features and the same data."""
    names = sweep["points"][0]["scores"]
    return paper.curves(sweep["recipe"]["config"]) if "fid" in names else {}


def draw(sweep: Sweep) -> bytes:
    """curve.png: Frechet distance against inception score, and each score against w.

    Bars are 95 % bootstrap intervals; the grey lines are what held-out real images score, if there
    are any, the dashed one the distance of a reference image to the nearest of the others; the
    dotted curves are the paper's.
    """
    names = list(sweep["points"][0]["scores"])
    fd, score = axes_of_figure(names)
    figure, axes = _panels(names)
    rules = by_rule(sweep["points"])
    for (rule, points), colour, marker in zip(rules.items(), _cycle(COLOURS), _cycle(MARKERS)):
        style = {"color": colour, "marker": marker, "markersize": 5, "linewidth": 1.5}
        x, y = ([p["scores"][name]["value"] for p in points] for name in (score, fd))
        axes["curve"].plot(x, y, label=rule, **style)
        for p, *at in zip(points, x, y):
            axes["curve"].annotate(
                f"{p['w']:g}", at, xytext=(5, 5), textcoords="offset points", color=colour, size=8
            )
        w = [p["w"] for p in points]
        for name in names:
            axes[name].errorbar(w, *_bars(points, name), capsize=2, elinewidth=0.8, **style)
    for (setting, rows), grey in zip(of_paper(sweep).items(), _cycle(("0.3", "0.5", "0.7"))):
        style = {"color": grey, "linestyle": ":", "marker": ".", "linewidth": 1, "zorder": 1}
        w, fid, inception = zip(*rows, strict=True)
        axes["curve"].plot(inception, fid, label=f"the paper (50,000 images), {setting}", **style)
        axes[fd].plot(w, fid, **style)
        axes[score].plot(w, inception, **style)
    axes["curve"].set(xlabel=title(score), ylabel=title(fd))
    axes["curve"].set_title("fidelity against diversity; the numbers are w", loc="left")
    axes["curve"].legend(frameon=False)
    ws = sorted({p["w"] for p in sweep["points"]})
    for name in names:
        _against_w(axes[name], name, ws, sweep["recipe"])
    axes["curve"].ticklabel_format(useOffset=False)
    for key in ("curve", fd):
        values = [p["scores"][fd]["value"] for p in sweep["points"]]
        if min(values) > 0 and max(values) > 20 * min(values):
            axes[key].set_yscale("log")
    for axis in axes.values():
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.5)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def _panels(names: Sequence[str]):
    """The curve over two rows and two columns, and the scores around it, four to a row."""
    cells = [*names, *["."] * (-len(names) % 4)]
    beside, below = cells[:4], cells[4:]
    mosaic = [["curve", "curve", *beside[:2]], ["curve", "curve", *beside[2:]]]
    mosaic += [below[at : at + 4] for at in range(0, len(below), 4)]
    figure = figures.Figure(figsize=(13, 2.85 * len(mosaic)), layout="constrained")
    return figure, figure.subplot_mosaic(mosaic)


def _bars(points: Sequence[Point], name: str) -> tuple[np.ndarray, list[np.ndarray]]:
    """The values of a score, and how far down and up their intervals reach."""
    value = np.array([p["scores"][name]["value"] for p in points])
    low, high = (
        np.array([p["scores"][name].get(end, p["scores"][name]["value"]) for p in points])
        for end in ("low", "high")
    )
    return value, [np.maximum(value - low, 0), np.maximum(high - value, 0)]


def _against_w(axis, name: str, ws: Sequence[float], recipe: Mapping[str, Any]) -> None:
    axis.set_title(title(name), loc="left", fontsize=10)
    # Linear up to the first strengths, logarithmic beyond.
    axis.set_xscale("symlog", linthresh=0.5, linscale=1)
    axis.set_xticks(ws, [f"{w:g}" for w in ws], fontsize=8)
    axis.xaxis.set_minor_locator(ticker.NullLocator())
    axis.set_xlabel("w", fontsize=8)
    grey = {"color": "0.6", "linewidth": 0.8, "zorder": 0}
    held_out = (recipe["held_out"] or {"scores": {}})["scores"]
    if name in held_out:
        axis.axhline(held_out[name]["value"], **grey)
    if name.partition("_")[0] == "nn":
        of = {"nn": 0} | {f"nn_{f['name']}": i for i, f in enumerate(recipe["features"])}
        axis.axhline(recipe["reference"][of[name]]["nn"], linestyle="--", **grey)


def _cycle(things: Iterable) -> Iterator:
    while True:
        yield from things
