"""The training job as a user meets it: what it leaves behind, and that stopping costs nothing."""

import json
import os
import shutil
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cli import ONE_LEVEL, QUICK, TWO_LEVELS
from faults import assert_equal, distance, final_state, outputs, run_together

from cfg_jax import experiment, hlo, reconstruct, stored, traffic, train, train_step
from cfg_jax.models import affine, weights
from cfg_jax.runtime import checkpoint, memory, profile, window
from cfg_jax.runtime import mesh as meshes
from cfg_jax.types import UsageError


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


@pytest.mark.parametrize(
    "section, change, most",
    [
        ("train", {}, 1),
        ("train", {"batch_size": 512}, 1),
        ("train", {"batch_size": 513}, None),
        ("train", {"fsdp": 2}, None),
        ("model", {"channels": 64}, None),
    ],
)
def test_a_small_step_takes_one_device_of_a_cpu(section, change, most):
    config = experiment.SCHEMA.complete(experiment.load_config("digits"))
    config[section] |= change
    assert experiment.build(config).cpu_devices == most


@pytest.mark.parametrize(
    "batch, at_most, processes, devices",
    [(128, None, 1, 4), (128, 1, 1, 1), (6, None, 1, 3), (6, None, 2, 3), (7, 2, 1, 1)],
)
def test_a_cpu_is_split_into_devices_that_divide_the_batch(
    batch, at_most, processes, devices, monkeypatch
):
    asked = {}
    monkeypatch.setattr(memory, "keep", lambda: None)
    monkeypatch.setattr(meshes, "_fill_holes_after_compiling", lambda: None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr(
        jax,
        "config",
        types.SimpleNamespace(
            jax_platforms="cpu", jax_num_cpu_devices=-1, update=asked.__setitem__
        ),
    )
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: processes > 1)
    monkeypatch.setenv("JAX_NUM_PROCESSES", str(processes))
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    meshes.split_cpu(batch, at_most)
    assert asked == {"jax_num_cpu_devices": devices}


def test_devices_can_be_chosen_after_a_config_was_read():
    """`train` builds a model to know how many it wants: jax must not have started by then."""
    code = (
        "import jax; from cfg_jax import experiment; "
        "experiment.build(experiment.load_config('digits')); "
        "jax.config.update('jax_num_cpu_devices', 3); print(len(jax.devices()))"
    )
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert told.stdout == "3\n", told.stderr[-2000:]


def test_a_step_that_is_not_small_takes_a_device_a_core(cli, tiny, tmp_path):
    """tiny is small but for its split state."""
    cores = len(os.sched_getaffinity(0))
    if cores % 2:
        pytest.skip(f"NOT TESTED: two devices of a CPU, with {cores} cores")
    run = [*tiny, f"--workdir={tmp_path}", "--config.train.steps=1", "--config.train.fsdp=2"]
    result = cli("train", *run)
    assert result.status == 0, result.err[-3000:]
    assert "on 1 devices" not in result.err and " devices (cpu)" in result.err


@pytest.mark.slow
def test_training_learns(cli, tiny, tmp_path):
    run = [*tiny, f"--workdir={tmp_path}", "--config.train.steps=100"]
    assert cli("train", *run).status == 0
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    first, last = lines[0]["loss"], np.mean([line["loss"] for line in lines[-4:]])
    assert first > 0.8 and last < 0.55, "a zero network's loss is 1"


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
        assert "on 1 devices (cpu)" in again.err, "too small for more"
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
    real, traces = train_step.train_step, []

    def bad_from_25(state, *args, **kwargs):
        traces.append(1)
        after, metrics = real(state, *args, **kwargs)
        return after, metrics | {"loss": metrics["loss"] / (state.step < 25)}

    monkeypatch.setattr(train_step, "train_step", bad_from_25)
    config = stored.saved_config(str(workdir))
    config["train"]["steps"] = 40
    with pytest.raises(window.Diverged, match="at step 25"):
        train.train(config, str(workdir))
    assert len(traces) == 1, "what is looked at before anything is written is what runs"
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
        if name.startswith("['ema']"):
            np.testing.assert_array_equal(ours[name], value, err_msg=name)
            there = name.replace("['ema']", "['state']['params']")
            np.testing.assert_array_equal(ours[there], value, err_msg=name)


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
def test_processes_that_read_change_no_bit(cli, tiny, trained, tmp_path):
    run = [*tiny, f"--workdir={tmp_path}", "--config.train.steps=20"]
    result = cli("train", *run, "--config.train.read_processes=2")
    assert result.status == 0, result.err[-3000:]
    assert_equal(final_state(tmp_path), final_state(trained))


