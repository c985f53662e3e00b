"""The two programs of an experiment, compiled for devices that need not be here, and read.

They are the ones that `train` and `sample` run, made by the same functions.
"""

import dataclasses
import gzip
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from cfg_jax import chips, executed, experiment, generator, hlo, traffic, train
from cfg_jax.runtime import mesh as meshes

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes a device. `peak` is what must fit at once; the other fields are its parts.

    Where the compiler refused the program, `peak` is what it asked for, and it tells no more.
    """

    peak: float
    arguments: float | None = None
    outputs: float | None = None  # that are not arguments used again
    temporaries: float | None = None
    code: float | None = None
    capacity: float | None = None  # None: not known
    refused: bool = False

    @property
    def fits(self) -> bool | None:
        """Whether the compiler made the program and it takes no more than there is, if known."""
        if self.refused:
            return False
        return None if self.capacity is None else self.peak <= self.capacity


@dataclasses.dataclass(frozen=True)
class Report:
    """What is known of a program without running it; every number is of one run, on one device."""

    memory: Memory
    wall_seconds: float  # of the compiler
    cpu_seconds: float
    model_flops: float  # products of the network as lowered, nothing computed twice
    # None where the program does not fit, and so was not made:
    flops: float | None = None  # products of the compiled program
    xla_flops: float | None = None  # what XLA's own cost analysis says, loops counted once
    collectives: tuple[traffic.Collective, ...] = ()
    moved: traffic.Traffic | None = None
    bound: chips.Bound | None = None  # None where the chip's peaks are not known

    @property
    def flops_ratio(self) -> float | None:
        """How many FLOPs were compiled for each of the model's; more than 1 is computed again."""
        return None if self.flops is None else self.flops / self.model_flops

    def json(self) -> dict[str, Any]:
        """The fields and what follows from them, as plan.json has them."""
        out = dataclasses.asdict(self)
        out["memory"]["fits"] = self.memory.fits
        out["flops_ratio"] = self.flops_ratio
        out["collectives"] = [dataclasses.asdict(c) | {"sent": c.sent} for c in self.collectives]
        if self.bound:
            out["bound"] |= {"seconds": self.bound.seconds, "limited_by": self.bound.limited_by}
        return out


class Compiler:
    """Compiles for one slice; what was compiled before, with the same versions, is read again.

    `keep` is the folder for that; None keeps nothing. `compilations` counts those that ran.
    """

    def __init__(self, target: chips.Slice, versions: Mapping[str, str], keep: str | None = None):
        self.target, self._versions = target, versions
        self._keep = epath.Path(keep) if keep else None
        self.compilations = 0

    def mesh(self, model: experiment.Experiment) -> Mesh:
        """The slice's devices as the training step has them, ("data", "fsdp")."""
        return meshes.make_mesh(model.train.fsdp, self.target.devices)

    def training_step(self, model: experiment.Experiment) -> Report:
        """Raises UsageError where the slice does not divide the batch."""
        mesh = self.mesh(model)
        meshes.check_batch(mesh, model.train.batch_size, model.train.accumulate)

        def lower(model):
            step = train.make_step(model, mesh)
            return self._lower(step.run, step.shapes, step.frozen, step.rows, _key(mesh))

        return self._report(lower, model)

    def sampler(self, model: experiment.Experiment) -> Report:
        """The whole guided chain, for one w that is not 0: both passes run at every level."""
        mesh = meshes.make_mesh(1, self.target.devices)  # as `sample` has it

        def lower(model):
            params = jax.eval_shape(model.network.init, jax.random.key(0))
            params = meshes.placed(params, meshes.state_shardings(mesh, params))
            size = generator.batch_size(model, mesh)
            rows = _over(meshes.batch_sharding(mesh), jax.ShapeDtypeStruct((size,), np.int32))
            number, seed = (
                _over(meshes.replicated(mesh), jax.ShapeDtypeStruct((), kind))
                for kind in (np.float32, np.uint32)
            )
            rule = jax.tree.map(lambda _: number, model.guidance())
            return self._lower(
                generator.program(model, mesh), {"model": params}, *3 * [rows], rule, seed
            )

        return self._report(lower, model)

    def _lower(self, program, *arguments):
        platform = self.target.devices[0].platform
        platform = {"gpu": "cuda"}.get(platform, platform)
        return program.trace(*arguments).lower(lowering_platforms=(platform,))

    def _report(self, lower: Callable, model: experiment.Experiment) -> Report:
        lowered = lower(model)
        plain = lowered
        if model.config["model"]["remat"] != "none":
            section = {**model.config["model"], "remat": "none"}
            plain = lower(experiment.build({**model.config, "model": section}))
        devices = len(self.target.devices)
        model_flops = executed.flops(hlo.parse(plain.as_text("hlo"))) / devices
        made = self._compiled(lowered)
        memory = Memory(
            **made["memory"], capacity=self.target.capacity, refused=made["text"] is None
        )
        common = {k: made[k] for k in ("wall_seconds", "cpu_seconds")} | {"memory": memory}
        if memory.refused:
            return Report(model_flops=model_flops, **common)
        module = hlo.parse(made["text"])
        flops, crossed = executed.flops(module), traffic.collectives(module)
        moved = traffic.memory(module)
        bound = None
        if self.target.chip:
            sent = sum(c.sent for c in crossed)
            bound = chips.bound(self.target.chip, flops, moved.padded_bytes, sent)
        return Report(
            model_flops=model_flops,
            flops=flops,
            xla_flops=made["xla_flops"],
            collectives=tuple(crossed),
            moved=moved,
            bound=bound,
            **common,
        )

    def _compiled(self, lowered) -> dict[str, Any]:
        """The compiled text, memory and seconds, from the folder or from the compiler."""
        parts = [lowered.as_text(), self.target.name, *map(str, self._versions.items())]
        parts += [os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
        name = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:20]
        kept = self._keep and self._keep / f"{name}.json.gz"
        if kept and kept.exists():
            return json.loads(gzip.decompress(kept.read_bytes()))
        made = compiled(lowered)
        self.compilations += 1
        if kept:
            self._keep.mkdir(parents=True, exist_ok=True)
            partial = kept.with_suffix(".partial")  # a plan that is killed leaves no half of one
            partial.write_bytes(gzip.compress(json.dumps(made).encode(), 5))
            partial.rename(kept)
        return made


