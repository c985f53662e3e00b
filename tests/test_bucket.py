"""A workdir in a bucket, played in memory: objects are written whole, and folders are never
renamed.
"""

import json

import pytest
from etils import epath
from etils.epath import backend
from fsspec.implementations import memory

from cfg_jax.runtime import checkpoint
from cfg_jax.runtime import logging as runlog


class Bucket(memory.MemoryFileSystem):
    """As gcsfs has it: what is opened to be appended to begins empty."""

    cachable = False
    store, pseudo_dirs = {}, [""]

    def open(self, path, mode="rb", **options):
        return super().open(path, mode.replace("a", "w"), **options)


class NoEvents:
    """TensorBoard's writer has a client of its own for buckets."""

    def __init__(self, *_, **__):
        pass

    def add_scalar(self, *_):
        pass

    def close(self):
        pass


@pytest.fixture
def workdir(monkeypatch):
    bucket = Bucket()
    monkeypatch.setattr(Bucket, "store", {})
    monkeypatch.setattr(Bucket, "pseudo_dirs", [""])
    monkeypatch.setattr(backend.fsspec_backend, "fs", lambda path: bucket)
    monkeypatch.setattr(runlog, "SummaryWriter", NoEvents)
    return epath.Path("gs://bucket/run")


def test_a_log_in_a_bucket_keeps_its_lines(workdir):
    def steps():
        lines = (workdir / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["step"] for line in lines]

    for start, expected in ((0, [5, 10, 15]), (10, [5, 10, 15, 20, 25])):
        log = runlog.RunLog(str(workdir), start=start, steps=30, config={})
        for step in range(start + 5, start + 20, 5):
            log.scalars(step, {"loss": 1.0})
            assert steps()[-1] == step, "there at once, should the run be killed"
        log.close()
        assert steps() == expected
    assert [path.name for path in workdir.iterdir()] == ["metrics.jsonl"]


def test_a_step_that_was_not_committed_is_no_checkpoint(workdir):
    assert not checkpoint.has_checkpoint(str(workdir))
    step = workdir / "checkpoints" / "10"
    (step / "ema").mkdir(parents=True)
    (step / "ema" / "manifest.ocdbt").write_text("cut short")
    assert not checkpoint.has_checkpoint(str(workdir))
    (step / "commit_success.txt").write_text("")
    assert checkpoint.has_checkpoint(str(workdir))
