"""ImageNet at 64, 128 and 256 pixels, from the archives of ILSVRC2012 as they are downloaded.

Each image becomes its central square, resized by area, as PNG. A class of the training archive, an
inner tar, becomes one shard, and the validation archive becomes 50. A shard is a function of its
part of the archive alone: any number of processes makes the same bytes, and a run that was stopped
goes on where it was. All lies in a folder beside its place until it is whole.
"""

import contextlib
import functools
import hashlib
import importlib.resources
import os
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from cfg_jax.data import assembly, shards
from cfg_jax.types import UsageError

COUNTS = {"train": 1_281_167, "validation": 50_000}
_ARCHIVES = {"train": "ILSVRC2012_img_train.tar", "validation": "ILSVRC2012_img_val.tar"}
_MD5 = {
    "train": "1d675b47d978889d74fa0da5fadfb00e",
    "validation": "29b22e2961454d5413ddabcf34fc5622",
}
_VALIDATION_SHARDS = 50
_WHERE = "https://image-net.org/download-images"
_OR_PARTIAL = f"fetch the whole from {_WHERE}, or say --partial"

# Told where the user asks for that set.
RESIZED_CAVEAT = (
    "imagenet_resized was resampled by others with another filter (Pillow's box, not area), and its"
    " labels are in another order than imagenet2012's: numbers do not compare with the paper's;"
    " --dataset=imagenet64 does, made from the ILSVRC2012 archives"
)


class _Imagenet(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """ILSVRC2012, square and small; labels and validation as in TFDS's imagenet2012.

    The training images lie class by class: train[:10%] is the first hundred classes.
    """

    VERSION = tfds.core.Version("1.0.0")
    needs_tensorflow = False
    side: int

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"ILSVRC2012: central squares, area-resized to {self.side} pixels.",
            homepage="https://image-net.org/",
            supervised_keys=("image", "label"),
            features=shards.features(self.side, wnids()),
        )

    def _split_generators(self, dl_manager):
        raise NotImplementedError("`prepare` of this module makes the files")

    def _generate_examples(self):
        raise NotImplementedError("`prepare` of this module makes the files")


class Imagenet64(_Imagenet, skip_registration=True):
    name, side = "imagenet64", 64


class Imagenet128(_Imagenet, skip_registration=True):
    name, side = "imagenet128", 128


class Imagenet256(_Imagenet, skip_registration=True):
    name, side = "imagenet256", 256


BUILDERS = {builder.name: builder for builder in (Imagenet64, Imagenet128, Imagenet256)}


def prepare(
    builder: _Imagenet,
    manual_dir: os.PathLike | str | None = None,
    *,
    workers: int | None = None,
    partial: bool = False,
    check_archives: bool = False,
    progress: Callable,
    say: Callable[[str], None],
) -> None:
    """Makes the files of the builder, unless they are there, with `workers` processes.

    The archives are in manual_dir; default: downloads/manual of the data directory. `partial` takes
    archives that hold less than ImageNet. progress(total, unit, initial=n) -> a bar with update(n)
    and close(); say(line) tells the user. UsageError where an archive is missing, damaged or not
    what it should be; what is made by then stays, and is not made again.
    """
    if "://" in os.fspath(builder.data_path):
        raise UsageError(
            f"{builder.name} is made on a local disk: copy it to the bucket afterwards"
        )
    place = Path(builder.data_path)
    if place.exists():
        found = {split: info.num_examples for split, info in builder.info.splits.items()}
        if found != COUNTS and not partial:
            raise UsageError(
                f"{place} holds a part of ImageNet, {_told(found)}: delete it to prepare the whole,"
                " or say --partial"
            )
        return
    manual = Path(manual_dir or Path(builder.data_dir_root) / "downloads" / "manual")
    archives = _find(manual, partial)
    if check_archives:
        _check_hashes(archives, progress)
    folder = place.with_name(f"incomplete.{place.name}")
    with assembly.held(folder):
        plan = {
            split: _plan(split, archive, builder, folder, partial)
            for split, archive in archives.items()
        }
        parts = [part for split in plan.values() for part in split]
        records = assembly.make_all(parts, workers or assembly.cores(), progress=progress, say=say)
        made = {split: [records[part.shard.name] for part in plan[split]] for split in plan}
        found = {split: sum(record["count"] for record in made[split]) for split in made}
        if found != COUNTS and not partial:
            raise UsageError(f"{manual} holds {_told(found)}, not {_told(COUNTS)}: {_OR_PARTIAL}")
        assembly.finish(builder, folder, made)


