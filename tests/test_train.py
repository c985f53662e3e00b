"""The training job as a user meets it: what it leaves behind, and that stopping costs nothing."""

import functools
import json
import shutil
import signal
import socket
import time

import jax
import numpy as np
import pytest

from cfg_jax import experiment, generator, train, train_step
from cfg_jax.runtime import checkpoint, window
from cfg_jax.runtime import mesh as meshes


def final_state(workdir) -> dict[str, np.ndarray]:
    """{path: array} of the newest checkpoint: step, parameters, optimizer and EMA."""
    model = experiment.build(generator.saved_config(str(workdir)))
    init = functools.partial(
        train_step.init_state, network=model.network, optimizer=model.optimizer
    )
    shapes = jax.eval_shape(init, jax.random.key(0))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = meshes.placed(shapes, jax.tree.map(lambda _: here, shapes))
    checkpoints = checkpoint.Checkpoints(str(workdir), read_only=True)
    _, found = checkpoints.restore(**train.items(wanted))
    checkpoints.close()
    leaves = jax.tree_util.tree_leaves_with_path(found)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def distance(a, b) -> float:
    """How far parameters and EMA are apart: the largest relative difference of an array.

    Arrays that have hardly left zero are left out, below 1e-3: they are biases in front of a norm
    that takes them out again, and Adam makes steps of the rounding that is their gradient.
    """
    assert a.keys() == b.keys()
    names = [k for k in a if ("params" in k or "ema" in k) and np.abs(b[k]).max() > 1e-3]
    assert len(names) > 100
    return max(np.linalg.norm(a[k] - b[k]) / np.linalg.norm(b[k]) for k in names)


def test_a_run_leaves_what_the_readme_says(trained):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 10, 15, 20]
    assert all(np.isfinite(line["loss"]) and line["images_per_second"] > 0 for line in lines)
    assert list((trained / "tensorboard").glob("events.*"))
    assert sorted(int(p.name) for p in (trained / "checkpoints").glob("[0-9]*")) == [10, 20]
    config = json.loads((trained / "config.json").read_text())
    assert config["model"]["channels"] == 8
    assert config["optimizer"]["b2"] == 0.999, "a default that the file leaves out is recorded"


def test_the_ema_is_the_mean_of_the_parameters_that_its_formula_says(tmp_path):
    ema, decay = train_step.Ema(0.9), 0.9
    average, expected = {"p": np.float32(1.0)}, 1.0
    for step, value in enumerate([2.0, -1.0, 0.5] * 20):
        average = ema(average, {"p": np.float32(value)}, np.int32(step))
        d = min(decay, (1 + step) / (10 + step))
        expected = d * expected + (1 - d) * value
    np.testing.assert_allclose(average["p"], expected, rtol=1e-5)


@pytest.mark.slow
def test_training_learns(cli, tiny, tmp_path):
    run = [*tiny, f"--workdir={tmp_path}", "--config.train.steps=100"]
    assert cli("train", *run, "--config.optimizer.learning_rate=0.003").status == 0
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    first, last = lines[0]["loss"], np.mean([line["loss"] for line in lines[-4:]])
    assert first > 0.8 and last < 0.55, "a zero network's loss is 1"