@pytest.mark.slow
def test_one_and_eight_devices_train_the_same(cli, tiny_two_levels, tmp_path):
    said = []
    for devices, fsdp in ((1, 1), (8, 1), (8, 4)):
        workdir = tmp_path / f"{devices}_{fsdp}"
        flags = f"--xla_force_host_platform_device_count={devices}"
        result = cli(
            "train",
            *tiny_two_levels,
            *QUICK,
            f"--workdir={workdir}",
            "--config.train.steps=20",
            f"--config.train.fsdp={fsdp}",
            "--config.model.dropout=0.1",
            env={"XLA_FLAGS": flags},
        )
        assert result.status == 0, result.err[-3000:]
        assert f"on {devices} devices" in result.err
        said.append(outputs(workdir))
    assert distance(said[1], said[0]) < 1e-4
    assert distance(said[2], said[0]) < 1e-4
    # And each goes on from the other's checkpoint, whole on one device or split over four.
    ends = []
    for begun, devices, fsdp in (("1_1", 8, 4), ("8_4", 1, 1)):
        result = cli(
            "train",
            *tiny_two_levels,
            *QUICK,
            f"--workdir={tmp_path / begun}",
            "--config.train.steps=25",
            f"--config.train.fsdp={fsdp}",
            "--config.model.dropout=0.1",
            env={"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"},
        )
        assert result.status == 0, result.err[-3000:]
        assert "going on from step 20 of 25" in result.err and f"on {devices} devices" in result.err
        ends.append(outputs(tmp_path / begun))
    assert distance(ends[1], ends[0]) < 1e-4


@pytest.mark.slow
def test_one_and_two_processes_train_the_same(cli, tiny, tmp_path):
    """20 steps in two processes; then as many more, in one, from their checkpoint."""
    alone, together = tmp_path / "1", tmp_path / "2"
    run = [*tiny, "--config.train.steps=20"]
    assert cli("train", *run, f"--workdir={alone}").status == 0
    run_together(cli, 2, "train", *run, f"--workdir={together}")
    assert distance(outputs(together), outputs(alone)) < 1e-4
    further = [*tiny, "--config.train.steps=25"]
    assert cli("train", *further, f"--workdir={together}").status == 0
    assert cli("train", *further, f"--workdir={alone}").status == 0
    assert distance(outputs(together), outputs(alone)) < 1e-4
    # Sampling is one program on both processes, too.
    for workdir, count in ((alone, 1), (together, 2)):
        out = [f"--workdir={workdir}", "--w=1", "--per_label=2"]
        run_together(cli, count, "sample", *out)
    ours, theirs = (np.load(w / "samples.npz")["images"] for w in (alone, together))
    assert np.abs(ours.astype(int) - theirs).max() <= 1


@pytest.mark.slow
def test_averages_are_kept_and_other_lengths_made_of_them(cli, tiny_two_levels, tmp_path):
    """Stopped and gone on, or not, the same files; a length that was kept is made to 1e-3."""
    kept = ["--config.ema.lengths=(0.05,0.1)", "--config.ema.snapshot_every=5"]
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    for workdir, steps in ((straight, 30), (stopped, 15), (stopped, 30)):
        run = [*tiny_two_levels, *kept, f"--workdir={workdir}", f"--config.train.steps={steps}"]
        result = cli("train", *run)
        assert result.status == 0, result.err[-3000:]
    assert_equal(final_state(stopped), final_state(straight))
    there = [
        {at: weights.flatten(weights.load_safetensors(path)[0]) for at, path in files.items()}
        for files in (reconstruct.kept(straight), reconstruct.kept(stopped))
    ]
    assert list(there[0]) == [(at, s) for at in range(5, 31, 5) for s in (0.05, 0.1)]
    for at, params in there[0].items():
        assert_equal(there[1][at], params)
    result = cli("reconstruct", f"--workdir={stopped}", "--length=0.05,0.08")
    assert result.status == 0, result.err[-3000:]
    paths = [line.split(": ")[0] for line in result.out.splitlines()]
    same, between = (weights.flatten(weights.load_safetensors(path)[0]) for path in paths)
    short, long = there[0][30, 0.05], there[0][30, 0.1]
    for name, value in short.items():
        np.testing.assert_allclose(same[name], value, atol=1e-3 * np.abs(value).max() + 1e-7)
    apart = {name: np.linalg.norm(short[name] - long[name]) for name in short}
    name = max(apart, key=apart.get)
    for end in (short, long):
        assert np.linalg.norm(between[name] - end[name]) < apart[name]
    assert stored.saved_config(paths[1]) == stored.saved_config(str(stopped))
    with pytest.raises(UsageError, match="5, 10, 15, 20, 25, 30"):
        reconstruct.make(stopped, 0.05, 12)
    reconstruct.forget(stopped)
    assert not reconstruct.kept(stopped) and (stopped / "ema").exists()


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
    config = stored.saved_config(str(trained))
    assert config == experiment.SCHEMA.complete(checkpoint.read_config(str(trained)))
    assert config["model"]["channel_mult"] == (1,)
    experiment.build(config)


