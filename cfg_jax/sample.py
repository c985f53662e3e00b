"""The sampling job: images of a trained model for a list of w, the same seeds for each.

    python -m cfg_jax.sample --workdir=DIR --w=0,1,4 [--labels=0,3,7] [--per_label=8] [--seed=0]
        [--classifier=DIR] [--weak=DIR] [--config.sample.FIELD=VALUE ...] [--out=DIR]

Writes samples_w*.png, one row a label, and samples.npz. DIR is a training folder or an exported
.safetensors file. --labels=3+8,0+6 mixes the labels of a row; --config.sample.negative=LABEL moves
away from a label; --weak=DIR is autoguidance.
"""

from typing import Any

import jax
import numpy as np
from absl import flags
from etils import epath

from cfg_jax import command, experiment, generator, request, stored
from cfg_jax.data import images
from cfg_jax.runtime import logging as runlog
from cfg_jax.runtime import mesh as meshes
from cfg_jax.types import UsageError


def some_labels(num_classes: int) -> list[int]:
    """All classes, or ten of them evenly spread: the rows of a grid."""
    return [int(c) for c in np.linspace(0, num_classes - 1, min(num_classes, 10))]


def name_w(w: float) -> str:
    """w as both conventions have it: `w=0.5 (scale 1.5)`."""
    return f"w={w:g} (scale {1 + w:g})"


def parse_numbers(flag: str, text: str, kind: type) -> list:
    """[0.0, 1.0] from "0,1". Raises UsageError where the text is not a list of numbers."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        example = "0,1,4" if kind is float else "0,3,7"
        raise UsageError(
            f"--{flag}={text}: a list of numbers is needed, such as --{flag}={example}."
        ) from None


def parse_rows(text: str) -> list[int] | list[list[int]]:
    """[0, 3] from "0,3", [[0, 3], [1, 8]] from "0+3,1+8". Raises UsageError for anything else."""
    rows = [parse_numbers("labels", row.replace("+", ","), int) for row in text.split(",")]
    if len({len(row) for row in rows}) > 1:
        raise UsageError(
            f"--labels={text}: each row mixes as many labels as the others, such as "
            "--labels=3+8,0+6; write 0+0 for one that is mixed with none."
        )
    return rows if len(rows[0]) > 1 else [label for (label,) in rows]


def label_grid(out: np.ndarray, per_label: int) -> np.ndarray:
    """Images in the order of their labels as one picture, a row a label, enlarged where tiny."""
    return images.grid(out, per_label, scale=max(1, 48 // out.shape[1]))


FLAGS = flags.FLAGS


def _define_flags() -> None:
    flags.DEFINE_string("workdir", None, "The folder of a trained model.", required=True)
    flags.DEFINE_string("w", "0,1,4", "Guidance strengths, as the paper's w (scale - 1).")
    flags.DEFINE_string(
        "labels", None, "Labels, a row of the grid each; 3+8 mixes. All (at most 10) if absent."
    )
    flags.DEFINE_integer("per_label", 8, "Images a label.", lower_bound=1)
    flags.DEFINE_integer(
        "seed", 0, "One seed for all: image i of each w starts from the same noise."
    )
    flags.DEFINE_string("classifier", None, "The folder of a noisy classifier that guides.")
    flags.DEFINE_string("weak", None, "The folder of a weaker model, the reference to guide by.")
    flags.DEFINE_string("out", None, "Where the files go; the workdir if absent.")
    flags.DEFINE_bool("distributed", False, "Join the other processes of a cluster.")


def main(config: dict[str, Any]) -> None:
    """Samples a grid for each w and writes the pictures and the array."""
    w = list(dict.fromkeys(parse_numbers("w", FLAGS.w, float)))
    meshes.initialize_distributed(FLAGS.distributed)
    meshes.split_cpu(config["sample"]["batch_size"])
    meshes.keep_compiled(FLAGS.workdir)
    model = experiment.build(config)
    if FLAGS.classifier and FLAGS.weak:
        raise UsageError("--classifier and --weak: one of them guides, not both.")
    guide = stored.open_guide("--classifier", FLAGS.classifier) or stored.open_guide(
        "--weak", FLAGS.weak
    )
    if FLAGS.labels is None:
        rows = some_labels(model.dataset.num_classes)
    else:
        rows = parse_rows(FLAGS.labels)
    labels = np.repeat(rows, FLAGS.per_label, axis=0)
    request.check(model, guide, labels, w, FLAGS.seed)
    sampled, step = generator.load(FLAGS.workdir, model, FLAGS.classifier or FLAGS.weak, guide)
    home = epath.Path(FLAGS.workdir)
    out = epath.Path(FLAGS.out) if FLAGS.out else home.parent if home.is_file() else home
    first = jax.process_index() == 0
    if first:
        make_folder(out)
    bar = runlog.progress_bar(len(w) * len(labels), "image")
    pictures = []
    for strength in w:
        bar.set_description(name_w(strength), refresh=False)
        pictures.append(sampled(labels, strength, seed=FLAGS.seed, progress=bar.update))
    bar.close()
    if not first:
        return
    evaluations = [request.evaluations(model, guide, strength, labels) for strength in w]
    for strength, images_of_w, count in zip(w, pictures, evaluations, strict=True):
        path = out / f"samples_w{strength:.10g}.png"
        images.save_png(path, label_grid(images_of_w, FLAGS.per_label))
        print(f"{name_w(strength)}: {path}  ({count} network evaluations an image)")
    arrays = {
        "images": np.stack(pictures),
        "labels": labels,
        "w": np.asarray(w),
        "evaluations": np.asarray(evaluations),
    }
    with (out / "samples.npz").open("wb") as file:
        np.savez_compressed(file, **arrays, seed=FLAGS.seed, step=step)
    print(
        f"all of them: {out / 'samples.npz'}  (images [w, N, H, W, C], labels, w, evaluations [w, 3"
        "] of the model, a classifier and a weaker model, seed, step)"
    )


def make_folder(path: epath.Path) -> None:
    """Makes the folder that results go to. Raises UsageError where that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{path} cannot be written to: {error}") from error


if __name__ == "__main__":
    _define_flags()
    command.run(main, config=lambda typed: stored.saved_config(typed.get("workdir", "")))
