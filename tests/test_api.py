"""The Python API: settings of the chain by argument, the way there, and the model that ships."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn import datasets, neighbors

import cfg_jax
from cfg_jax import experiment, generator, stored
from cfg_jax.diffusion import samplers

ROOT = Path(__file__).parent.parent
LABELS = [3, 1, 4]


@pytest.fixture(scope="module")
def model(trained):
    """Of the tests together: what one has compiled is there for the others."""
    return cfg_jax.load(trained)


def near(a, b):
    """uint8 images within one level: other programs round otherwise."""
    return a.shape == b.shape and np.abs(a.astype(int) - b).max() <= 1


def test_settings_of_the_chain_are_those_of_the_config(model, trained):
    config = model.config
    sampler = {"name": "ancestral", "v": 1.0}
    config["sample"] |= {"steps": 4, "sampler": sampler, "guidance": {"name": "scaled_score"}}
    expected, _ = generator.load(str(trained), experiment.build(config))
    which = {"seed": 2, "index": [5, 0, 9]}
    got = model.sample(LABELS, 0.5, **which, steps=4, sampler={"v": 1.0}, guidance="scaled_score")
    np.testing.assert_array_equal(got, expected(LABELS, 0.5, **which))
    assert not near(got, model.sample(LABELS, 0.5, **which))
    assert model.config["sample"]["steps"] == 8, "the model itself is as it was"


def test_equal_settings_share_one_program(model, monkeypatch):
    compiled = []
    make = generator.program
    monkeypatch.setattr(generator, "program", lambda *a, **k: compiled.append(a) or make(*a, **k))
    for w in (0.0, 1.0):
        model.sample(LABELS, w)
        model.sample(LABELS, w, steps=8, sampler="ancestral", guidance={"name": "classifier_free"})
        model.sample(LABELS, w, steps=5)
        model.sample(LABELS, w, steps=5, sampler={"v": 0.3})
    assert len(compiled) <= 2, "one for 5 levels; and one for 8, unless it was made before"
    assert all(g.compilations() <= 1 for g in model._generators.values())


def test_other_settings_are_other_programs(model):
    own = model._generator()._programs
    assert model._generator(8, "ancestral", "uniform_u", "scaled_score", [3])._programs is own
    others = [{"steps": 9}, {"sampler": "ddim"}, {"sampler": {"v": 0.9}}, {"along": True}]
    for other in (*others, {"grid": "edm"}, {"grid": {"name": "edm", "rho": 5.0}}):
        assert model._generator(**other)._programs is not own, other


@pytest.mark.parametrize(
    "sampler",
    [
        name if name in ("ancestral", "heun") else pytest.param(name, marks=pytest.mark.slow)
        for name in samplers.SAMPLERS
    ],
)
def test_the_trajectory_ends_in_the_image(model, sampler):
    settings = {"w": 1.5, "seed": 4, "sampler": sampler}
    image = model.sample(LABELS, **settings)
    path = model.trajectory(LABELS, **settings)
    assert path.dtype == np.uint8 and path.shape == (8, *image.shape)
    assert near(path[-1], image)
    assert len(np.unique(path.reshape(8, -1), axis=0)) > 2, "it moves"
    backwards = model.trajectory(LABELS[::-1], **settings, index=[2, 1, 0])
    assert near(backwards[:, ::-1], path), "each by its index"
    thinned = model.trajectory(LABELS, **settings, every=3)
    np.testing.assert_array_equal(thinned, path[[1, 4, 7]])


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda m: m.sample(LABELS, sampler="ancestrall"), "did you mean 'ancestral'"),
        (lambda m: m.sample(LABELS, sampler={"w": 1.0}), "sample.sampler.w is no field"),
        (lambda m: m.sample(LABELS, guidance="clasifier_free"), "did you mean 'classifier_free'"),
        (lambda m: m.sample(LABELS, guidance="classifier"), "cfg_jax.load(PATH, classifier=DIR)"),
        (lambda m: m.sample(LABELS, steps=0), "sample.steps=0"),
        (lambda m: m.sample(LABELS, steps=2.5), "sample.steps=2.5"),
        (lambda m: m.sample(3), "list of whole numbers"),
        (lambda m: m.sample([10]), "outside the classes 0 to 9"),
        (lambda m: m.sample(LABELS, w=-2.0), "w=-2.0"),
        (lambda m: m.sample(LABELS, w=[1.0]), "must be of one length"),
        (lambda m: m.sample(LABELS, guidance="cosine", negative=[12]), "negative [12] are outside"),
        (lambda m: m.sample(LABELS, guidance="scaled_score", negative=[3]), "sample.negative with"),
        (lambda m: m.trajectory(LABELS, every=0), "every=0"),
        (lambda m: cfg_jax.load("digit"), "(digits)"),
        (lambda m: cfg_jax.load("digits", classifier="digits"), "holds no classifier"),
        (lambda m: cfg_jax.load("digits", classifier="digits", weak="digits"), "not both"),
    ],
)
def test_a_mistake_says_what_would_be_right(model, call, told):
    with pytest.raises(cfg_jax.UsageError) as raised:
        call(model)
    assert told in str(raised.value) and "\n" not in str(raised.value)
    assert "--" not in str(raised.value), "a flag is no argument"


def test_a_bucket_wants_an_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(cfg_jax.UsageError, match=r"cfg_jax\[gcs\]"):
        cfg_jax.load("gs://bucket/digits")


def test_what_config_gives_is_a_copy(model):
    model.config["sample"]["steps"] = 99
    assert model.config["sample"]["steps"] == 8


def test_the_digits_that_ship_are_small_and_say_what_made_them():
    assert stored.SHIPPED["digits"].stat().st_size < 2e6
    model = cfg_jax.load("digits")
    assert repr(model) == "<Model of digits: 10 classes, 8x8x1, step 1500>"
    described = experiment.SCHEMA.complete(experiment.load_config("digits"))
    assert model.config == described, "what configs/digits.py says"
    assert "--config=digits" in (stored.SHIPPED["digits"].parent / "README.md").read_text()


def test_the_jobs_are_told_where_the_model_that_ships_is(cli, tmp_path):
    few = ["--w=0", "--labels=3", "--per_label=1", "--config.sample.steps=2"]
    result = cli("sample", "--workdir=digits", *few, cwd=tmp_path)
    (line,) = result.errors
    assert result.status == 2 and not any(tmp_path.iterdir())
    workdir, out = re.search(r"is (--workdir=\S+) (--out=DIR)$", line).groups()
    assert cli("sample", workdir, out, *few, cwd=tmp_path).status == 0
    assert (tmp_path / "DIR" / "samples_w0.png").exists()


@pytest.mark.slow
def test_the_digits_that_ship_are_digits_of_their_classes():
    """To the nearest of the real ones, which is right on 98 % of those held out."""
    real = datasets.load_digits()
    judge = neighbors.KNeighborsClassifier(1).fit(real.data * (255 / 16), real.target)
    labels = np.arange(100) % 10
    images = cfg_jax.load("digits").sample(labels, w=1.0, steps=32)
    assert judge.score(images.reshape(100, -1), labels) >= 0.97


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel of a copy, with what it asks for, in an environment of its own; its folder."""
    home = tmp_path_factory.mktemp("installed")
    source = home / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("cfg_jax", "configs"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    pip = [sys.executable, "-m", "pip", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", f"--wheel-dir={home}", str(source)], check=True)
    shutil.rmtree(source)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home / "env")], check=True)
    (wheel,) = home.glob("*.whl")
    pinned = f"--constraint={ROOT / 'launch' / 'constraints.txt'}"
    python = f"--python={home / 'env' / 'bin' / 'python'}"
    subprocess.run([*pip, python, "install", pinned, str(wheel)], check=True)
    yield home
    shutil.rmtree(home / "env")  # a gigabyte