def sum_of_squares(params, frozen, batch, key):
    """A loss whose gradient is known, and that tells the keys it was given."""
    del frozen
    residual = batch["x"] @ params["w"]
    return jnp.mean(residual**2), {"coin": jax.random.bernoulli(key).astype(jnp.float32)}


def test_parts_of_a_batch_have_the_gradient_of_the_batch():
    batch = {"x": jax.random.normal(jax.random.key(0), (24, 5))}
    params = {"w": jnp.arange(5.0)}
    gradient = jax.value_and_grad(sum_of_squares, has_aux=True)
    (value, _), grads = gradient(params, {}, batch, jax.random.key(1))
    for unroll in (False, True):
        in_parts = train_step.in_parts(gradient, 4, unroll=unroll)
        (mean, metrics), sums = in_parts(params, {}, batch, jax.random.key(1))
        np.testing.assert_allclose(mean, value, rtol=1e-6)
        np.testing.assert_allclose(sums["w"], grads["w"], rtol=1e-5)
        coins = [jax.random.bernoulli(jax.random.fold_in(jax.random.key(1), k)) for k in range(4)]
        assert metrics["coin"] == np.mean(coins) != round(np.mean(coins)), "each part has a key"
        loops = str(jax.make_jaxpr(in_parts)(params, {}, batch, jax.random.key(1)))
        assert "scan" in loops


@pytest.fixture
def tiny_model():
    config = experiment.load_config("digits")
    config["model"] |= ONE_LEVEL
    return experiment.build(config)


def compiled_step(mesh):
    """The training step of a bfloat16 network, and its text compiled for a mesh."""
    config = experiment.load_config("digits")
    config["model"] |= TWO_LEVELS
    config["model"]["dtype"] = "bfloat16"
    config["train"] |= {"batch_size": 32, "fsdp": mesh.shape["fsdp"]}
    step = train.make_step(experiment.build(config), mesh)
    program = step.run.lower(step.shapes, {}, step.rows, jax.random.key(0))
    return step, program.compile(compiler_options={"xla_backend_optimization_level": 0}).as_text()


def test_the_state_is_donated(tiny_model):
    """Each array of it is given back in its own place: a step needs no second state."""
    step = train.make_step(tiny_model, meshes.make_mesh(1, jax.devices()[:1]))
    text = step.run.lower(step.shapes, step.frozen, step.rows, jax.random.key(0)).as_text()
    assert text.count("tf.aliasing_output") == len(jax.tree.leaves(step.shapes)) > 50


@pytest.mark.slow
def test_a_split_state_is_gathered_once_a_step():
    step, text = compiled_step(meshes.make_mesh(fsdp=4))
    crossed = traffic.collectives(hlo.parse(text))
    gathers = sum(c.count for c in crossed if c.kind == "all-gather")
    split = [s for s in jax.tree.leaves(step.shardings.params) if "fsdp" in s.spec]
    assert len(split) > 50 and 0 < gathers <= len(split)


def test_a_profile_window():
    for text in ("3", "5:2", "a:b", ""):
        with pytest.raises(UsageError, match="--profile="):
            profile.Profile(text, "unused")


