"""What a compiled program moves: between devices, and between a chip's memory and its units.

Pure functions over a module that `hlo.parse` has read.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

from cfg_jax import executed, hlo

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
)
# Names for what lies there already, or work counted elsewhere: they move nothing themselves.
_MOVE_NOTHING = {
    *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "call"),
    *("while", "conditional", "opt-barrier", "partition-id", "replica-id", "iota"),
}


@dataclasses.dataclass(frozen=True)
class Collective:
    """Exchanges of one kind, precision, group and place: `count` of them, `bytes` in all.

    bytes are those of the whole array that is summed, gathered or passed on, a device, not those
    that a link carries; `devices` take part in each, 0 where the text does not say.
    """

    kind: str
    dtype: str  # of most of its bytes
    devices: int
    in_loop: bool
    count: int
    bytes: int

    @property
    def sent(self) -> float:
        """Bytes that a device must send at the least, by whatever route."""
        others = (self.devices - 1) / self.devices if self.devices else 1
        return self.bytes * {"all-reduce": 2 * others, "collective-permute": 1}.get(
            self.kind, others
        )


def collectives(module: hlo.Module) -> list[Collective]:
    """What crosses between devices, the most bytes first; those in loops as often as they run."""
    found: dict = {}
    begun = set()
    for visit in executed.walk(module):
        instruction = visit.instruction
        kind = instruction.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            continue
        if "async_collective_fusion_config" in instruction.attributes:
            # An exchange that a TPU runs beside other work stands in the fusion that starts it, in
            # those that it runs beside, and in the one that waits for it.
            if (channel := instruction.attribute("channel_id")) in begun:
                continue
            begun.add(channel)
        if visit.fused and any(i.opcode == "dynamic-slice" for i in visit.computation.values()):
            kind = {"all-reduce": "reduce-scatter"}.get(kind, kind)  # each keeps a slice of the sum
        # Of a gather or a permutation that is only started, the result holds the operand too.
        moved = instruction.result
        given = [a for name in instruction.operands for a in visit.computation[name].result]
        if instruction.opcode.endswith("-start") and kind != "all-reduce":
            moved = moved[len(given) : 2 * len(given)] or moved
        if kind == "reduce-scatter":
            moved = given
        sizes: dict = {}
        for array in moved:
            sizes[array.dtype] = sizes.get(array.dtype, 0) + array.bytes
        dtype = max(sizes, key=sizes.get)
        key = (kind, dtype, _group_size(instruction.attributes), visit.in_loop)
        count, size = found.get(key, (0, 0))
        found[key] = (count + visit.times, size + visit.times * sum(sizes.values()))
    listed = [Collective(*key, count, size) for key, (count, size) in found.items()]
    return sorted(listed, key=lambda c: -c.bytes)


def _group_size(attributes: str) -> int:
    """How many devices take part in a collective."""
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(match[1])
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return len(match[1].split(","))
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        # 'axis' is all of it, 'axis':(before)size a part.
        used = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match[2])
        return math.prod(int(part or sizes[axis]) for axis, part in used)
    return 0


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What one run moves between the chip's main memory and its units, in bytes.

    `bytes` are the numbers alone, `padded_bytes` with what fills the tiles of their layouts up.
    `worst` names the arrays that are filled up most: (shape, times it is moved, bytes of filling).
    """

    bytes: int
    padded_bytes: int
    worst: tuple[tuple[str, int, int], ...]


def memory(module: hlo.Module, worst: int = 5) -> Traffic:
    """Operands and results of everything that runs and is not inside a fusion, where they lie in
    main memory; of an operand of which only slices are taken, the slices.
    """
    total = padded = 0
    filling: dict = {}
    for visit in executed.walk(module):
        if visit.fused or visit.instruction.opcode in _MOVE_NOTHING:
            continue
        if visit.instruction.opcode.endswith(("-done", "-update")):
            continue
        for array in _moved(module, visit):
            if array.space:
                continue
            total += visit.times * array.bytes
            padded += visit.times * array.padded_bytes
            if extra := visit.times * (array.padded_bytes - array.bytes):
                key = f"{array.dtype}{list(array.dims)}"
                times, size = filling.get(key, (0, 0))
                filling[key] = (times + visit.times, size + extra)
    most = sorted(filling.items(), key=lambda item: -item[1][1])[:worst]
    return Traffic(total, padded, tuple((key, *value) for key, value in most))


def _moved(module: hlo.Module, visit: executed.Visit) -> Iterator[hlo.Array]:
    instruction, computation = visit.instruction, visit.computation
    results = instruction.result
    if instruction.opcode in ("dynamic-slice", "slice", "gather", "slice-start"):
        part = results[1] if instruction.opcode == "slice-start" else results[0]
        source = computation[instruction.operands[0]].result[0]
        yield from (part, dataclasses.replace(part, space=source.space))
        return
    if instruction.opcode.endswith("-start"):
        results = results[:1]
    yield from results
    inner = {}
    if instruction.opcode == "fusion":
        body = module.computations[instruction.callees[0]]
        inner = {int(i.operands[0]): i for i in body.values() if i.opcode == "parameter"}
    for at, name in enumerate(instruction.operands):
        given = computation[name].result
        if at in inner:
            users = [i for i in body.values() if inner[at].name in i.operands]
            if users and all(
                i.opcode in ("dynamic-slice", "slice", "gather") and i.operands[0] == inner[at].name
                for i in users
            ):
                given = [a for i in users for a in i.result]
                given = [
                    dataclasses.replace(a, space=computation[name].result[0].space) for a in given
                ]
        yield from given
