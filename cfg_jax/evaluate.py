"""The evaluation job: fidelity against diversity over a list of w, the same seeds for each.

    python -m cfg_jax.evaluate --workdir=DIR --judge=DIR --w=0,0.1,0.3,1,4 [--num_samples=50000]
        [--classifier=DIR] [--weak=DIR] [--guidance=NAME,NAME] [--seed=0]
        [--config.sample.FIELD=VALUE ...] [--out=DIR]

Writes sweep.csv, sweep.json (the scores with the full recipe), curve.png and report.html. The
images are kept beside them: a sweep that was killed goes on where it stopped, and one with another
w, or more samples, makes only what is missing.
"""

import importlib.metadata
import platform
from typing import Any

import jax
import numpy as np
from absl import flags
from etils import epath

from cfg_jax import (
    command,
    experiment,
    features,
    generator,
    report,
    request,
    sample,
    schema,
    scores,
    sweep,
)
from cfg_jax.data import datasets, images
from cfg_jax.diffusion import guidance
from cfg_jax.metrics import neighbours
from cfg_jax.runtime import logging as runlog
from cfg_jax.runtime import mesh as meshes
from cfg_jax.types import Params, UsageError

FLAGS = flags.FLAGS


def _define_flags() -> None:
    flags.DEFINE_string("workdir", None, "The folder of a trained model.", required=True)
    flags.DEFINE_string("w", "0,0.1,0.3,0.5,1,2,4", "Guidance strengths (scale - 1).")
    flags.DEFINE_integer("num_samples", 50_000, "Images a point.", lower_bound=2)
    flags.DEFINE_integer("seed", 0, "Image i of every point starts from the same noise.")
    flags.DEFINE_string("features", "judge", f"Who looks: {', '.join(features.FEATURES)}.")
    flags.DEFINE_string("judge", None, "The folder of a classifier of clean images.")
    flags.DEFINE_string("classifier", None, "The folder of a noisy classifier, to guide as well.")
    flags.DEFINE_string("weak", None, "The folder of a weaker model, the reference to guide by.")
    flags.DEFINE_string(
        "guidance", None, "Rules to compare; the config's if absent, and classifier where given."
    )
    flags.DEFINE_string("out", None, "Where the files go; WORKDIR/sweep if absent.")
    flags.DEFINE_bool("distributed", False, "Join the other processes of a cluster.")


def rules(config: dict[str, Any], classifier: str | None, asked: str | None) -> list[str]:
    """The names of the guidance rules to compare. Raises UsageError for one that is not known."""
    own = config["sample"]["guidance"]["name"]
    names = asked.split(",") if asked else [own, *(["classifier"] if classifier else [])]
    for name in names:
        schema.entry("--guidance", guidance.GUIDANCE, name)
    if classifier and "classifier" not in names:
        raise UsageError(
            f"--classifier={classifier} guides nothing: --guidance={asked} has no 'classifier'."
        )
    return list(dict.fromkeys(names))


def with_rule(config: dict[str, Any], name: str) -> experiment.Experiment:
    """The experiment, sampled with another guidance rule; its own options stay the config's."""
    own = config["sample"]["guidance"]
    section = own if own["name"] == name else {"name": name}
    return experiment.build({**config, "sample": {**config["sample"], "guidance": section}})


