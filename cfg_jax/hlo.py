"""A program as XLA's text has it: its instructions, each as often as it runs, and their FLOPs.

Pure functions over HLO before XLA's passes (`lowered.as_text("hlo")`) or after them
(`compiled.as_text()`). XLA's own cost analysis counts the body of a loop once, whatever its trip
count; here everything is counted as often as it runs.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

_BITS = {"pred": 8, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<= ]*)\](?:\{([^}]*)\})?")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_CALLEES = re.compile(
    r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)"
    r"|branch_computations=\{([^}]*)\}"
)


@dataclasses.dataclass(frozen=True)
class Array:
    """One array as a program keeps it. `tile` and `order` (the minor dimension first) say how."""

    dtype: str
    dims: tuple[int, ...]
    order: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()
    space: int = 0  # 0 is the chip's main memory; on a TPU 1 is its vector memory

    @property
    def bytes(self) -> int:
        """What its numbers take."""
        return math.prod(self.dims) * _bits(self.dtype) // 8

    @property
    def padded_bytes(self) -> int:
        """What it takes with the numbers that fill its tiles up."""
        dims = list(self.dims)
        for size, where in zip(reversed(self.tile), self.order):
            dims[where] = -(-dims[where] // size) * size
        return math.prod(dims) * _bits(self.dtype) // 8


def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    digits = re.search(r"\d+", dtype)
    return int(digits[0]) * (2 if dtype.startswith("c") else 1) if digits else 0


@functools.cache
def arrays(shape: str) -> tuple[Array, ...]:
    """The arrays of a shape as HLO writes it: one, or those of a tuple in their order."""
    out = []
    for dtype, dims, layout in _ARRAY.findall(re.sub(r"/\*.*?\*/", "", shape)):
        order, _, rest = layout.partition(":")
        tile = re.search(r"T\(([\d,]+)\)", rest)
        space = re.search(r"S\((\d+)\)", rest)
        out.append(
            Array(
                dtype,
                tuple(int(n.strip("<= ")) for n in dims.split(",") if n.strip()),
                tuple(int(n) for n in order.split(",") if n),
                tuple(int(n) for n in tile[1].split(",")) if tile else (),
                int(space[1]) if space else 0,
            )
        )
    return tuple(out)


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    root: bool = False

    @property
    def result(self) -> tuple[Array, ...]:
        return arrays(self.shape)

    def attribute(self, name: str) -> str | None:
        """The value of name=value or name={value}, without its braces."""
        match = re.search(rf"(?:^|[ ,]){name}=(?:\{{([^}}]*)\}}|([^ ,]+))", self.attributes)
        return match and (match[1] if match[1] is not None else match[2])

    @functools.cached_property
    def callees(self) -> tuple[str, ...]:
        found = []
        for one, several in _CALLEES.findall(self.attributes):
            found += [one] if one else [s.strip().lstrip("%") for s in several.split(",")]
        return tuple(found)


Computation = Mapping[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Module:
    """The computations of a program by name, and which of them is run."""

    computations: Mapping[str, Computation]
    entry: str


def parse(text: str) -> Module:
    """Reads a module. Raises ValueError where the text is none."""
    computations, entry, current = {}, None, None
    for line in text.splitlines():
        if line.startswith((" ", "\t")):
            match = _LINE.match(line)
            if match and current is not None:
                instruction = _instruction(match[2], match[3], bool(match[1]))
                current[instruction.name] = instruction
        elif match := _HEAD.match(line):
            current = computations[match[2]] = {}
            entry = match[2] if match[1] else entry
    if entry is None:
        raise ValueError("this is not the text of an HLO module: it has no ENTRY")
    return Module(computations, entry)


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for at in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        if depth == 0:
            return at
    raise ValueError(f"an unclosed parenthesis: {text[:80]}")


def _instruction(name: str, rest: str, root: bool) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    inside = re.sub(r"/\*.*?\*/", "", rest[opening + 1 : closing])
    opcode = rest[:opening]
    # Operands may be written with their shapes; their names come last.
    operands = () if opcode == "constant" else tuple(re.findall(r"([\w.\-]+)(?:,|$)", inside))
    if "[" in inside and opcode not in ("constant", "parameter"):
        operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    attributes = rest[opening + 1 :] if opcode == "constant" else rest[closing + 1 :].lstrip(", ")
    return Instruction(name, shape, opcode, operands, attributes, root)


def trip_count(module: Module, loop: Instruction) -> int:
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

    instruction: Instruction
    computation: Computation
    times: int
    fused: bool  # inside a fusion: its operands and result are in no memory
    in_loop: bool


def walk(module: Module) -> Iterator[Visit]:
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


def _live(computation: Computation, needed) -> dict[str, frozenset | None]:
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


def _flops_of(module: Module, name: str) -> int:
    return sum(
        v.times * product_flops(v.instruction, v.computation)
        for v in _walk(module, name, None, 1, False, False)
    )


def flops(module: Module) -> int:
    """Of convolutions and matrix products, 2 a multiply-add, as often as they run, on one device.

    Taps on the padding or in the holes of a dilation are not counted, neither here nor in the
    model's own count: one convention for both, and the only one under which a batched product that
    the compiler writes as a dilated convolution keeps its count. Nothing else is counted.
    """
    return _flops_of(module, module.entry)


def product_flops(instruction: Instruction, computation: Computation) -> int:
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
