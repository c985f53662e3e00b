"""The benchmarks write what they say, with PyTorch beside us where it is installed; and what the
oracle table is made with is right.
"""

import json
import os
import re
import subprocess
import sys
from importlib import util
from pathlib import Path

import jax
import numpy as np
import oracle as answers
import pytest

from benchmarks import metrics, oracle, precision, samplers
from benchmarks import ours as ours_side
from cfg_jax import executed, experiment, hlo, train
from cfg_jax.models import affine
from cfg_jax.runtime import mesh as meshes

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


def bench(*arguments, module="run", **environment):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | environment
    return subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", *arguments],
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
        model = experiment.build(experiment.load_config(str(config)))
        assert r["flops"] == ours_side.operations(model, r["task"]) > 1e5
        assert ours["gflops"] == pytest.approx(r["flops"] / ours["median_s"] / 1e9)
        assert ("ratio" in r) == beside
        if beside:
            assert r["sides"]["torch eager"]["errors"]
    assert "| side |" in result.stdout and f"{config.stem}" in result.stdout


def test_products_alone_are_counted_and_on_every_machine_the_same():
    x = jax.ShapeDtypeStruct((4, 8, 8, 16), np.float32)
    kernel = jax.ShapeDtypeStruct((3, 3, 16, 5), np.float32)
    forward = 2 * 4 * (3 * 8 - 2) ** 2 * 16 * 5

    def loss(kernel, x):
        return jax.numpy.sum(jax.numpy.tanh(affine.convolve(x, kernel)) ** 2)

    assert ours_side.products(loss, kernel, x) == forward
    assert ours_side.products(jax.grad(loss), kernel, x) == 2 * forward, "nor as a CPU has it"


def test_operations_are_those_of_the_plan(tmp_path):
    """Of the job's own step, counted as `plan` counts it."""
    config = tmp_path / "small.py"
    config.write_text(CONFIG)
    model = experiment.build(experiment.load_config(str(config)))
    step = train.make_step(model, meshes.make_mesh(1, jax.devices()[:1]))
    program = step.run.trace(step.shapes, step.frozen, step.rows, jax.random.key(0))
    text = program.lower(lowering_platforms=("tpu",)).as_text("hlo")
    assert ours_side.operations(model, "train") == executed.flops(hlo.parse(text))
    forward = ours_side.operations(model, "sample") / (2 * model.sample.steps)
    assert 2 < ours_side.operations(model, "train") / forward < 3, "an image has no gradient"


def test_what_is_asked_wrongly_is_told_in_a_line():
    result = bench("--configs=digits", "--wrong")
    assert result.returncode == 2 and "--wrong" in result.stderr.splitlines()[-1]


# The oracle table

GRID, FINER = np.linspace(-20, 20, 11), np.linspace(-20, 20, 41)


@pytest.fixture(scope="module")
def path():
    """The start and the fine normals of 400 points in the plane."""
    rng = np.random.default_rng(3)
    return rng.standard_normal((400, 2)), rng.standard_normal((oracle.CELLS, 400, 2))


def walked(lams, draws):
    """How far the draws of each step have carried a path, [T, N, 2] from 0 at the first level.

    A kick of dlam weighs e^(lam / 2): the variance of a step is the integral, e^lam from end to
    end.
    """
    weights = np.sqrt(np.diff(np.exp(lams)))
    steps = weights[:, None, None] * draws[1:-1]
    return np.concatenate([np.zeros((1, *draws.shape[1:])), np.cumsum(steps, 0)])


@pytest.mark.parametrize("lams", [GRID, FINER, GRID[3:], [-20.0, -19.999, -19.998, 0.0, 20.0]])
def test_the_draws_of_a_coarse_chain_are_unit_normals(path, lams):
    draws = oracle.coarse(lams, *path)
    assert draws.shape == (len(lams) + 1, 400, 2)
    flat = draws.reshape(len(draws), -1)
    covariance = flat @ flat.T / flat.shape[1]
    np.testing.assert_allclose(covariance, np.eye(len(draws)), atol=5 * (2 / 800) ** 0.5)
    assert np.abs(flat.mean(1)).max() < 5 / 800**0.5


