"""A sweep as files: sweep.csv and sweep.json, curve.png, and one page that holds it all."""

import base64
import csv
import html
import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath, epy

from cfg_jax import sample
from cfg_jax.data import images

with epy.lazy_imports():
    from matplotlib import figure as figures
    from matplotlib import ticker

Sweep = Mapping[str, Any]  # {"recipe": {...}, "points": [...]}, as evaluate.py makes it
Point = Mapping[str, Any]

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")  # Okabe & Ito
MARKERS = "osD^vP"
TITLES = {
    "fd": "Fréchet distance",
    "is": "inception score",
    "precision": "precision",
    "recall": "recall",
    "nn": "nearest reference image",
    "accuracy": "accuracy",
}


def write_tables(out: epath.Path, sweep: Sweep) -> None:
    """Writes sweep.json and sweep.csv, each whole or not at all."""
    _replace(out / "sweep.json", (json.dumps(sweep, indent=1) + "\n").encode())
    text = io.StringIO()
    rows = [_flat(point) for point in sweep["points"]]
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    _replace(out / "sweep.csv", text.getvalue().encode())


def write_pictures(out: epath.Path, sweep: Sweep, grids: Mapping[str, np.ndarray]) -> None:
    """Writes curve.png and report.html. grids: by rule, uint8 [H, W, C], a row a w."""
    curve = draw_curve(sweep)
    _replace(out / "curve.png", curve)
    _replace(out / "report.html", page(sweep, curve, grids).encode())


def _replace(path: epath.Path, content: bytes) -> None:
    beside = path.with_name(path.name + ".tmp")
    beside.write_bytes(content)
    beside.replace(path)


def _flat(point: Point) -> dict[str, Any]:
    flat = {key: value for key, value in point.items() if not isinstance(value, Mapping)}
    for name, score in point["scores"].items():
        flat |= {name if k == "value" else f"{name}_{k}": value for k, value in score.items()}
    for name, change in point["from_first_w"].items():
        flat |= {f"{name}_from_first_w_{k}": value for k, value in change.items()}
    return flat


def table(points: list[Point]) -> str:
    """The scores as text, one line a point."""
    names = list(points[0]["scores"])
    rows = [["guidance", "w", "scale", "evaluations", *names]]
    for p in points:
        scores = [f"{p['scores'][name]['value']:.3f}" for name in names]
        rows.append([p["guidance"], f"{p['w']:g}", f"{p['scale']:g}", evaluations(p), *scores])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *rest in rows:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return "\n".join(lines)


def evaluations(point: Point) -> str:
    """Network evaluations an image: "256", or "256 + 256" where a second network has a share."""
    others = (point.get(f"{role}_evaluations") for role in ("classifier", "weak"))
    return " + ".join(str(n) for n in (point["evaluations"], *others) if n) or "0"


