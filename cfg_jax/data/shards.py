"""Images of a tar archive or a folder -> array_record shards, each made once.

A shard is a function of its part of the archive alone. It is written under another name, renamed,
and then recorded with its hash; one that is there with its record is not made again.
"""

import collections
import dataclasses
import functools
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL.Image
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tensorflow_datasets.core import example_serializer

from cfg_jax.data import images
from cfg_jax.types import UsageError


class File(NamedTuple):
    """A member of an archive or a folder: an image, or a tar of images that share the label."""

    name: str
    offset: int  # of its content in the archive, in bytes
    size: int
    label: int
    modified: int = 0  # when, in nanoseconds, where it is a file of its own


@dataclasses.dataclass(frozen=True)
class Part:
    """Some members of an archive or a folder, and the shard that they become.

    decode(content, side) -> (uint8 [side, side, 3], a remark to be counted or ""); content is
    bytes, or the path of a file in a folder. Where it raises, the run ends, or, if `lenient`, goes
    on: the record then says of which files, and why.
    """

    archive: Path
    files: tuple[File, ...]
    side: int  # of the images in the shard, in pixels
    shard: Path
    decode: Callable[[bytes | Path, int], tuple[np.ndarray, str]]
    lenient: bool = False

    @property
    def record(self) -> Path:
        """Where the record of the shard lies: once it is there, the shard is whole."""
        return self.shard.parent / "records" / f"{self.shard.name}.json"

    @property
    def source(self) -> dict[str, str | int]:
        """What tells this part from that of another archive."""
        return {
            "archive": self.archive.name,
            "first": self.files[0].name,
            "last": self.files[-1].name,
            "side": self.side,
            "files": hashlib.sha256(repr(self.files).encode()).hexdigest(),
        }


def features(side: int, names: Sequence[str] | None = None) -> tfds.features.FeaturesDict:
    """What a record holds, for images of side x side pixels; `names` are those of the classes."""
    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(side, side, 3), encoding_format="png"),
            "label": tfds.features.ClassLabel(names=names),
            "file_name": tfds.features.Text(),
        }
    )


def kept(part: Part) -> dict | None:
    """The record of a shard that is there, whole, and from this part; else None."""
    try:
        record = json.loads(part.record.read_text())
        # Through JSON, as it was stored.
        told = (record["count"], record["remarks"], record["bad"])
        same = record == json.loads(json.dumps(_record(part, *told)))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if same else None


def make(part: Part) -> dict:
    """Writes the shard of a part, and its record, which it returns.

    UsageError for an image that cannot be decoded, an inner archive that is cut short, and where
    the disk is full.
    """
    beside = part.shard.with_name(f"{part.shard.name}.tmp")
    serializer = _serializer(part.side)
    # As TFDS writes, and what reading single records asks for.
    writer = array_record_module.ArrayRecordWriter(str(beside), "group_size:1")
    count, remarks, bad = 0, collections.Counter(), []
    try:
        try:
            for name, label, content in _images(part):
                try:
                    image, remark = part.decode(content, part.side)
                except Exception as error:  # Pillow has no common base for what its formats raise
                    if part.lenient:
                        bad.append([name, label, _line(error)])
                        continue
                    raise UsageError(
                        f"{name} of {part.archive} cannot be decoded: {_line(error)}"
                    ) from error
                if remark:
                    remarks[remark] += 1
                text = name.encode(errors="replace")  # which the name of a file need not be
                example = {"image": images.png(image), "label": label, "file_name": text}
                # Protocol buffers order the fields of a map by chance, unless told otherwise.
                record = serializer.get_tf_example(example)
                writer.write(record.SerializeToString(deterministic=True))
                count += 1
        finally:
            writer.close()
        if not (count or bad):
            raise UsageError(f"{part.files[0].name} of {part.archive} holds no images")
        beside.rename(part.shard)
        record = _record(part, count, remarks, bad)
        beside.write_text(json.dumps(record))
        beside.rename(part.record)
    except (OSError, RuntimeError) as error:  # array_record's errors are RuntimeErrors
        raise UsageError(f"{part.shard} was not written: {_line(error)}") from error
    return record


def small(content: bytes, side: int) -> np.ndarray:
    """An encoded image of any size and colours -> its central square, uint8 [side, side, 3].

    The format is told by the content, not the name: one of ImageNet's .JPEG files is PNG.
    """
    with PIL.Image.open(io.BytesIO(content)) as picture:
        image = np.asarray(picture.convert("RGB"))
    return images.area_resize(images.central_square(image), side, side)


def _images(part: Part) -> Iterator[tuple[str, int, bytes | Path]]:
    """(name, label, content for `decode`) of a part, in the order of the archive."""
    if part.archive.is_dir():
        yield from ((file.name, file.label, part.archive / file.name) for file in part.files)
        return
    with part.archive.open("rb") as archive:
        for file in part.files:
            if not file.name.endswith(".tar"):
                archive.seek(file.offset)
                yield file.name, file.label, archive.read(file.size)
                continue
            try:
                archive.seek(file.offset)
                with tarfile.open(fileobj=archive, mode="r:") as inner:
                    for member in inner:
                        if member.offset_data + member.size > file.offset + file.size:
                            raise tarfile.ReadError("unexpected end of data")
                        if member.isfile():
                            content = inner.extractfile(member).read()
                            yield os.path.basename(member.name), file.label, content
            except tarfile.TarError as error:
                raise UsageError(
                    f"{file.name} of {part.archive} is no whole tar file: {_line(error)}"
                ) from error


def _record(part: Part, count: int, remarks: Mapping[str, int], bad: Sequence) -> dict:
    """The record of a shard that holds `count` examples."""
    with part.shard.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
        size = file.tell()
    return {
        "shard": part.shard.name,
        "count": count,
        "bytes": size,
        "sha256": digest,
        "source": part.source,
        "remarks": dict(remarks),
        "bad": bad,
    }


@functools.cache
def _serializer(side: int) -> example_serializer.ExampleSerializer:
    return example_serializer.ExampleSerializer(features(side).get_serialized_info())


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