def test_killed_and_started_again_is_never_stopped(cli, tiny, tmp_path):
    """Kill -9 after the first checkpoint; then the finished runs agree to the bit."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    run = [*tiny, f"--workdir={killed}"]
    # Far more steps than will be made: the kill cannot come too late.
    job = cli.start("train", *run, "--config.train.steps=100000")
    wait_for(job, killed / "checkpoints" / "10")
    job.kill(signal.SIGKILL)
    assert job.wait().status == -signal.SIGKILL
    again = cli("train", *run, "--config.train.steps=100")
    assert again.status == 0, again.err[-3000:]
    assert "going on from step " in again.err and "of 100" in again.err
    done = cli("train", *tiny, f"--workdir={straight}", "--config.train.steps=100")
    assert done.status == 0, done.err[-3000:]
    assert_equal(final_state(killed), final_state(straight))
    steps = [json.loads(x)["step"] for x in (killed / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(5, 105, 5))


def wait_for(job, path):
    while not path.exists():
        assert not (job.folder / "status").exists(), job.err()[-2000:]
        time.sleep(0.001)


@pytest.mark.slow
def test_sigterm_saves_and_leaves_with_0(cli, tiny, tmp_path):
    run = [*tiny, f"--workdir={tmp_path}", "--config.train.steps=100000"]
    job = cli.start("train", *run)
    wait_for(job, tmp_path / "checkpoints" / "10")
    job.kill(signal.SIGTERM)
    result = job.wait(60)
    assert result.status == 0 and "saved, and leaving" in result.err
    told = int(result.err.split("told to leave at step ")[1].split(":")[0])
    saved = max(int(p.name) for p in (tmp_path / "checkpoints").glob("[0-9]*"))
    assert saved == told


def truncate(folder):
    for file in folder.rglob("*"):
        if file.is_file() and file.stat().st_size > 1000:
            file.write_bytes(file.read_bytes()[:200])


def test_a_truncated_newest_checkpoint_falls_back_to_the_one_before(cli, tiny, trained, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    newest = workdir / "checkpoints" / "20"
    truncate(newest)
    sampled = cli("sample", f"--workdir={workdir}", "--w=0", "--per_label=1")
    assert sampled.status == 0 and "checkpoint 20" in sampled.err
    assert np.load(workdir / "samples.npz")["step"] == 10
    assert newest.exists(), "a reader moves nothing"
    for times in (1, 2):
        again = cli("train", *tiny, f"--workdir={workdir}", "--config.train.steps=20")
        assert again.status == 0, again.err[-3000:]
        assert "checkpoint 20" in again.err and "going on from step 10" in again.err
        assert len(list((workdir / "unreadable").glob("*/20"))) == times
        assert_equal(final_state(workdir), final_state(trained))
        truncate(newest)
    truncate(workdir / "checkpoints" / "10")
    for job in (["sample"], ["train", *tiny]):
        result = cli(*job, f"--workdir={workdir}")
        assert result.status == 2 and len(result.errors) == 1, result.err[-2000:]
        assert "none of the checkpoints [20, 10]" in result.errors[0]
        assert sorted(p.name for p in (workdir / "checkpoints").glob("[0-9]*")) == ["10", "20"]


def test_a_loss_that_is_not_finite_stops_the_run(cli, tiny, tmp_path):
    run = [*tiny, f"--workdir={tmp_path}", "--config.train.steps=60"]
    result = cli("train", *run, "--config.optimizer.learning_rate=1e30")
    assert result.status == 1
    assert "stopped: " in result.err and " at step " in result.err
    assert "Traceback" not in result.err
    assert not list((tmp_path / "checkpoints").glob("[0-9]*")), "nothing good was there to keep"
    # And nothing stands in the way of doing better.
    assert cli("train", *tiny, f"--workdir={tmp_path}", "--config.train.steps=1").status == 0


@pytest.mark.slow
def test_the_last_good_checkpoint_is_kept(trained, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    real = train_step.train_step

    def bad_from_25(state, *args, **kwargs):
        after, metrics = real(state, *args, **kwargs)
        return after, metrics | {"loss": metrics["loss"] / (state.step < 25)}

    monkeypatch.setattr(train_step, "train_step", bad_from_25)
    config = generator.saved_config(str(workdir))
    config["train"]["steps"] = 40
    with pytest.raises(window.Diverged, match="at step 25"):
        train.train(config, str(workdir))
    assert sorted(int(p.name) for p in (workdir / "checkpoints").glob("[0-9]*")) == [10, 20]
    assert_equal(final_state(workdir), final_state(trained))


@pytest.mark.slow
def test_a_new_run_starts_from_anothers_ema(cli, tiny, trained, tmp_path):
    run = [*tiny, f"--workdir={tmp_path}", "--config.train.steps=1"]
    # A learning rate that moves nothing: what is saved is what it started from.
    result = cli("train", *run, f"--init_from={trained}", "--config.optimizer.learning_rate=1e-30")
    assert result.status == 0, result.err[-2000:]
    ours, theirs = final_state(tmp_path), final_state(trained)
    for name, value in theirs.items():
        if name.startswith("ema"):
            np.testing.assert_array_equal(ours[name], value, err_msg=name)
            np.testing.assert_array_equal(
                ours[name.replace("ema", "state['params']", 1)], value, err_msg=name
            )


@pytest.mark.slow
def test_going_on_further_than_first_asked(cli, tiny, trained, tmp_path):
    """More steps are not another run: 20 and then 30 are the 30 of one go."""
    workdir = tmp_path / "further"
    shutil.copytree(trained, workdir)
    assert cli("train", *tiny, f"--workdir={workdir}", "--config.train.steps=30").status == 0
    straight = [*tiny, f"--workdir={tmp_path / 'straight'}", "--config.train.steps=30"]
    assert cli("train", *straight).status == 0
    assert_equal(final_state(workdir), final_state(tmp_path / "straight"))


@pytest.mark.slow
def test_one_and_eight_devices_train_the_same(cli, tiny, tmp_path):
    states = []
    for devices, fsdp in ((1, 1), (8, 1), (8, 4)):
        workdir = tmp_path / f"{devices}_{fsdp}"
        flags = f"--xla_force_host_platform_device_count={devices}"
        result = cli(
            "train",
            *tiny,
            f"--workdir={workdir}",
            "--config.train.steps=20",
            f"--config.train.fsdp={fsdp}",
            "--config.model.dropout=0.1",
            env={"XLA_FLAGS": flags},
        )
        assert result.status == 0, result.err[-3000:]
        assert f"on {devices} devices" in result.err
        states.append(final_state(workdir))
    assert distance(states[1], states[0]) < 1e-4
    assert distance(states[2], states[0]) < 1e-4


def run_together(cli, count, *args):
    """The same job in `count` real processes that find each other on loopback."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    jobs = [
        cli.start(
            *args,
            env={
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "JAX_NUM_PROCESSES": str(count),
                "JAX_PROCESS_ID": str(i),
                "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
            },
        )
        for i in range(count)
    ]
    results = [job.wait() for job in jobs]
    for result in results:
        assert result.status == 0, result.err[-3000:]
    return results


