"""Published checkpoints become training folders, by one command and without PyTorch."""

import json
import math

import jax
import numpy as np
import pytest
import recipe
import torch_writer

from cfg_jax import convert, experiment, stored
from cfg_jax.diffusion import denoiser, guidance
from cfg_jax.models import weights

# The published networks, thin: overrides that make them those of the fixtures.
THIN = {
    "64x64_diffusion.pt": (
        "unet_new_order",
        ["channels=32", "channel_mult=(1,2,3)", "num_res_blocks=2", "head_channels=16"],
        ["attention_resolutions=(16,8)"],
    ),
    "256x256_diffusion_uncond.pt": (
        "unet_unconditional",
        ["channels=32", "channel_mult=(1,2)", "num_res_blocks=1", "head_channels=32"],
        ["attention_resolutions=(8,)"],
    ),
    "64x64_classifier.pt": (
        "classifier",
        ["channels=32", "channel_mult=(1,2,3)", "num_res_blocks=2", "head_channels=16"],
        ["attention_resolutions=(16,8)"],
    ),
}


def thin(name, folder):
    """-> (the flags of a conversion of a thin network published under that name, its fixture)."""
    case, *overrides = THIN[name]
    _, theirs, state, fixture = recipe.adm_case(case)
    path = folder / name
    torch_writer.write_zip(path, *torch_writer.state_dict(state))
    flags = [f"--config.model.{override}" for part in overrides for override in part]
    # Ten classes of small images, as the fixtures have them.
    flags += ["--config.dataset.name=cifar10", f"--config.dataset.size={theirs['image_size']}"]
    return [f"--checkpoint={path}", *flags], fixture


@pytest.fixture(scope="module")
def converted(cli, tmp_path_factory):
    """{name: (folder, fixture)} of the thin networks."""
    folder, out = tmp_path_factory.mktemp("published"), {}
    for name in THIN:
        flags, fixture = thin(name, folder)
        workdir = folder / name.removesuffix(".pt")
        result = cli("convert", *flags, f"--workdir={workdir}")
        assert result.status == 0, result.err[-3000:]
        assert "parameters, now in" in result.out
        out[name] = workdir, fixture
    return out


