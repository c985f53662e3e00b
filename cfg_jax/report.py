"""A sweep as files: sweep.csv and sweep.json, curve.png, and one page that holds it all."""

import base64
import csv
import html
import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from cfg_jax import curve, sample
from cfg_jax.data import images

Sweep, Point = curve.Sweep, curve.Point


def write_tables(out: epath.Path, sweep: Sweep) -> None:
    """Writes sweep.json and sweep.csv, each whole or not at all."""
    _replace(out / "sweep.json", (json.dumps(sweep, indent=1) + "\n").encode())
    text = io.StringIO()
    rows = [_flat(point) for point in sweep["points"]]
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    _replace(out / "sweep.csv", text.getvalue().encode())


def write_scores(out: epath.Path, scores: Mapping[str, Any]) -> None:
    """Writes scores.json, of one set of images, whole or not at all."""
    _replace(out / "scores.json", (json.dumps(scores, indent=1) + "\n").encode())


def write_pictures(out: epath.Path, sweep: Sweep, grids: Mapping[str, list[np.ndarray]]) -> None:
    """Writes curve.png and report.html. grids: by rule, a picture uint8 [H, W, C] a w."""
    picture = curve.draw(sweep)
    _replace(out / "curve.png", picture)
    _replace(out / "report.html", page(sweep, picture, grids).encode())


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
        scores = [number(p["scores"][name]["value"]) for name in names]
        rows.append([p["guidance"], f"{p['w']:g}", f"{p['scale']:g}", evaluations(p), *scores])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *rest in rows:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return "\n".join(lines)


def number(value: float) -> str:
    """Three decimals, or two digits where these would say nothing."""
    return f"{value:.3f}" if abs(value) >= 0.01 or value == 0 else f"{value:.1e}"


def evaluations(point: Point) -> str:
    """Network evaluations an image: "256", or "256 + 256" where a second network has a share."""
    others = (point.get(f"{role}_evaluations") for role in ("classifier", "weak"))
    return " + ".join(str(n) for n in (point["evaluations"], *others) if n) or "0"


def columns(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Which images a grid shows: the first two of ten classes at most."""
    chosen = [np.flatnonzero(labels == c)[:2] for c in sample.some_labels(num_classes)]
    return np.concatenate(chosen)


STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #888; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.5rem; }
p { max-width: 46rem; } .soft { color: var(--soft); }
img { max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
.scroll { overflow-x: auto; }
.curve { min-width: 52rem; } /* on a telephone these scroll, so that they can be read */
.shown, .row { min-width: 40rem; }
.row span { position: sticky; left: 0; background: Canvas; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .85rem; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid var(--line);
         white-space: nowrap; }
th { white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
tr.first td { border-top: 2px solid var(--soft); }
td small { color: var(--soft); display: block; }
.row { display: flex; align-items: center; gap: .7rem; margin: 0 0 2px; }
.row span { flex: 0 0 4rem; font-size: .8rem; text-align: right; }
.row img { min-width: 0; }
.row img, .shown { width: 100%; image-rendering: pixelated; border-radius: 2px; }
.choose { display: flex; align-items: center; gap: .7rem; margin: .5rem 0; }
.choose input { flex: 1; max-width: 30rem; accent-color: #0072b2; }
.choose output { font-variant-numeric: tabular-nums; }
pre { font-size: .75rem; overflow-x: auto; }
"""


# The slider of a rule shows one of the pictures below it; without scripts these are all there is.
SCRIPT = """
for (const rule of document.querySelectorAll(".rule")) {
  const choose = rule.querySelector("input"), rows = rule.querySelectorAll(".row img");
  const show = () => {
    const row = rows[choose.value];
    rule.querySelector(".shown").src = row.src;
    rule.querySelector("output").textContent = row.dataset.w;
  };
  rule.querySelector(".choose").hidden = rule.querySelector(".shown").hidden = false;
  choose.addEventListener("input", show);
  show();
}
"""


def page(sweep: Sweep, picture: bytes, grids: Mapping[str, list[np.ndarray]]) -> str:
    """report.html, self-contained: nothing on it is fetched from elsewhere."""
    recipe, points = sweep["recipe"], sweep["points"]
    held_out, dataset = recipe["held_out"], recipe["config"]["dataset"]["name"]
    looks = "; ".join(map(_compared, recipe["features"], recipe["reference"]))
    parts = [
        f"<h1>{html.escape(dataset)}: {recipe['num_samples']:,} images a point</h1>",
        f"<p>Guidance strength w is the paper's: 0 is the conditional model, and the guidance scale"
        f" of other papers is 1 + w. Every point starts from the same noise (seed {recipe['seed']})"
        f" and takes the same {recipe['config']['sample']['steps']} noise levels. Scores use the"
        f" features of {html.escape(looks)}.</p>",
        f"<div class='scroll'><img class='curve' src='{_data_uri(picture)}' alt='Scores against w'>"
        "</div>",
        f"<p class='soft'>Bars are 95 % bootstrap intervals. {_grey_lines(held_out)} Dashed: the"
        f" distance of a reference image to the nearest of the others.{_dotted(sweep)}</p>",
        "<h2>Images from equal seeds</h2>",
    ]
    for rule, points_of_rule in curve.by_rule(points).items():
        parts.append(_pictures(html.escape(rule), [p["w"] for p in points_of_rule], grids[rule]))
    parts += [
        "<h2>Scores</h2>",
        f"<div class='scroll'>{_html_table(points, held_out and held_out['scores'])}</div>",
        "<p class='soft'>Evaluations are those of the network an image; behind a plus, those of a"
        " classifier with its gradient, or of a weaker model. Precision and recall use the"
        f" {recipe['precision_recall']['k']} nearest neighbours. The nearest reference image is"
        " told by its distance in the mean: from one another reference images are"
        f" {recipe['reference'][0]['nn']:.3f}, and a copy would be at 0.</p>",
        "<h2>Recipe</h2><details><summary>Everything that made these numbers</summary>"
        f"<pre>{html.escape(json.dumps(recipe, indent=1))}</pre></details>",
    ]
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>Guidance sweep</title><style>{STYLE}</style></head><body>"
        + "\n".join(parts)
        + f"<script>{SCRIPT}</script></body></html>\n"
    )