TIMED = "import time; t = time.perf_counter(); import cfg_jax; print(time.perf_counter() - t)"
SAMPLED = "print(cfg_jax.load('digits').sample([0, 7], w=1.0, steps=4).shape)"


@pytest.mark.slow
def test_the_wheel_works_in_an_environment_of_its_own(installed):
    """Away from the repository: the size, the import, the model that ships, the five jobs."""
    elsewhere = installed / "elsewhere"
    elsewhere.mkdir()
    ours = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "XLA_FLAGS")
    env = {name: value for name, value in os.environ.items() if name not in ours}
    env["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # compiling is most of what the jobs cost here

    def run(*args):
        command = [str(installed / "env" / "bin" / "python"), *args]
        done = subprocess.run(command, cwd=elsewhere, env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"{args}\n{done.stderr[-3000:]}"
        return done.stdout

    (packages,) = (installed / "env").glob("lib/*/site-packages")
    there = {path.name.lower() for path in packages.iterdir()}
    assert not {"tensorflow", "torch", "libtpu"} & there
    size = sum(path.stat().st_size for path in packages.rglob("*") if path.is_file())
    assert size < 1.2e9, f"{size / 1e9:.2f} GB"
    assert min(float(run("-c", TIMED)) for _ in range(3)) < 2
    told = run("-c", f"import cfg_jax; print(cfg_jax.__file__); {SAMPLED}")
    assert told.splitlines() == [str(packages / "cfg_jax" / "__init__.py"), "(2, 8, 8, 1)"]
    assert (packages / "cfg_jax" / "py.typed").exists()

    def job(name, *flags):
        return run("-m", f"cfg_jax.{name}", *flags)

    data, few = "--config.dataset.data_dir=DATA", ["--config.model.channels=8"]
    few += ["--config.model.head_channels=8", "--config.train.batch_size=16"]
    chain = ["--config.sample.steps=4", "--config.sample.batch_size=16"]
    steps = ["--config.train.steps=2", "--config.train.sample_every=0"]
    job("prepare", "--dataset=digits", "--data_dir=DATA")
    for config in ("digits", "digits_judge"):
        job("train", f"--config={config}", data, f"--workdir={config}", *few, *steps)
    assert (elsewhere / "digits" / "checkpoints" / "2").exists()
    job("sample", "--workdir=digits", "--w=0,1", "--per_label=1", *chain)
    assert (elsewhere / "digits" / "samples_w1.png").exists()
    scored = ["--w=0,1", "--num_samples=16", "--judge=digits_judge"]
    job("evaluate", "--workdir=digits", *scored, *chain)
    assert (elsewhere / "digits" / "sweep" / "report.html").exists()
    assert "cpu" in job("plan", "--config=digits", "--topology=cpu", *few, *chain)
