"""What a run tells: a progress bar, a line of JSON and TensorBoard events at intervals, and
pictures.
"""

import json
import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import tqdm
from etils import epath
from tensorboardX import SummaryWriter

from cfg_jax.runtime import wandb_run


def say(message: str) -> None:
    """A line to the person who watches, on standard error, from process 0; above the bar if there
    is one.
    """
    if jax.process_index() == 0:
        tqdm.tqdm.write(message, file=sys.stderr)


def progress_bar(total: int, unit: str, *, initial: int = 0) -> tqdm.tqdm:
    """A bar with the time left, on process 0; a line now and then where nobody watches it move."""
    return tqdm.tqdm(
        total=total,
        initial=initial,
        unit=unit,
        mininterval=0.5 if sys.stderr.isatty() else 20,
        dynamic_ncols=True,
        disable=jax.process_index() > 0,
    )


def _lines_up_to(path: epath.Path, step: int) -> list[str]:
    kept = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue  # a line cut short when the run was killed
    return kept


class _Lines:
    """A file that begins with the lines `kept`, and holds each line added at once."""

    def __init__(self, path: epath.Path, kept: list[str]):
        self._path, self._kept = path, kept
        self._rewrite()
        # A bucket's objects are written whole: opening one to append to it would empty it.
        self._file = None if "://" in str(path) else path.open("a")

    def _rewrite(self) -> None:
        beside = self._path.with_name(f"{self._path.name}.tmp")
        beside.write_text("".join(f"{line}\n" for line in self._kept))
        beside.replace(self._path)

    def add(self, line: str) -> None:
        if self._file is None:
            self._kept.append(line)
            self._rewrite()
        else:
            self._file.write(f"{line}\n")
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class RunLog:
    """The log of one training run, written by process 0; on the others every method does nothing.

    metrics.jsonl holds a line a step logged, and one more where the EMA was evaluated. A run that
    goes on from `start` first drops the lines after it, so that the file reads as if the run had
    never stopped. `wandb` names a project of Weights & Biases to log to as well, and to tell the
    config.
    """

    def __init__(
        self, workdir: str, *, start: int, steps: int, config: Mapping[str, Any], wandb: str = ""
    ):
        self._active = jax.process_index() == 0
        if not self._active:
            return
        root = epath.Path(workdir)
        root.mkdir(parents=True, exist_ok=True)
        path = root / "metrics.jsonl"
        self._lines = _Lines(path, _lines_up_to(path, start))
        self._events = SummaryWriter(str(root / "tensorboard"), purge_step=start + 1)
        self._wandb = wandb_run.WandbRun(wandb, workdir, config) if wandb else None
        self._bar = progress_bar(steps, "step", initial=start)

    def advance(self) -> None:
        """One more step is done: moves the bar."""
        if self._active:
            self._bar.update(1)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Writes the values of a step, and shows them on the bar."""
        if not self._active:
            return
        self._lines.add(json.dumps({"step": step, **values}))
        for name, value in values.items():
            self._events.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.scalars(step, values)
        self._bar.set_postfix({k: f"{v:.4g}" for k, v in values.items()}, refresh=False)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Adds a picture, uint8 [H, W, C], to the events."""
        if self._active:
            self._events.add_image(name, image, step, dataformats="HWC")
            if self._wandb:
                self._wandb.image(step, name, image)

    def close(self) -> None:
        """Flushes and closes; safe to call twice."""
        if self._active:
            self._active = False
            self._bar.close()
            self._lines.close()
            self._events.close()
            if self._wandb:
                self._wandb.close()
