"""A window of steps under JAX's profiler, for TensorBoard (its XProf plugin) or Perfetto."""

import re

import jax
from etils import epath

from cfg_jax.runtime import logging as runlog
from cfg_jax.types import UsageError


class Profile:
    """Traces steps FIRST to LAST of a run, as in "100:110", into the folder given; None traces
    nothing.

    A context, so that a run that ends inside the window still writes what it has. Every process
    writes a file of its own. Raises UsageError for a window that is none.
    """

    def __init__(self, window: str | None, folder: epath.PathLike):
        match = re.fullmatch(r"(\d+):(\d+)", "0:0" if window is None else window)
        self._first, self._last = map(int, match.groups()) if match else (1, 0)
        if self._last < self._first:
            raise UsageError(f"--profile={window}: give the first and the last step, as 100:110.")
        self._wanted, self._folder, self._on = window is not None, epath.Path(folder), False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._stop()

    def before(self, step: int) -> None:
        """Tells that step `step` (the first is 0) is about to be dispatched."""
        if self._wanted and self._first <= step <= self._last:
            self._wanted = False
            self._folder.mkdir(parents=True, exist_ok=True)
            jax.profiler.start_trace(str(self._folder))
            self._on = True

    def after(self, step: int, output) -> None:
        """Tells that it was dispatched, and what it will have made once it is done."""
        if self._on and step >= self._last:
            jax.block_until_ready(output)
            self._stop()

    def _stop(self) -> None:
        if self._on:
            self._on = False
            jax.profiler.stop_trace()
            runlog.say(f"profile of steps from {self._first} to {self._last}: {self._folder}")
