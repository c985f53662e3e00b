"""What of a program runs, each instruction as often as it runs, and how many FLOPs that is.

XLA's own cost analysis counts the body of a loop once, whatever its trip count; here everything is
counted as often as it runs.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

import numpy as np

from cfg_jax import hlo


def trip_count(module: hlo.Module, loop: hlo.Instruction) -> int:
    """How often a while loop runs: the compiler's word, or the bound that its condition compares
    with. Raises ValueError where neither is there: the count would be a guess.
    """
    if known := re.search(r'known_trip_count"?:\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    condition = module.computations[loop.attribute("condition").lstrip("%")]
    bounds = [
        int(match[1])
        for i in condition.values()
        if i.opcode == "constant" and i.shape.startswith(("s32[]", "s64[]", "u32[]"))
        if (match := re.match(r"(-?\d+)\)", i.attributes))
    ]
    if not bounds:
        raise ValueError(f"loop {loop.name} does not say how often it runs")
    return max(bounds)


@dataclasses.dataclass(frozen=True)
class Visit:
    """An instruction where it runs: in which computation, how often, and inside what."""

    instruction: hlo.Instruction
    computation: hlo.Computation
    times: int
    fused: bool  # inside a fusion: its operands and result are in no memory
    in_loop: bool


def walk(module: hlo.Module) -> Iterator[Visit]:
    """Every instruction that runs, as often as it runs. Of the branches of a conditional the one
    that multiplies most is walked: with guidance that is the one of two passes.

    What no result depends on is left out, as the compiler leaves it out.
    """
    yield from _walk(module, module.entry, None, 1, False, False)


def _walk(module, name, needed, times, fused, in_loop) -> Iterator[Visit]:
    computation = module.computations[name]
    live = _live(computation, needed)
    for instruction in computation.values():
        if instruction.name not in live:
            continue
        yield Visit(instruction, computation, times, fused, in_loop)
        callees = instruction.callees
        if instruction.opcode == "conditional":
            flops = [_flops_of(module, c) for c in callees]
            callees = [callees[flops.index(max(flops))]]
        elif instruction.opcode not in ("while", "fusion", "call") and not (
            instruction.opcode.endswith("-start")
        ):
            continue  # the sums of reductions, sorts and scatters
        loop = instruction.opcode == "while"
        more = trip_count(module, instruction) if loop else 1
        wants = live[instruction.name] if instruction.opcode == "call" else None
        for callee in callees:
            within = fused or instruction.opcode == "fusion"
            yield from _walk(module, callee, wants, times * more, within, in_loop or loop)


def _live(computation: hlo.Computation, needed) -> dict[str, frozenset | None]:
    """{name: which of its results are needed, None for all} of what the root depends on."""
    root = next((i for i in computation.values() if i.root), None) or [*computation.values()][-1]
    live: dict = {}
    stack = [(root.name, needed)]
    while stack:
        name, want = stack.pop()
        instruction = computation.get(name)
        if instruction is None:
            continue
        if name in live:
            before = live[name]
            if before is None or (want is not None and want <= before):
                continue
            want = None if want is None else want | before
        live[name] = want
        if instruction.opcode == "tuple" and want is not None:
            stack += [(instruction.operands[i], None) for i in want]
        elif instruction.opcode == "get-tuple-element":
            index = frozenset([int(instruction.attribute("index"))])
            stack.append((instruction.operands[0], index))
        else:
            stack += [(operand, None) for operand in instruction.operands]
    for i in computation.values():  # what has an effect runs whether or not it is used
        if i.opcode in ("send", "recv", "outfeed", "infeed"):
            live.setdefault(i.name, None)
    return live


def _flops_of(module: hlo.Module, name: str) -> int:
    return sum(
        v.times * product_flops(v.instruction, v.computation)
        for v in _walk(module, name, None, 1, False, False)
    )


def flops(module: hlo.Module) -> int:
    """Of convolutions and matrix products, 2 a multiply-add, as often as they run, on one device.

    Taps on the padding or in the holes of a dilation are not counted, neither here nor in the
    model's own count: one convention for both, and the only one under which a batched product that
    the compiler writes as a dilated convolution keeps its count. Nothing else is counted.
    """
    return _flops_of(module, module.entry)


def product_flops(instruction: hlo.Instruction, computation: hlo.Computation) -> int:
    """Those of one convolution or matrix product; 0 for anything else."""
    if instruction.opcode == "dot":
        lhs = computation[instruction.operands[0]].result[0]
        contracted = (instruction.attribute("lhs_contracting_dims") or "").split(",")
        inner = math.prod(lhs.dims[int(d)] for d in contracted if d)
        return 2 * math.prod(instruction.result[0].dims) * inner
    if instruction.opcode != "convolution":
        return 0
    lhs, rhs = (computation[name].result[0].dims for name in instruction.operands[:2])
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    out = instruction.result[0].dims
    window = _window(instruction.attribute("window") or "")
    taps = 1
    for spatial in (d for d in labels[3] if d.isdigit()):
        size, stride, low, lhs_dilate, rhs_dilate = window[int(spatial)]
        taps *= _valid_taps(
            lhs[labels[1].index(spatial)],
            rhs[labels[2].index(spatial)],
            out[labels[3].index(spatial)],
            stride,
            low,
            lhs_dilate,
            rhs_dilate,
        )
        assert size == rhs[labels[2].index(spatial)]
    groups = int(instruction.attribute("batch_group_count") or 1)
    batch = lhs[labels[1].index("b")] // groups
    return 2 * batch * out[labels[3].index("f")] * rhs[labels[2].index("i")] * taps


def _window(text: str) -> list[tuple[int, int, int, int, int]]:
    """(size, stride, low padding, dilation of the left, of the right) of every dimension."""
    fields = dict(part.split("=") for part in text.split())
    sizes = [int(n) for n in fields.get("size", "").split("x") if n]

    def each(name: str, default: str) -> list[str]:
        return fields[name].split("x") if name in fields else [default] * len(sizes)

    low = [int(pad.split("_")[0]) for pad in each("pad", "0_0")]
    rest = [list(map(int, each(n, "1"))) for n in ("stride", "lhs_dilate", "rhs_dilate")]
    return list(zip(sizes, rest[0], low, rest[1], rest[2]))


@functools.cache
def _valid_taps(
    length: int, taps: int, out: int, stride: int, low: int, lhs_dilate: int, rhs_dilate: int
) -> int:
    """Pairs (output, tap) along one dimension whose input is neither padding nor a hole."""
    where = np.arange(out)[:, None] * stride - low + np.arange(taps)[None] * rhs_dilate
    inside = (where >= 0) & (where <= (length - 1) * lhs_dilate) & (where % lhs_dilate == 0)
    return int(inside.sum())
