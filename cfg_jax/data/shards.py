"""Images of a tar archive -> array_record shards, made by many processes, each shard once.

A shard is a function of its part of the archive alone. It is written under another name, renamed,
and then recorded with its hash; one that is there with its record is not made again.
"""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import io
import json
import multiprocessing
import os
import signal
import tarfile
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
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
    """A member of an archive: an image, or a tar of images that share the label."""

    name: str
    offset: int  # of its content in the archive, in bytes
    size: int
    label: int


@dataclasses.dataclass(frozen=True)
class Part:
    """Some members of an archive, and the shard that they become."""

    archive: Path
    files: tuple[File, ...]
    side: int  # of the images in the shard, in pixels
    shard: Path

    @property
    def record(self) -> Path:
        return self.shard.parent / "records" / f"{self.shard.name}.json"

    @property
    def source(self) -> dict[str, str | int]:
        """What tells this part from that of another archive."""
        first, last = self.files[0], self.files[-1]
        return {
            "archive": self.archive.name,
            "first": first.name,
            "last": last.name,
            "offset": first.offset,
            "size": sum(file.size for file in self.files),
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


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Makes the folder and keeps other processes out; the system lets go when this one ends."""
    try:
        (folder / "records").mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UsageError(f"cannot write to {folder}: give another data_dir ({error})") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f"another process is at work in {folder}") from error
        except OSError:
            pass  # a network file system without such locks
        yield
    finally:
        os.close(handle)


def make_all(
    parts: Sequence[Part], workers: int, *, progress: Callable, say: Callable[[str], None]
) -> dict[str, dict]:
    """Makes the shards that are not there; the records of all, by the names of the shards.

    progress(total, unit, initial=n) -> a bar with update(n) and close(). A record holds shard,
    count, bytes, sha256 and source. Raises the first UsageError of a shard, after those under way.
    """
    pool = futures.ProcessPoolExecutor(
        max(1, min(workers, len(parts))), multiprocessing.get_context("spawn"), _start_worker
    )
    try:
        recorded = [part for part in parts if part.record.exists()]
        records = [record for record in pool.map(kept, recorded) if record]
        there = {record["shard"] for record in records}
        if there:
            say(f"{len(there)} of {len(parts)} shards are there already")
        missing = [part for part in parts if part.shard.name not in there]
        with contextlib.closing(progress(len(parts), "shard", initial=len(there))) as bar:
            for done in futures.as_completed([pool.submit(make, p) for p in missing]):
                records.append(done.result())
                bar.update(1)
    except futures.BrokenExecutor as error:
        raise UsageError(
            "a worker was killed, perhaps for want of memory: run it again, with fewer --workers;"
            " what is made stays"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
    return {record["shard"]: record for record in records}


def kept(part: Part) -> dict | None:
    """The record of a shard that is there, whole, and from this part; else None."""
    try:
        record = json.loads(part.record.read_text())
        # Through JSON, as it was stored.
        same = record == json.loads(json.dumps(_record(part, record["count"])))
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
    count = 0
    try:
        try:
            for name, label, content in _images(part):
                try:
                    image = small(content, part.side)
                except Exception as error:  # Pillow has no common base for what its formats raise
                    raise UsageError(
                        f"{name} of {part.archive} cannot be decoded: {_line(error)}"
                    ) from error
                example = {"image": images.png(image), "label": label, "file_name": name}
                # Protocol buffers order the fields of a map by chance, unless told otherwise.
                record = serializer.get_tf_example(example)
                writer.write(record.SerializeToString(deterministic=True))
                count += 1
        finally:
            writer.close()
        if not count:
            raise UsageError(f"{part.files[0].name} of {part.archive} holds no images")
        beside.rename(part.shard)
        record = _record(part, count)
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


def _images(part: Part) -> Iterator[tuple[str, int, bytes]]:
    """(name, label, encoded image) of a part, in the order of the archive."""
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


def _record(part: Part, count: int) -> dict:
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
    }


@functools.cache
def _serializer(side: int) -> example_serializer.ExampleSerializer:
    return example_serializer.ExampleSerializer(features(side).get_serialized_info())


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that waits for them tells them
    warnings.filterwarnings("ignore", module="PIL")  # of EXIF data, which nobody reads here
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Else workers would wait for work for ever after the one who gives it was killed."""
    multiprocessing.parent_process().join()
    os._exit(1)
