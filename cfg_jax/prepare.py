"""Prepares a data set: download, convert to array_record, count. Once; training only reads.

    python -m cfg_jax.prepare --dataset=cifar10 --data_dir=DIR [--manual_dir=DIR]

DATASET is a name of cfg_jax.data.datasets.DATASETS or of the TFDS catalogue: kmnist,
imagenet_resized/64x64. What cannot be downloaded is taken from --manual_dir, under the names that
its publisher gives the files; Fashion-MNIST is there as Debian's package dataset-fashion-mnist
installs it:

    python -m cfg_jax.prepare --dataset=fashion_mnist --data_dir=DIR \
        --manual_dir=/usr/share/datasets/fashion-mnist
"""

from absl import flags

from cfg_jax import command
from cfg_jax.data import builders, datasets


def main() -> None:
    prepare(flags.FLAGS.dataset, flags.FLAGS.data_dir, flags.FLAGS.manual_dir)


def prepare(
    name: str, data_dir: str | None = None, manual_dir: str | None = None
) -> dict[str, int]:
    """Prepares data set `name` unless it is already; returns the sizes of its splits."""
    row = datasets.DATASETS.get(name)
    builder = builders.builder(row().builder if row and name != "tfds" else name, data_dir)
    already = builders.is_prepared(builder)
    counts = builders.count(builders.prepare(builder, manual_dir))
    sizes = ", ".join(f"{split} {count:,}" for split, count in counts.items())
    print(f"{name}: {'already' if already else 'now'} in {builder.data_path}: {sizes}")
    return counts


if __name__ == "__main__":
    flags.DEFINE_string("dataset", None, "Which data set.", required=True)
    flags.DEFINE_string("data_dir", None, "Where to put it; default: TFDS's own place.")
    flags.DEFINE_string("manual_dir", None, "Where the files are that you fetched yourself.")
    command.run(main)
