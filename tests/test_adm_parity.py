"""Our U-Net and classifier are those of Dhariwal & Nichol (2021): outputs, names and size."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recipe

from cfg_jax.models import affine, network, weights
from cfg_jax.types import UsageError


def published(case):
    """-> (build, published state, fixture) of one reference network."""
    kind, theirs, state, fixture = recipe.adm_case(case)
    fields = {
        "image_size": theirs["image_size"],
        "in_channels": theirs["in_channels"],
        "channels": theirs["model_channels"],
        "channel_mult": theirs["channel_mult"],
        "num_res_blocks": theirs["num_res_blocks"],
        "attention_resolutions": [
            theirs["image_size"] // factor for factor in theirs["attention_resolutions"]
        ],
        "num_heads": theirs.get("num_heads"),
        "head_channels": theirs.get("num_head_channels"),
        "head_order": "new" if theirs["use_new_attention_order"] else "legacy",
        "resblock_updown": theirs["resblock_updown"],
        "scale_shift_norm": theirs["use_scale_shift_norm"],
    }
    if kind == "unet":
        fields |= {
            "num_classes": theirs["num_classes"],
            "out_channels": theirs["out_channels"],
            "null_row": False,
        }
    else:
        fields |= {"num_classes": theirs["out_channels"]}
    return network.make(kind, **fields), state, fixture


CASES = ["unet_new_order", "unet_legacy_order", "unet_unconditional", "classifier"]


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_the_published_ones(case):
    build, state, fixture = published(case)
    params = weights.from_adm(state, network.shapes(build))
    net = network.network(build, sinusoid_input=lambda t: t)
    z = fixture["x_nchw"].transpose(0, 2, 3, 1)
    apply = jax.jit(net.apply, compiler_options=recipe.QUICK)
    out = np.asarray(apply(params, z, fixture["t"], {"label": fixture["y"]}))
    want = fixture["out"] if case == "classifier" else fixture["out"].transpose(0, 2, 3, 1)
    assert out.shape == want.shape
    assert np.abs(want).max() > 0.5  # else agreement would mean little
    assert np.abs(out - want).max() < 2e-5  # measured: 5e-6


@pytest.mark.parametrize("case", CASES)
def test_every_name_is_used_once(case):
    build, state, _ = published(case)
    ours = weights.flatten(network.shapes(build))
    names = [weights.adm_name(path) for path in ours]
    assert sorted(names) == sorted(state)


def test_weights_of_another_model_are_refused():
    build, state, _ = published("unet_unconditional")
    _, other, _ = published("unet_legacy_order")
    with pytest.raises(
        UsageError, match=r"another model.*8 arrays are missing .*63 are not wanted"
    ):
        weights.from_adm(other, network.shapes(build))
    with pytest.raises(UsageError, match=r"1 are not wanted \(extra"):
        weights.from_adm(state | {"extra": np.zeros(3)}, network.shapes(build))
    with pytest.raises(UsageError, match=r"time_embed\.0\.bias.*\[3\]"):
        weights.from_adm(state | {"time_embed.0.bias": np.zeros(3)}, network.shapes(build))
    state["label_emb.weight"] = np.zeros((10, 128))
    with pytest.raises(UsageError, match=r"label_emb\.weight.*null_row=False"):
        labelled = functools.partial(build, num_classes=10, null_row=True)
        weights.from_adm(state, network.shapes(labelled))


ADM_64 = {"image_size": 64, "num_classes": 1000}  # the rest is the default
ADM_128 = {
    "image_size": 128,
    "num_classes": 1000,
    "channels": 256,
    "channel_mult": (1, 1, 2, 3, 4),
    "num_res_blocks": 2,
    "num_heads": 4,
    "head_order": "legacy",
}


@pytest.mark.parametrize(
    ("fields", "width", "exact", "published_millions"),
    [(ADM_64, 192, 295_900_035, 295.90), (ADM_128, 256, 421_523_715, 421.53)],
    ids=["64", "128"],
)
def test_size_of_the_papers_networks(fields, width, exact, published_millions):
    """Published ones have six output channels, a learned variance, and no null row."""
    assert count(network.make("unet", **fields)) == exact
    published = exact + 3 * (9 * width + 1) - 4 * width
    assert round(published / 1e6, 2) == published_millions


def test_size_of_the_published_classifiers():
    """65M and 43M in table 12 of Dhariwal & Nichol (2021)."""
    fields = {"num_classes": 1000, "channel_mult": (1, 1, 2, 3, 4), "num_res_blocks": 2}
    assert count(network.make("classifier", image_size=64, num_classes=1000)) == 65_438_568
    assert count(network.make("classifier", image_size=128, **fields)) == 42_568_040


def count(build):
    return sum(leaf.size for leaf in jax.tree.leaves(network.shapes(build)))


def test_plain_resampling_has_published_names():
    """`resblock_updown=False`: no fixture, but the names are `op` and `conv`."""
    build, _, _ = published("unet_unconditional")
    paths = weights.flatten(network.shapes(lambda rngs: build(rngs, resblock_updown=False)))
    names = {weights.adm_name(path) for path in paths}
    assert {"input_blocks.2.0.op.weight", "output_blocks.1.2.conv.weight"} <= names
    assert len(names) == len(paths)


def test_strided_convolution_is_padded_as_pytorch_pads():
    """PyTorch pads both sides by one, where "SAME" would pad only the far side."""
    x, kernel = jnp.arange(16.0).reshape(1, 4, 4, 1), jnp.zeros((3, 3, 1, 1)).at[1, 1].set(1)
    out = affine.convolve(x, kernel, stride=2)
    np.testing.assert_array_equal(out[0, :, :, 0], [[0, 2], [8, 10]])