def test_coarse_chains_follow_one_path(path):
    """A grid's draws are the sums of its refinement's; a later start is where the path is then."""
    coarse, fine = (oracle.coarse(lams, *path) for lams in (GRID, FINER))
    np.testing.assert_array_equal(coarse[0], path[0])
    there = walked(GRID, coarse)
    np.testing.assert_allclose(walked(FINER, fine)[::4], there, rtol=1e-9, atol=1e-9)

    later = oracle.coarse(GRID[3:], *path)
    np.testing.assert_array_equal(later[1:-1], coarse[4:-1])
    h = 40 / oracle.CELLS
    begin, now = np.exp(GRID[[0, 3]])
    so_far = np.sqrt(begin) * path[0] + np.sqrt(h / np.expm1(h)) * there[3]
    start = so_far / np.sqrt(begin + h / np.expm1(h) * (now - begin))
    np.testing.assert_allclose(later[0], start, rtol=1e-9, atol=1e-9)


def test_errors_are_those_of_the_class_that_is_furthest_off():
    rng = np.random.default_rng(0)
    label = np.arange(3000) % 3
    true = answers.MEANS[label] + answers.STDS[label, None] * rng.standard_normal((3000, 2))
    np.testing.assert_array_equal(oracle.errors(true, true, label), 0)

    def spread(points):
        return np.sqrt(np.trace(np.cov(points.T)) / 2)

    x = true.copy()
    x[label == 1] += [0.0, -0.1]  # by far the narrowest class
    x[label == 0] += [0.05, 0.0]
    for c, factor in ((2, 0.9), (0, 1.05)):
        own = x[label == c]
        x[label == c] = own.mean(0) + factor * (own - own.mean(0))
    mean, spread_error, _ = oracle.errors(x, true, label)
    np.testing.assert_allclose(mean, 0.1 / spread(true[label == 1]), rtol=1e-9)
    np.testing.assert_allclose(spread_error, -0.1, rtol=1e-9)

    x = true.copy()
    x[label == 0] = answers.MEANS[2]
    was = np.mean(answers.likely_class(true[label == 0]) == 0)
    assert was > 0.8 and oracle.errors(x, true, label)[2] == -was


@pytest.mark.slow
def test_the_oracle_table_finds_the_orders(tmp_path):
    """At few points: samplers without noise make errors of their own, and not of chance."""
    few = ("--rules=classifier_free", "--points=30", f"--out={tmp_path / 'oracle.md'}")
    result = bench(*few, module="oracle", JAX_PLATFORMS="cpu")
    assert result.returncode == 0, result.stderr[-3000:]
    text = (tmp_path / "oracle.md").read_text()
    names, cells = (
        re.search(rf"^\| {first} \| (.*) \|$", text, re.M)[1].split(" | ")
        for first in ("rule", "classifier_free")
    )
    orders = {name: [float(x) for x in cell.split("/")] for name, cell in zip(names, cells)}
    assert set(orders) == set(oracle.SAMPLERS)
    known = {"ddim, eta = 0": 1, "euler": 1, "dpmpp_2m, eta = 0": 2, "heun": 2, "unipc": 3}
    for name, order in known.items():
        np.testing.assert_allclose(orders[name], order, atol=0.3, err_msg=name)


# What is measured on a trained model

QUICK = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


@pytest.mark.parametrize(
    "sampler, w, steps, spent",
    [
        ("ancestral", 0.3, 4, 8),
        ("ancestral", -1.0, 9, 9),
        ("heun", 0.3, 2, 6),
    ],
)
def test_a_budget_pays_for_as_many_levels_as_guidance_leaves(sampler, w, steps, spent):
    config = experiment.SCHEMA.complete(experiment.load_config("digits"))
    some = samplers.with_budget(config, {"name": sampler}, "uniform_lambda", w, 9)
    assert (some.sample.steps, samplers.cost(some, w)) == (steps, spent)