def opened(workdir):
    model = experiment.build(stored.saved_config(str(workdir)))
    return model, stored.load_ema(str(workdir), model)[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", THIN)
def test_a_converted_network_says_at_lambda_what_the_published_says_at_t(name, converted):
    workdir, fixture = converted[name]
    model, params = opened(workdir)
    lam = model.schedule(fixture["t"] / 999)
    z, cond = fixture["x_nchw"].transpose(0, 2, 3, 1), {"label": fixture["y"]}
    apply = jax.jit(model.network.apply, compiler_options=recipe.QUICK)
    out = np.asarray(apply(params, z, lam, cond))
    want = fixture["out"] if model.is_classifier else fixture["out"].transpose(0, 2, 3, 1)
    # The step of lambda in float32 moves t by up to 1e-3, and the sinusoid as much.
    assert np.abs(out - want).max() < 1e-3 * np.abs(want).max()
    if not model.is_classifier:
        told = model.reading.read(z, out, lam)
        np.testing.assert_array_equal(told.eps, out[..., :3])
        np.testing.assert_array_equal(told.v, (out[..., 3:] + 1) / 2)


@pytest.mark.slow
def test_converted_networks_sample_and_guide(converted, cli, tmp_path):
    """At w = 0, and by the noisy classifier; the unconditional one does not look at labels."""
    chain = ["--config.sample.steps=5", "--config.sample.batch_size=8", "--per_label=2"]
    labels = [*chain, "--labels=0,3"]
    conditional, unconditional, classifier = (converted[name][0] for name in THIN)

    def sampled(out, workdir, *flags):
        result = cli("sample", f"--workdir={workdir}", f"--out={tmp_path / out}", *labels, *flags)
        assert result.status == 0, result.err[-3000:]
        return np.load(tmp_path / out / "samples.npz")["images"]

    learned = sampled("learned", conditional, "--w=0")
    fixed = sampled("fixed", conditional, "--w=0", "--config.sample.sampler.learned_v=False")
    assert learned.shape == (1, 4, 32, 32, 3) and not np.array_equal(learned, fixed)
    rule = "--config.sample.guidance.name=classifier"
    guided = sampled("guided", conditional, "--w=0,2", rule, f"--classifier={classifier}")
    np.testing.assert_array_equal(guided[0], learned[0])
    assert not np.array_equal(guided[1], learned[0])
    with_labels = sampled("uncond", unconditional, "--w=0")
    assert with_labels.shape == (1, 4, 16, 16, 3)
    result = cli("sample", f"--workdir={conditional}", "--w=0,1", *labels)
    assert result.status == 2 and "no null label (p_uncond = 0)" in result.errors[0]
    result = cli("sample", f"--workdir={unconditional}", "--w=1", *labels)
    assert result.status == 2 and "no null label (p_uncond = 1)" in result.errors[0]


@pytest.mark.slow
def test_a_conditional_and_an_unconditional_network_are_a_pair_for_guidance(tmp_path):
    """Two networks of one chain meet in eq. (6) as denoisers; the second never reads a label."""
    small = {"channels": 32, "channel_mult": (1,), "num_res_blocks": 1}
    small |= {"attention_resolutions": (), "head_channels": 32}
    pair = []
    for labels in (True, False):
        config = convert._unet(64, "linear", labels=labels, **small)
        config["dataset"] = {"name": "cifar10", "size": 8}
        model = experiment.build(config)
        wanted = jax.eval_shape(model.network.init, jax.random.key(0))
        state = {
            name: recipe.adm_weight(name, shape) for name, shape in published_shapes(wanted).items()
        }
        pair.append((model, weights.from_adm(state, wanted)))
    assert ("label" in pair[0][1]) and ("label" not in pair[1][1])
    z, lam = recipe.draw("z", (4, 8, 8, 3)), np.float32(0.5)

    @jax.jit
    def run(label):
        bound = [
            denoiser.denoiser(m.network, p, {"label": label}, reading=m.reading) for m, p in pair
        ]
        guided = guidance.ClassifierFree(1.0)(*bound)
        return [one(z, lam) for one in (*bound, guided)]

    with_c, without, guided = run(np.arange(4))
    np.testing.assert_allclose(guided.eps, 2 * with_c.eps - without.eps, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(guided.v, with_c.v)
    np.testing.assert_array_equal(run(np.zeros(4, int))[1].eps, without.eps)


@pytest.mark.slow
def test_converted_networks_sample_as_a_pair_by_weak(converted, cli, tmp_path):
    """The two at 256, thin: at w = 0 the conditional one alone, beyond it both."""
    name, other = "256x256_diffusion.pt", "256x256_diffusion_uncond.pt"
    flags, _ = thin(other, tmp_path)
    config = stored.saved_config(str(converted[other][0]))
    loss = convert.PUBLISHED[name]["loss"]
    model = experiment.build({**config, "loss": {**config["loss"], **loss}})
    wanted = jax.eval_shape(model.network.init, jax.random.key(0))
    state = {key: recipe.adm_weight(key, shape) for key, shape in published_shapes(wanted).items()}
    torch_writer.write_zip(tmp_path / name, *torch_writer.state_dict(state))
    workdir = tmp_path / "conditional"
    result = cli("convert", f"--checkpoint={tmp_path / name}", *flags[1:], f"--workdir={workdir}")
    assert result.status == 0, result.err[-3000:]
    chain = ["--config.sample.steps=4", "--config.sample.batch_size=8", "--per_label=2"]
    pictures = []
    for extra in (["--w=0"], ["--w=0,1", f"--weak={converted[other][0]}"]):
        out = tmp_path / f"out{len(extra)}"
        result = cli(
            "sample", f"--workdir={workdir}", "--labels=0,3", *chain, *extra, f"--out={out}"
        )
        assert result.status == 0, result.err[-3000:]
        pictures.append(np.load(out / "samples.npz")["images"])
    (alone,), (unguided, guided) = pictures
    assert alone.shape == (4, 16, 16, 3) and not np.array_equal(alone[:2], alone[2:])
    np.testing.assert_array_equal(unguided, alone)
    assert not np.array_equal(guided, alone)


def published_shapes(wanted):
    """{published name: its shape} for parameters of ours."""
    shapes = {}
    for path, leaf in weights.flatten(wanted).items():
        shape = leaf.shape
        if path.endswith("kernel") or path == "pool/position":
            shape = shape[::-1] if len(shape) < 4 else (shape[3], shape[2], *shape[:2])
        shapes[weights.adm_name(path)] = shape
    return shapes


# Published by Dhariwal & Nichol (2021) in tables 11 and 12, in millions; 554 are of the conditional
# network at 256, whose labels are 1000 rows of 1024. The classifier's at 256 is our own count.
MILLIONS = {
    "64x64_diffusion.pt": 296,
    "128x128_diffusion.pt": 422,
    "256x256_diffusion.pt": 554,
    "256x256_diffusion_uncond.pt": 554 - 1,
    "64x64_classifier.pt": 65,
    "128x128_classifier.pt": 43,
    "256x256_classifier.pt": 54,
}


@pytest.mark.parametrize("name", MILLIONS)
def test_every_published_network_is_built_in_its_size(name):
    """Full size, by shape: every name of ours is a published one, and the sizes add up."""
    model = experiment.build(convert.published_config({"checkpoint": f"some/{name}"}))
    wanted = jax.eval_shape(model.network.init, jax.random.key(0))
    shapes = published_shapes(wanted)
    assert round(sum(map(math.prod, shapes.values())) / 1e6) == MILLIONS[name]
    empty = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    arrays = weights.flatten(weights.from_adm(empty, wanted))
    assert arrays.keys() == weights.flatten(wanted).keys()
    side = int(name.split("x")[0])
    assert model.dataset.image_shape == (side, side, 3)
    assert model.null_label is None
    known = {"64": "cosine", "128": "linear", "256": "linear"}
    assert model.schedule.betas == known[str(side)]
    assert len(model.lams()) == (256 if model.is_classifier else 250)
    # What no shape tells, and the flags of the published commands do: in how many heads, and in
    # which order, channels are read; that the variance is learned.
    options, sampler = model.config["model"], model.config["sample"]["sampler"]
    heads = {"num_heads": 4} if name == "128x128_diffusion.pt" else {"head_channels": 64}
    for option in ("num_heads", "head_channels"):
        assert options[option] == heads.get(option), option
    assert options["head_order"] == ("new" if name == "64x64_diffusion.pt" else "legacy")
    assert sampler["learned_v"] is not model.is_classifier


MISTAKES = {
    "another name": (["--checkpoint=model.pt"], ["--checkpoint='model.pt'", "64x64_diffusion.pt"]),
    "another published name": (
        ["--checkpoint=model.pt", "--published=64x64"],
        ["--published='64x64'", "64x64_diffusion.pt"],
    ),
    "no file": (
        ["--checkpoint=none/64x64_diffusion.pt"],
        ["none/64x64_diffusion.pt does not exist"],
    ),
    "another network": (
        ["--checkpoint={folder}/a.pt", "--published=128x128_classifier.pt"],
        ["another model", "missing", "not wanted (a)"],
    ),
    "a folder in use": (
        ["--checkpoint={folder}/a.pt", "--published=64x64_classifier.pt"],
        ["holds a run already"],
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(case, cli, tmp_path):
    torch_writer.write_zip(
        tmp_path / "a.pt", *torch_writer.state_dict({"a": np.zeros(3, np.float32)})
    )
    flags, wanted = MISTAKES[case]
    workdir = tmp_path / "workdir"
    if case == "a folder in use":
        workdir.mkdir()
        (workdir / "config.json").write_text(json.dumps({}))
    flags = [flag.format(folder=tmp_path) for flag in flags]
    result = cli("convert", *flags, f"--workdir={workdir}")
    assert result.status == 2 and len(result.errors) == 1 and "Traceback" not in result.err
    for part in wanted:
        assert part in result.errors[0]
    assert workdir.exists() == (case == "a folder in use")
