"""The trained model that the repository keeps: it loads, it samples, bfloat16 is good enough."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cfg_jax
from cfg_jax import experiment, generator, stored
from cfg_jax.data import images
from cfg_jax.diffusion import logsnr, losses

MODEL = Path(__file__).parent.parent / "launch" / "models" / "fashion_mnist.safetensors"
FEW = {"steps": 16, "batch_size": 16}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def made():
    """Images of eight T-shirts and eight trousers, [16, 32, 32, 1], and their labels."""
    config = stored.saved_config(str(MODEL))
    model = experiment.build({**config, "sample": {**config["sample"], **FEW}})
    sampled, _ = generator.load(str(MODEL), model)
    labels = np.repeat([0, 1], 8)
    return sampled(labels, 4.0), labels


def test_it_is_small_and_says_what_made_it():
    assert MODEL.stat().st_size < 5e6
    model = cfg_jax.load(str(MODEL))
    assert model.classes[:2] == ("T-shirt/top", "Trouser")
    assert model.step == model.config["train"]["steps"]
    assert model.config["dataset"]["data_dir"] is None, "a path of one machine"


def test_it_draws_what_is_asked_for(made):
    """Between the legs of trousers is nothing, where a shirt is."""
    pictures, labels = made
    between = pictures[:, 20:28, 15:17, 0].mean((1, 2))
    assert np.median(between[labels == 0]) > 2 * np.median(between[labels == 1])
    assert len({p.tobytes() for p in pictures}) == len(pictures)


def test_bfloat16_is_within_two_percent_of_float32(made):
    """Over the levels of training, for images like those that it was trained on."""
    pictures, labels = made
    config = stored.saved_config(str(MODEL))
    model = experiment.build(config)
    _, params = stored.load_ema(str(MODEL), model)
    x = images.to_float(jnp.asarray(pictures))
    lam = losses.sample_lambda(jax.random.key(0), model.schedule, len(x), stratified=True)
    z = logsnr.diffuse(x, losses.sample_eps(jax.random.key(1), x), lam)
    outputs = []
    for dtype in ("float32", "bfloat16"):
        network = experiment.build({**config, "model": {**config["model"], "dtype": dtype}}).network
        outputs.append(jax.jit(network.apply)(params, z, lam, {"label": jnp.asarray(labels)}))
    error = jnp.linalg.norm(outputs[1] - outputs[0]) / jnp.linalg.norm(outputs[0])
    assert 1e-4 < error < 0.02
