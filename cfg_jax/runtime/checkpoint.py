"""Checkpoints: the training state and its EMA as two items, saved while training goes on, by Orbax.

A run is a folder: `config.json` says what it is, `checkpoints/STEP/{state,ema}` where it stands.
Sampling reads the EMA alone, onto whatever devices there are.
"""

import contextlib
import functools
import json
import re
import sys
import time

import jax
import orbax.checkpoint as ocp
from etils import epath

from cfg_jax.runtime import logging as runlog
from cfg_jax.runtime import mesh as meshes
from cfg_jax.types import UsageError


class NotSaved(RuntimeError):
    """A checkpoint that could not be written: a full disk, a bucket without the right to write."""


def write_config(workdir: str, config: dict) -> None:
    """Writes config.json beside the checkpoints, whole or not at all, from one process."""
    path = epath.Path(workdir) / "config.json"
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name("config.json.tmp")
        beside.write_text(json.dumps(config, indent=2) + "\n")
        beside.replace(path)
    meshes.barrier("config")


def read_config(workdir: str) -> dict | None:
    """The config of a run, or None if there is none yet. Raises UsageError if it is damaged."""
    path = epath.Path(workdir) / "config.json"
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UsageError(f"{path} is damaged ({error}): take another folder.") from error


def has_checkpoint(workdir: str) -> bool:
    """Whether a run has saved anything yet, to the end: in a bucket the folder of a step is there
    from the first byte on.
    """
    return bool(ocp.utils.checkpoint_steps(epath.Path(workdir) / "checkpoints"))


@functools.cache
def _hush_stragglers() -> None:
    """Once a file of a checkpoint cannot be written, TensorStore reports on the others to an event
    loop that is closed by then: a traceback each. The error itself is raised, and told in a line.
    """
    tell = sys.unraisablehook

    def hook(unraisable) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            tell(unraisable)

    sys.unraisablehook = hook


# What became of reading a checkpoint, the worst first.
_NOT_NOW, _DAMAGED, _READ = range(3)

# With these TensorStore begins what it says of data that are missing or corrupt. It raises a
# ValueError for every status, PERMISSION_DENIED and UNAVAILABLE too, and names none for bytes that
# make no sense.
_DAMAGE = (None, "NOT_FOUND", "DATA_LOSS", "OUT_OF_RANGE", "FAILED_PRECONDITION")


def _root(error: BaseException) -> BaseException:
    """Orbax raises a bare Exception from what TensorStore says of an array."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _is_damage(error: BaseException) -> bool:
    """Whether data are missing or corrupt, rather than out of reach, or too large, for now."""
    status = re.match(r"([A-Z]+(?:_[A-Z]+)*): ", str(error))
    missing = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
    return isinstance(error, (ValueError, KeyError, EOFError, *missing)) and (
        (status and status[1]) in _DAMAGE
    )


class Checkpoints:
    """The checkpoints of one run; the newest `keep` of them are kept.

    One that is damaged (a disk that was full, a file cut short) is said, and the one before it is
    taken; a run that goes on then moves it to `unreadable/`, a reader leaves it.
    """

    def __init__(self, workdir: str, *, keep: int = 2, read_only: bool = False):
        _hush_stragglers()
        self._workdir = epath.Path(workdir)
        self._read_only = read_only
        self._manager = ocp.CheckpointManager(
            # Orbax wants an absolute path, and a bucket's name is one.
            epath.Path(str(workdir) if "://" in str(workdir) else self._workdir.absolute())
            / "checkpoints",
            item_names=("state", "ema"),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, create=not read_only, read_only=read_only
            ),
        )

    def save(self, step: int, **trees) -> None:
        """Starts to save items, state and ema or one of them; training may go on at once.

        A step that is there already stays. Raises NotSaved where this one, or the one before it,
        could not be written.
        """
        if step in self._manager.all_steps():
            return
        items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        with self._writing():
            self._manager.save(step, args=ocp.args.Composite(**items))

    @contextlib.contextmanager
    def _writing(self):
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise many kinds
            if meshes.lost_another(error):
                raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            reason = "no space left" if "No space left" in str(error) else reason[:200]
            raise NotSaved(f"{self._workdir} could not be written to: {reason}") from error

    def restore(self, **wanted):
        """(step, {item: tree}) of the newest checkpoint that is whole, or None where there is none
        at all.

        `wanted` names the items, state and ema or one of them, as pytrees of jax.ShapeDtypeStruct
        with the shardings wanted; another number of devices than at the time of saving is fine.
        Raises UsageError where there are checkpoints and none can be read, and where the newest
        that may be whole is out of reach: a right or a connection that is missing, too little
        memory.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        items = {name: ocp.args.StandardRestore(tree) for name, tree in wanted.items()}
        damaged, reason = [], ""
        for step in steps:
            outcome, reason = _READ, "another process could not"
            try:
                found = self._manager.restore(step, args=ocp.args.Composite(**items))
            except Exception as error:  # Orbax and TensorStore raise many kinds
                root = _root(error)
                outcome = _DAMAGED if _is_damage(root) else _NOT_NOW
                reason = (str(root).splitlines() or [type(root).__name__])[0][:120]
            outcome = meshes.least(outcome)
            if outcome == _READ:
                self._leave_behind(damaged)
                return step, {name: found[name] for name in wanted}
            if outcome == _NOT_NOW:
                raise UsageError(
                    f"checkpoint {step} in {self._workdir} could not be read now ({reason}): it is "
                    "left as it is; start again once it can be."
                )
            damaged.append(step)
            runlog.say(f"checkpoint {step} in {self._workdir} cannot be read ({reason})")
        if steps:
            raise UsageError(
                f"none of the checkpoints {steps} in {self._workdir} can be read ({reason}): they "
                "stay as they are; train again in another --workdir."
            )
        return None

    def _leave_behind(self, damaged: list[int]) -> None:
        """Once an older one has been read: out of the way of those that training will save."""
        if self._read_only or not damaged:
            return
        if jax.process_index() == 0:
            aside = self._workdir / "unreadable" / str(time.time_ns())
            aside.mkdir(parents=True, exist_ok=True)
            for step in damaged:
                (self._workdir / "checkpoints" / str(step)).rename(aside / str(step))
            runlog.say(f"moved to {aside}: {damaged}")
        meshes.barrier("left behind")
        self._manager.reload()

    def preempted(self, step: int) -> bool:
        """Whether the cluster has told some process to leave: the same answer on all of them."""
        return self._manager.reached_preemption(step)

    def close(self) -> None:
        """Returns once what was saved is on disk, and lets go of the folder. Raises NotSaved."""
        with self._writing():
            self._manager.close()
