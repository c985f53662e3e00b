"""Sampling: one program for every w, and an image that depends on its own seed alone."""

import json

import jax
import numpy as np
import PIL.Image
import pytest
from cli import TWO_LEVELS

import cfg_jax
from cfg_jax import card, experiment, generator, stored


@pytest.fixture(scope="module")
def model():
    """A network with random weights: its output is not zero, and w matters."""
    config = experiment.SCHEMA.complete(experiment.load_config("digits"))
    config["model"] |= TWO_LEVELS
    config["sample"] |= {"steps": 8, "batch_size": 16}
    built = experiment.build(config)
    params = jax.jit(built.network.init)(jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    shaken = [p + 0.2 * jax.random.normal(k, p.shape) for p, k in zip(leaves, keys)]
    return built, jax.tree.unflatten(tree, shaken)


@pytest.fixture(scope="module")
def sampler(model):
    built, params = model
    return generator.Generator(built, {"model": params})


def near(a, b):
    """uint8 images within one level."""
    assert a.shape == b.shape and a.dtype == b.dtype == np.uint8
    return np.abs(a.astype(int) - b).max() <= 1


def test_twenty_values_of_w_compile_once(sampler):
    seen = [sampler([1, 2, 3], w) for w in np.linspace(-1, 4, 20)]
    assert sampler.compilations() == 1
    assert not np.array_equal(seen[0], seen[-1]), "w reaches the images"
    sampler(np.arange(8), 0.5, seed=7)
    assert sampler.compilations() == 1, "nor do other labels and seeds compile again"


def test_an_image_is_the_same_alone_and_in_a_batch_in_any_order(sampler):
    labels = np.arange(16) % 10
    batch = sampler(labels, 1.5, seed=3)
    assert len(np.unique(batch.reshape(16, -1), axis=0)) == 16
    for i in (0, 7, 15):
        assert near(sampler([labels[i]], 1.5, seed=3, index=[i])[0], batch[i])
    order = np.random.default_rng(0).permutation(16)
    assert near(sampler(labels[order], 1.5, seed=3, index=order), batch[order])
    # 40 images are three batches, the last of them padded.
    longer = sampler(np.arange(40) % 10, 1.5, seed=3)
    assert near(longer[:16], batch)


def test_an_image_is_the_same_on_one_and_eight_devices(model, sampler, monkeypatch):
    assert sampler.mesh.size == 8
    eight = sampler(np.arange(16) % 10, 2.0, seed=5)
    one_device = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: one_device)
    built, params = model
    one = generator.Generator(built, {"model": jax.device_get(params)})
    assert one.mesh.size == 1
    assert near(one(np.arange(16) % 10, 2.0, seed=5), eight)


def test_one_w_for_all_is_one_w_an_image(sampler):
    labels = np.arange(12) % 10
    w = np.repeat([-1.0, 0.0, 0.5, 4.0], 3)
    each = sampler(labels, w, seed=1)
    for strength in np.unique(w):
        rows = w == strength
        assert near(sampler(labels, strength, seed=1)[rows], each[rows])


def test_w_0_needs_the_label_and_w_minus_1_does_not(sampler):
    """Both ends of the range: conditional and unconditional."""
    zeros, ones = np.zeros(8, int), np.ones(8, int)
    assert not near(sampler(zeros, 0.0), sampler(ones, 0.0))
    assert np.array_equal(sampler(zeros, -1.0), sampler(ones, -1.0))


def test_the_command_writes_a_grid_for_each_w_from_the_same_seeds(cli, trained, tmp_path):
    result = cli(
        "sample",
        f"--workdir={trained}",
        "--w=0,1.5",
        "--labels=3,1,4",
        "--per_label=5",
        "--seed=9",
        f"--out={tmp_path}",
    )
    assert result.status == 0, result.err[-3000:]
    assert "w=1.5 (scale 2.5)" in result.out
    data = np.load(tmp_path / "samples.npz")
    assert data["images"].shape == (2, 15, 8, 8, 1) and data["images"].dtype == np.uint8
    assert data["labels"].tolist() == [3] * 5 + [1] * 5 + [4] * 5
    assert data["w"].tolist() == [0.0, 1.5] and data["step"] == 20
    assert not near(*data["images"]), "each w has its own"
    model = cfg_jax.load(str(trained))
    again = model.sample(data["labels"], w=1.5, seed=9)
    assert near(again, data["images"][1]), "the Python API is the same program"
    for w in ("0", "1.5"):
        picture = np.asarray(PIL.Image.open(tmp_path / f"samples_w{w}.png"))
        scale, margin = 6, 1
        assert picture.shape == (3 * (8 * scale + margin) - 1, 5 * (8 * scale + margin) - 1)
    # Row 1, column 2 of the last picture is image 7.
    tile = picture[(8 * scale + 1) :][: 8 * scale, 2 * (8 * scale + 1) :][:, : 8 * scale]
    np.testing.assert_array_equal(tile[::scale, ::scale], data["images"][1][7, ..., 0])


