"""Shards -> a set that TFDS reads: made by many processes in a folder that one run holds.

Until the set is whole it lies beside its place, and what is made of it stays when a run is killed.
"""

import contextlib
import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from pathlib import Path

import tensorflow_datasets as tfds

from cfg_jax.data import shards
from cfg_jax.types import UsageError


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


def spread(
    builder: tfds.core.DatasetBuilder,
    folder: Path,
    split: str,
    files: Sequence[shards.File],
    count: int,
) -> list[tuple[Path, tuple[shards.File, ...]]]:
    """Where the `count` shards of a split lie in a folder, and which files become each of them."""
    template = tfds.core.ShardedFileTemplate(
        dataset_name=builder.name, data_dir=folder, split=split, filetype_suffix="array_record"
    )
    bounds = [len(files) * i // count for i in range(count + 1)]
    return [
        (Path(path), tuple(files[start:end]))
        for path, start, end in zip(template.sharded_filepaths(count), bounds, bounds[1:])
    ]


def finish(
    builder: tfds.core.DatasetBuilder, folder: Path, made: Mapping[str, Sequence[Mapping]]
) -> None:
    """Puts a folder of whole shards, {split: records}, where TFDS reads the set of the builder."""
    builder.info.set_splits(
        tfds.core.SplitDict(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[record["count"] for record in records],
                num_bytes=sum(record["bytes"] for record in records),
            )
            for split, records in made.items()
            if any(record["count"] for record in records)
        )
    )
    builder.info.write_to_directory(folder)
    (folder / "shards.json").write_text(json.dumps(made, indent=1))
    names = {record["shard"] for records in made.values() for record in records}
    for path in folder.iterdir():  # shards of other archives, tried before
        if path.name.startswith(f"{builder.name}-") and path.name not in names:
            path.unlink()
    folder.rename(builder.data_path)
    shutil.rmtree(Path(builder.data_path) / "records")  # they are in shards.json together


def sources(place: Path) -> list[dict]:
    """What the shards of a finished set were made of, in their order; [] where that is not told."""
    told = place / "shards.json"
    made = json.loads(told.read_text()) if told.exists() else {}
    return [record["source"] for records in made.values() for record in records]


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def make_all(
    parts: Sequence[shards.Part], workers: int, *, progress: Callable, say: Callable[[str], None]
) -> dict[str, dict]:
    """Makes the shards that are not there; the records of all, by the names of the shards.

    progress(total, unit, initial=n) -> a bar with update(n) and close(). A record holds shard,
    count, bytes, sha256 and source, remarks {remark: count} and bad [[name, label, why], ...].
    Raises the first UsageError of a shard, after those under way.
    """
    pool = futures.ProcessPoolExecutor(
        max(1, min(workers, len(parts))), multiprocessing.get_context("spawn"), _start_worker
    )
    try:
        recorded = [part for part in parts if part.record.exists()]
        records = [record for record in pool.map(shards.kept, recorded) if record]
        there = {record["shard"] for record in records}
        if there:
            say(f"{len(there)} of {len(parts)} shards are there already")
        missing = [part for part in parts if part.shard.name not in there]
        with contextlib.closing(progress(len(parts), "shard", initial=len(there))) as bar:
            for done in futures.as_completed([pool.submit(shards.make, p) for p in missing]):
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


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that waits for them tells them
    warnings.filterwarnings("ignore", module="PIL")  # of EXIF data, which nobody reads here
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Else workers would wait for work for ever after the one who gives it was killed."""
    multiprocessing.parent_process().join()
    os._exit(1)
