"""The evaluation job: fidelity against diversity over a list of w, the same seeds for each.

    python -m cfg_jax.evaluate --workdir=DIR --judge=DIR --w=0,0.1,0.3,1,4 [--num_samples=50000]
        [--features=NAME,NAME] [--reference=FILE.npz] [--labels=training] [--classifier=DIR]
        [--weak=DIR] [--guidance=NAME,NAME] [--seed=0] [--config.sample.FIELD=VALUE ...] [--out=DIR]
    python -m cfg_jax.evaluate --config=NAME --make_reference=FILE.npz [--features=NAME]
    python -m cfg_jax.evaluate --samples=FILE.npz --reference=FILE.npz [--features=NAME] [--out=DIR]

Writes sweep.csv, sweep.json (the scores with the full recipe), curve.png and report.html. The
images and what was seen in them are kept beside them: a sweep that was killed goes on where it
stopped, to the bit, and one with another w, or more samples, makes only what is missing.
The second form writes a reference of a data set's images to be read instead of them, the third
scores the images of another project (arr_0, uint8 [N, H, W, C]).
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
    panel,
    reference,
    report,
    request,
    sample,
    schema,
    scores,
    stored,
    sweep,
)
from cfg_jax.data import images
from cfg_jax.diffusion import guidance
from cfg_jax.runtime import logging as runlog
from cfg_jax.runtime import mesh as meshes
from cfg_jax.types import Params, UsageError

FLAGS = flags.FLAGS
BATCH = 128  # images at a time, where no config says how many


def _define_flags() -> None:
    flags.DEFINE_string("workdir", None, "The folder of a trained model.")
    flags.DEFINE_string("w", "0,0.1,0.3,0.5,1,2,4", "Guidance strengths (scale - 1).")
    flags.DEFINE_integer("num_samples", 50_000, "Images a point.", lower_bound=scores.K + 1)
    flags.DEFINE_integer("seed", 0, "Image i of every point starts from the same noise.")
    flags.DEFINE_string("features", "judge", f"Who look, of {', '.join(features.FEATURES)}.")
    flags.DEFINE_string("judge", None, "The folder of a classifier of clean images.")
    flags.DEFINE_string("reference", None, "Real images as a file; the data set if absent.")
    flags.DEFINE_string("make_reference", None, "Write the data set as such a file, and leave.")
    flags.DEFINE_string("samples", None, "Score these images (.npz) rather than a model's.")
    flags.DEFINE_enum(
        "labels", "balanced", list(sweep.LABELS), "How often each label is asked for."
    )
    flags.DEFINE_string("classifier", None, "The folder of a noisy classifier, to guide as well.")
    flags.DEFINE_string("weak", None, "The folder of a weaker model, the reference to guide by.")
    flags.DEFINE_string(
        "guidance", None, "Rules to compare; the config's if absent, and classifier where given."
    )
    flags.DEFINE_string("out", None, "Where the files go; WORKDIR/sweep if absent.")
    flags.DEFINE_bool("distributed", False, "Join the other processes of a cluster.")


def rules(config: dict[str, Any], classifier: str | None, asked: str | None) -> list[str]:
    """The names of the guidance rules to compare. Raises UsageError for one that is not known."""

    def takes_one(name: str) -> bool:
        return with_rule(config, name).guidance(0.0).second == "classifier"

    own = config["sample"]["guidance"]["name"]
    names = asked.split(",") if asked else [own]
    for name in names:
        schema.entry("--guidance", guidance.GUIDANCE, name)
    if classifier and not asked and not takes_one(own):
        names.append("classifier")
    if classifier and not any(map(takes_one, names)):
        raise UsageError(
            f"--classifier={classifier} guides nothing: --guidance={asked} has no 'classifier'."
        )
    return list(dict.fromkeys(names))


def with_rule(config: dict[str, Any], name: str) -> experiment.Experiment:
    """The experiment, sampled with another guidance rule; its own options stay the config's."""
    own = config["sample"]["guidance"]
    section = own if own["name"] == name else {"name": name}
    return experiment.build({**config, "sample": {**config["sample"], "guidance": section}})


