"""Batches as a function of the step: no state, hence nothing to save and nothing to restore.

Row r of the endless stream of training rows belongs to step r // batch_size and to epoch r // N.
Which example it shows and whether it is mirrored depend on (seed, r) alone, never on who asks:
process p of P takes its slice of the global batch, and the slices side by side are the batch of one
process.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping

import numpy as np
from etils import epy

from cfg_jax.data import datasets, images
from cfg_jax.types import UsageError

with epy.lazy_imports():
    import grain

_ORDER, _FLIP = 0, 1  # independent random streams of one seed
_ENDLESS = 1 << 40  # steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batches:
    """batches[step] -> {"image": uint8 [b, H, W, C], "label": int32 [b]}.

    b is batch_size / process_count, the rows of this process. Each epoch shows every example once,
    in an order of its own; batches straddle epochs. Images are mirrored with probability 1/2 where
    `flip` is set. Raises UsageError where the batch does not divide.
    """

    examples: datasets.Examples
    batch_size: int  # of all processes together
    seed: int
    flip: bool
    process_index: int = 0
    process_count: int = 1

    def __post_init__(self):
        if self.batch_size < 1 or self.batch_size % self.process_count:
            raise UsageError(
                f"batch_size={self.batch_size} cannot be shared by {self.process_count} processes:"
                f" give a positive multiple of {self.process_count}"
            )
        if not 0 <= self.seed < 1 << 64:
            raise UsageError(f"seed={self.seed} must be in [0, 2^64)")

    def __getitem__(self, step: int) -> Mapping[str, np.ndarray]:
        b = self.batch_size // self.process_count
        first = step * self.batch_size + self.process_index * b
        batch = self.examples[_indices(self.seed, first, b, len(self.examples))]
        if self.flip:
            # Philox counts in blocks of four words: row r owns block r; its first word is the coin.
            words = _random_words(self.seed, _FLIP, counter=(first, 0), count=4 * b)
            heads = (words[::4] & 1).astype(bool)
            image = batch["image"].copy()
            image[heads] = images.flip(image[heads])
            batch = {**batch, "image": image}
        return batch


def iterate(
    batches: Batches, start: int = 0, *, threads: int = 2, processes: int = 0
) -> Iterator[tuple[int, Mapping]]:
    """Yields (step, batches[step]) from `start` on, without end, made ahead by threads.

    With `processes`, that many of them read, each with so many threads: decoding images holds
    Python's lock most of the time. An exception is raised here, at its step. Closing the iterator
    ends threads and processes.
    """
    steps = grain.MapDataset.range(start, _ENDLESS).map(functools.partial(_numbered, batches))
    dataset = steps.to_iter_dataset(
        grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    )
    if processes:
        options = grain.MultiprocessingOptions(num_workers=processes, per_worker_buffer_size=2)
        dataset = dataset.mp_prefetch(options)
    iterator = iter(dataset)
    try:
        yield from iterator
    finally:
        iterator.close()


def _numbered(batches: Batches, step: int) -> tuple[int, Mapping[str, np.ndarray]]:
    return step, batches[step]


def _indices(seed: int, first: int, count: int, size: int) -> np.ndarray:
    """The examples shown by rows first, ..., first + count - 1."""
    epochs, places = np.divmod(np.arange(first, first + count), size)
    runs = range(epochs[0], epochs[-1] + 1)
    return np.concatenate([_order(seed, epoch, size)[places[epochs == epoch]] for epoch in runs])


@functools.lru_cache(maxsize=8)
def _order(seed: int, epoch: int, size: int) -> np.ndarray:
    """The permutation of an epoch."""
    words = _random_words(seed, _ORDER, counter=(0, epoch), count=size)
    return np.argsort(words, kind="stable")


def _random_words(seed: int, stream: int, *, counter: tuple[int, int], count: int) -> np.ndarray:
    """uint64 [count] of a counter-based generator (Salmon et al., 2011).

    Raw words, because numpy promises to keep those; what its `permutation` makes of them may
    change.
    """
    key, counter = np.array([seed, stream], np.uint64), np.array([*counter, 0, 0], np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(count)