def columns(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Which images a grid shows: the first two of ten classes at most."""
    chosen = [np.flatnonzero(labels == c)[:2] for c in sample.some_labels(num_classes)]
    return np.concatenate(chosen)


def _by_rule(points: list[Point]) -> dict[str, list[Point]]:
    rules = dict.fromkeys(p["guidance"] for p in points)
    return {
        r: sorted((p for p in points if p["guidance"] == r), key=lambda p: p["w"]) for r in rules
    }


def _title(name: str) -> str:
    plain, _, features = name.partition("_")
    title = TITLES.get(plain, plain)
    return f"{title} ({features})" if features else title


def draw_curve(sweep: Sweep) -> bytes:
    """curve.png: Frechet distance against inception score, and each score against w.

    Bars are 95 % bootstrap intervals; the grey lines are what held-out real images score, if there
    are any, the dashed one the distance of a reference image to the nearest of the others.
    """
    rules = _by_rule(sweep["points"])
    names = list(sweep["points"][0]["scores"])
    held_out = (sweep["recipe"]["held_out"] or {"scores": {}})["scores"]
    figure = figures.Figure(figsize=(13, 8.5), layout="constrained")
    last = np.repeat(names[4:], 4 // len(names[4:]))
    axes = figure.subplot_mosaic(
        [["curve", "curve", *names[:2]], ["curve", "curve", *names[2:4]], last.tolist()]
    )
    fd, score = names[:2]
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
            value = np.array([p["scores"][name]["value"] for p in points])
            low, high = (
                np.array([p["scores"][name].get(end, p["scores"][name]["value"]) for p in points])
                for end in ("low", "high")
            )
            bars = [np.maximum(value - low, 0), np.maximum(high - value, 0)]
            axes[name].errorbar(w, value, bars, capsize=2, elinewidth=0.8, **style)
    axes["curve"].set(xlabel=_title(score), ylabel=_title(fd))
    axes["curve"].set_title("fidelity against diversity; the numbers are w", loc="left")
    axes["curve"].legend(frameon=False)
    ws = sorted({p["w"] for p in sweep["points"]})
    for name in names:
        axes[name].set_title(_title(name), loc="left", fontsize=10)
        # Linear up to the first strengths, logarithmic beyond.
        axes[name].set_xscale("symlog", linthresh=0.5, linscale=1)
        axes[name].set_xticks(ws, [f"{w:g}" for w in ws], fontsize=8)
        axes[name].xaxis.set_minor_locator(ticker.NullLocator())
        axes[name].set_xlabel("w", fontsize=8)
        if name in held_out:
            axes[name].axhline(held_out[name]["value"], color="0.6", linewidth=0.8, zorder=0)
        if name == "nn":
            among = sweep["recipe"]["reference"]["nn"]
            axes[name].axhline(among, color="0.6", linewidth=0.8, linestyle="--", zorder=0)
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


def _cycle(things):
    while True:
        yield from things


STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #888; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.5rem; }
p { max-width: 46rem; } .soft { color: var(--soft); }
img { max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .85rem; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid var(--line);
         white-space: nowrap; }
th { white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
tr.first td { border-top: 2px solid var(--soft); }
td small { color: var(--soft); display: block; }
.grid { display: grid; grid-template-columns: auto 1fr; gap: 0 .7rem; margin: .5rem 0 1.5rem; }
.grid div { display: flex; flex-direction: column; justify-content: space-around;
            font-size: .8rem; text-align: right; }
.grid img { width: 100%; image-rendering: pixelated; }
pre { font-size: .75rem; overflow-x: auto; }
"""


def page(sweep: Sweep, curve: bytes, grids: Mapping[str, np.ndarray]) -> str:
    """report.html, self-contained: nothing on it is fetched from elsewhere."""
    recipe, points = sweep["recipe"], sweep["points"]
    reference, held_out = recipe["reference"], recipe["held_out"]
    parts = [
        f"<h1>{html.escape(reference['dataset'])}: {recipe['num_samples']:,} images a point</h1>",
        f"<p>Guidance strength w is the paper's: 0 is the conditional model, and the guidance scale"
        f" of other papers is 1 + w. Every point starts from the same noise (seed {recipe['seed']})"
        f" and takes the same {recipe['config']['sample']['steps']} noise levels. Scores use the"
        f" features of {html.escape(recipe['features']['name'])}, against {reference['images']:,}"
        f" images of {html.escape(reference['split'])}.</p>",
        f"<img src='{_data_uri(curve)}' alt='Scores against w'>",
        f"<p class='soft'>Bars are 95 % bootstrap intervals. {_grey_lines(held_out)} Dashed: the"
        " distance of a reference image to the nearest of the others.</p>",
        "<h2>Images from equal seeds</h2>",
    ]
    for rule, points_of_rule in _by_rule(points).items():
        names = "".join(f"<span>w={p['w']:g}</span>" for p in points_of_rule)
        picture = _data_uri(images.png(grids[rule]))
        parts.append(
            f"<h3>{html.escape(rule)}</h3><div class='grid'><div>{names}</div>"
            f"<img src='{picture}' alt='A row for each w of {html.escape(rule)}'></div>"
        )
    parts += [
        "<h2>Scores</h2>",
        f"<div class='scroll'>{_html_table(points, held_out and held_out['scores'])}</div>",
        "<p class='soft'>Evaluations are those of the network an image; behind a plus, those of a"
        " classifier with its gradient, or of a weaker model. Precision and recall use the"
        f" {recipe['precision_recall']['k']} nearest neighbours. Images nearer to a reference image"
        f" than these are to one another ({reference['nn']:.3f}) would be copies of them.</p>",
        "<h2>Recipe</h2><details><summary>Everything that made these numbers</summary>"
        f"<pre>{html.escape(json.dumps(recipe, indent=1))}</pre></details>",
    ]
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>Guidance sweep</title><style>{STYLE}</style></head><body>"
        + "\n".join(parts)
        + "</body></html>\n"
    )


def _grey_lines(held_out: Mapping[str, Any] | None) -> str:
    if held_out is None:
        return ""
    split = html.escape(held_out["split"])
    return f"Grey lines: {held_out['images']:,} real images of {split}, which training did not see."


def _html_table(points: list[Point], held_out: Mapping[str, Any] | None) -> str:
    names = list(points[0]["scores"])

    def cells(scores: Mapping[str, Any]) -> str:
        return "".join(f"<td>{_with_interval(scores[name])}</td>" for name in names)

    head = ["guidance", "w", "scale", "evaluations", *map(_title, names)]
    lines = ["<tr>" + "".join(f"<th>{html.escape(h)}</th>" for h in head) + "</tr>"]
    for of_rule in _by_rule(points).values():
        for i, p in enumerate(of_rule):
            start = [html.escape(p["guidance"]), f"{p['w']:g}", f"{p['scale']:g}", evaluations(p)]
            start = "".join(f"<td>{cell}</td>" for cell in start)
            lines.append(f"<tr{' class=first' * (i == 0)}>{start}{cells(p['scores'])}</tr>")
    if held_out is not None:
        lines.append(f"<tr class=first><td colspan=4>real, held out</td>{cells(held_out)}</tr>")
    return f"<table>{''.join(lines)}</table>"


def _with_interval(score: Mapping[str, float]) -> str:
    value = f"{score['value']:.3f}"
    if "low" not in score:
        return value
    return f"{value} <small>{score['low']:.3f} to {score['high']:.3f}</small>"


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