def main(config: dict[str, Any] | None = None) -> None:
    """Sweeps, or writes a reference, or scores the images of a file, as the flags say."""
    meshes.initialize_distributed(FLAGS.distributed)
    meshes.split_cpu(config["sample"]["batch_size"] if config else BATCH)
    if FLAGS.workdir is not None:
        meshes.keep_compiled(FLAGS.workdir)
    names = FLAGS.features.split(",")
    if len(names) > 1 and (FLAGS.reference or FLAGS.make_reference):
        raise UsageError(f"--features={FLAGS.features}: a reference is of one name only.")
    if FLAGS.make_reference and (FLAGS.reference or FLAGS.samples):
        raise UsageError("--make_reference goes with neither --reference nor --samples.")
    if FLAGS.samples and FLAGS.workdir:
        raise UsageError(f"--samples={FLAGS.samples} are scored alone: leave --workdir out.")
    if FLAGS.samples is not None:
        score_samples(names)
    elif FLAGS.make_reference is not None:
        make_reference(names[0], config)
    else:
        sweep_over_w(names, config)


def make_reference(name: str, config: dict[str, Any]) -> None:
    """Writes the images of the config's data set as a reference."""
    model = experiment.build(config)
    dataset = model.dataset
    looks = panel.extractors([name], meshes.make_mesh(), FLAGS.judge)
    panel.check_judge(looks, model)
    sample.make_folder(epath.Path(FLAGS.make_reference).parent)
    bar = runlog.progress_bar(len(dataset.load(dataset.split)), "image")
    made = reference.of_dataset(looks[0], dataset, bar.update)
    bar.close()
    if jax.process_index() == 0:
        reference.save(FLAGS.make_reference, made)
        print(f"{made.recipe['images']:,} images of {dataset.name}: {FLAGS.make_reference}")


def score_samples(names: list[str]) -> None:
    """Scores the images of a file against a reference, as scores.json and a line each."""
    if FLAGS.reference is None:
        raise UsageError(
            f"--samples={FLAGS.samples} needs --reference=FILE.npz: a published one, or one that "
            "--make_reference has written."
        )
    made = reference.arrays_of("--samples", FLAGS.samples, ("arr_0",))["arr_0"]
    looks = panel.extractors(names, meshes.make_mesh(), FLAGS.judge)
    against = reference.load(FLAGS.reference, looks[0], image_shape=made.shape[1:])
    out = epath.Path(FLAGS.out or epath.Path(FLAGS.samples).parent)
    if jax.process_index() == 0:
        sample.make_folder(out)
    bar = runlog.progress_bar(len(made), "image")
    seen = looks[0](made, bar.update)
    bar.close()
    judges = panel.Panel(looks, [against])
    scored = {name: s.summary() for name, s in judges.score([seen], None).items()}
    recipe = {"samples": FLAGS.samples, "images": len(made), **judges.recipe()}
    if jax.process_index() == 0:
        report.write_scores(out, {"recipe": recipe | {"versions": versions()}, "scores": scored})
        for name, score in scored.items():
            print(f"{name}: {score['value']:.4f}")
        print(out / "scores.json")


