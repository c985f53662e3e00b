"""Weights & Biases offline: a run tells it the scalars and pictures that it tells TensorBoard."""

import importlib.util
import json

import numpy as np
import PIL.Image
import pytest

from cfg_jax.runtime import wandb_run
from cfg_jax.types import UsageError


def test_the_package_is_asked_for_in_one_line(monkeypatch):
    wandb_run.check("")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    wandb_run.check("")
    with pytest.raises(UsageError, match=r"train.wandb='mine' needs.*cfg_jax\[wandb\]"):
        wandb_run.check("mine")


def records(path):
    """The messages of a .wandb file: a header of 7 bytes, then blocks of 32 KiB of pieces, each
    with a checksum, a length and whether it is whole, first, middle or last.
    """
    from wandb.proto import wandb_internal_pb2

    data, at, held = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = -at % 32768
        if left < 7:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        held += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(held)
            yield record
            held = b""


def history(run):
    """{step: {name: value}} of what a run logged."""
    out = {}
    for record in records(run):
        if record.HasField("history"):
            items = {
                ".".join(item.nested_key) or item.key: json.loads(item.value_json)
                for item in record.history.item
            }
            out.setdefault(int(items["_step"]), {}).update(items)
    return out


@pytest.mark.slow
def test_a_run_tells_the_same_to_both(cli, tiny, tmp_path):
    pytest.importorskip("wandb", reason="wandb is missing: pip install -e '.[wandb]'")
    run = tmp_path / "run"
    command = [*tiny, f"--workdir={run}", "--config.train.wandb=mine"]
    command += ["--config.train.sample_every=10", "--config.train.sample_w=(0.0,1.0)"]
    env = {"WANDB_MODE": "offline"}
    for steps in (10, 20):  # the second goes on
        result = cli("train", *command, f"--config.train.steps={steps}", env=env)
        assert result.status == 0, result.err[-3000:]
    told = {}
    runs = sorted((run / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(runs) == 2
    assert len({path.stem for path in runs}) == 1, "one run, that went on"
    for path in runs:
        told |= history(path)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 10, 15, 20]
    for line in lines:
        step = line.pop("step")
        assert {name: told[step][name] for name in line} == line
    for step in (10, 20):
        (place,) = [p.parent for p in runs if step in history(p)]
        ours = np.asarray(PIL.Image.open(run / "samples" / f"step_{step:08d}.png"))
        name = told[step]["samples.path"] if "samples.path" in told[step] else None
        name = name or told[step]["samples"]["path"]
        np.testing.assert_array_equal(np.asarray(PIL.Image.open(place / "files" / name)), ours)
