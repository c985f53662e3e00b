"""The README's commands for ImageNet: thin networks, few steps, eight devices, fake archives."""

import json

import numpy as np
import pytest

pytestmark = pytest.mark.slow

THIN = (
    "--config.model.channels=16",
    "--config.model.num_res_blocks=1",
    "--config.model.channel_mult=(1,1)",
    "--config.model.attention_resolutions=(32,)",
    "--config.model.head_channels=16",
    "--config.train.batch_size=8",
    "--config.train.steps=3",
    "--config.train.log_every=1",
    "--config.train.sample_every=0",
)
EIGHT = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}


def test_imagenet_from_its_archives_to_the_sweep(cli, archives, tmp_path):
    manual, _ = archives
    data, run, judge = (str(tmp_path / name) for name in ("data", "run", "judge"))

    def call(*args):
        result = cli(*args, env=EIGHT)
        assert result.status == 0, result.err[-3000:]
        return result

    told = call(
        "prepare",
        "--dataset=imagenet64",
        f"--data_dir={data}",
        f"--manual_dir={manual}",
        "--partial",
        "--workers=1",
    )
    assert "train 12, validation 12" in told.out
    where = f"--config.dataset.data_dir={data}"
    told = call("train", "--config=imagenet64", where, f"--workdir={run}", *THIN)
    assert "on 8 devices" in told.err
    losses = [json.loads(line)["loss"] for line in open(f"{run}/metrics.jsonl")]
    assert len(losses) == 3 and 0.5 < np.mean(losses) < 2
    call(
        "train",
        "--config=imagenet64_classifier",
        "--config.loss.noisy=False",
        "--config.train.seed=1",  # and a width of its own, which is thin here anyway
        where,
        f"--workdir={judge}",
        *THIN,
    )
    few = ("--config.sample.steps=4", "--config.sample.batch_size=8")
    call("sample", f"--workdir={run}", "--w=0,1,3", "--labels=0,230", "--per_label=2", *few)
    arrays = np.load(f"{run}/samples.npz")
    assert arrays["images"].shape == (3, 4, 64, 64, 3)
    call(
        "evaluate",
        f"--workdir={run}",
        f"--judge={judge}",
        "--config.dataset.split=validation",
        "--w=0,1",
        "--num_samples=12",
        *few,
    )
    sweep = json.loads(open(f"{run}/sweep/sweep.json").read())
    points = sweep["points"]
    assert sweep["recipe"]["held_out"] is None, "the reference is not held out from itself"
    assert "held out" not in open(f"{run}/sweep/report.html").read().split("<h2>Recipe")[0]
    assert [(p["w"], p["evaluations"]) for p in points] == [(0, 4), (1, 8)]
    assert all(np.isfinite(s["value"]) for p in points for s in p["scores"].values())
