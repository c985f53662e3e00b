"""The metrics of the last steps: kept on the device, looked at together, refused if not finite."""

import time

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
        self._since, self._timed = time.monotonic(), 0

    def add(self, step: int, metrics: dict[str, Array]) -> None:
        """Keeps a step's metrics, and lets the host run at most two steps ahead of the devices."""
        self._metrics.append((step, metrics))
        self._timed += 1
        if len(self._metrics) > 2:
            jax.block_until_ready(self._metrics[-3][1])

    def close(self, batch_size: int) -> dict[str, float]:
        """The means over the window and its speed; empties it.

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
            rate = self._timed / max(time.monotonic() - self._since, 1e-9)
            means |= {"steps_per_second": rate, "images_per_second": rate * batch_size}
        self._metrics = []
        self.restart_clock()
        return means

    def __len__(self) -> int:
        return len(self._metrics)
