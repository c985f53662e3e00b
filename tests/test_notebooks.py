"""The notebooks: clean in git, and they run from the top in a kernel of their own."""

import importlib.metadata
import importlib.util
import json
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "launch" / "colab").glob("*.ipynb"))
# In place of what the cell tagged "parameters" says.
SMALL = {
    "sampling": {
        "STEPS": 8,
        "COLUMNS": 2,
        "SLIDER": [0, 4],
        "TRAIN_STEPS": 30,
        "JUDGE_STEPS": 30,
        "CURVE": [0, 1],
        "CURVE_IMAGES": 50,
    },
    "guidance_in_2d": {"POINTS": 1000, "STEPS": 32, "CELLS": 24},
}


def cell(notebook: dict, tag: str) -> str:
    """The source of the one cell with a tag."""
    (found,) = [c for c in notebook["cells"] if tag in c["metadata"].get("tags", [])]
    return "".join(found["source"])


def by_name(paths):
    return pytest.mark.parametrize("path", paths, ids=lambda p: p.stem)


def test_there_are_small_settings_for_each():
    assert {p.stem for p in NOTEBOOKS} == set(SMALL)
    for path in NOTEBOOKS:
        known = set(
            re.findall(r"^([A-Z_]+) =", cell(json.loads(path.read_text()), "parameters"), re.M)
        )
        assert set(SMALL[path.stem]) <= known


@by_name(NOTEBOOKS)
def test_nothing_that_was_run_is_in_git(path):
    notebook = json.loads(path.read_text())
    for c in notebook["cells"]:
        assert set(c["metadata"]) <= {"tags"}
        if c["cell_type"] == "code":
            assert c["outputs"] == [] and c["execution_count"] is None
    assert "widgets" not in notebook["metadata"]


def test_badges_and_links_lead_to_one_repository():
    """To these files in it, from wherever they are named."""
    pages = [*NOTEBOOKS, *ROOT.glob("docs/*.md"), ROOT / "docs" / "conf.py", ROOT / "README.md"]
    texts = {page: page.read_text() for page in pages}
    ours = r"github(?:\.com)?/([\w-]+/cfg_jax)\b"
    assert len({name for text in texts.values() for name in re.findall(ours, text)}) == 1
    for text in texts.values():
        for file in re.findall(r"cfg_jax/blob/main/([\w/.]+)", text):
            assert (ROOT / file).is_file(), file
    for path in NOTEBOOKS:
        link = f"https://colab.research.google.com/github/[\\w-]+/cfg_jax/blob/main/launch/colab/{path.name}"
        for page in (path, ROOT / "README.md"):
            assert re.search(rf"\[!\[Open in Colab\]\([^)]+\)\]\({link}\)", texts[page])


@by_name(NOTEBOOKS)
def test_installing_leaves_a_jax_that_is_there_alone(path, tmp_path, monkeypatch):
    """Where the package is missing pip is held to what is there; else nothing runs."""
    source = cell(json.loads(path.read_text()), "setup")
    calls = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", lambda argv, **_: calls.append(argv))
    exec(source, {})
    assert not calls and not list(tmp_path.iterdir())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    exec(source, {})
    (argv,) = calls
    assert argv[-1].startswith("cfg_jax[notebook] @ git+https://")
    (constraints,) = [a.removeprefix("--constraint=") for a in argv if "--constraint" in a]
    kept = (tmp_path / constraints).read_text().splitlines()
    for name in ("jax", "jaxlib", "numpy"):
        assert f"{name}=={importlib.metadata.version(name)}" in kept


@pytest.mark.slow
@by_name(NOTEBOOKS)
def test_it_runs_from_the_top(path, tmp_path, monkeypatch):
    import nbclient
    import nbformat

    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(path, as_version=4)
    at = [("parameters" in c.metadata.get("tags", [])) for c in notebook.cells].index(True)
    small = "\n".join(f"{name} = {value}" for name, value in SMALL[path.stem].items())
    notebook.cells.insert(at + 1, nbformat.v4.new_code_cell(small))
    where = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=where).execute()
    outputs = [o for c in notebook.cells for o in c.get("outputs", [])]
    text = "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stdout")
    kinds = [kind for o in outputs for kind in o.get("data", {})]
    if path.stem == "sampling":
        assert "<Model of digits: 10 classes, 8x8x1, step 1500>" in text
        assert kinds.count("image/png") == 3 and kinds.count("image/gif") == 1
        assert kinds.count("application/vnd.jupyter.widget-view+json") == 1
        assert "w = 1: {'fd':" in text
    else:
        check_the_plane(text)
        assert kinds.count("image/png") == 4


def check_the_plane(text: str) -> None:
    """What the notebook says of its numbers holds for them."""
    numbers = [[float(x) for x in re.findall(r"\d+\.\d+", line)] for line in text.splitlines()]
    chains, diffused, intervals = numbers[:4], numbers[4:8], numbers[8:]
    for exact, guided in chains[1:]:
        assert guided > exact + 0.1, "the guided chain goes further"
    for exact, own in diffused:
        assert abs(own - exact) < 0.06, "the diffused score draws the figure"
    everywhere, high, middle, low = (numbers[-1] for numbers in intervals)
    assert everywhere > middle > max(high, low) + 0.2, "the middle does nearly all"
