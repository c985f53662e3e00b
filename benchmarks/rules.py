"""Every guidance rule on one trained model: strips of images at equal seeds, and the frontier.

    python -m benchmarks.rules --workdir=runs/digits --judge=runs/digits_judge [--weak=DIR]
        [--classifier=DIR] [--num_samples=1000] [--steps=32] [--sampler=NAME] [--grid=NAME]
        [--rules=NAME,NAME] [--w=0.5,1] [--data_dir=DIR] [--split=SPLIT] [--out=docs/guidance]

Writes RULE.png, a row for each w and a column a class, frontier.png, the Frechet distance against
the inception score of every rule over w, and rules.json with the numbers and what each point cost.
Image i starts from the same noise at every point. Autoguidance is left out without --weak,
classifier guidance without --classifier, and that is said. CFG++ is sampled by DDIM, where
--sampler would not take it.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib import figure as figures

from cfg_jax import (
    experiment,
    features,
    generator,
    reference,
    request,
    sample,
    scores,
    stored,
    sweep,
)
from cfg_jax.data import images
from cfg_jax.diffusion import corrections, directions, guidance, strengths
from cfg_jax.metrics import frechet, inception_score
from cfg_jax.runtime import mesh as meshes

FREE = guidance.ClassifierFree


@dataclasses.dataclass(frozen=True)
class Variant:
    """A rule, w -> Guidance, over some w, what it moves away from, and what guides it: no second
    network, or one that is "weak" or a "classifier".
    """

    make: Callable
    w: Sequence[float] = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
    negative: Sequence[int] = ()
    guide: str = ""


VARIANTS = {
    "classifier_free": Variant(FREE),
    "classifier": Variant(guidance.ClassifierGuidance, guide="classifier"),
    "interval": Variant(lambda w: strengths.Interval(FREE(w))),
    "linear": Variant(lambda w: strengths.linear(FREE(w))),
    "cosine": Variant(lambda w: strengths.cosine(FREE(w))),
    "power_cosine": Variant(lambda w: strengths.power_cosine(FREE(w))),
    "rescale": Variant(lambda w: corrections.Rescale(FREE(w))),
    "dynamic_threshold": Variant(lambda w: corrections.DynamicThreshold(FREE(w))),
    "apg": Variant(directions.AdaptiveProjected),
    "cfg_zero_star": Variant(directions.ZeroStar),
    "cfg_plus_plus": Variant(directions.PlusPlus, w=(-1.0, -0.9, -0.8, -0.6, -0.3, 0.0)),
    "autoguidance": Variant(FREE, guide="weak"),
    "away_from_the_mean": Variant(FREE, negative=range(10)),
    "scaled_score": Variant(guidance.ScaledScore),
    "scaled_noise": Variant(guidance.ScaledNoise),
}


def generators(options: argparse.Namespace) -> dict[str, generator.Generator]:
    """The generator of every variant that can be run; says which cannot."""
    config = stored.saved_config(options.workdir)
    config["sample"] |= {"steps": options.steps, "grid": options.grid}
    config["sample"] |= {"sampler": {"name": options.sampler}, "guidance": {}}
    asked = {"data_dir": options.data_dir, "split": options.split}
    config["dataset"] |= {name: value for name, value in asked.items() if value}
    meshes.split_cpu(config["sample"]["batch_size"])
    paths = {"weak": options.weak, "classifier": options.classifier}
    guides = {kind: (path, stored.open_guide(f"--{kind}", path)) for kind, path in paths.items()}
    needs_pair = experiment.build(config).sampler.needs_pair
    out = {}
    for name, variant in VARIANTS.items():
        path, guide = guides.get(variant.guide, (None, None))
        if variant.guide and guide is None:
            print(f"{name} is left out: it needs --{variant.guide}=DIR")
            continue
        section, rule = dict(config["sample"]), variant.make(0.0)
        if variant.guide == "classifier":
            section["guidance"] = {"name": "classifier"}
        if needs_pair and not rule.keeps_pair:
            section["sampler"] = {"name": "ddim"}
        model = experiment.build({**config, "sample": section})
        one, _ = generator.load(options.workdir, model, path, guide)
        out[name] = one.guided(variant.make, variant.negative)
    return out


def point(made: np.ndarray, look: features.Extractor, real: scores.Reference) -> dict:
    """The Frechet distance and the inception score of images."""
    seen = look(made)
    return {
        "fd": frechet.distance(frechet.moments(seen["features"]), real.moments),
        "is": inception_score.inception_score(seen["logits"]).mean,
    }


def frontier(points: Sequence[dict], title: str, classes: int) -> figures.Figure:
    """Frechet distance against inception score, a line a rule; the numbers are w.

    A judge knows nearly every image, and scores crowd below the number of classes, which is the
    most that a score can be: so the axis is of what is missing to it.
    """
    figure = figures.Figure(figsize=(9, 6.5), layout="constrained")
    axes = figure.subplots()
    for i, name in enumerate(dict.fromkeys(p["rule"] for p in points)):
        own = [p for p in points if p["rule"] == name]
        x, y = [classes - p["is"] for p in own], [p["fd"] for p in own]
        style = {"marker": "osD^vPX"[i % 7], "color": f"C{i % 10}", "linewidth": 1}
        axes.plot(x, y, "-" if i < 10 else "--", label=name, markersize=4, **style)
        for at in zip(x, y, own):
            text = f"{at[2]['w']:g}"
            axes.annotate(text, at[:2], xytext=(3, 3), textcoords="offset points", size=6)
    axes.set(xscale="log", yscale="log", ylabel="Fréchet distance (judge)")
    axes.set_xlabel(f"{classes} - inception score (judge): better to the right")
    axes.invert_xaxis()
    axes.set_title(title, loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.25, linewidth=0.5)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rules")
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--judge", required=True)
    parser.add_argument("--weak")
    parser.add_argument("--classifier")
    parser.add_argument("--num_samples", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--sampler", default="ancestral")
    parser.add_argument("--grid", default="uniform_lambda")
    parser.add_argument("--rules", help="some of them: NAME,NAME")
    parser.add_argument("--w", help="in place of each rule's own: W,W")
    parser.add_argument("--data_dir", help="where the real images are")
    parser.add_argument("--split", help="the real images to compare with")
    parser.add_argument("--out", default="docs/guidance", type=Path)
    options = parser.parse_args()
    asked = options.rules.split(",") if options.rules else list(VARIANTS)
    strengths_asked = [float(w) for w in options.w.split(",")] if options.w else None

    made_by = {name: one for name, one in generators(options).items() if name in asked}
    model = next(iter(made_by.values())).model
    look = features.FEATURES["judge"](meshes.make_mesh(), options.judge)
    real = reference.of_dataset(look, model.dataset).seen
    labels = sweep.balanced_labels(options.num_samples, model.dataset.num_classes)
    shown = [int(np.flatnonzero(labels == c)[0]) for c in sample.some_labels(labels.max() + 1)]
    options.out.mkdir(parents=True, exist_ok=True)
    points = []
    for name, one in made_by.items():
        rows = []
        for w in strengths_asked or VARIANTS[name].w:
            made = one(labels, w)
            rows.append(made[shown])
            count = request.evaluations(one.model, one.guide, w)
            p = {"rule": name, "w": w, **point(made, look, real)}
            p |= {"evaluations": count._asdict(), "sampler": type(one.model.sampler).__name__}
            points.append(p)
            print(f"{name:20} w={w:<4g} fd {p['fd']:8.2f}  is {p['is']:.3f}  {count}", flush=True)
        picture = images.grid(np.concatenate(rows), len(shown), scale=4)
        images.save_png(options.out / f"{name}.png", picture)
    title = f"{model.dataset.name}, {options.num_samples} images a point, {options.steps} levels"
    page = frontier(points, f"{title}; the numbers are w", model.dataset.num_classes)
    page.savefig(options.out / "frontier.png", dpi=110, metadata={"Software": None})
    recipe = {key: str(value) for key, value in vars(options).items()}
    text = json.dumps({"recipe": recipe, "points": points}, indent=1)
    (options.out / "rules.json").write_text(text + "\n")
    print(f"all of them: {options.out}")


if __name__ == "__main__":
    main()
