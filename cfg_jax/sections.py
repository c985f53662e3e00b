"""The sections of a config that name no entry of a table: how long and how wide a run is, what it
shows on the way, and how a chain is sampled.
"""

import dataclasses
from typing import Any

from cfg_jax.diffusion import guidance
from cfg_jax.types import UsageError


@dataclasses.dataclass(frozen=True)
class Train:
    """How long, how wide, and how often to tell. Raises UsageError for numbers out of range."""

    steps: int = 10_000
    batch_size: int = 128  # global, over all devices and processes
    seed: int = 0  # of the parameters, the data's order and every draw
    fsdp: int = 1  # devices that share one copy of the state; 1 is plain data parallelism
    accumulate: int = 1  # parts of the batch that a device takes one after the other
    # In what gradients are summed over devices. A float32 sum is the same over 8 chips and 256, to
    # its rounding; "bfloat16" halves what crosses for layers that compute in bfloat16.
    gradient_dtype: str = "float32"
    read_threads: int = 2  # that make batches ahead
    read_processes: int = 0  # that do so, each with read_threads; 0: this one
    log_every: int = 100
    checkpoint_every: int = 1000
    keep: int = 2  # checkpoints
    sample_every: int = 0  # steps between sample grids; 0 for none
    sample_w: tuple[float, ...] = (0.0, 1.0, 4.0)
    wandb: str = ""  # a project of Weights & Biases to log to as well

    def __post_init__(self):
        for name in ("sample_every", "read_processes"):
            if getattr(self, name) < 0:
                raise UsageError(f"train.{name}={getattr(self, name)}: 0 for none, or more.")
        counts = ("steps", "batch_size", "fsdp", "accumulate", "log_every", "checkpoint_every")
        for name in (*counts, "keep", "read_threads"):
            if getattr(self, name) < 1:
                raise UsageError(f"train.{name}={getattr(self, name)}: must be at least 1.")
        if self.gradient_dtype not in ("float32", "bfloat16"):
            raise UsageError(
                f"train.gradient_dtype={self.gradient_dtype!r}: must be 'float32' or 'bfloat16'."
            )
        if not 0 <= self.seed < 2**32:
            raise UsageError(f"train.seed={self.seed}: must lie in 0 to 2^32 - 1.")
        if self.sample_every and not self.sample_w:
            raise UsageError("train.sample_w is empty: give a w, or train.sample_every=0.")
        for w in self.sample_w:
            guidance.check_w(w)


@dataclasses.dataclass(frozen=True)
class Sample:
    """The reverse chain: which rule and sampler, over which noise levels.

    Raises UsageError for numbers out of range.
    """

    guidance: dict[str, Any] = dataclasses.field(default_factory=dict)
    sampler: dict[str, Any] = dataclasses.field(default_factory=dict)
    # Labels to move away from in place of the null one; several are mixed, a pass of each.
    negative: tuple[int, ...] = ()
    grid: dict[str, Any] = dataclasses.field(default_factory=dict)
    steps: int = 256  # T, noise levels
    clip: bool = True  # x to [-1, 1], after mixing
    batch_size: int = 128  # images at a time, over all devices

    def __post_init__(self):
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"sample.{name}={getattr(self, name)}: must be at least 1.")


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """A small sweep of the EMA during training. Raises UsageError for numbers out of range."""

    every: int = 0  # steps between sweeps; 0 for none
    w: tuple[float, ...] = (0.0, 1.0)
    num_samples: int = 1000  # a w
    seed: int = 0
    features: str = "judge"  # one name of FEATURES
    judge: str | None = None
    reference: str | None = None
    keep_best: str | None = None  # a score, as "fd_judge": the EMA that has the best one is kept

    def __post_init__(self):
        if self.every < 0 or self.num_samples < 4:
            raise UsageError(
                f"evaluate.every={self.every}: 0 for none, or more; evaluate.num_samples="
                f"{self.num_samples}: 4 or more, for three neighbours each."
            )
        if not 0 <= self.seed < 2**32:
            raise UsageError(f"evaluate.seed={self.seed}: must lie in 0 to 2^32 - 1.")
        if not self.w:
            raise UsageError("evaluate.w is empty: give a w, or evaluate.every=0.")
        for w in self.w:
            guidance.check_w(w)