@pytest.mark.slow
def test_a_profile_is_left_in_the_workdir(cli, tiny, tmp_path):
    run = [*tiny, f"--workdir={tmp_path}", "--config.train.steps=8", "--profile=3:5"]
    result = cli("train", *run)
    assert result.status == 0 and "profile of steps from 3 to 5" in result.err
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_what_is_compiled_is_kept_in_the_workdir(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        (tmp_path / "ema.safetensors").write_text("")
        meshes.keep_compiled(str(tmp_path / "ema.safetensors"))
        assert jax.config.jax_compilation_cache_dir is None, "a file holds nothing"
        meshes.keep_compiled(str(tmp_path))
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "compiled")
        meshes.keep_compiled("gs://bucket/run")
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "compiled"), "named already"
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_the_wait_for_data_is_told(monkeypatch):
    clock = iter(np.arange(0.0, 100.0))
    monkeypatch.setattr(window.time, "monotonic", lambda: next(clock))
    steps = window.Window()  # 0
    for step, item in zip(range(3), steps.fed_by("abc")):  # 1-2, 3-4, 5-6
        assert item == "abc"[step]
        steps.add(step, {"loss": jnp.float32(1)})
    assert steps.close(4)["data_wait"] == pytest.approx(3 / 7)  # 7


ON_A_CLUSTER = {
    "named": (
        {
            "JAX_COORDINATOR_ADDRESS": "host:1",
            "JAX_NUM_PROCESSES": "4",
            "JAX_PROCESS_ID": "2",
        },
        (("host:1",), {"num_processes": 4, "process_id": 2}),
    ),
    "Slurm": ({"SLURM_STEP_NUM_TASKS": "8"}, ((), {})),
    "Slurm, one task": ({"SLURM_STEP_NUM_TASKS": "1"}, None),
    "Open MPI": ({"OMPI_COMM_WORLD_SIZE": "2"}, ((), {})),
    "TPUs of Kubernetes": ({"TPU_WORKER_HOSTNAMES": "a,b"}, ((), {})),
    "one of them": ({"TPU_WORKER_HOSTNAMES": "a", "JAX_PLATFORMS": "tpu"}, None),
    "TPUs on the bus": ({"JAX_PLATFORMS": "tpu,cpu"}, ((), {})),
    "TPUs, not to be asked for a pod": ({"JAX_PLATFORMS": "tpu", "TPU_SKIP_MDS_QUERY": "1"}, None),
    "TPUs, and a CPU wanted": ({"JAX_PLATFORMS": "cpu"}, None),
    "asked for": ({"requested": True}, ((), {})),
}


@pytest.mark.parametrize("case", ON_A_CLUSTER)
def test_a_cluster_is_detected(case, monkeypatch):
    env, joined = ON_A_CLUSTER[case]
    names = ("JAX_NUM_PROCESSES", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    for name in (*names, "TPU_WORKER_HOSTNAMES", "TPU_SKIP_MDS_QUERY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    env = dict(env)
    requested = env.pop("requested", False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(meshes, "_has_tpu", lambda: True)
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: calls.append((a, k)))
    meshes.initialize_distributed(requested, saves=True)
    assert calls == ([] if joined is None else [joined])


@pytest.mark.parametrize(
    "vendor, device, found",
    [("0x1ae0", "0x0063", True), ("0x1ae0", "0x0042", False), ("0x8086", "0x0063", False)],
)
def test_a_machine_with_tpus_is_known_by_its_bus(tmp_path, vendor, device, found):
    for name, numbers in (("a", ("0x8086", "0x1237")), ("b", (vendor, device))):
        (tmp_path / name).mkdir()
        for file, number in zip(("vendor", "device"), numbers):
            (tmp_path / name / file).write_text(number + "\n")
    assert meshes._has_tpu(str(tmp_path)) == found
    assert not meshes._has_tpu(str(tmp_path / "none"))


def test_a_barrier_is_kept_where_the_compiler_is_told_to():
    """XLA:CPU would otherwise compute again what `once` marks, for each that reads it."""
    mesh = meshes.make_mesh()
    x, kernel = jnp.ones((8, 4, 4, 3)), jnp.ones((3, 3, 3, 3))
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        kept = [
            jax.jit(lambda x, k: affine.convolve(jnp.sin(x), k), compiler_options=options)
            .lower(x, kernel)
            .compile()
            .as_text()
            .count("opt-barrier")
            for options in (None, meshes.compiler_options(mesh))
        ]
    finally:
        jax.config.update("jax_disable_most_optimizations", True)
    assert kept[0] == 0 and kept[1] > 0
