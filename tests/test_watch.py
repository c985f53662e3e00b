"""Evaluation during training: what is logged and kept, and that training does not notice."""

import json

import pytest
from faults import assert_equal, final_state, run_together

import cfg_jax
from cfg_jax import experiment, stored, watch
from cfg_jax.models import weights
from cfg_jax.runtime import mesh as meshes


@pytest.fixture(scope="module")
def watching(tiny, judge):
    return [
        *tiny,
        "--config.train.steps=20",
        "--config.evaluate.every=10",
        "--config.evaluate.w=(0.0,1.5)",
        "--config.evaluate.num_samples=40",
        "--config.evaluate.seed=3",
        f"--config.evaluate.judge={judge}",
        "--config.evaluate.keep_best=fd_judge",
    ]


@pytest.fixture(scope="module")
def watched(cli, watching, tmp_path_factory):
    """The folder of a run that was evaluated twice, at 10 and 20 steps."""
    workdir = tmp_path_factory.mktemp("watched")
    result = cli("train", *watching, f"--workdir={workdir}")
    assert result.status == 0, result.err[-3000:]
    return workdir


def logged(workdir):
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line for line in lines if "evaluate/fd_judge_w0" in line}


def test_training_goes_on_bit_equal(watched, trained):
    assert_equal(final_state(watched), final_state(trained))


def test_the_numbers_are_those_of_evaluate(cli, watched, judge, tmp_path):
    found = logged(watched)
    assert sorted(found) == [10, 20]
    flags = [f"--workdir={watched}", f"--judge={judge}", "--w=0,1.5", "--num_samples=40"]
    result = cli("evaluate", *flags, "--seed=3", f"--out={tmp_path}")
    assert result.status == 0, result.err[-3000:]
    for point in json.loads((tmp_path / "sweep.json").read_text())["points"]:
        for name, score in point["scores"].items():
            assert found[20][f"evaluate/{name}_w{point['w']:g}"] == pytest.approx(score["value"])


@pytest.mark.slow
def test_two_processes_see_what_one_does(cli, watching, watched, tmp_path):
    """And keep one best between them, of which both know when they go on."""
    run = [*watching, "--config.train.steps=10", f"--workdir={tmp_path / 'two'}"]
    run_together(cli, 2, "train", *run)
    one, two = logged(watched)[10], logged(tmp_path / "two")[10]
    named = [name for name in one if name.startswith("evaluate/")]
    assert named
    for name in named:
        assert two[name] == pytest.approx(one[name], rel=0.02, abs=0.05), name
    best = json.loads(weights.load_safetensors(tmp_path / "two" / watch.BEST)[1]["best"])
    assert best["value"] == min(two["evaluate/fd_judge_w0"], two["evaluate/fd_judge_w1.5"])
    said = "".join(result.err for result in run_together(cli, 2, "train", *run))
    assert "nothing is left" in said and "the real images" not in said


def test_the_best_is_kept_and_is_a_model(watched):
    _, metadata = weights.load_safetensors(watched / watch.BEST)
    best, found = json.loads(metadata["best"]), logged(watched)
    of_step = {
        (step, w): line[f"evaluate/fd_judge_w{w:g}"]
        for step, line in found.items()
        for w in (0, 1.5)
    }
    assert best["value"] == min(of_step.values()) == of_step[best["step"], best["w"]]
    assert cfg_jax.load(str(watched / watch.BEST)).step == best["step"]


def test_a_run_that_goes_on_knows_its_best(cli, watching, watched):
    """What was kept stays, and the real images are not looked at again."""
    before = (watched / watch.BEST).read_bytes()
    result = cli("train", *watching, f"--workdir={watched}")
    assert result.status == 0 and "nothing is left" in result.err
    assert "looking at the real images" not in result.err
    assert (watched / watch.BEST).read_bytes() == before
    model = experiment.build(stored.saved_config(str(watched)))
    again = watch.Watch(model, meshes.make_mesh(), str(watched))
    best = json.loads(weights.load_safetensors(watched / watch.BEST)[1]["best"]) | {"step": 30}
    assert not again._is_better(best, min), "no better than what is in the file"
    assert again._is_better(best | {"value": best["value"] - 1}, min)


def test_an_equal_or_worse_one_is_not_kept():
    seen = watch.Watch.__new__(watch.Watch)
    seen._best = {"of": {"keep_best": "fd_judge"}, "value": 2.0, "w": 0.0, "step": 10}
    for value, falling, rising in ((1.0, True, False), (2.0, False, False), (3.0, False, True)):
        best = seen._best | {"value": value}
        assert seen._is_better(best, min) is falling
        assert seen._is_better(best, max) is rising
    assert seen._is_better(best | {"of": {"keep_best": "fd_judge", "seed": 1}}, min)


MISTAKES = {
    "a score that is none": (["keep_best=fd_jugde"], ["fd_jugde", "did you mean 'fd_judge'"]),
    "no judge": (["judge="], ["config.evaluate.judge"]),
    "features of nobody": (["features=inceptoin"], ["inceptoin", "efficientnet_lite0"]),
    "w": (["w=(-2.0,)"], ["w=-2"]),
    "seed": (["seed=-1"], ["evaluate.seed=-1"]),
    "no images": (["num_samples=1"], ["evaluate.num_samples=1", "4 or more"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(cli, watching, tmp_path, name):
    fields, words = MISTAKES[name]
    flags = [f"--config.evaluate.{field}" for field in fields]
    result = cli("train", *watching, *flags, f"--workdir={tmp_path / 'run'}")
    assert result.status == 2, result.err[-2000:]
    assert len(result.errors) == 1 and all(word in result.errors[0] for word in words)
    assert not (tmp_path / "run" / "checkpoints").exists()
