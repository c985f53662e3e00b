"""The metrics of the last steps: kept on the device, looked at together, refused if not finite."""

import time
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np

from cfg_jax.types import Array


class Diverged(RuntimeError):
    """A loss, gradient or parameter that is not finite, and the step it came at."""


class Window:
    """The metrics of the steps since the last look: on the device until then, so no step waits."""

    def __init__(self):
        self._metrics: list[tuple[int, dict[str, Array]]] = []
        self.restart_clock()

    def restart_clock(self) -> None:
        """The time since the last step was not training: a compilation, a save, a picture."""
        self._since, self._timed, self._waited = time.monotonic(), 0, 0.0

    def fed_by(self, feed: Iterable[Any]) -> Iterator[Any]:
        """The items of `feed`; the time that the loop waits for them is `data_wait`."""
        feed = iter(feed)
        while True:
            began = time.monotonic()
            item = next(feed)
            self._waited += time.monotonic() - began
            yield item

    def add(self, step: int, metrics: dict[str, Array]) -> None:
        """Keeps a step's metrics, and lets the host run at most two steps ahead of the devices.

        So the batches of the next two steps go to the devices while they work at this one.
        """
        self._metrics.append((step, metrics))
        self._timed += 1
        if len(self._metrics) > 2:
            jax.block_until_ready(self._metrics[-3][1])

    def close(self, batch_size: int) -> dict[str, float]:
        """The means over the window and its speed; empties it.

        `data_wait` is the share of the time in which the loop waited for the next batch: the
        devices had up to two steps of work left then, so that they waited less.

        Raises Diverged, naming the first step whose loss, gradient or new parameters are not
        finite.
        """
        steps = [step for step, _ in self._metrics]
        fetched = jax.device_get([metrics for _, metrics in self._metrics])
        for step, metrics in zip(steps, fetched, strict=True):
            bad = {name: float(value) for name, value in metrics.items() if not np.isfinite(value)}
            if bad:
                told = ", ".join(f"{name} {value}" for name, value in bad.items())
                raise Diverged(f"{told} at step {step}")
        means = {name: float(np.mean([m[name] for m in fetched])) for name in fetched[0]}
        if self._timed:
            seconds = max(time.monotonic() - self._since, 1e-9)
            rate = self._timed / seconds
            means |= {
                "steps_per_second": rate,
                "images_per_second": rate * batch_size,
                "data_wait": self._waited / seconds,
            }
        self._metrics = []
        self.restart_clock()
        return means

    def __len__(self) -> int:
        return len(self._metrics)
