"""The benchmark writes its report, with PyTorch beside us where it is installed."""

import json
import os
import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CONFIG = """
from ml_collections import ConfigDict

def get_config():
    return ConfigDict({
        "dataset": {"name": "digits"},
        "model": {"channels": 8, "channel_mult": (1,), "num_res_blocks": 1, "name": "unet",
                  "attention_resolutions": (), "head_channels": 8},
        "train": {"batch_size": 4},
        "sample": {"steps": 2},
    })
"""


def bench(*arguments):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.run", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside PyTorch"])
def test_report(tmp_path, beside):
    if beside and util.find_spec("torch") is None:
        pytest.skip('the benchmark beside PyTorch needs it: pip install -e ".[parity]"')
    config, out = tmp_path / "small.py", tmp_path / "report.json"
    config.write_text(CONFIG)
    few = (f"--configs={config}", f"--out={out}", "--rounds=2", "--seconds=0.01", "--no-compile")
    result = bench(*few, *(() if beside else ("--no-torch",)))
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads(out.read_text())
    assert report["versions"]["jax"] and report["machine"]["cpu"]
    assert [r["task"] for r in report["results"]] == ["train", "sample"]
    for r in report["results"]:
        ours = r["sides"]["ours"]
        assert len(ours["seconds"]) == 2 and ours["images_per_s"] > 0 and ours["peak_mib"] > 50
        assert ours["gflops"] > 0 and r["flops"] > 1e5
        assert ("ratio" in r) == beside
        if beside:
            assert r["sides"]["torch eager"]["errors"]
    assert "| side |" in result.stdout and f"{config.stem}" in result.stdout


def test_what_is_asked_wrongly_is_told_in_a_line():
    result = bench("--configs=digits", "--wrong")
    assert result.returncode == 2 and "--wrong" in result.stderr.splitlines()[-1]
