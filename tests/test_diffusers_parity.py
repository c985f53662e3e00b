"""The arithmetic of rescaling and dynamic thresholding is that of diffusers, on random tensors.

Where the definitions differ: diffusers rescales what the network says (eps or the velocity), ours
the clean image that follows from it; and its default sample_max_value of 1 turns its dynamic
threshold into the static one, so that here it is set beyond any value.
"""

import jax
import numpy as np
import pytest

from cfg_jax.diffusion import corrections, directions, guidance
from cfg_jax.types import Prediction

try:
    import torch
    from diffusers import DDIMScheduler
    from diffusers.guiders import (
        adaptive_projected_guidance,
        classifier_free_zero_star_guidance,
        guider_utils,
    )
except ModuleNotFoundError:
    pytest.skip(
        'the parity tests of rules need diffusers and PyTorch: pip install -e ".[parity]"',
        allow_module_level=True,
    )


def tensors(seed, spread=1.0):
    """Two of a batch of four, alike but not equal, in float32."""
    rng = np.random.default_rng(seed)
    one = rng.standard_normal((4, 3, 8, 8)).astype(np.float32) * spread
    return one, (one + 0.3 * rng.standard_normal(one.shape)).astype(np.float32)


def near(ours, theirs):
    theirs = theirs.numpy()
    assert np.linalg.norm(ours - theirs) < 1e-5 * np.linalg.norm(theirs)


@pytest.mark.parametrize("phi", [0.0, 0.7, 1.0])
def test_rescaling(phi):
    guided, positive = tensors(0, 3.0)
    theirs = guider_utils.rescale_noise_cfg(
        torch.from_numpy(guided), torch.from_numpy(positive), phi
    )
    near(np.asarray(corrections.rescale(guided, positive, phi)), theirs)


@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.995, 1.0])
@pytest.mark.parametrize("spread", [0.2, 1.0, 5.0])
def test_dynamic_thresholding(quantile, spread):
    x, _ = tensors(1, spread)
    scheduler = DDIMScheduler(
        thresholding=True, dynamic_thresholding_ratio=quantile, sample_max_value=1e9
    )
    theirs = scheduler._threshold_sample(torch.from_numpy(x))
    near(np.asarray(corrections.dynamic_threshold(x, quantile)), theirs)


def x_of(rule, with_c, without):
    """x~ of a rule, given the two x, at a level that plays no part in it."""

    def says(x):
        return lambda z, lam: Prediction(x, z)

    return np.asarray(jax.jit(lambda z: rule(says(with_c), says(without))(z, 0.3).x)(with_c))


@pytest.mark.parametrize("eta, bound", [(0.0, None), (0.3, 1.5), (1.0, 3.0)])
def test_apg_without_momentum(eta, bound):
    """Theirs starts from the conditional prediction, and weighs by 1 less than the scale."""
    with_c, without = tensors(2)
    theirs = adaptive_projected_guidance.normalized_guidance(
        torch.from_numpy(with_c),
        torch.from_numpy(without),
        2.5,
        eta=eta,
        norm_threshold=bound or 0.0,
        use_original_formulation=True,
    )
    near(x_of(directions.AdaptiveProjected(2.5, eta, bound), with_c, without), theirs)


def test_the_scale_of_zero_star():
    """Theirs adds 1e-8 to the square that it divides by: no difference to a float32."""
    with_c, without = (a.reshape(4, -1) for a in tensors(3))
    theirs = classifier_free_zero_star_guidance.cfg_zero_star_scale(
        torch.from_numpy(with_c), torch.from_numpy(without)
    )
    near(np.asarray(directions.scale_of(with_c, without)), theirs)


def test_a_wrong_rule_is_not_near():
    """The bound of this page can fail: eq. (6) is not APG."""
    with_c, without = tensors(2)
    theirs = torch.tensor(x_of(directions.AdaptiveProjected(2.5), with_c, without))
    with pytest.raises(AssertionError):
        near(x_of(guidance.ClassifierFree(2.5), with_c, without), theirs)