@pytest.mark.slow
def test_steps_and_sampler_can_be_overridden_for_sampling(cli, trained, tmp_path):
    one = [f"--workdir={trained}", "--w=1", "--per_label=1"]
    results = []
    others = (
        ["--config.sample.steps=4"],
        ["--config.sample.sampler.v=1.0"],
        ["--config.sample.sampler=unipc", "--config.sample.grid=edm", "--config.sample.grid.rho=5"],
    )
    for i, extra in enumerate(([], *others)):
        out = tmp_path / str(i)
        result = cli("sample", *one, *extra, f"--out={out}")
        assert result.status == 0, result.err[-2000:]
        results.append(np.load(out / "samples.npz")["images"])
    for result in results[1:]:
        assert not np.array_equal(results[0], result)
    assert json.loads((trained / "config.json").read_text())["sample"]["steps"] == 8


def test_an_export_is_the_model(trained, tmp_path):
    path = tmp_path / "ema.safetensors"
    model = cfg_jax.load(str(trained))
    model.save(path)
    again = cfg_jax.load(str(path))
    assert again.step == model.step == 20
    assert again.config == model.config
    assert again.classes == tuple("0123456789")
    np.testing.assert_array_equal(again.sample([1, 2], w=2.0), model.sample([1, 2], w=2.0))

    card = (tmp_path / "ema.md").read_text()
    for said in ('cfg_jax.load("ema.safetensors")', "20 steps of 16 images", "- 9: 9", "w=1"):
        assert said in card
    whole = json.loads(card.partition("```json")[2].partition("```")[0])
    assert experiment.SCHEMA.complete(whole) == again.config, "the card holds the whole config"
    (tmp_path / "ema.md").write_text("mine")
    model.save(path)
    assert (tmp_path / "ema.md").read_text() == "mine", "a card that its maker wrote on stays"


def test_a_card_says_what_its_model_is(model):
    config = model[0].config
    known = {"classes": ["zero", "one"], "image_shape": (8, 8, 1), "parameters": 12345}
    trained = card.text("my.safetensors", config, step=3000, guided=True, **known)
    steps = f"3,000 steps of {config['train']['batch_size']} images"
    for said in ("# my\n", "2 classes", "12,345", "[1, 8, 8, 1]", "w=1,", "- 1: one", steps):
        assert said in trained, said
    assert "is 1 + w" in trained and "Converted" not in trained
    converted = card.text("my.safetensors", config, step=0, guided=False, **known)
    assert "Converted from published weights." in converted and "Trained for" not in converted
    assert "no null label" in converted and "w=0," in converted


def test_an_export_does_not_tell_where_the_data_lay(model, tmp_path):
    config = {**model[0].config, "dataset": {**model[0].config["dataset"], "data_dir": "/mine"}}
    path = str(tmp_path / "ema.safetensors")
    stored.export(path, {"p": np.zeros(1, np.float32)}, config, 1)
    assert stored.saved_config(path) == {**model[0].config}
    assert config["dataset"]["data_dir"] == "/mine"


@pytest.mark.slow
def test_classifier_guidance_moves_towards_its_class(cli, tiny, trained, tmp_path):
    """The same loop trains the classifier; guiding by it raises its own probability."""
    classifier = [
        "--config=digits_classifier",
        "--config.model.channels=8",
        "--config.model.num_res_blocks=1",
        "--config.model.head_channels=8",
        "--config.train.batch_size=64",
        "--config.train.steps=150",
        "--config.train.checkpoint_every=150",
        f"--workdir={tmp_path / 'classifier'}",
    ]
    result = cli("train", *classifier)
    assert result.status == 0, result.err[-3000:]
    lines = (tmp_path / "classifier" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["accuracy"] > 1.5 * json.loads(lines[0])["accuracy"]
    config = stored.saved_config(str(trained))
    config["sample"]["guidance"] = {"name": "classifier"}
    config["sample"]["steps"] = 32
    classifier_path = str(tmp_path / "classifier")
    guided, _ = generator.load(
        str(trained),
        experiment.build(config),
        classifier_path,
        experiment.build(stored.saved_config(classifier_path)),
    )
    labels = np.arange(16) % 10
    judge = jax.jit(
        lambda params, images: guided.guide.network.apply(
            params, images / 127.5 - 1, np.full(len(images), 8.0, np.float32), {}
        )
    )

    def mean_log_prob(images):
        logits = judge(guided.params["classifier"], images.astype(np.float32))
        return np.mean(np.asarray(jax.nn.log_softmax(logits))[np.arange(16), labels])

    unguided, strongly = guided(labels, 0.0), guided(labels, 5.0)
    assert guided.compilations() == 1
    assert mean_log_prob(strongly) > mean_log_prob(unguided) + 0.2