@pytest.mark.slow
def test_what_bfloat16_costs_is_told(tmp_path):
    """Two curves side by side, and errors that grow where rounding drowns the noise."""
    config = tmp_path / "small.py"
    config.write_text(CONFIG)
    few = (f"--config={config}", "--steps=10")
    result = bench(*few, module="precision", **QUICK)
    assert result.returncode == 0, result.stderr[-3000:]
    curves = re.findall(r"^\| (\d+) \| ([\d.]+) \| ([\d.]+) \|$", result.stdout, re.M)
    assert [int(step) for step, *_ in curves] == list(range(1, 11))
    assert all(abs(float(single) - float(half)) < 0.05 for _, single, half in curves)
    errors = re.findall(r"^\| (\S+) \| ([\d.]+) % \| [\d.]+ \|$", result.stdout, re.M)
    assert [name for name, _ in errors] == ["p(lambda)", *(f"lam={x:g}" for x in precision.LAMS)]
    assert all(0 < float(error) < 20 for _, error in errors)


@pytest.mark.slow
def test_samplers_are_drawn_over_what_they_cost(trained, judge, tmp_path, monkeypatch, capsys):
    out = tmp_path / "samplers.png"
    few = ("--w=-1", "--images=20", "--evaluations=4", "--grids=uniform_lambda", f"--out={out}")
    monkeypatch.setattr(sys, "argv", ["", f"--workdir={trained}", f"--judge={judge}", *few])
    two = {name: samplers.SAMPLERS[name] for name in ("ddim", "heun")}
    monkeypatch.setattr(samplers, "SAMPLERS", two)
    monkeypatch.setattr(samplers.meshes, "keep_compiled", lambda workdir: None)
    samplers.main()
    told = capsys.readouterr().out
    rows = re.findall(r"^\| uniform_lambda \| (\w+) \| (\d+) \| (\d+) \| ", told, re.M)
    assert rows == [("ddim", "4", "4"), ("heun", "2", "3")]
    assert out.stat().st_size > 1000


@pytest.mark.slow
def test_rules_are_compared_on_a_trained_model(trained, judge, tmp_path):
    few = ("--num_samples=20", "--steps=3", "--rules=classifier_free,cfg_plus_plus", "--w=-0.5,0")
    result = bench(
        *(f"--workdir={trained}", f"--judge={judge}", *few, f"--out={tmp_path}"),
        module="rules",
        **QUICK,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "autoguidance is left out" in result.stdout
    points = json.loads((tmp_path / "rules.json").read_text())["points"]
    told = [(p["rule"], p["w"], p["sampler"], p["evaluations"]["model"]) for p in points]
    assert told == [
        ("classifier_free", -0.5, "Ancestral", 6),
        ("classifier_free", 0.0, "Ancestral", 3),
        ("cfg_plus_plus", -0.5, "DDIM", 6),
        ("cfg_plus_plus", 0.0, "DDIM", 6),
    ]
    assert all(p["fd"] > 0 and p["is"] >= 1 for p in points)
    for name in ("classifier_free", "cfg_plus_plus", "frontier"):
        assert (tmp_path / f"{name}.png").stat().st_size > 100


@pytest.mark.slow
def test_metrics_are_timed(monkeypatch, capsys):
    """Of narrow features, as the Frechet distance of wide ones takes long for any number."""
    few = ["--images=40", "--real=30", "--side=8", "--looked=32"]
    monkeypatch.setattr(sys, "argv", ["metrics", *few])
    monkeypatch.setattr(metrics, "POOL3", 24)
    monkeypatch.setattr(metrics, "PLACES", 23)
    metrics.main()
    told = capsys.readouterr().out
    rows = re.findall(r"^\| (.*) \| [\d.]+ s \| .* \| (\d+) MiB \|", told, re.M)
    assert [rows[0][0], rows[-1][0]] == ["FID", "all, with resamples"] and len(rows) == 8
    assert all(float(mib) > 50 for *_, mib in rows)
