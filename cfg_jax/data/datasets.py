"""Labelled images by name: what they are, and their examples in random access.

DATASETS is at the foot. `DATASETS[name](**options)` describes a data set and reads nothing; `load`
opens one of its splits, in TFDS's own language: "train", "train+test", "train[:90%]".
"""

import dataclasses
import functools
import math
import resource
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from etils import epath, epy

from cfg_jax.data import images
from cfg_jax.types import UsageError

with epy.lazy_imports():
    from cfg_jax.data import builders, imagenet

IN_MEMORY_BYTES = (
    1 << 30
)  # sets that are larger when decoded are read from the disk, batch by batch


class Examples(Protocol):
    """examples[indices or slice] -> {"image": uint8 [b, H, W, C], "label": int32 [b]}."""

    def __len__(self) -> int: ...

    def __getitem__(self, indices: np.ndarray | slice) -> Mapping[str, np.ndarray]: ...


@dataclasses.dataclass(frozen=True)
class InMemory:
    """Examples as two arrays."""

    images: np.ndarray  # uint8 [N, H, W, C]
    labels: np.ndarray  # int32 [N]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: np.ndarray | slice) -> Mapping[str, np.ndarray]:
        return {"image": self.images[indices], "label": self.labels[indices]}


@dataclasses.dataclass(frozen=True)
class OnDisk:
    """Examples as records of a TFDS data source, decoded when asked for."""

    source: Sequence[Mapping]
    dataset: "Tfds"

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, indices: np.ndarray | slice) -> Mapping[str, np.ndarray]:
        if isinstance(indices, slice):
            indices = range(*indices.indices(len(self)))
        records = self.source.__getitems__([int(index) for index in indices])
        return {
            "image": self.dataset.fit([record["image"] for record in records]),
            "label": np.array([record["label"] for record in records], np.int32),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tfds:
    """A TFDS set of labelled images, by the name of its builder: imagenet_resized/64x64.

    Raises UsageError for a builder that is unknown or has no images with labels, and for images of
    many sizes where no `size` is given.
    """

    builder: str
    split: str = "train"
    held_out: str = "test"  # examples that training must not see
    size: int | None = None  # crop the central square, resize it by area; small images are enlarged
    pad: int = 0  # pixels of constant 0 on each side, after resizing
    flip: bool = False  # whether a mirrored image is as likely as the image, and of the same class
    names: tuple[str, ...] = ()  # of the classes, where TFDS has only numbers
    channels: int | None = None  # with size and names: known where the files are not
    data_dir: str | None = None  # None: $TFDS_DATA_DIR, else ~/tensorflow_datasets

    def __post_init__(self):
        if self.pad < 0 or (self.size is not None and self.size < 1):
            raise UsageError(f"{self.name}: pad={self.pad}, size={self.size} must not be negative")

    @property
    def name(self) -> str:
        return self.builder

    @property
    def num_classes(self) -> int:
        return len(self.names) or self._features["label"].num_classes

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the order of the labels."""
        return tuple(self.names or self._features["label"].names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of every image, cropped, resized and padded."""
        if self.size and self.channels:
            sides, channels = (self.size, self.size), self.channels
        else:
            *sides, channels = self._features["image"].shape
            sides = (self.size, self.size) if self.size else sides
        if None in sides:
            raise UsageError(f"the images of {self.name} vary in size: say size=64, or another")
        return *(side + 2 * self.pad for side in sides), channels

    @property
    def resize(self) -> str:
        """How the images came to their size: two sets compare only where it is the same."""
        by_area = self.size or self.builder in ("imagenet64", "imagenet128")
        how = "central square, by area" if by_area else "as stored"
        return f"{how}, {self.pad} pixels added" if self.pad else how

    def described(self) -> dict[str, Any]:
        """Fields that tell what the files of a user's own set tell: for a config that is carried to
        where they are not. Empty for sets that the code describes.
        """
        if (self.names and self.size and self.channels) or builders.describes_itself(self.builder):
            return {}
        height, _, channels = self.image_shape
        return {"names": self.classes, "size": height - 2 * self.pad, "channels": channels}

    def splits(self, data_dir: epath.PathLike | None = None) -> dict[str, int]:
        """{"train": 60000, ...}: the splits and how many examples each has."""
        info = self._prepared(data_dir).info
        return {name: split.num_examples for name, split in info.splits.items()}

    def load(self, split: str | None = None, data_dir: epath.PathLike | None = None) -> Examples:
        """The examples of a split (default: `self.split`), decoded at once where they are few.

        Raises UsageError where the set is not prepared, with the command that does it, and for a
        split that it does not have.
        """
        builder, split = self._prepared(data_dir), split or self.split
        try:
            source = builder.as_data_source(split)
        except ValueError as error:
            reason = str(error).splitlines()[0]
            raise UsageError(f"{self.name} has no split {split!r}: {reason}") from error
        examples = OnDisk(source, self)
        if not len(examples):
            raise UsageError(f"{self.name} has no examples in split {split!r}")
        if len(examples) * math.prod(self.image_shape) > IN_MEMORY_BYTES:
            _allow_open_files(sum(info.num_shards for info in builder.info.splits.values()))
            return examples
        # In chunks, because what is decoded may be far larger than what is kept.
        chunks = [examples[start : start + 256] for start in range(0, len(examples), 256)]
        return InMemory(*(np.concatenate([c[key] for c in chunks]) for key in ("image", "label")))

    def fit(self, decoded: Sequence[np.ndarray]) -> np.ndarray:
        """uint8 images of any sizes -> uint8 [b, *image_shape]: crop, area resize, padding."""
        if self.size and {image.shape[:2] for image in decoded} != {(self.size, self.size)}:
            squares = map(images.central_square, decoded)
            decoded = [images.area_resize(square, self.size, self.size) for square in squares]
        sides = (self.pad, self.pad)
        return np.pad(np.stack(decoded), ((0, 0), sides, sides, (0, 0)))

    @property
    def _features(self) -> Mapping:
        return _features(self.builder, self.data_dir)

    def _prepared(self, data_dir: epath.PathLike | None):
        data_dir = data_dir or self.data_dir
        builder = builders.builder(self.builder, data_dir)
        if isinstance(builder, builders.Digits):
            builder = builders.prepare(builder)  # two seconds, and nothing to download
        where = data_dir or builder.data_dir_root
        command = f"python -m cfg_jax.prepare --dataset={self.name} --data_dir="
        if not builders.is_prepared(builder):
            caveat = (
                f" (note: {imagenet.RESIZED_CAVEAT})" if builder.name == "imagenet_resized" else ""
            )
            raise UsageError(
                f"{self.name} is not prepared in {where}: run  {command}{where}{caveat}"
            )
        if builder.info.file_format.value != builders.FORMAT:
            raise UsageError(
                f"{self.name} in {where} is stored as {builder.info.file_format.value}, which only"
                f" TensorFlow reads: prepare it elsewhere,  {command}DIR"
            )
        return builder


@functools.cache
def _features(name: str, data_dir: str | None) -> Mapping:
    features = builders.builder(name, data_dir).info.features
    missing = {"image", "label"} - set(features)
    if missing:
        raise UsageError(f"{name} has no {' and no '.join(sorted(missing))}: it has {[*features]}")
    return features


def _allow_open_files(count: int) -> None:
    """Lets this process open `count` files beside the 1,024 that it may on many systems.

    A reader of array_record keeps every file of its set open, and ImageNet has a thousand.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        wanted = soft + count
        if hard != resource.RLIM_INFINITY:
            wanted = min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


# A new data set is a new row. Each is called with the fields of `config.dataset` beside its name.
DATASETS = {
    "digits": functools.partial(Tfds, builder="digits"),
    # A mirrored shirt is a shirt; but all shoes point to the left, and so must generated ones.
    "fashion_mnist": functools.partial(Tfds, builder="fashion_mnist"),
    "cifar10": functools.partial(
        Tfds,
        builder="cifar10",
        flip=True,
        names=(
            *("airplane", "automobile", "bird", "cat", "deer"),
            *("dog", "frog", "horse", "ship", "truck"),
        ),
    ),
    "imagenet64": functools.partial(Tfds, builder="imagenet64", held_out="validation", flip=True),
    "imagenet128": functools.partial(Tfds, builder="imagenet128", held_out="validation", flip=True),
    "imagenet256": functools.partial(Tfds, builder="imagenet256", held_out="validation", flip=True),
    # As `prepare --dataset=image_folder --path=DIR` made it; its --name is `builder` here.
    "image_folder": functools.partial(Tfds, builder="image_folder"),
    "tfds": Tfds,
}
