"""A program as XLA's text has it: computations, and their instructions.

The text is HLO before XLA's passes (`lowered.as_text("hlo")`) or after them
(`compiled.as_text()`).
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping

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
    """One line of a computation: `name = shape opcode(operands), attributes`."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    root: bool = False

    @property
    def result(self) -> tuple[Array, ...]:
        """The arrays that it gives: one, or those of a tuple in their order."""
        return arrays(self.shape)

    def attribute(self, name: str) -> str | None:
        """The value of name=value or name={value}, without its braces."""
        match = re.search(rf"(?:^|[ ,]){name}=(?:\{{([^}}]*)\}}|([^ ,]+))", self.attributes)
        return match and (match[1] if match[1] is not None else match[2])

    @functools.cached_property
    def callees(self) -> tuple[str, ...]:
        """The names of the computations that it runs: of a fusion, a loop's body, a branch."""
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
