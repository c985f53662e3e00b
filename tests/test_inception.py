"""The network of FID is the published one: its outputs, its weights, and what is refused."""

import jax
import numpy as np
import pytest
import recipe

from cfg_jax import features
from cfg_jax.models import inception
from cfg_jax.runtime import mesh as meshes
from cfg_jax.types import UsageError

OURS = {"pool3": "pool3", "spatial7": "spatial", "logits_unbiased": "logits"}
OURS["pool_mixed_6e"] = "mixed_6e"


@pytest.fixture(scope="module")
def published():
    return recipe.inception_state()


@pytest.fixture(scope="module")
def params(published):
    return inception.from_published(published)


@pytest.fixture(scope="module")
def fixture():
    return dict(np.load(recipe.INCEPTION / "features.npz"))


@pytest.fixture(scope="module")
def look():
    return jax.jit(inception.look, compiler_options=recipe.QUICK)


@pytest.mark.parametrize("side", [8, 32, 64, 128, 299, 320])
def test_every_output_is_the_published_one(look, params, fixture, side):
    looked = look(params, inception.preprocess(fixture[f"image{side}"]))
    ours = {theirs: np.asarray(getattr(looked, name)) for theirs, name in OURS.items()}
    ours["logits"] = ours["logits_unbiased"] + params["fc"]["bias"]
    for name, value in ours.items():
        want = fixture[f"{name}_{side}"]
        assert value.shape == want.shape
        assert np.abs(value - want).max() < 1e-3 * want.std(), name


@pytest.mark.slow
def test_one_device_and_eight_see_the_same(params, fixture):
    """Features and logits, root mean square, to 1e-5 of their spread."""
    images = np.concatenate([fixture["image32"]] * 4)
    images[2:] ^= np.arange(6, dtype=np.uint8)[:, None, None, None]
    seen = []
    for count in (1, 8):
        look = features.FEATURES["inception"].keywords["look"]
        extractor = features.Extractor(
            name="inception",
            names={},
            look=look,
            params=params,
            mesh=meshes.make_mesh(devices=jax.devices()[:count]),
            recipe={"parameters": "recipe"},
            batch_size=8,
        )
        seen.append(extractor(images))
    for name, one in seen[0].items():
        assert np.sqrt(np.mean((one - seen[1][name]) ** 2)) < 1e-5 * one.std(), name


def test_weights_of_another_network_are_refused(published):
    wide = published | {"Mixed_6b.branch1x1.conv.weight": np.zeros((192, 700, 1, 1))}
    cut = {name: array for name, array in published.items() if name != "fc.bias"}
    for state, words in ((wide, "2015-12-05"), (cut, r"fc\.bias")):
        with pytest.raises(UsageError, match=words) as error:
            inception.from_published(state)
        assert "\n" not in str(error.value)
