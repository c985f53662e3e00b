"""Prepares a data set: download, convert to array_record, count. Once; training only reads.

    python -m cfg_jax.prepare --dataset=cifar10 --data_dir=DIR [--manual_dir=DIR]

DATASET is a name of cfg_jax.data.datasets.DATASETS or of the TFDS catalogue: kmnist,
imagenet_resized/64x64. What cannot be downloaded is taken from --manual_dir, under the names that
its publisher gives the files; Fashion-MNIST is there as Debian's package dataset-fashion-mnist
installs it:

    python -m cfg_jax.prepare --dataset=fashion_mnist --data_dir=DIR \\
        --manual_dir=/usr/share/datasets/fashion-mnist

ImageNet is made from ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, had after registering at
https://image-net.org/download-images, with central squares and the exact area resize:

    python -m cfg_jax.prepare --dataset=imagenet64 --data_dir=DIR --manual_dir=DIR \\
        [--workers=N] [--check_archives] [--partial]

imagenet128 and imagenet256 likewise. The archives are read where they are and never unpacked; a run
that was stopped goes on where it was. imagenet_resized/64x64 of TFDS is smaller to download, but it
was resampled by others with another filter (Pillow's box) and has its labels in another order than
imagenet2012: numbers on it do not compare with the paper's.

Pictures of your own, in one folder a class, of any sizes and common formats:

    python -m cfg_jax.prepare --dataset=image_folder --path=DIR --data_dir=DATA [--size=64] \\
        [--name=NAME] [--bad_files=skip] [--held_out=20] [--workers=N]
    python -m cfg_jax.train --config=image_folder --config.dataset.data_dir=DATA --workdir=DIR

with --config.dataset.builder=NAME where there is one. Stopped, it goes on too.
"""

import sys

import jax
from absl import flags
from etils import epy

from cfg_jax.data import builders, datasets, folder, imagenet
from cfg_jax.types import UsageError

with epy.lazy_imports():  # the workers, which import this file too, need neither
    from cfg_jax import command
    from cfg_jax.runtime import logging


def main() -> None:
    """Prepares the data set that the flags name."""
    # Nothing here is computed by JAX: an accelerator is left to the run that may be using it.
    jax.config.update("jax_platforms", "cpu")
    given = flags.FLAGS
    if given.dataset == "image_folder":
        prepare_folder(
            given.path,
            given.name,
            given.data_dir,
            side=given.size,
            held_out=given.held_out,
            bad_files=given.bad_files,
            workers=given.workers,
        )
    else:
        prepare(
            given.dataset,
            given.data_dir,
            given.manual_dir,
            workers=given.workers,
            partial=given.partial,
            check_archives=given.check_archives,
        )


def prepare(
    name: str, data_dir: str | None = None, manual_dir: str | None = None, **for_imagenet
) -> dict[str, int]:
    """Prepares data set `name` unless it is already; returns the sizes of its splits.

    `for_imagenet` are the options of cfg_jax.data.imagenet.prepare.
    """
    row = datasets.DATASETS.get(name)
    builder = builders.builder(row().builder if row and name != "tfds" else name, data_dir)
    if builder.name == "imagenet_resized":
        print(f"note: {imagenet.RESIZED_CAVEAT}", file=sys.stderr)
    already = builders.is_prepared(builder)
    if builder.name in imagenet.BUILDERS:
        tell = {"progress": logging.progress_bar, "say": logging.say}
        imagenet.prepare(builder, manual_dir, **tell, **for_imagenet)
        builder = builders.builder(builder.name, data_dir)
    return _told(name, builders.prepare(builder, manual_dir), already)


def prepare_folder(
    path: str | None, name: str = "image_folder", data_dir: str | None = None, **options
) -> dict[str, int]:
    """Prepares the pictures below path as data set `name`; returns the sizes of its splits.

    `options` are those of cfg_jax.data.folder.prepare.
    """
    if path is None:
        raise UsageError("--dataset=image_folder needs --path=DIR, which holds one folder a class.")
    tell = {"progress": logging.progress_bar, "say": logging.say}
    made = folder.prepare(path, name, data_dir, **tell, **options)
    return _told(name, builders.builder(name, data_dir), not made)


def _told(name: str, builder, already: bool) -> dict[str, int]:
    counts = builders.count(builder)
    sizes = ", ".join(f"{split} {count:,}" for split, count in counts.items())
    print(f"{name}: {'already' if already else 'now'} in {builder.data_path}: {sizes}")
    return counts


if __name__ == "__main__":
    flags.DEFINE_string("dataset", None, "Which data set.", required=True)
    flags.DEFINE_string("data_dir", None, "Where to put it; default: TFDS's own place.")
    flags.DEFINE_string("manual_dir", None, "Where the files are that you fetched yourself.")
    flags.DEFINE_integer("workers", None, "How many processes make shards; default: one a core.")
    flags.DEFINE_bool("partial", False, "ImageNet: accept archives that hold a part, for a try.")
    flags.DEFINE_bool("check_archives", False, "ImageNet: compare the archives' MD5 first.")
    flags.DEFINE_string("path", None, "Own pictures: the folder that holds one folder a class.")
    flags.DEFINE_string("name", "image_folder", "Own pictures: what the set is called.")
    flags.DEFINE_integer("size", 64, "Own pictures: the side that they are resized to, in pixels.")
    flags.DEFINE_enum(
        *("bad_files", folder.REFUSE, [folder.REFUSE, folder.SKIP]),
        "Own pictures: what becomes of files that cannot be read; they are named in any case.",
    )
    flags.DEFINE_integer(
        *("held_out", 20), "Own pictures: every N-th of a class is split `test`; 0: none."
    )
    command.run(main)