@pytest.mark.slow
def test_one_and_two_processes_train_the_same(cli, tiny, tmp_path):
    """20 steps in two processes; then as many more, in one, from their checkpoint."""
    alone, together = tmp_path / "1", tmp_path / "2"
    run = [*tiny, "--config.train.steps=20"]
    assert cli("train", *run, f"--workdir={alone}").status == 0
    run_together(cli, 2, "train", *run, f"--workdir={together}")
    assert distance(final_state(together), final_state(alone)) < 1e-4
    further = [*tiny, "--config.train.steps=25"]
    assert cli("train", *further, f"--workdir={together}").status == 0
    assert cli("train", *further, f"--workdir={alone}").status == 0
    assert distance(final_state(together), final_state(alone)) < 1e-4
    # Sampling is one program on both processes, too.
    for workdir, count in ((alone, 1), (together, 2)):
        out = [f"--workdir={workdir}", "--w=1", "--per_label=2"]
        run_together(cli, count, "sample", *out)
    ours, theirs = (np.load(w / "samples.npz")["images"] for w in (alone, together))
    assert np.abs(ours.astype(int) - theirs).max() <= 1


def test_metrics_name_the_step_that_went_wrong():
    for name in ("loss", "grad_norm", "param_norm"):
        steps = window.Window()
        for step, value in enumerate([1.0, 2.0, float("nan"), float("inf")]):
            metrics = {"loss": 1.0, "grad_norm": 1.0, "param_norm": 1.0} | {name: value}
            steps.add(step, jax.tree.map(jax.numpy.float32, metrics))
        with pytest.raises(window.Diverged, match=f"{name} nan at step 2"):
            steps.close(8)


def test_the_state_lies_over_fsdp_where_it_divides():
    mesh = meshes.make_mesh(fsdp=4)
    shapes = {
        "kernel": jax.ShapeDtypeStruct((3, 3, 8, 16), "float32"),
        "b": jax.ShapeDtypeStruct((3,), "float32"),
    }
    rules = meshes.state_shardings(mesh, shapes)
    assert rules["kernel"].spec == jax.sharding.PartitionSpec(None, None, None, "fsdp")
    assert rules["b"].spec == jax.sharding.PartitionSpec()


def test_the_config_that_is_saved_is_the_config_that_is_read(trained):
    config = generator.saved_config(str(trained))
    assert config == experiment.SCHEMA.complete(checkpoint.read_config(str(trained)))
    assert config["model"]["channel_mult"] == (1, 1)
    experiment.build(config)
