"""Our U-Net is the one of `benchmarks/torch_adm.py`, outputs and gradients: the benchmark's ratio
is between equals, and our layers agree with PyTorch's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recipe

from cfg_jax.models import network, weights

try:
    import torch

    from benchmarks import torch_adm
except ModuleNotFoundError:
    torch = None
    pytest.skip(
        'the PyTorch parity tests need PyTorch: pip install -e ".[parity]"',
        allow_module_level=True,
    )

SMALL = {
    "image_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "num_classes": 5,
    "channels": 32,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (8, 4),
    "head_channels": 16,
}
VARIANTS = {
    "adm": {},
    "legacy order, other head width": {"head_order": "legacy", "head_channels": 32},
    "plain resampling, added embedding": {"resblock_updown": False, "scale_shift_norm": False},
    "below 32 channels": {"channels": 16, "channel_mult": (1, 1.5), "head_channels": 8},
}


def random_like(shapes, seed):
    rng = np.random.default_rng(seed)

    def one(p):
        offset = 1.0 if len(p.shape) == 1 else 0.0
        scale = 0.1 if len(p.shape) == 1 else np.prod(p.shape[:-1]) ** -0.5
        return (offset + scale * rng.standard_normal(p.shape)).astype(np.float32)

    return jax.tree.map(one, shapes)


@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_and_gradients_are_pytorchs(variant):
    fields = SMALL | VARIANTS[variant]
    build = network.make("unet", dropout=0.0, **fields)
    params = random_like(network.shapes(build), 0)
    ours = network.network(build, sinusoid_input=lambda s: s)
    theirs = torch_adm.UNet(**fields)
    torch_adm.load(theirs, weights.flatten(params))

    rng = np.random.default_rng(1)
    z, target = rng.standard_normal((2, 3, 8, 8, 3)).astype(np.float32)
    s = np.array([3.0, 400.0, 990.0], np.float32)
    label = np.array([0, 4, 5], np.int32)  # the last is the null label

    def loss(params, z):
        out = ours.apply(params, z, s, {"label": label})
        return jnp.mean((out - target) ** 2), out

    gradient = jax.jit(
        jax.value_and_grad(loss, (0, 1), has_aux=True), compiler_options=recipe.QUICK
    )
    (_, out), (by_params, by_z) = gradient(params, z)
    z_theirs = torch.from_numpy(z).permute(0, 3, 1, 2).requires_grad_()
    out_theirs = theirs(z_theirs, torch.from_numpy(s), torch.from_numpy(label).long())
    torch.mean((out_theirs - torch.from_numpy(target).permute(0, 3, 1, 2)) ** 2).backward()

    def near(mine, other, floor=0.0):
        other = other.detach().numpy()
        assert np.abs(mine - other).max() <= 2e-5 * max(floor, np.abs(other).max())

    assert np.abs(out).max() > 0.5  # else agreement would mean little
    near(out, out_theirs.permute(0, 2, 3, 1))
    near(by_z, z_theirs.grad.permute(0, 2, 3, 1))
    named = dict(theirs.named_parameters())
    # A bias before a norm of groups of one channel has a gradient of zero, plus rounding.
    floor = 0.1 * max(np.abs(p.grad.numpy()).max() for p in named.values())
    for path, gradient in weights.flatten(by_params).items():
        name, array = torch_adm.translated(path, np.asarray(gradient))
        near(array, named.pop(name).grad, floor)
    assert not named


def test_every_parameter_must_have_its_place():
    build = network.make("unet", **SMALL)
    flat = weights.flatten(random_like(network.shapes(build), 0))
    flat.pop("time/out/bias")
    with pytest.raises(RuntimeError, match=r"Missing key.*time\.out\.bias"):
        torch_adm.load(torch_adm.UNet(**SMALL), flat)
