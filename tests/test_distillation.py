"""The student of a guided teacher: where it starts, what it refuses, and its one pass."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cli import ONE_LEVEL
from faults import assert_equal, final_state

import cfg_jax
from cfg_jax import experiment, generator, request, start, stored, train
from cfg_jax.runtime import mesh as meshes
from cfg_jax.types import Network, UsageError

STUDENT = ("--config=digits_distilled", "--config.train.steps=20")


def shaken(params, size=0.2):
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return jax.tree.unflatten(
        tree, [p + size * jax.random.normal(k, p.shape) for p, k in zip(leaves, keys)]
    )


def small(name):
    config = experiment.load_config(name)
    config["model"] |= ONE_LEVEL
    config["sample"] |= {"steps": 8, "batch_size": 16}
    return experiment.build(config)


@pytest.fixture(scope="module")
def model():
    return small("digits_distilled")


@pytest.fixture(scope="module")
def teacher(model):
    """Parameters of a teacher that says something."""
    return shaken(jax.jit(model.teacher.network.init)(jax.random.key(0)))


@pytest.fixture(scope="module")
def student(model, teacher):
    """As a run starts: the teacher's parameters, and what reads w."""
    return {**jax.jit(model.network.init)(jax.random.key(2)), **teacher}


@pytest.mark.slow
def test_a_student_begins_as_its_conditional_teacher(model, teacher, student):
    labels = np.arange(12) % 10
    taught = generator.Generator(small("digits"), {"model": teacher})
    learning = generator.Generator(model, {"model": student})
    conditional = taught(labels, 0.0)
    for w in (0.0, 1.5, 4.0):
        np.testing.assert_array_equal(learning(labels, w), conditional)
    assert not np.array_equal(taught(labels, 1.5), conditional)
    learning.params = {"model": shaken(student)}
    few, many = learning(labels, 0.5), learning(labels, 3.5)
    assert not np.array_equal(few, many), "w reaches the images"
    assert learning.compilations() == 1
    each = learning(labels, np.where(labels < 5, 0.5, 3.5))
    np.testing.assert_array_equal(each, np.where((labels < 5)[:, None, None, None], few, many))


def passes_written(model):
    """How often the network stands in the program of a chain, of which one step is written."""
    calls = []

    def apply(params, z, lam, cond, key=None):
        calls.append(cond)
        return model.network.apply(params, z, lam, cond, key)

    counted = dataclasses.replace(model, network=Network(model.network.init, apply))
    params = {"model": jax.eval_shape(model.network.init, jax.random.key(0))}
    label = jnp.zeros(2, int)
    arguments = (label, label, jnp.arange(2), model.guidance(jnp.float32(1)), jnp.uint32(0))
    jax.eval_shape(lambda *a: generator.reverse_chain(*a, model=counted), params, *arguments)
    return len(calls)


def test_a_student_takes_one_pass_a_step(model):
    assert model.guidance(3.0).passes(np.zeros(7)) == (7, 0)
    assert passes_written(model) == 1
    assert passes_written(small("digits")) == 4, "two, and each of them alone"


@pytest.mark.parametrize("w", [-1.0, 4.1, [0.0, 5.0]])
def test_a_strength_that_was_not_trained_is_refused(model, w):
    with pytest.raises(UsageError, match="trained for w from 0 to 4"):
        request.check(model, None, [0, 1], w, 0)


def test_the_ends_of_a_range_that_float32_has_not_are_in_it():
    config = experiment.load_config("digits_distilled")
    config["loss"] |= {"w_min": 0.1, "w_max": 0.3}
    request.check(experiment.build(config), None, [0], [0.1, 0.3], 0)


@pytest.mark.parametrize(
    "config, rule", [("digits_distilled", "classifier_free"), ("digits", "distilled")]
)
def test_a_student_is_sampled_as_one_and_nothing_else_is(config, rule):
    config = experiment.load_config(config)
    config["sample"]["guidance"] = {"name": rule}
    with pytest.raises(UsageError, match=f"sample.guidance.name='{rule}'"):
        experiment.build(config)


@pytest.mark.parametrize("outer", ["interval", "linear", "rescale", "dynamic_threshold"])
@pytest.mark.parametrize("inner", ["distilled", "scaled_noise"])
def test_nothing_stands_around_what_does_not_guide_a_denoiser(outer, inner):
    config = experiment.load_config("digits")
    config["sample"]["guidance"] = {"name": outer, "rule": {"name": inner}}
    with pytest.raises(UsageError, match="nothing can be put around it"):
        experiment.build(config)