def _pictures(rule: str, ws: list[float], grids: list[np.ndarray]) -> str:
    """A slider over w with the picture that it chooses, and all of them below."""
    rows = "".join(
        f"<div class='row'><span>w={w:g}</span><img src='{_data_uri(images.png(grid))}'"
        f" data-w='{sample.name_w(w)}' alt='{rule} at w={w:g}'></div>"
        for w, grid in zip(ws, grids, strict=True)
    )
    return (
        f"<section class='rule'><h3>{rule}</h3><label class='choose' hidden>w <input type='range'"
        f" min='0' max='{len(ws) - 1}' value='0' aria-label='w of {rule}'><output></output></label>"
        f"<div class='scroll'><img class='shown' alt='{rule} at the w chosen' hidden></div>"
        "<details open><summary>all of them</summary>"
        f"<div class='scroll'>{rows}</div></details></section>"
    )


def _compared(look: Mapping[str, Any], reference: Mapping[str, Any]) -> str:
    count = f"{reference['images']:,} images" if reference["images"] else "images"
    return f"{look['name']}, against {count} of {reference['dataset']}, {reference['split']}"


def _dotted(sweep: Sweep) -> str:
    settings = ", ".join(curve.of_paper(sweep))
    return f" Dotted: the paper's table ({html.escape(settings)})." if settings else ""


def _grey_lines(held_out: Mapping[str, Any] | None) -> str:
    if held_out is None:
        return ""
    split = html.escape(held_out["split"])
    return f"Grey lines: {held_out['images']:,} real images of {split}, which training did not see."


def _html_table(points: list[Point], held_out: Mapping[str, Any] | None) -> str:
    names = list(points[0]["scores"])

    def cells(scores: Mapping[str, Any]) -> str:
        return "".join(f"<td>{_with_interval(scores.get(name))}</td>" for name in names)

    head = ["guidance", "w", "scale", "evaluations", *map(curve.title, names)]
    lines = ["<tr>" + "".join(f"<th>{html.escape(h)}</th>" for h in head) + "</tr>"]
    for of_rule in curve.by_rule(points).values():
        for i, p in enumerate(of_rule):
            start = [html.escape(p["guidance"]), f"{p['w']:g}", f"{p['scale']:g}", evaluations(p)]
            start = "".join(f"<td>{cell}</td>" for cell in start)
            lines.append(f"<tr{' class=first' * (i == 0)}>{start}{cells(p['scores'])}</tr>")
    if held_out is not None:
        lines.append(f"<tr class=first><td colspan=4>real, held out</td>{cells(held_out)}</tr>")
    return f"<table>{''.join(lines)}</table>"


def _with_interval(score: Mapping[str, float] | None) -> str:
    if score is None:
        return ""
    value = number(score["value"])
    if "low" in score:
        return f"{value} <small>{number(score['low'])} to {number(score['high'])}</small>"
    return f"{value} <small>± {number(score['error'])}</small>" if "error" in score else value


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
