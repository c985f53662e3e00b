"""Which checkpoint is taken for damaged: one that is out of reach for now is left as it is."""

import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfg_jax.runtime import checkpoint
from cfg_jax.types import UsageError

TREE = {"a": np.arange(100_000.0, dtype=np.float32), "b": np.ones((64, 64), np.float32)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("saved")
    checkpoints = checkpoint.Checkpoints(str(workdir))
    for step in (1, 2):
        checkpoints.save(step, ema=jax.tree.map(jnp.asarray, TREE))
    checkpoints.close()
    return workdir


@pytest.fixture
def workdir(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


@pytest.fixture
def restore(workdir):
    checkpoints = checkpoint.Checkpoints(str(workdir))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here), TREE)
    yield lambda: checkpoints.restore(ema=shapes)
    checkpoints.close()


def steps(workdir):
    return sorted(path.name for path in (workdir / "checkpoints").iterdir())


def arrays(step):
    return [file for file in (step / "ema").rglob("*") if file.parent.name == "d"]


def garble(file):
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2] + b"\x00\xff" * 10)


DAMAGES = {
    "index missing": lambda step: (step / "ema" / "manifest.ocdbt").unlink(),
    "index empty": lambda step: (step / "ema" / "manifest.ocdbt").write_bytes(b""),
    "arrays missing": lambda step: [file.unlink() for file in arrays(step)],
    "arrays cut short": lambda step: [os.truncate(file, 100) for file in arrays(step)],
    "arrays of the process missing": lambda step: shutil.rmtree(step / "ema" / "ocdbt.process_0"),
    "arrays garbled": lambda step: [garble(file) for file in arrays(step)],
    "metadata cut short": lambda step: os.truncate(step / "ema" / "_METADATA", 100),
    "metadata garbled": lambda step: garble(step / "ema" / "_METADATA"),
    "item missing": lambda step: shutil.rmtree(step / "ema"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_one_before_a_damaged_one_is_taken(workdir, restore, damage, capfd):
    DAMAGES[damage](workdir / "checkpoints" / "2")
    step, found = restore()
    assert step == 1 and "checkpoint 2 in" in capfd.readouterr().err
    np.testing.assert_array_equal(found["ema"]["a"], TREE["a"])
    assert steps(workdir) == ["1"] and list((workdir / "unreadable").glob("*/2"))


def wrapped(cause):
    """As Orbax passes on what TensorStore says of an array."""
    error = Exception("Encountered error while reading array index: (slice(0, 10, 1),).")
    error.__cause__ = cause
    return error


# The texts are those that TensorStore and XLA have.
OUT_OF_REACH = [
    PermissionError(13, "Permission denied"),
    MemoryError(),
    TimeoutError("timed out"),
    ConnectionResetError(104, "Connection reset by peer"),
    OSError(5, "Input/output error"),
    jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."),
    ValueError('PERMISSION_DENIED: Error opening "cast" driver: Error reading local file'),
    ValueError("UNAVAILABLE: Error reading: CURL error Couldn't resolve host name"),
    wrapped(ValueError("DEADLINE_EXCEEDED: Error reading: all 32 retry attempts failed")),
]


@pytest.mark.parametrize("error", OUT_OF_REACH, ids=lambda e: str(e).partition(":")[0][:30])
def test_one_that_is_out_of_reach_is_left_as_it_is(workdir, restore, error, monkeypatch):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "restore", fails)
    with pytest.raises(UsageError, match=r"checkpoint 2 in .* could not be read now") as told:
        restore()
    assert "\n" not in str(told.value)
    assert steps(workdir) == ["1", "2"] and not (workdir / "unreadable").exists()
