"""The chips that a program can be compiled for without one: published numbers, and their devices.

Numbers are those of Google Cloud's TPU documentation, "System architecture" and a page a chip,
https://docs.cloud.google.com/tpu/docs/v4 (v5e, v5p-training, v6e), read on 2026-11-24.
"""

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Mapping

import jax
from jax.experimental import topologies

from cfg_jax.types import UsageError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A chip is one device: where it has two cores they work as one."""

    name: str
    flops: float  # a second, bfloat16 products
    memory: float  # bytes of HBM
    usable: float  # bytes of it that libtpu 0.0.52 lets a program take: said when one wants more
    bandwidth: float  # bytes a second, of HBM
    # Bytes a second that a chip sends over all its links: half of the documented bidirectional
    # bandwidth; for v4, which has none there, the all-reduce bandwidth a pod over its 4096 chips.
    network: float
    dimensions: int  # of a slice
    core_config: str  # what libtpu calls one device a chip


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 275e12, 32 * GIB, 30.75 * GIB, 1200e9, 1.1e15 / 4096, 3, "megacore"),
        Chip("v5e", 197e12, 16 * GIB, 15.75 * GIB, 819e9, 200e9, 2, "default"),
        # Documented as 95 GB; libtpu has somewhat more.
        Chip("v5p", 459e12, 95 * GIB, 95.73 * GIB, 2765e9, 600e9, 3, "megacore"),
        Chip("v6e", 918e12, 32 * GIB, 31.24 * GIB, 1640e9, 400e9, 2, "default"),
    )
}
# So that libtpu compiles on a machine that has no TPU and asks no metadata server for one.
_WITHOUT_A_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # two plans at a time: neither touches a chip
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """What a program is compiled for. `chip` is None where no numbers are published here."""

    name: str
    devices: tuple[jax.Device, ...]
    chip: Chip | None

    @property
    def hosts(self) -> int:
        """How many machines the devices are attached to."""
        return len({device.process_index for device in self.devices})

    @property
    def capacity(self) -> float | None:
        """Bytes that a program may take a device, None where that is not known."""
        if self.chip:
            return self.chip.usable
        stats = self.devices[0].memory_stats() if self.devices[0].platform == "gpu" else None
        return (stats or {}).get("bytes_limit")


def target(topology: str) -> Slice:
    """The devices of a named slice ("v5e:16x16"), or this machine's ("cpu", "cpu:8", "gpu").

    Must be called before jax starts a backend. Raises UsageError for what there is none of.
    """
    name, _, size = topology.partition(":")
    if name in ("cpu", "gpu"):
        return Slice(topology, tuple(_local(topology, name, size)), None)
    chip = CHIPS.get(name)
    example = "--topology=v5e:16x16, v4:4x4x4, cpu:8 or gpu"
    if chip is None:
        raise UsageError(
            f"--topology={topology}: {name!r} is no chip that can be planned for; there are "
            f"{', '.join(CHIPS)}, cpu and gpu, as in {example}."
        )
    if not re.fullmatch(r"\d+(x\d+)*", size) or size.count("x") + 1 != chip.dimensions:
        raise UsageError(
            f"--topology={topology}: a slice of {name} has {chip.dimensions} dimensions, as in "
            f"{name}:{'x'.join(['4'] * chip.dimensions)}."
        )
    if importlib.util.find_spec("libtpu") is None:
        raise UsageError(
            f"--topology={topology}: the TPU compiler is not installed; "
            "pip install 'cfg_jax[plan]' brings it."
        )
    os.environ |= {k: v for k, v in _WITHOUT_A_TPU.items() if k not in os.environ}
    # The arrays of this process, of which there are next to none, lie on the CPU.
    jax.config.update("jax_platforms", "cpu")
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=topology, chip_config_name=chip.core_config
        )
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--topology={topology}: the TPU compiler refuses it: {reason}") from error
    devices = tuple(found.devices)
    assert len(devices) == math.prod(map(int, size.split("x")))
    return Slice(topology, devices, chip)


def _local(topology: str, platform: str, count: str) -> list[jax.Device]:
    if count and (platform != "cpu" or not count.isdigit() or int(count) < 1):
        raise UsageError(f"--topology={topology}: write cpu, gpu, or cpu:8 for eight devices.")
    if platform == "cpu":
        jax.config.update("jax_platforms", "cpu")
        if count:
            jax.config.update("jax_num_cpu_devices", int(count))
    try:
        return jax.devices(platform)
    except RuntimeError as error:
        raise UsageError(
            f"--topology={topology}: this machine has none, and its compiler is not found without; "
            f"plan for a TPU slice or for cpu."
        ) from error


@dataclasses.dataclass(frozen=True)
class Bound:
    """The least seconds that one run of a program can take on a chip, and what sets them.

    A bound, not a measurement: every unit at its published peak, all of them at the same time.
    """

    compute: float
    memory: float
    network: float

    @property
    def seconds(self) -> float:
        """Those of the slowest of the three, as if the others were hidden behind it."""
        return max(self.compute, self.memory, self.network)

    @property
    def limited_by(self) -> str:
        """Which of the three is the slowest: "compute", "memory" or "network"."""
        times: Mapping[str, float] = dataclasses.asdict(self)
        return max(times, key=times.get)


def bound(chip: Chip, flops: float, moved: float, sent: float) -> Bound:
    """From FLOPs, bytes to and from HBM, and bytes that a chip sends, all a chip."""
    return Bound(flops / chip.flops, moved / chip.bandwidth, sent / chip.network)
