"""The floors of the house, read from the imports themselves."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "cfg_jax"

ROOMS = ("diffusion", "models", "data", "runtime", "metrics")
# From the ground up: a module imports only from lower floors, and no room another room.
FLOORS = (
    {"types"},
    {*ROOMS, "schema", "probes", "hlo", "chips", "power_ema"},
    {"train_step", "executed", "sections"},
    {"experiment", "traffic"},
    {"request", "stored"},
    {"generator", "command", "scores"},
    {"features", "paper"},
    {"reference"},
    {"panel"},
    {
        *("prepare", "convert", "start", "train", "reconstruct", "sample", "sweep", "evaluate"),
        *("watch", "programs", "plan", "plan_report", "curve", "report", "figure2", "card", "api"),
    },
)
# A library and the places that may know it.
KNOWS = {
    "flax": {"models"},
    "optax": {"train_step", "experiment"},
    "orbax": {"runtime"},
    "tensorflow_datasets": {"data"},
    "array_record": {"data"},
    "grain": {"data"},
    "ml_collections": {"schema", "command"},
    "tensorflow": {"data"},
    "matplotlib": {"curve", "figure2"},
    "torch": set(),
    "wandb": {"runtime"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def place(path: Path) -> str:
    """The room of a file in a room, else the file's own name."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imports(path: Path) -> list[str]:
    """Every module that a file imports, at its top, in a function or lazily."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def floor(name: str) -> int:
    return next(i for i, names in enumerate(FLOORS) if name in names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_come_from_lower_floors(path):
    here = place(path)
    if here == "__init__":
        return  # the front door is lazy, and leads to api
    for name in imports(path):
        if not name.startswith("cfg_jax."):
            continue
        there = name.split(".")[1]
        same_room = there == here and here in ROOMS
        same_job_floor = floor(there) == floor(here) == len(FLOORS) - 1
        assert same_room or same_job_floor or floor(there) < floor(here), f"{here} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_libraries_are_known_only_where_they_belong(path):
    for name in imports(path):
        library = name.split(".")[0]
        assert place(path) in KNOWS.get(library, {place(path)}), f"{path} imports {name}"


def test_the_paper_needs_jax_alone():
    for path in (PACKAGE / "diffusion").glob("*.py"):
        for name in imports(path):
            top = name.split(".")[0]
            assert top in {"jax", "cfg_jax", "dataclasses", "math", "collections", "typing"}, name


def test_every_file_has_a_floor_and_none_is_a_drawer():
    for path in FILES:
        if place(path) != "__init__":
            floor(place(path))
        assert path.stem not in {"util", "utils", "common", "helpers", "misc"}
        assert len(path.read_text().splitlines()) <= 330, f"{path}: one idea, or two?"
