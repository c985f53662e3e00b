"""The rules, a weaker model, and negative and mixed labels, in the jobs and the Python API."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cli import ONE_LEVEL

import cfg_jax
from cfg_jax import experiment, generator, request, stored
from cfg_jax.data import images
from cfg_jax.diffusion import (
    corrections,
    denoiser,
    directions,
    guidance,
    logsnr,
    samplers,
    strengths,
)
from cfg_jax.models import weights
from cfg_jax.types import UsageError

FREE = guidance.ClassifierFree
STEPS = 8


def shaken(seed, channels=8, **fields):
    """A network of random weights: its output is not zero, and its label matters."""
    config = experiment.SCHEMA.complete(experiment.load_config("digits"))
    config["model"] |= ONE_LEVEL | {"channels": channels, "head_channels": channels}
    config["sample"] |= {"steps": STEPS, "batch_size": 16, "grid": "uniform_lambda"}
    built = experiment.build({**config, **fields})
    params = jax.jit(built.network.init)(jax.random.key(seed))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    leaves = [p + 0.2 * jax.random.normal(k, p.shape) for p, k in zip(leaves, keys)]
    return built, jax.tree.unflatten(tree, leaves)


@pytest.fixture(scope="module")
def model():
    return shaken(0)


@pytest.fixture(scope="module")
def sampler(model):
    return generator.Generator(model[0], {"model": model[1]})


LABELS = np.arange(16) % 10


def near(a, b):
    """uint8 images within one level."""
    assert a.shape == b.shape and a.dtype == b.dtype == np.uint8
    return np.abs(a.astype(int) - b).max() <= 1


def test_twenty_intervals_compile_once(sampler):
    """Ends, w and the numbers of the rules inside are data; w may be one an image."""

    def guided(low, high, phi, w):
        def rule(w):
            return strengths.Interval(corrections.Rescale(FREE(w), phi), low, high)

        return sampler.guided(rule)(LABELS, w)

    before = sampler.compilations()
    ends = np.linspace(-9, 9, 20)
    seen = [guided(low, 10.0, phi, w) for low, phi, w in zip(ends, ends / 20 + 0.5, ends + 8.5)]
    assert sampler.compilations() == before + 1
    assert len({x.tobytes() for x in seen}) > 8
    covering = guided(-np.inf, np.inf, 0.0, 1.5)
    assert near(covering, sampler(LABELS, 1.5)), "an interval of all is none"
    assert near(guided(-1.0, -1.0, 0.5, 1.5), sampler(LABELS, 0.0)), "an empty one is w = 0"
    w = np.repeat([0.0, 1.5], 8)
    each = guided(-2.0, 9.0, 0.5, w)
    assert near(each[8:], guided(-2.0, 9.0, 0.5, 1.5)[8:])
    assert near(each[:8], sampler(LABELS, 0.0)[:8])


def test_evaluations_are_those_of_the_levels_inside(sampler):
    """Eight levels from -20 to 20: the interval [-3, 9) holds -2.9, 2.9 and 8.6."""

    def count(w, rule=None, labels=(0,), negative=()):
        other = sampler.guided(rule, negative)
        return request.evaluations(other.model, other.guide, w, labels)

    interval = lambda w: strengths.Interval(FREE(w), -3.0, 9.0)  # noqa: E731
    assert count(1.0) == (16, 0, 0) and count(0.0) == count(-1.0) == (8, 0, 0)
    assert count(1.0, interval) == (8 + 3, 0, 0)
    assert count(0.0, interval) == (8, 0, 0)
    assert count(1.0, interval, [[0, 1], [2, 3]]) == (2 * 8 + 3, 0, 0)
    assert count(1.0, interval, negative=(1, 2)) == (8 + 2 * 3, 0, 0)
    assert str(count(1.0, interval)) == "11"


@pytest.mark.slow
def test_a_negative_label_that_is_the_label_guides_nowhere(sampler):
    threes = np.full(16, 3)
    away = sampler.guided(negative=[3])
    assert near(away(threes, 4.0), sampler(threes, 0.0))
    assert not near(away(LABELS, 4.0), sampler(LABELS, 4.0))
    # The null label itself is no class: a mixture of classes is another reference than it.
    assert not near(sampler.guided(negative=range(10))(LABELS, 1.0), sampler(LABELS, 1.0))


def test_a_mixture_of_one_label_is_the_label(sampler):
    assert near(sampler(LABELS[:, None], 1.5), sampler(LABELS, 1.5))
    assert near(sampler(np.stack([LABELS] * 2, 1), 1.5), sampler(LABELS, 1.5))
    both, swapped = (sampler(np.stack([LABELS, other], 1), 1.5) for other in (9 - LABELS, LABELS))
    assert near(both, sampler(np.stack([9 - LABELS, LABELS], 1), 1.5)), "in any order"
    assert not near(both, swapped)


def test_a_model_that_is_its_own_weaker_one_is_not_guided(model, sampler):
    built, params = model
    itself = generator.Generator(built, {"model": params, "weak": params}, built)
    for w in (-1.0, 4.0):
        assert near(itself(LABELS, w), sampler(LABELS, 0.0))
    assert itself.compilations() == 1
    assert request.evaluations(built, built, 4.0) == (8, 0, 8)


@pytest.mark.slow
def test_a_weaker_model_is_another_network_with_its_own_parameters(model, sampler):
    """Its readings are its own: at w = -1 the images are those that it makes alone."""
    weak, params = shaken(7, reading="velocity")
    guided = generator.Generator(model[0], {"model": model[1], "weak": params}, weak)
    alone = generator.Generator(weak, {"model": params})
    assert near(guided(LABELS, -1.0), alone(LABELS, 0.0))
    assert near(guided(LABELS, 0.0), sampler(LABELS, 0.0))
    assert not near(guided(LABELS, 1.0), sampler(LABELS, 1.0))


def test_cfg_plus_plus_through_ddim_adds_the_noise_of_the_unconditional_again(model):
    """The chain of the config, clipping included, is DDIM of the two networks written out."""
    built, params = model
    sample = {"guidance": {"name": "cfg_plus_plus"}, "sampler": {"name": "ddim"}}
    asked = experiment.build({**built.config, "sample": {**built.config["sample"], **sample}})
    w, rows = -0.4, np.arange(16)
    made = generator.Generator(asked, {"model": params})(LABELS, w)

    @jax.jit
    def says(label, z, lam):
        return denoiser.denoiser(built.network, params, {"label": label})(z, lam)

    bound = jnp.array(LABELS), jnp.full(16, built.null_label)

    def by_hand(noise_of):
        lams = request.levels(built)
        z = samplers.seeded_noise(generator.keys(0, rows), built.dataset.image_shape)(0)
        for lam, after in zip(lams, [*lams[1:], None]):
            both = [says(label, z, lam) for label in bound]
            x = jnp.clip((1 + w) * both[0].x - w * both[1].x, -1, 1)
            if after is None:
                return np.asarray(images.to_uint8(x))
            z = logsnr.alpha(after) * x + logsnr.sigma(after) * both[noise_of].eps

    assert near(made, by_hand(noise_of=1))
    assert not near(made, by_hand(noise_of=0)), "the conditional one's noise is another chain"


def test_what_cannot_be_guided_is_refused(model):
    built, weak = model[0], shaken(7)[0]
    no_null = dataclasses.replace(built, null_label=None)
    unguided = dataclasses.replace(built, guidance=guidance.ScaledScore)
    with pytest.raises(UsageError, match=r"^weak with"):
        request.check_guidance(unguided, weak, [1.0])
    with pytest.raises(UsageError, match=r"sample\.negative with"):
        sample = dataclasses.replace(built.sample, negative=(3,))
        request.check_guidance(dataclasses.replace(unguided, sample=sample), None, [1.0])
    with pytest.raises(UsageError, match=r"^weak has num_classes 9, the model 10"):
        other = types.SimpleNamespace(image_shape=(8, 8, 1), num_classes=9)
        request.check_guidance(built, dataclasses.replace(weak, dataset=other), [1.0])
    with pytest.raises(UsageError, match="tells a variance"):
        request.check_guidance(built, shaken(7, reading="eps_and_v")[0], [1.0])
    with pytest.raises(UsageError, match="take its teacher"):
        student = experiment.build(experiment.load_config("digits_distilled"))
        request.check_guidance(built, student, [1.0])
    with pytest.raises(UsageError, match="weak=DIR"):
        request.check_guidance(no_null, None, [1.0])
    request.check_guidance(no_null, weak, [1.0])  # a weaker model needs none
    with pytest.raises(UsageError, match="Ancestral"):
        broken = dataclasses.replace(built, guidance=directions.PlusPlus)
        request.check_guidance(broken, None, [-0.5])


@pytest.fixture(scope="module")
def weak(tmp_path_factory):
    """A weaker model as a file: narrower than the tiny run, a network of its own."""
    path = tmp_path_factory.mktemp("weak") / "weak.safetensors"
    built, params = shaken(7, channels=4)
    weights.save_safetensors(path, params, {"config": json.dumps(built.config), "step": "7"})
    return path


@pytest.mark.slow
def test_the_command_guides_by_a_weaker_model_in_an_interval(cli, trained, weak, tmp_path):
    rule = [
        "--config.sample.guidance.rule.name=apg",  # before the one around it, on purpose
        "--config.sample.guidance.name=interval",
        "--config.sample.guidance.low=-3.0",
        "--config.sample.guidance.rule.eta=0.5",
    ]
    flags = ["--w=0,1.5", "--labels=3,1", "--per_label=4", f"--weak={weak}", f"--out={tmp_path}"]
    result = cli("sample", f"--workdir={trained}", *flags, *rule)
    assert result.status == 0, result.err[-3000:]
    data = np.load(tmp_path / "samples.npz")
    lams = request.levels(experiment.build(stored.saved_config(str(trained))))
    inside = int(np.sum((lams >= -3) & (lams < 2.55)))
    assert 0 < inside < 8
    assert data["evaluations"].tolist() == [[8, 0, 0], [8, 0, inside]]
    assert f"(8 + {inside} network evaluations an image)" in result.out
    again = cfg_jax.load(str(trained), weak=str(weak)).sample(
        data["labels"],
        1.5,
        guidance=lambda w: strengths.Interval(directions.AdaptiveProjected(w, 0.5), -3.0, 2.55),
    )
    assert near(again, data["images"][1]), "the Python API is the same program"
    assert not near(data["images"][0], data["images"][1])


def test_the_command_mixes_labels_and_moves_away_from_others(cli, trained, tmp_path):
    flags = ["--w=1", "--labels=3+8,1+1", "--per_label=2", "--config.sample.negative=5"]
    result = cli("sample", f"--workdir={trained}", *flags, f"--out={tmp_path}")
    assert result.status == 0, result.err[-3000:]
    data = np.load(tmp_path / "samples.npz")
    assert data["labels"].tolist() == [[3, 8], [3, 8], [1, 1], [1, 1]]
    assert data["evaluations"].tolist() == [[24, 0, 0]]
    model = cfg_jax.load(str(trained))
    assert near(model.sample(data["labels"], 1.0, negative=[5]), data["images"][0])


MISTAKES = {
    "a weaker model that is a classifier": (["--weak=CLASSIFIER"], ["--weak", "a classifier"]),
    "a weaker model that is not there": (["--weak=/nowhere"], ["--weak=/nowhere"]),
    "a classifier that is a weaker model": (
        ["--classifier=WEAK", "--config.sample.guidance.name=classifier"],
        ["--classifier", "no classifier"],
    ),
    "both": (["--weak=WEAK", "--classifier=CLASSIFIER"], ["--weak", "--classifier"]),
    "a negative label outside": (["--config.sample.negative=(3,12)"], ["[12]", "0 to 9"]),
    "rows of mixtures of two lengths": (["--labels=3+8,1"], ["--labels=3+8,1", "1"]),
    "a mixture outside": (["--labels=3+10"], ["[10]"]),
    "a rule inside that is not known": (
        ["--config.sample.guidance.name=interval", "--config.sample.guidance.rule.name=agp"],
        ["agp", "apg"],
    ),
    "ends": (
        ["--config.sample.guidance.name=interval", "--config.sample.guidance.low=5.0"],
        ["low=5.0", "sigma"],
    ),
    "CFG++": (["--config.sample.guidance.name=cfg_plus_plus", "--w=-0.4"], ["Ancestral", "DDIM"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(cli, trained, weak, classifier, tmp_path, name):
    flags, words = MISTAKES[name]
    flags = [f.replace("WEAK", str(weak)).replace("CLASSIFIER", str(classifier)) for f in flags]
    result = cli("sample", f"--workdir={trained}", *flags, f"--out={tmp_path / 'out'}")
    assert result.status == 2, result.err[-2000:]
    assert len(result.errors) == 1 and "Traceback" not in result.err
    assert all(word in result.errors[0] for word in words), result.errors
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_sweep_counts_what_it_spares(cli, trained, weak, judge, tmp_path):
    """Of evaluate: the weaker model, its recipe, and the evaluations of an interval."""
    flags = [f"--workdir={trained}", f"--judge={judge}", "--w=0,1.5", "--num_samples=40"]
    flags += [f"--weak={weak}", "--guidance=classifier_free,interval", f"--out={tmp_path}"]
    result = cli("evaluate", *flags, "--config.sample.negative=(1,2)")
    assert result.status == 0, result.err[-3000:]
    found = json.loads((tmp_path / "sweep.json").read_text())
    lams = request.levels(experiment.build(stored.saved_config(str(trained))))
    inside = int(np.sum((lams >= -2.13) & (lams < 2.55)))
    counts = [(p["guidance"], p["evaluations"], p["weak_evaluations"]) for p in found["points"]]
    assert counts == [
        ("classifier_free", 8, 0),
        ("classifier_free", 8, 16),
        ("interval", 8, 0),
        ("interval", 8, 2 * inside),
    ]
    assert found["recipe"]["weak"]["workdir"] == str(weak)
    assert found["recipe"]["steps"] == {"model": 20, "weak": 7}
    assert set(found["recipe"]["parameters"]) == {"model", "weak"}