def main(config: dict[str, Any]) -> None:
    """Makes and scores every point, and writes the results after each."""
    w = list(dict.fromkeys(sample.parse_numbers("w", FLAGS.w, float)))
    names = rules(config, FLAGS.classifier, FLAGS.guidance)
    make_extractor = schema.entry("--features", features.FEATURES, FLAGS.features)
    meshes.initialize_distributed(FLAGS.distributed)
    meshes.split_cpu(config["sample"]["batch_size"])
    meshes.keep_compiled(FLAGS.workdir)
    mesh = meshes.make_mesh()

    classifier = generator.open_guide("--classifier", FLAGS.classifier)
    weak = generator.open_guide("--weak", FLAGS.weak)
    models = {name: with_rule(config, name) for name in names}
    guides = {
        n: classifier if m.guidance().second == "classifier" else weak for n, m in models.items()
    }
    for name in names:
        request.check(models[name], guides[name], [0], w, FLAGS.seed)
    model = models[names[0]]
    look = make_extractor(model, mesh, FLAGS.judge)
    networks = load_networks(model, classifier, weak)
    fingerprints = {n: features.fingerprint(params) for n, (_, params) in networks.items()}
    home = epath.Path(FLAGS.workdir)
    out = epath.Path(FLAGS.out or (home.parent if home.is_file() else home) / "sweep")
    if jax.process_index() == 0:
        sample.make_folder(out)

    reference, of_real = look_at_real(look, model.dataset)
    recipe = {
        "workdir": FLAGS.workdir,
        "config": config,
        "classifier": classifier and {"workdir": FLAGS.classifier, "config": classifier.config},
        "weak": weak and {"workdir": FLAGS.weak, "config": weak.config},
        "steps": {n: step for n, (step, _) in networks.items()},
        "parameters": fingerprints,
        "guidance": names,
        "w": w,
        "num_samples": FLAGS.num_samples,
        "labels": "image i is of class i mod the number of classes",
        "seed": FLAGS.seed,
        "features": look.recipe,
        **of_real,
        "precision_recall": {"k": scores.K},
        "resamples": {"all": scores.REPLICATES, look.fd: scores.FRECHET_REPLICATES},
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "versions": versions(),
    }
    results = {"recipe": recipe, "points": []}
    bar = runlog.progress_bar(len(names) * len(w) * FLAGS.num_samples, "image")
    labels = sweep.labels_of(FLAGS.num_samples, model.dataset.num_classes)
    shown = report.columns(labels, model.dataset.num_classes)
    grids = {}
    for name in names:
        used = ["model", *([request.role(guides[name])] if guides[name] else [])]
        params = {n: networks[n][1] for n in used}
        sampled = generator.Generator(models[name], params, guides[name], mesh=mesh)
        first, rows = None, []
        for strength in w:
            point = sweep.Point(
                sampled, strength, FLAGS.seed, {n: fingerprints[n] for n in used}, out
            )
            bar.set_description(point.title, refresh=False)
            made = point.images(len(labels), bar.update)
            scored = scores.score(*look(made), labels, reference, knows_labels=look.knows_labels)
            first = first or scored
            results["points"].append(describe(point, look, scored, first))
            rows.append(made[shown])
            if jax.process_index() == 0:
                report.write_tables(out, results)
        scale = max(1, 32 // made.shape[1])
        grids[name] = images.grid(np.concatenate(rows), len(shown), scale=scale)
    bar.close()
    if jax.process_index() == 0:
        report.write_pictures(out, results, grids)
        print(report.table(results["points"]))
        for file in ("sweep.csv", "sweep.json", "curve.png", "report.html"):
            print(out / file)


def load_networks(
    model: experiment.Experiment, *guides: experiment.Experiment | None
) -> dict[str, tuple[int, Params]]:
    """{"model": (step, EMA), "classifier": ..., "weak": ...} of the folders that the flags name."""
    networks = {"model": generator.load_ema(FLAGS.workdir, model)}
    for guide in filter(None, guides):
        role = request.role(guide)
        networks[role] = generator.load_ema(FLAGS[role].value, guide)
    return networks


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    packages = ("cfg_jax", "jax", "jaxlib", "flax", "numpy")
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def look_at_real(
    look: features.Extractor, dataset: Any
) -> tuple[scores.Reference, dict[str, dict[str, Any]]]:
    """What generated images are compared with, and how it and real images held out are described.

    The reference is the split of the config, what training saw if no other is asked for; "nn" is
    the mean distance of its images to the nearest of the others. The scores of images held out, the
    judge's accuracy among them, say what to expect of images that are real; where the reference is
    that very split there are none.
    """
    runlog.say(f"looking at the real images of {dataset.name}")
    seen = dataset.load(dataset.split)
    reference = scores.Reference.of(look_through(look, seen)[0])
    held_out = None
    if dataset.split != dataset.held_out:
        others = dataset.load(dataset.held_out)
        looked = look_through(look, others)
        scored = scores.score(*looked, reference, knows_labels=look.knows_labels)
        held_out = {
            "split": dataset.held_out,
            "images": len(others),
            "scores": {called(look, name): s.summary() for name, s in scored.items()},
        }
    return reference, {
        "reference": {
            "dataset": dataset.name,
            "split": dataset.split,
            "images": len(seen),
            "features": reference.features.shape[1],
            "nn": float(neighbours.among(reference.features).mean()),
        },
        "held_out": held_out,
    }


def look_through(look: features.Extractor, examples: datasets.Examples) -> list[np.ndarray]:
    """Features, logits and labels of all examples, of which few are in memory at a time."""
    parts = []
    for start in range(0, len(examples), 1024):
        some = examples[start : start + 1024]
        parts.append((*look(some["image"]), some["label"]))
    return [np.concatenate(column) for column in zip(*parts, strict=True)]


def called(look: features.Extractor, name: str) -> str:
    """What a score is called when these features were used."""
    return {"fd": look.fd, "is": look.score}.get(name, name)


def describe(
    point: sweep.Point,
    look: features.Extractor,
    scored: dict[str, scores.Score],
    first: dict[str, scores.Score],
) -> dict[str, Any]:
    """A point as sweep.json has it; differences are from the first w of the same rule, paired."""
    evaluations = point.evaluations
    return {
        "guidance": point.rule,
        "w": point.w,
        "scale": 1 + point.w,
        "evaluations": evaluations.model,
        "classifier_evaluations": evaluations.classifier,
        "weak_evaluations": evaluations.weak,
        "scores": {called(look, name): s.summary() for name, s in scored.items()},
        "from_first_w": {
            called(look, name): s.difference(first[name]) for name, s in scored.items()
        },
    }


if __name__ == "__main__":
    _define_flags()
    command.run(main, config=lambda typed: generator.saved_config(typed.get("workdir", "")))