def compiled(lowered) -> dict[str, Any]:
    """{"text", "memory", "xla_flops", "wall_seconds", "cpu_seconds"} of what a compiler makes.

    CPU seconds are this process's: they tell the work where the machine is shared. Where the
    program does not fit, text is None, and memory what the compiler says that it wants.
    """
    wall, cpu = time.perf_counter(), time.process_time()
    memory = None
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        memory = {"peak": wanted(str(error))}
        if memory["peak"] is None:
            raise
    seconds = {
        "wall_seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
    }
    if memory:
        return {"text": None, "memory": memory, "xla_flops": None, **seconds}
    stats = program.memory_analysis()
    memory = {
        "arguments": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes - stats.alias_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
    }
    memory["peak"] = sum(memory.values())
    xla = (program.cost_analysis() or {}).get("flops")
    return {"text": program.as_text(), "memory": memory, "xla_flops": xla, **seconds}


def wanted(message: str) -> float | None:
    """Bytes a device that a program wants of which the compiler says it has not enough."""
    patterns = (
        r"required for HLO temporaries \(([\d.]+)([KMGT])\) exceeds available HBM",
        r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm",
    )
    for match in filter(None, (re.search(pattern, message) for pattern in patterns)):
        return float(match[1]) * _UNITS[match[2]]
    return None


def _over(sharding, leaf) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _key(mesh: Mesh) -> jax.ShapeDtypeStruct:
    return _over(meshes.replicated(mesh), jax.eval_shape(lambda: jax.random.key(0)))


def largest_batch(
    peak: Callable[[int], float | None],
    seen: Mapping[int, float | None],
    capacity: float,
    tries: int,
) -> dict[int, float | None]:
    """{batch a chip: peak bytes} of what was compiled to find the largest that fits.

    A peak is None where the compiler refused: that bounds the search, and what it asked for is no
    point of the line. Memory grows nearly linearly with the batch: a second point is taken at twice
    the first, the line through the two nearest gives the next, and where there is none, or it leads
    out of the bracket, the bracket is halved; a quarter is next where nothing fits yet. What is
    returned as fitting was compiled. At most `tries` calls of peak(batch).
    """
    seen = dict(seen)
    for _ in range(tries):
        known = {b: p for b, p in seen.items() if p is not None}
        fit = max((b for b, p in known.items() if p <= capacity), default=0)
        full = min((b for b in seen if b not in known or known[b] > capacity), default=None)
        guess = 2 * fit
        if len(known) > 1:
            (b0, p0), (b1, p1) = sorted(sorted(known.items()), key=lambda s: abs(s[1] - capacity))[
                :2
            ]
            slope = (p1 - p0) / (b1 - b0)
            guess = int(b0 + (capacity - p0) / slope) if slope > 0 else 2 * max(b0, b1)
        guess = max(guess, fit + 1)
        if full is not None and (len(known) < 2 or guess >= full):
            guess = (fit + full) // 2 if fit else max(full // 4, 1)
        if guess < 1 or guess in seen:
            break
        seen[guess] = peak(guess)
    return seen