def test_the_frozen_parameters_lie_as_those_that_are_trained(model):
    config = {**model.config, "train": {**model.config["train"], "fsdp": 4}}
    step = train.make_step(experiment.build(config), meshes.make_mesh(fsdp=4))
    lies = jax.tree.map(lambda leaf: leaf.sharding, step.frozen)
    trained = {k: v for k, v in step.shardings.params.items() if k != "strength"}
    assert lies == trained
    assert sum("fsdp" in s.spec for s in jax.tree.leaves(lies)) > 50


@pytest.mark.parametrize(
    "change, told",
    [
        ({"loss": {"p_uncond": 0.0}}, "null label"),
        ({"model": {"channels": 16}}, r"model.channels=8 \(there 16\)"),
        ({"reading": "x"}, r"reading='eps' \(there 'x'\)"),
        ({"dataset": {"size": 16}, "model": {"attention_resolutions": (16,)}}, "image_shape"),
    ],
)
def test_a_teacher_of_another_kind_is_refused(model, change, told, tmp_path):
    config = {**small("digits").config}
    for section, fields in change.items():
        config[section] = {**config[section], **fields} if isinstance(fields, dict) else fields
    path = tmp_path / "other.safetensors"
    stored.export(str(path), {"p": np.zeros(1, np.float32)}, config, 1)
    with pytest.raises(UsageError, match=told):
        start.load_teacher(str(tmp_path / "run"), str(path), model, {})
    assert not (tmp_path / "run").exists()


def test_a_teacher_is_wanted_where_there_is_a_student_and_nowhere_else(model, tmp_path):
    for of, given, told in (
        (model, None, "--teacher=DIR"),
        (model, str(tmp_path / "gone"), "no trained model"),
        (model.teacher, "anything", "'denoising' learns from images alone"),
    ):
        with pytest.raises(UsageError, match=told):
            start.load_teacher(str(tmp_path / "run"), given, of, {})
    assert start.load_teacher(str(tmp_path / "run"), None, model.teacher, {}) == {}
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def distilled(cli, tiny, trained, tmp_path_factory):
    """The folder of a tiny student of 20 steps."""
    workdir = tmp_path_factory.mktemp("distilled")
    result = cli("train", *tiny[1:], *STUDENT, f"--teacher={trained}", f"--workdir={workdir}")
    assert result.status == 0, result.err[-3000:]
    assert "learning from the EMA of" in result.err
    return workdir


@pytest.mark.slow
def test_a_student_learns_and_is_a_model_like_others(cli, distilled, tmp_path):
    """Loaded, exported, and evaluated at one pass a step, whatever w."""
    lines = [json.loads(line) for line in (distilled / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"] < 0.1
    model = cfg_jax.load(str(distilled))
    model.save(tmp_path / "student.safetensors")
    config = experiment.load_config("digits_judge")
    config["model"] |= ONE_LEVEL
    judge = experiment.build(config)
    judging = jax.jit(judge.network.init)(jax.random.key(1))
    stored.export(str(tmp_path / "judge.safetensors"), judging, judge.config, 1)
    files = [
        f"--{k}={tmp_path / v}.safetensors" for k, v in (("workdir", "student"), ("judge",) * 2)
    ]
    result = cli("evaluate", *files, "--w=0,2", "--num_samples=10", f"--out={tmp_path}")
    assert result.status == 0, result.err[-3000:]
    points = json.loads((tmp_path / "sweep.json").read_text())["points"]
    assert [(p["guidance"], p["w"], p["evaluations"]) for p in points] == [
        ("distilled", 0, 8),
        ("distilled", 2, 8),
    ]
    (images,) = (tmp_path / "images").glob("distilled_w2_*/*.npz")
    made = model.sample(np.arange(10), w=2.0)
    assert np.abs(made.astype(int) - np.load(images)["images"]).max() <= 1


@pytest.mark.slow
def test_a_student_goes_on_without_its_teacher(cli, tiny, trained, distilled, tmp_path):
    """Stopped and gone on, to the bit, though the teacher is not where it was."""
    run = [*tiny[1:], *STUDENT, f"--workdir={tmp_path}"]
    first = cli("train", *run, "--config.train.steps=10", f"--teacher={trained}")
    assert first.status == 0, first.err[-2000:]
    result = cli("train", *run, "--teacher=gone")
    assert result.status == 0 and "teacher.safetensors, kept" in result.err, result.err[-2000:]
    assert_equal(final_state(tmp_path), final_state(distilled))