def sweep_over_w(names: list[str], config: dict[str, Any]) -> None:
    """Makes and scores every point, and writes the results after each."""
    w = list(dict.fromkeys(sample.parse_numbers("w", FLAGS.w, float)))
    of_rules = rules(config, FLAGS.classifier, FLAGS.guidance)
    mesh = meshes.make_mesh()
    classifier = stored.open_guide("--classifier", FLAGS.classifier)
    weak = stored.open_guide("--weak", FLAGS.weak)
    models = {name: with_rule(config, name) for name in of_rules}
    guides = {
        n: classifier if m.guidance().second == "classifier" else weak for n, m in models.items()
    }
    for name in of_rules:
        request.check(models[name], guides[name], [0], w, FLAGS.seed)
    model = models[of_rules[0]]
    dataset = model.dataset
    looks = panel.extractors(names, mesh, FLAGS.judge)
    panel.check_judge(looks, model)
    networks = load_networks(model, classifier, weak)
    fingerprints = {n: features.fingerprint(params) for n, (_, params) in networks.items()}
    home = epath.Path(FLAGS.workdir)
    out = epath.Path(FLAGS.out or (home.parent if home.is_file() else home) / "sweep")
    if jax.process_index() == 0:
        sample.make_folder(out)
    if FLAGS.reference is not None:
        shape, how = dataset.image_shape, dataset.resize
        against = reference.load(FLAGS.reference, looks[0], image_shape=shape, resize=how)
        judges, held_out = panel.Panel(looks, [against]), None
    else:
        judges = panel.Panel.against_dataset(looks, dataset, out / "real")
        held_out = judges.held_out(dataset)
    # What training saw, whatever the images are compared with now.
    learned = experiment.build(stored.saved_config(FLAGS.workdir)).dataset
    labels = sweep.LABELS[FLAGS.labels](FLAGS.num_samples, learned)
    label_rule = FLAGS.labels
    if label_rule == "training":
        label_rule = f"as in {learned.name}, {learned.split}"
    recipe = {
        "workdir": FLAGS.workdir,
        "config": config,
        "classifier": classifier and {"workdir": FLAGS.classifier, "config": classifier.config},
        "weak": weak and {"workdir": FLAGS.weak, "config": weak.config},
        "steps": {n: step for n, (step, _) in networks.items()},
        "parameters": fingerprints,
        "guidance": of_rules,
        "w": w,
        "num_samples": FLAGS.num_samples,
        "labels": label_rule,
        "seed": FLAGS.seed,
        **judges.recipe(),
        "held_out": held_out,
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "versions": versions(),
    }
    results = {"recipe": recipe, "points": []}
    bar = runlog.progress_bar(len(of_rules) * len(w) * FLAGS.num_samples, "image")
    shown = report.columns(labels, dataset.num_classes)
    grids = {}
    for name in of_rules:
        used = ["model", *([request.role(guides[name])] if guides[name] else [])]
        params = {n: networks[n][1] for n in used}
        sampled = generator.Generator(models[name], params, guides[name], mesh=mesh)
        first, rows = None, []
        for strength in w:
            point = sweep.Point(
                sampled=sampled,
                w=strength,
                seed=FLAGS.seed,
                label_rule=label_rule,
                labels=labels,
                fingerprints={n: fingerprints[n] for n in used},
                folder=out,
            )
            bar.set_description(point.title, refresh=False)
            made, seen = point.look(looks, keep=shown, progress=bar.update)
            scored = judges.score(seen, labels)
            first = first or scored
            results["points"].append(describe(point, scored, first))
            scale = max(1, 32 // made.shape[1])
            rows.append(images.grid(made, len(shown), scale=scale))
            if jax.process_index() == 0:
                report.write_tables(out, results)
        order = np.argsort(w, kind="stable")  # as the report has them
        grids[name] = [rows[i] for i in order]
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
    networks = {"model": stored.load_ema(FLAGS.workdir, model)}
    for guide in filter(None, guides):
        role = request.role(guide)
        networks[role] = stored.load_ema(FLAGS[role].value, guide)
    return networks


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    packages = ("cfg_jax", "jax", "jaxlib", "flax", "numpy")
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def describe(
    point: sweep.Point, scored: dict[str, scores.Score], first: dict[str, scores.Score]
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
        "scores": {name: s.summary() for name, s in scored.items()},
        "from_first_w": {name: s.difference(first[name]) for name, s in scored.items()},
    }


def _config(typed: dict[str, str]) -> dict[str, Any] | None:
    """Of the workdir; or of a data set to be looked at; or none, where a file is scored."""
    if "samples" in typed:
        return None
    if "make_reference" in typed and "config" in typed:
        return experiment.load_config(typed["config"])
    return stored.saved_config(typed.get("workdir", ""))


if __name__ == "__main__":
    _define_flags()
    command.run(main, config=_config)