def _find(manual: Path, partial: bool) -> dict[str, Path]:
    archives = {split: manual / name for split, name in _ARCHIVES.items()}
    for split, archive in list(archives.items()):
        if archive.is_file():
            continue
        if split == "train" or not partial:
            raise UsageError(
                f"there is no {archive}: download it from {_WHERE}"
                " and say --manual_dir=DIR, the folder that it is in"
            )
        del archives[split]
    return archives


def _check_hashes(archives: dict[str, Path], progress: Callable) -> None:
    for split, archive in archives.items():
        digest, chunk = hashlib.md5(), 1 << 24
        with (
            archive.open("rb") as file,
            contextlib.closing(
                progress(archive.stat().st_size >> 20, f"MiB of {archive.name}")
            ) as bar,
        ):
            while data := file.read(chunk):
                digest.update(data)
                bar.update(len(data) >> 20)
        if digest.hexdigest() != _MD5[split]:
            raise UsageError(
                f"{archive} is not the published file: MD5 {digest.hexdigest()}, not {_MD5[split]}"
            )


def _plan(
    split: str, archive: Path, builder: _Imagenet, folder: Path, partial: bool
) -> list[shards.Part]:
    """What becomes the shards of a split, in their order.

    From the headers of the archive alone: its content is passed over.
    """
    try:
        with tarfile.open(archive, "r:") as tar:
            members = [member for member in tar if member.isfile()]
    except (OSError, tarfile.TarError) as error:
        raise UsageError(f"{archive} is no whole tar file: {error}") from error
    label = _class_of if split == "train" else _validation_label
    files = [
        shards.File(os.path.basename(member.name), member.offset_data, member.size, label(member))
        for member in members
    ]
    wanted = len(wnids()) if split == "train" else COUNTS[split]
    if not files or (len(files) != wanted and not partial):
        kind = "classes" if split == "train" else "images"
        raise UsageError(f"{archive} holds {len(files):,} {kind}, not {wanted:,}: {_OR_PARTIAL}")
    files.sort()  # by name; of the classes that is the order of the labels, too
    count = len(files) if split == "train" else min(_VALIDATION_SHARDS, len(files))
    return [
        shards.Part(archive, share, builder.side, shard, decode=_square)
        for shard, share in assembly.spread(builder, folder, split, files, count)
    ]


def _square(content: bytes, side: int) -> tuple[np.ndarray, str]:
    return shards.small(content, side), ""


def _told(counts: dict[str, int]) -> str:
    return ", ".join(f"{split} {count:,}" for split, count in counts.items())


@functools.cache
def wnids() -> tuple[str, ...]:
    """The WordNet numbers of the 1000 classes, in the order of TFDS's imagenet2012."""
    return tuple(_imagenet2012("labels.txt").split())


@functools.cache
def _labels() -> dict[str, int]:
    return {wnid: label for label, wnid in enumerate(wnids())}


@functools.cache
def _validation() -> tuple[str, ...]:
    return tuple(_imagenet2012("validation_labels.txt").split())


def _imagenet2012(name: str) -> str:
    folder = importlib.resources.files("tensorflow_datasets") / "datasets" / "imagenet2012"
    return (folder / name).read_text()


def _class_of(member: tarfile.TarInfo) -> int:
    wnid, suffix = os.path.splitext(os.path.basename(member.name))
    if wnid not in _labels() or suffix != ".tar":
        raise UsageError(f"{_ARCHIVES['train']} holds {member.name}, no class of ILSVRC2012")
    return _labels()[wnid]


def _validation_label(member: tarfile.TarInfo) -> int:
    match = re.fullmatch(r"(?:.*/)?ILSVRC2012_val_(\d{8})\.JPEG", member.name)
    if not match or not 1 <= int(match[1]) <= COUNTS["validation"]:
        raise UsageError(
            f"{_ARCHIVES['validation']} holds {member.name}, no validation image of ILSVRC2012"
        )
    return _labels()[_validation()[int(match[1]) - 1]]
