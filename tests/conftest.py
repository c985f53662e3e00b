"""Every test sees eight CPU devices, as on a small pod; set before the backend starts."""

import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# What one test has compiled others take, in pytest's processes and in the jobs. A folder of their
# own: a job that is killed may leave half of a program, which all after it would compile again.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _compiled = tempfile.TemporaryDirectory(prefix="cfg_jax_compiled_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_cpu_collective_call_warn_stuck_timeout_seconds=300"
    + " --xla_cpu_collective_call_terminate_timeout_seconds=600"
)

import jax

jax.config.update("jax_num_cpu_devices", 8)
# Compiling is most of what a small network costs a test.
jax.config.update("jax_disable_most_optimizations", True)
import pytest

pytest.register_assert_rewrite("faults")  # a failure there shows its values, as a test's does
from archives import write as write_archives
from cli import ONE_LEVEL, QUICK, TINY, TINY_TWO_LEVELS, Cli

from cfg_jax import experiment, stored


@pytest.fixture
def optimised():
    """As users compile, where it is the compiler's work that is looked at."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def float64():
    """Where rounding would hide what is looked for."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def cli():
    """cli("train", "--config=digits", ...) -> Result: the jobs as a user runs them."""
    runner = Cli()
    yield runner
    runner.close()


@pytest.fixture(scope="session")
def tiny():
    """The flags of a run small enough for a test."""
    return (*TINY, *QUICK)


@pytest.fixture(scope="session")
def tiny_two_levels():
    """The same with attention, and what a U-Net does between its levels."""
    return TINY_TWO_LEVELS


@pytest.fixture(scope="session")
def trained(cli, tiny, tmp_path_factory):
    """The folder of a tiny run of 20 steps."""
    workdir = tmp_path_factory.mktemp("trained")
    result = cli("train", *tiny, f"--workdir={workdir}", "--config.train.steps=20")
    assert result.status == 0, result.err[-3000:]
    return workdir


def small_classifier(name, path):
    """A classifier of random weights, as a file: what the jobs do with it is the same."""
    config = experiment.load_config(name)
    config["model"] |= ONE_LEVEL
    built = experiment.build(config)
    stored.export(str(path), built.network.init(jax.random.key(1)), built.config, 7)
    return path


@pytest.fixture(scope="session")
def judge(tmp_path_factory):
    """The file of a classifier of clean images."""
    return small_classifier("digits_judge", tmp_path_factory.mktemp("judge") / "judge.safetensors")


@pytest.fixture(scope="session")
def classifier(tmp_path_factory):
    """The file of a classifier of noisy images."""
    path = tmp_path_factory.mktemp("classifier") / "classifier.safetensors"
    return small_classifier("digits_classifier", path)


@pytest.fixture(scope="session")
def archives(tmp_path_factory):
    """A folder with both archives of ImageNet, and what `archives.write` says is in them."""
    folder = tmp_path_factory.mktemp("manual")
    return folder, write_archives(folder)
