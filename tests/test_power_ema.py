"""Averages by power functions: their weights, their lengths, and lengths made after training."""

import numpy as np
import pytest
from scipy import integrate

from cfg_jax import power_ema, reconstruct, train_step
from cfg_jax.models import weights
from cfg_jax.types import UsageError


def weights_by_hand(sigma, steps):
    """What parameters 1 to `steps` weigh in the average at the last of them."""
    i = np.arange(1, steps + 1, dtype=np.float64)
    power = power_ema.exponent(sigma) + 1
    return (i / steps) ** power - ((i - 1) / steps) ** power


@pytest.mark.parametrize("sigma", [0.01, 0.05, 0.1, 0.2, 0.28])
def test_a_length_is_the_standard_deviation_of_its_profile(sigma):
    gamma = power_ema.exponent(sigma)
    moment = [
        integrate.quad(lambda t, k=k: (gamma + 1) * t ** (gamma + k), 0, 1)[0] for k in range(3)
    ]
    np.testing.assert_allclose(moment[0], 1, rtol=1e-6)
    np.testing.assert_allclose(np.sqrt(moment[2] - moment[1] ** 2), sigma, rtol=1e-5)


def test_products_are_the_integrals_of_the_profiles():
    profiles = [(100, 0.05), (250, 0.05), (250, 0.2), (80, 0.1)]

    def density(t, step, sigma):
        gamma = power_ema.exponent(sigma)
        return (gamma + 1) * (t / step) ** gamma / step * (t <= step)

    for a, row in zip(profiles, power_ema.products(profiles, profiles), strict=True):
        for b, found in zip(profiles, row, strict=True):
            end = min(a[0], b[0])
            wanted, _ = integrate.quad(lambda t, a=a, b=b: density(t, *a) * density(t, *b), 0, end)
            np.testing.assert_allclose(found, wanted, rtol=1e-6)


@pytest.mark.parametrize("sigma", [0.02, 0.1, 0.25])
def test_what_is_tracked_is_the_weighted_sum_of_all_parameters(sigma):
    path = np.random.default_rng(0).standard_normal((300, 4)).astype(np.float32)
    average = {"p": np.full(4, 9, np.float32)}  # whatever it began with
    for step, params in enumerate(path):
        average = power_ema.track(sigma, average, {"p": params}, np.int32(step))
    np.testing.assert_allclose(average["p"], weights_by_hand(sigma, 300) @ path, atol=2e-6)


@pytest.fixture(scope="module")
def run():
    """A path of parameters that falls and trembles, and what was kept of its averages."""
    rng = np.random.default_rng(1)
    steps = np.arange(1, 2001)[:, None]
    path = rng.standard_normal(8) * np.exp(-steps / rng.uniform(100, 900, 8))
    path = 1 + path + 0.1 * rng.standard_normal((2000, 8))
    kept = {
        (at, sigma): weights_by_hand(sigma, at) @ path[:at]
        for at in range(100, 2001, 100)
        for sigma in (0.05, 0.1)
    }
    return path, kept


@pytest.mark.parametrize(
    "sigma, at, within",
    [(0.05, 2000, 1e-9), (0.1, 1500, 1e-9), (0.07, 2000, 1e-3), (0.15, 2000, 1e-3)],
)
def test_other_lengths_are_made_after_training(run, sigma, at, within):
    """Those that were kept come back; others are those that would have been, had they been."""
    path, kept = run
    kept = {profile: average for profile, average in kept.items() if profile[0] <= at}
    factors, error = power_ema.coefficients(list(kept), (at, sigma))
    made = factors @ np.array(list(kept.values()))
    direct = weights_by_hand(sigma, at) @ path[:at]
    assert np.linalg.norm(made - direct) / np.linalg.norm(direct) < within
    assert factors.sum() == pytest.approx(1)
    assert error < max(30 * within, 1e-6)


def test_an_average_is_made_of_what_was_kept_until_its_step(run, tmp_path):
    path, kept = run
    (tmp_path / "ema").mkdir()
    for (at, sigma), average in kept.items():
        params = {"p": np.float32(average if at <= 1500 else np.full(8, np.nan))}
        file = tmp_path / "ema" / f"{at:08d}_{sigma!r}.safetensors"
        weights.save_safetensors(file, params, {"step": str(at)})
    params, step, error = reconstruct.make(str(tmp_path), 0.07, 1500)
    np.testing.assert_allclose(params["p"], weights_by_hand(0.07, 1500) @ path[:1500], rtol=1e-3)
    assert step == 1500 and error < 0.03
    last, step, _ = reconstruct.make(str(tmp_path), 0.07)
    assert step == 2000 and np.isnan(last["p"]).all()


@pytest.mark.parametrize("sigma, least", [(0.001, 0.8), (0.01, 0.2), (0.03, 0.02)])
def test_the_error_says_what_cannot_be_made(run, sigma, least):
    """A profile shorter than any that was kept; its error is that of the closest sum."""
    _, kept = run
    factors, error = power_ema.coefficients(list(kept), (2000, sigma))
    by_hand = sum(
        f * np.pad(weights_by_hand(s, t), (0, 2000 - t)) for f, (t, s) in zip(factors, kept)
    )
    wanted = weights_by_hand(sigma, 2000)
    assert error > least
    assert error == pytest.approx(
        np.linalg.norm(by_hand - wanted) / np.linalg.norm(wanted), rel=0.01
    )


@pytest.mark.parametrize("sigma", [0, -0.1, 0.289, 1.0, float("nan")])
def test_a_length_out_of_range_is_told(sigma):
    with pytest.raises(UsageError, match="relative length"):
        power_ema.check_length("--length", sigma)


@pytest.mark.parametrize(
    "fields, told",
    [
        ({"lengths": (0.1, 0.1)}, "must differ"),
        ({"lengths": (0.1, 0.5)}, "ema.lengths=0.5"),
        ({"lengths": (0.1,), "snapshot_every": 0}, "snapshot_every=0"),
    ],
)
def test_what_cannot_be_kept_is_told(fields, told):
    with pytest.raises(UsageError, match=told):
        train_step.Ema(**fields)
