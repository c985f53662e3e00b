"""The parts of `cfg_jax.diffusion`, each against float64 NumPy, an identity, or a count."""

import dataclasses
import functools
import inspect
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from scipy import stats

from cfg_jax.diffusion import (
    clocks,
    corrections,
    denoiser,
    directions,
    edm,
    guidance,
    logsnr,
    losses,
    mixture,
    multistep,
    samplers,
    schedules,
    strengths,
    weightings,
)
from cfg_jax.types import Network, Path, Prediction, UsageError

LEVELS = np.array([-20.0, -19.9, -13.0, -5.0, -1.0, 0.0, 0.3, 4.0, 11.0, 19.9, 20.0])
# Every pair lam <= lam_next of LEVELS, near and far.
PAIRS = np.array(list(itertools.combinations_with_replacement(LEVELS, 2)))
STEPS = PAIRS[PAIRS[:, 0] < PAIRS[:, 1]]


# Readings that a loss trains; the other is of published weights.
TRAINED = [name for name in logsnr.READINGS if name != "eps_and_v"]


def draws(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def forward_variance(lam, lam_next):
    """Eq. (2) in NumPy: the variance of z_lam given z_next, for lam < lam_next."""
    return -np.expm1(lam - lam_next) * oracle.sigma(lam) ** 2


def posterior(lam, lam_next):
    """Eq. (3) not by its formula but by conditioning: the weights on z and on x, and the variance.

    Given x, z_next and z are jointly normal: z_next = alpha' x + sigma' e, z = (alpha / alpha')
    z_next + noise of eq. (2). The information of the two about z_next adds up.
    """
    ratio = oracle.alpha(lam) / oracle.alpha(lam_next)
    prior, likelihood = 1 / oracle.sigma(lam_next) ** 2, ratio**2 / forward_variance(lam, lam_next)
    variance = 1 / (prior + likelihood)
    on_z = variance * ratio / forward_variance(lam, lam_next)
    return on_z, variance * prior * oracle.alpha(lam_next), variance


# logsnr


def test_alpha_and_sigma_share_a_unit_variance_at_every_level():
    lam = jnp.linspace(-20, 20, 1001)
    np.testing.assert_allclose(logsnr.alpha(lam) ** 2 + logsnr.sigma(lam) ** 2, 1, rtol=5e-7)


def test_lambda_is_the_log_signal_to_noise_ratio():
    lam = jnp.linspace(-20, 20, 101)
    ratio = 2 * (jnp.log(logsnr.alpha(lam)) - jnp.log(logsnr.sigma(lam)))
    np.testing.assert_allclose(ratio, lam, atol=1e-5)


@pytest.mark.parametrize("name", ["alpha", "sigma"])
def test_the_shares_hold_in_float32_out_to_the_ends(name):
    """A relative bound, as alpha is 4.5e-5 at lambda = -20 and sigma at 20."""
    ours = getattr(logsnr, name)(jnp.asarray(LEVELS, jnp.float32))
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, getattr(oracle, name)(np.float32(LEVELS)), rtol=3e-6)


def test_the_posterior_is_gaussian_conditioning(float64):
    """Eq. (3) for every pair of levels: the weights on z and x, and the variance."""
    lam, lam_next = STEPS.T
    on_z, on_x, variance = posterior(lam, lam_next)
    one, zero = np.ones((len(STEPS), 1)), np.zeros((len(STEPS), 1))
    mean = functools.partial(
        logsnr.posterior_mean, lam=jnp.array(lam), lam_next=jnp.array(lam_next)
    )
    np.testing.assert_allclose(mean(one, zero)[:, 0], on_z, rtol=1e-10)
    np.testing.assert_allclose(mean(zero, one)[:, 0], on_x, rtol=1e-10)
    np.testing.assert_allclose(logsnr.posterior_variance(lam, lam_next), variance, rtol=1e-10)
    np.testing.assert_allclose(
        logsnr.forward_variance(lam, lam_next), forward_variance(lam, lam_next), rtol=1e-10
    )


def test_the_posterior_holds_in_float32_out_to_the_ends():
    """Each coefficient to 2e-5 relative of float64, though neither alpha' / alpha nor sigma is near
    1.
    """
    lam, lam_next = (jnp.asarray(side, jnp.float32) for side in STEPS.T)
    exact = np.float64(lam), np.float64(lam_next)
    on_z, on_x, variance = posterior(*exact)
    one, zero = jnp.ones((len(STEPS), 1)), jnp.zeros((len(STEPS), 1))
    bound = {"rtol": 2e-5}
    mean = functools.partial(logsnr.posterior_mean, lam=lam, lam_next=lam_next)
    np.testing.assert_allclose(mean(one, zero)[:, 0], on_z, **bound)
    np.testing.assert_allclose(mean(zero, one)[:, 0], on_x, **bound)
    np.testing.assert_allclose(logsnr.posterior_variance(lam, lam_next), variance, **bound)
    forward = forward_variance(*exact)
    np.testing.assert_allclose(logsnr.forward_variance(lam, lam_next), forward, **bound)
    for v in (0, 0.3, 1):
        std = np.sqrt(variance ** (1 - v) * forward**v)
        np.testing.assert_allclose(logsnr.reverse_std(lam, lam_next, v), std, **bound)


def test_diffusing_further_keeps_the_marginal(float64):
    """Eq. (2) after eq. (1) is eq. (1): what carries z_next to z must give z its own variance."""
    lam, lam_next = STEPS.T
    ratio = logsnr.alpha(lam) / logsnr.alpha(lam_next)
    variance = ratio**2 * logsnr.sigma(lam_next) ** 2 + logsnr.forward_variance(lam, lam_next)
    np.testing.assert_allclose(variance, oracle.sigma(lam) ** 2, rtol=1e-12)


@pytest.mark.parametrize("v, name", [(0, "posterior_variance"), (1, "forward_variance")])
def test_the_reverse_std_is_eq_3_at_v_0_and_eq_2_at_v_1(v, name):
    lam, lam_next = (jnp.asarray(side, jnp.float32) for side in PAIRS.T)
    std = logsnr.reverse_std(lam, lam_next, v)
    np.testing.assert_allclose(std, jnp.sqrt(getattr(logsnr, name)(lam, lam_next)), rtol=5e-6)


def test_the_reverse_std_is_a_line_in_v_on_a_log_scale(float64):
    low, middle, high = (np.log(logsnr.reverse_std(*STEPS.T, v)) for v in (0.0, 0.3, 1.0))
    np.testing.assert_allclose(middle, 0.7 * low + 0.3 * high, atol=1e-12)
    assert np.all(low < high)


def test_a_step_of_no_length_adds_nothing():
    """The last level is followed by itself: z stays, with no noise and no NaN."""
    lam = jnp.asarray(LEVELS, jnp.float32)
    z, x = draws(len(LEVELS), 3), draws(len(LEVELS), 3, seed=1)
    np.testing.assert_allclose(logsnr.posterior_mean(z, x, lam, lam), z, rtol=1e-6)
    assert np.all(np.asarray(logsnr.reverse_std(lam, lam, 0.3)) == 0)


@pytest.mark.parametrize("name", TRAINED)
def test_reading_a_target_gives_back_x_and_eps(name, float64):
    """Round trip, with one lambda an image, and the pair keeps z = alpha x + sigma eps."""
    x, eps = draws(9, 4, 4, 3, dtype=np.float64), draws(9, 4, 4, 3, seed=1, dtype=np.float64)
    reading, lam = logsnr.READINGS[name], np.linspace(-20, 20, 9)
    a, s = (side(lam).reshape(9, 1, 1, 1) for side in (oracle.alpha, oracle.sigma))

    @jax.jit
    def there_and_back(x, eps, lam, said):
        z = logsnr.diffuse(x, eps, lam)
        return z, reading.read(z, reading.target(x, eps, lam), lam), reading.read(z, said, lam)

    z, back, read = there_and_back(x, eps, lam, draws(9, 4, 4, 3, seed=2, dtype=np.float64))
    np.testing.assert_allclose(z, a * x + s * eps, rtol=1e-12)
    np.testing.assert_allclose(back.x, x, atol=1e-10)
    np.testing.assert_allclose(back.eps, eps, atol=1e-10)
    # Whatever the network says, what is read of it is a pair.
    np.testing.assert_allclose(a * read.x + s * read.eps, z, rtol=1e-9, atol=1e-10)


def test_the_velocity_is_how_z_turns():
    """z = cos(phi) x + sin(phi) eps turns with dz / dphi = alpha eps - sigma x."""
    x, eps = draws(5, 2), draws(5, 2, seed=1)
    target = logsnr.VELOCITY.target(x, eps, jnp.float32(0.7))
    phi = np.arctan(np.exp(-0.35))
    np.testing.assert_allclose(target, np.cos(phi) * eps - np.sin(phi) * x, rtol=1e-5, atol=1e-6)


# schedules


@pytest.mark.parametrize("ends", [(-20.0, 20.0), (-10.0, 5.0), (-6.0, 14.0)])
@pytest.mark.parametrize("name", ["cosine", "uniform"])
def test_a_schedule_falls_from_its_maximum_to_its_minimum(name, ends):
    """Both ends exactly, in float32; in between strictly down."""
    schedule = schedules.SCHEDULES[name](*ends)
    lam = np.asarray(schedule(jnp.linspace(0, 1, 2001)))
    assert (lam[-1], lam[0]) == ends
    assert np.all(np.diff(lam) < 0)


def test_the_cosine_schedule_holds_in_float32_near_both_ends():
    """Against -2 log tan(a u + b) in float64, for the same float32 u: to 1e-5 everywhere.

    Done in float32 as it stands, the formula is wrong by 0.003 at u = 1 - 1e-6.
    """
    near = np.geomspace(1e-7, 0.5, 200)
    u = np.float32(np.concatenate([[0], near, 1 - near, [1]]))
    b = np.arctan(np.exp(-10.0))
    angle = (np.arctan(np.exp(10.0)) - b) * np.float64(u) + b
    np.testing.assert_allclose(
        schedules.Cosine()(jnp.asarray(u)), -2 * np.log(np.tan(angle)), atol=1e-5
    )


def test_the_cosine_schedule_draws_a_hyperbolic_secant():
    """p(lam) = sech(lam / 2) / (4 a): the schedule is the inverse of its distribution function, and
    its quantiles are those of the paper's setting.
    """
    u = jnp.linspace(0, 1, 1001)
    lam = np.float64(schedules.Cosine()(u))
    a = 1.570706
    np.testing.assert_allclose(2 * a, np.pi - 4 * np.arctan(np.exp(-10.0)), rtol=1e-6)
    share_below = (np.arctan(np.sinh(lam / 2)) - np.arctan(np.sinh(-10.0))) / (2 * a)
    np.testing.assert_allclose(share_below, 1 - np.float64(u), atol=2e-6)
    quantiles = schedules.Cosine()(1 - jnp.array([0.01, 0.05, 0.25, 0.75, 0.95, 0.99]))
    np.testing.assert_allclose(quantiles, [-8.31, -5.09, -1.76, 1.76, 5.09, 8.31], atol=0.01)


def test_the_uniform_schedule_is_uniform():
    lam = schedules.Uniform(-10, 5)(jnp.linspace(0, 1, 16))
    np.testing.assert_allclose(lam, np.linspace(5, -10, 16), atol=1e-5)


@pytest.mark.parametrize(
    "steps, first", [(256, [-10.17, -8.79, -7.98]), (128, [-8.78, -7.40]), (1024, [-12.90, -11.54])]
)
def test_the_papers_grid_has_its_known_levels_at_both_ends(steps, first):
    """Uniform u with both ends, as in Algorithm 2; the levels are known."""
    lams = np.asarray(schedules.uniform_u(schedules.Cosine(), steps))
    assert lams.shape == (steps,)
    assert (lams[0], lams[-1]) == (-20, 20)
    assert np.all(np.diff(lams) > 0)
    np.testing.assert_allclose(lams[1 : 1 + len(first)], first, atol=0.006)
    np.testing.assert_allclose(lams, -lams[::-1], atol=2e-3)


def test_the_grid_uniform_in_lambda_is_so():
    lams = schedules.uniform_lambda(schedules.Cosine(), 9)
    np.testing.assert_allclose(lams, np.linspace(-20, 20, 9), atol=1e-5)
    assert (lams[0], lams[-1]) == (-20, 20)


def test_the_edm_grid_is_eq_5_of_karras():
    """Its sigmas, level by level, for their 18; e^(-lam / 2) is what they call sigma."""
    i = np.arange(18)
    sigmas = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    lams = schedules.edm(schedules.Cosine(), 18)
    np.testing.assert_allclose(np.exp(-0.5 * np.float64(lams)), sigmas, rtol=2e-5)
    assert np.all(np.diff(lams) > 0)


@pytest.mark.parametrize("betas", ["linear", "cosine"])
def test_the_edm_grid_ends_where_the_levels_of_a_network_end(betas):
    levels = schedules.Discrete(betas).levels()
    lams = schedules.edm(schedules.Discrete(betas), 12)
    ends = max(min(levels), -2 * np.log(80)), min(max(levels), -2 * np.log(0.002))
    np.testing.assert_allclose([lams[0], lams[-1]], ends, rtol=1e-5)


@pytest.mark.parametrize(
    "name, options, level",
    [
        ("uniform_u", {}, -20),
        ("uniform_lambda", {}, -20),
        ("edm", {"sigma_max": np.exp(4.5)}, -9),
        ("explicit", {"lams": (3.0,)}, 3),
    ],
)
def test_a_grid_of_one_step_is_the_noisiest_level(name, options, level):
    grid = schedules.GRIDS[name](schedules.Cosine(), 1, **options)
    np.testing.assert_allclose(grid, [level], rtol=1e-6)


def test_explicit_levels_are_taken_as_they_are():
    lams = (-7.0, 0.1, 4.0)
    np.testing.assert_array_equal(
        schedules.explicit(schedules.Cosine(), 3, lams=lams), np.float32(lams)
    )


def test_the_sinusoid_of_the_cosine_schedule_is_told_1000_u():
    u = jnp.linspace(0, 1, 101)
    told = schedules.sinusoid_input(schedules.Cosine()(u))
    np.testing.assert_allclose(told, 1000 * u, atol=0.03)
    np.testing.assert_array_equal(
        schedules.sinusoid_input(jnp.array([-99.0, 99.0])),
        schedules.sinusoid_input(jnp.array([-20.0, 20.0])),
    )


def test_discrete_levels_are_the_products_of_1_minus_beta():
    """In float64 NumPy; `sinusoid_input` is the way back, and lies between the levels between."""
    t = np.arange(1000)
    share = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    betas = {
        "linear": np.linspace(1e-4, 0.02, 1000),
        "cosine": np.minimum(1 - share[1:] / share[:-1], 0.999),
    }
    for name, beta in betas.items():
        alpha_sq, schedule = np.cumprod(1 - beta), schedules.Discrete(name)
        lam = np.log(alpha_sq / (1 - alpha_sq))
        np.testing.assert_allclose(schedule(t / np.float32(999)), lam, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(schedule.sinusoid_input(jnp.float32(lam)), t, atol=2e-3)
        half = schedule.sinusoid_input(jnp.float32((lam[1:] + lam[:-1]) / 2))
        np.testing.assert_allclose(half, t[1:] - 0.5, atol=2e-3)
        # 250 respaced steps of the published code: every 999 / 249, rounded.
        respaced = lam[np.round(np.arange(250) * 999 / 249).astype(int)][::-1]
        np.testing.assert_allclose(
            schedules.uniform_u(schedule, 250), respaced, rtol=1e-5, atol=1e-5
        )
    with pytest.raises(UsageError, match="betas='sigmoid'"):
        schedules.Discrete("sigmoid")


# denoiser


def linear(init=2.0):
    """A network that says a z + b lam + c label: all its inputs show in its output."""

    def apply(params, z, lam, cond, key=None):
        assert lam.shape == z.shape[:1]
        label = logsnr.expand(jnp.asarray(cond.get("label", 0), z.dtype), z)
        return params["a"] * z + params["b"] * logsnr.expand(lam, z) + params["c"] * label

    weights = {"a": jnp.float32(init), "b": jnp.float32(0.1), "c": jnp.float32(0.5)}
    return Network(lambda key: weights, apply)


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("lam", [0.7, np.linspace(-2, 2, 5)])
def test_a_denoiser_reads_the_network_at_each_images_level(name, lam):
    network, lam = linear(), jnp.asarray(lam, jnp.float32)
    z, label = draws(5, 2, 2, 1), np.arange(5)
    params = network.init(jax.random.key(0))
    bound = denoiser.denoiser(network, params, {"label": label}, reading=logsnr.READINGS[name])
    x, eps = (np.float64(side) for side in bound(z, lam))
    level = np.broadcast_to(np.float64(lam), 5).reshape(5, 1, 1, 1)
    a, s = oracle.alpha(level), oracle.sigma(level)
    said = 2 * z + 0.1 * level + 0.5 * label.reshape(5, 1, 1, 1)
    expected = {"eps": eps, "x": x, "velocity": a * eps - s * x}[name]
    np.testing.assert_allclose(expected, said, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(a * x + s * eps, z, rtol=1e-4, atol=1e-4)


def test_clipping_bounds_x_and_keeps_the_pair():
    """x is cut to the range and eps follows from it, however wild the denoiser's own pair is."""
    z, lam = 3 * draws(64, 3), np.float32(np.repeat([-20, -3, 0.5, 2], 16))

    def wild(z, lam):
        return Prediction(4 * z, jnp.full_like(z, jnp.nan))

    x, eps = jax.jit(denoiser.clipped(wild, -0.5, 0.25))(z, lam)
    np.testing.assert_array_equal(x, np.clip(4 * z, -0.5, 0.25))
    a, s = oracle.alpha(lam)[:, None], oracle.sigma(lam)[:, None]
    np.testing.assert_allclose(a * np.float64(x) + s * np.float64(eps), z, rtol=1e-5, atol=1e-5)


def test_clipping_leaves_a_denoiser_inside_the_range_alone():
    inner = mixture.Mixture(jnp.zeros((1, 3)), jnp.array([0.1]), jnp.zeros(1)).denoiser()
    z, lam = draws(64, 3), jnp.float32(0.5)
    free, tied = jax.jit(lambda: (inner(z, lam), denoiser.clipped(inner)(z, lam)))()
    np.testing.assert_allclose(tied.x, free.x, rtol=1e-6)
    np.testing.assert_allclose(tied.eps, free.eps, rtol=1e-4, atol=1e-5)


# guidance


def pair_of_denoisers():
    """Two denoisers that differ at every z, each with z = alpha x + sigma eps."""
    one = mixture.Mixture(jnp.array([[0.5, -0.2]]), jnp.array([0.3]), jnp.zeros(1))
    two = mixture.Mixture(jnp.array([[-0.4, 0.1]]), jnp.array([0.8]), jnp.zeros(1))
    return one.denoiser(), two.denoiser()


@jax.jit
def each_and_guided(w, z, lam):
    """The two Predictions of `pair_of_denoisers`, and theirs by eq. (6)."""
    conditional, unconditional = pair_of_denoisers()
    guided = guidance.ClassifierFree(w)(conditional, unconditional)
    return conditional(z, lam), unconditional(z, lam), guided(z, lam)


@pytest.mark.parametrize("w", [-1.0, 0.0, 0.3, 1.0, 4.0])
def test_classifier_free_guidance_is_eq_6_in_eps_and_in_x(w, float64):
    """Both sides of the Prediction are mixed with (1 + w) and -w, so that the pair is kept."""
    z, lam = draws(7, 2, dtype=np.float64), np.linspace(-8, 8, 7)
    with_c, without, (x, eps) = each_and_guided(w, z, lam)
    np.testing.assert_allclose(eps, (1 + w) * with_c.eps - w * without.eps, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(x, (1 + w) * with_c.x - w * without.x, rtol=1e-12, atol=1e-12)
    a, s = oracle.alpha(lam)[:, None], oracle.sigma(lam)[:, None]
    np.testing.assert_allclose(a * x + s * eps, z, rtol=1e-9)


@pytest.mark.parametrize("w, said", [(0.0, 1.0), (-1.0, 2.0)])
def test_w_0_is_the_conditional_and_w_minus_1_the_unconditional_whatever_the_other_says(w, said):
    """Not 0 times the other: a NaN or an infinity of a pass without weight does not enter."""

    def says(value):
        return lambda z, lam: Prediction(jnp.full_like(z, value), jnp.full_like(z, value))

    both = (says(1.0), says(np.nan)) if w == 0 else (says(np.inf), says(2.0))
    guided = guidance.ClassifierFree(w)(*both)(draws(7, 2), jnp.float32(0.4))
    assert np.all(guided.x == said) and np.all(guided.eps == said)


# A student's w acts in its network.
RULES = {name: rule for name, rule in guidance.GUIDANCE.items() if name != "distilled"}
WITH_W_INSIDE = [n for n, rule in RULES.items() if "rule" in inspect.signature(rule).parameters]


def rule_of(name, w):
    """The rule at the strength w; those around a rule, around the paper's."""
    return RULES[name](guidance.ClassifierFree(w) if name in WITH_W_INSIDE else w)


def second_argument(name):
    return {"reference": pair_of_denoisers()[1], "classifier": log_prob_of_a_slope}.get(
        rule_of(name, 0.0).second
    )


def strengths_of(name):
    """Some strengths that a rule takes, with 0 and, where it does, -1 among them."""
    return {"scaled_noise": (-0.9, 0.0, 0.5), "cfg_plus_plus": (-1.0, -0.4, 0.0)}.get(
        name, (-1.0, 0.0, 0.5)
    )


def log_prob_of_a_slope(z, lam):
    return -jnp.logaddexp(0.0, -(z @ jnp.array([1.0, -2.0], z.dtype)))


@functools.partial(jax.jit, static_argnames="name")
def guide(w, z, lam, *, name):
    return rule_of(name, w)(pair_of_denoisers()[0], second_argument(name))(z, lam)


@pytest.mark.parametrize("name", [n for n in RULES if n not in WITH_W_INSIDE])
def test_a_w_of_each_images_own_is_its_w_alone(name, float64):
    """w [B] gives image i what the number w[i] gives, also where w is 0 or -1."""
    z, lam = draws(5, 2, dtype=np.float64), 0.4
    w = np.array([-1.0, 0.0, 0.5, 1.0, 4.0])
    together = guide(w, z, lam, name=name)
    for i in range(5):
        alone = guide(float(w[i]), z, lam, name=name)
        np.testing.assert_allclose(together.x[i], alone.x[i], rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(together.eps[i], alone.eps[i], rtol=1e-10, atol=1e-12)


def test_classifier_guidance_moves_eps_by_w_sigma_times_the_gradient(float64):
    """eps~ = eps - w sigma grad log p(c|z), the gradient here by hand; and the pair is kept."""
    z, lam, w = draws(6, 2, dtype=np.float64), np.linspace(-6, 6, 6), 1.5
    x, eps = guide(w, z, lam, name="classifier")
    slope = np.array([1.0, -2.0])
    gradient = (1 / (1 + np.exp(z @ slope)))[:, None] * slope
    a, s = oracle.alpha(lam)[:, None], oracle.sigma(lam)[:, None]
    before = guide(0.0, z, lam, name="classifier").eps
    np.testing.assert_allclose(eps, before - w * s * gradient, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(a * x + s * eps, z, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", RULES)
def test_twenty_strengths_compile_once(name):
    first, second = pair_of_denoisers()[0], second_argument(name)
    lams, traces = schedules.uniform_lambda(schedules.Cosine(), 5), []  # one is 0

    @jax.jit
    def sample(rule, sampler, z):
        traces.append(rule)
        noise = getattr(rule, "draws", lambda noise: noise)(lambda i: z)
        return sampler(rule(first, second), noise, lams).x

    low, high = (-0.9, -0.1) if name == "cfg_plus_plus" else (-0.9, 4)
    images = [
        sample(rule_of(name, w), samplers.Ancestral(0.3), draws(3, 2))
        for w in np.linspace(low, high, 20)
    ]
    assert sample._cache_size() == 1 and len(traces) == 1
    assert len({np.asarray(x).tobytes() for x in images}) == 20


class Counter:
    """Counts at run time how often what it wraps is executed, not how often it is traced."""

    def __init__(self, inner):
        self.inner, self.count = inner, 0

    def __call__(self, z, lam):
        jax.debug.callback(self._add)
        return self.inner(z, lam)

    def _add(self):
        self.count += 1


def counter_of_passes(first, second):
    """(rule, lams) -> how often a chain ran its first argument, and its second."""
    first, second = Counter(first), Counter(second)

    @jax.jit
    def sample(rule, z, lams):
        return samplers.Ancestral(0.3)(rule(first, second), lambda i: z, lams).x

    def count(rule, lams):
        first.count = second.count = 0
        jax.block_until_ready(sample(rule, draws(3, 2), lams))
        jax.effects_barrier()
        return first.count, second.count

    return count


def count_passes(rule, first, second, steps=12):
    lams = schedules.uniform_lambda(schedules.Cosine(), steps)
    return counter_of_passes(first, second)(rule, lams)


@pytest.mark.parametrize(
    "w, passes",
    [
        (0.0, (12, 0)),
        (-1.0, (0, 12)),
        (1.0, (12, 12)),
        (np.zeros(3, np.float32), (12, 12)),
    ],
)
def test_only_the_passes_that_w_needs_are_run(w, passes):
    """T evaluations of each denoiser in T levels, none of one that has no weight; w is traced.

    With one w an image both run, whatever they are.
    """
    assert count_passes(guidance.ClassifierFree(w), *pair_of_denoisers()) == passes


@pytest.mark.parametrize("w, passes", [(0.0, (12, 0)), (1.0, (12, 12))])
def test_the_classifier_runs_only_where_it_has_weight(w, passes):
    rule = guidance.ClassifierGuidance(w)
    assert count_passes(rule, pair_of_denoisers()[0], log_prob_of_a_slope) == passes


@pytest.mark.parametrize("name", RULES)
def test_a_rule_says_how_many_passes_it_takes(name):
    """One program for all strengths: what is counted is what it runs, not what was compiled."""
    second = second_argument(name) or pair_of_denoisers()[1]
    count = counter_of_passes(pair_of_denoisers()[0], second)
    lams = schedules.uniform_lambda(schedules.Cosine(), 12)
    for w in (*strengths_of(name), np.zeros(3, np.float32)):
        rule = rule_of(name, w)
        assert count(rule, lams) == rule.passes(lams), w


def test_a_scaled_score_is_that_of_a_lower_temperature():
    """N(m, s^2) has the score -(z - alpha m) / (alpha^2 s^2 + sigma^2): times 1 + w, and a pair."""
    z, lam, w = draws(6, 2), jnp.float32(0.3), 0.7
    alone, _ = pair_of_denoisers()
    x, eps = guidance.ScaledScore(w)(alone)(z, lam)
    alpha, sigma = oracle.alpha(0.3), oracle.sigma(0.3)
    score = -(z - alpha * np.array([0.5, -0.2])) / (alpha**2 * 0.3**2 + sigma**2)
    np.testing.assert_allclose(-eps / sigma, (1 + w) * score, rtol=2e-5, atol=1e-5)
    np.testing.assert_allclose(alpha * x + sigma * eps, z, atol=1e-5)


def test_scaled_noise_leaves_the_start_and_divides_the_rest():
    def noise(i):
        return jnp.full((3, 2), i + 1.0)

    scaled = guidance.ScaledNoise(jnp.array([0.0, 1.0, 3.0])).draws(noise)
    np.testing.assert_allclose(scaled(0), noise(0))
    np.testing.assert_allclose(scaled(4), [[5.0] * 2, [2.5] * 2, [1.25] * 2])
    alone, _ = pair_of_denoisers()
    assert guidance.ScaledNoise(1.0)(alone, None) is alone


# A user's mistake


@pytest.mark.parametrize(
    "mistake, told",
    [
        (lambda: guidance.check_w(math.nan), "w=nan"),
        (lambda: guidance.check_w(math.inf), "w=inf"),
        (lambda: guidance.check_w(-1.5), "w=-1.5"),
        (lambda: losses.Denoising(p_uncond=-0.1), "p_uncond=-0.1"),
        (lambda: losses.Denoising(p_uncond=1.1), "p_uncond=1.1"),
        (lambda: losses.Denoising(p_uncond=math.nan), "p_uncond=nan"),
        (lambda: guidance.ScaledNoise(-1.0), "above -1"),
        (lambda: directions.PlusPlus(0.5), "w=0.5"),
        (lambda: directions.PlusPlus(-1.1), "w=-1.1"),
        (lambda: directions.AdaptiveProjected(1.0, eta=math.inf), "eta=inf"),
        (lambda: directions.AdaptiveProjected(1.0, bound=0.0), "bound=0.0"),
        (lambda: strengths.Interval(guidance.ClassifierFree(1.0), 2.0, 1.0), "low=2.0"),
        (lambda: strengths.Interval(guidance.ClassifierFree(1.0), math.nan, 1.0), "low=nan"),
        (lambda: strengths.Interval(guidance.ScaledNoise(1.0)), "ScaledNoise"),
        (lambda: strengths.power_cosine(guidance.ClassifierFree(1.0), 0.0), "power=0.0"),
        (lambda: corrections.Rescale(guidance.ClassifierFree(1.0), 1.1), "phi=1.1"),
        (lambda: corrections.DynamicThreshold(guidance.ClassifierFree(1.0), 99.5), "quantile=99.5"),
        (lambda: clocks.interval_of_steps(3, 2, np.arange(5.0)), "steps 3 to 2"),
        (lambda: losses.Denoising(weight="min_srn"), "weight='min_srn'"),
        (lambda: losses.Distillation(weight="snr"), "weight='snr'"),
        (lambda: losses.Distillation(2.0, 2.0), "w_min=2.0"),
        (lambda: losses.Distillation(-1.5), "w_min=-1.5"),
        (lambda: losses.Distillation(0.0, math.inf), "w_max=inf"),
        (lambda: losses.Distillation(0.0, math.nan), "w_max=nan"),
        (lambda: samplers.Ancestral(-0.1), "v=-0.1"),
        (lambda: samplers.Ancestral(2), "v=2"),
        (lambda: samplers.Ancestral(math.nan), "v=nan"),
        (lambda: schedules.Cosine(5.0, -5.0), "lambda_min=5.0"),
        (lambda: schedules.Cosine(1.0, 1.0), "lambda_min=1.0"),
        (lambda: schedules.Cosine(math.nan, 20.0), "lambda_min=nan"),
        (lambda: schedules.Uniform(-20.0, math.inf), "lambda_max=inf"),
        (lambda: schedules.Uniform(3, 2), "lambda_min=3"),
        (lambda: schedules.uniform_u(schedules.Cosine(), 0), "steps=0"),
        (lambda: schedules.uniform_lambda(schedules.Cosine(), -3), "steps=-3"),
        (lambda: schedules.edm(schedules.Cosine(), 0), "steps=0"),
        (lambda: schedules.edm(schedules.Cosine(), 4, sigma_min=0.0), "sigma_min=0.0"),
        (lambda: schedules.edm(schedules.Cosine(), 4, sigma_max=0.001), "sigma_max=0.001"),
        (lambda: schedules.edm(schedules.Cosine(), 4, rho=-1.0), "rho=-1.0"),
        (lambda: schedules.explicit(None, 3, lams=(0.0, 1.0)), "2 levels with steps=3"),
        (lambda: schedules.explicit(None, 2, lams=(1.0, 1.0)), "increase"),
        (lambda: schedules.explicit(None, 2, lams=(0.0, math.inf)), "finite"),
        (lambda: samplers.DDIM(1.5), "eta=1.5"),
        (lambda: multistep.DPMSolver2M(-0.5), "eta=-0.5"),
        (lambda: edm.Euler(churn=-1.0), "churn=-1.0"),
        (lambda: edm.Heun(churn_noise=math.nan), "churn_noise=nan"),
    ],
)
def test_a_value_out_of_range_is_told_in_one_line_with_what_was_given(mistake, told):
    with pytest.raises(UsageError, match=told) as error:
        mistake()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("w", [-1, 0, 0.1, 100.0])
def test_every_finite_w_from_minus_1_is_legal(w):
    assert guidance.check_w(w) == w


def test_the_ends_of_each_range_are_legal():
    assert losses.Denoising(p_uncond=0).p_uncond == 0
    assert losses.Denoising(p_uncond=1).p_uncond == 1
    assert [samplers.Ancestral(v).v for v in (0, 1)] == [0, 1]
    assert [samplers.DDIM(eta).eta for eta in (0, 1)] == [0, 1]


# losses

NULL = 10
NARROW = schedules.Uniform(-4.0, 4.0)  # where float32 z still tells what its eps was


def batch_of(size, shape=(4, 4, 3)):
    rng = np.random.default_rng(3)
    image = rng.uniform(-1, 1, (size, *shape)).astype(np.float32)
    return {"image": image, "label": rng.integers(0, NULL, size).astype(np.int32)}


def run(loss, network, batch, reading="eps", seed=1, frozen=None, **told):
    """(loss, metrics, gradient) in one jitted call, and what the network was shown, in float64."""
    keys = []

    @jax.jit
    def value_and_slope(params, batch, key):
        def value(params):
            shown = {}

            def apply(params, z, lam, cond, key=None):
                keys.append(key)
                shown.update(z=z, lam=lam, **cond)
                return network.apply(params, z, lam, cond, key)

            total, metrics = loss(
                params,
                frozen or {},
                batch,
                key,
                network=Network(network.init, apply),
                schedule=NARROW,
                reading=logsnr.READINGS[reading],
                null_label=NULL,
                **told,
            )
            return total, (metrics, shown)

        return jax.value_and_grad(value, has_aux=True)(params)

    params = network.init(jax.random.key(0))
    (total, (metrics, shown)), slope = value_and_slope(params, batch, jax.random.key(seed))
    assert len(keys) == 1, "one evaluation of the network a loss"
    assert keys[0] is not None, "training leaves dropout off"
    return total, metrics, slope, {name: np.float64(a) for name, a in shown.items()}


def noise_in(shown, image):
    """The eps in z = alpha x + sigma eps, and alpha and sigma, shaped to multiply images."""
    lam = shown["lam"].reshape(-1, 1, 1, 1)
    a, s = oracle.alpha(lam), oracle.sigma(lam)
    return (shown["z"] - a * image) / s, a, s


@pytest.mark.parametrize("name", TRAINED)
def test_the_loss_is_algorithm_1_written_by_hand(name):
    """From the z, lambda and labels that the network was shown: eps follows, then the target, the
    mean square and its gradient, in NumPy; and that eps was a unit normal draw.
    """
    batch = batch_of(512)
    total, metrics, slope, shown = run(losses.Denoising(0.2), linear(), batch, name)
    eps, a, s = noise_in(shown, batch["image"])
    assert stats.kstest(eps.ravel(), "norm").pvalue > 1e-3
    target = {"eps": eps, "x": batch["image"], "velocity": a * eps - s * batch["image"]}[name]
    lam, label = (shown[key].reshape(-1, 1, 1, 1) for key in ("lam", "label"))
    error = 2 * shown["z"] + 0.1 * lam + 0.5 * label - target
    np.testing.assert_allclose(total, np.mean(error**2), rtol=1e-5)
    for key, feature in {"a": shown["z"], "b": lam, "c": label}.items():
        np.testing.assert_allclose(slope[key], np.mean(2 * error * feature), rtol=1e-4)
    np.testing.assert_allclose(metrics["p_uncond"], np.mean(label == NULL), rtol=1e-6)


@pytest.mark.parametrize("p_uncond", [0.0, 0.2, 1.0])
def test_labels_are_dropped_at_their_rate_and_for_themselves(p_uncond):
    """The share lies in its binomial band; what is dropped is the null label, the rest untouched;
    and neither lambda nor eps knows which was dropped, as with one key for both they would.
    """
    size = 4096
    batch = batch_of(size, (2, 1, 1))
    *_, shown = run(losses.Denoising(p_uncond), linear(), batch, seed=2)
    dropped = shown["label"] == NULL
    low, high = stats.binom.interval(0.9999, size, p_uncond)
    assert low <= dropped.sum() <= high
    np.testing.assert_array_equal(shown["label"][~dropped], batch["label"][~dropped])
    if 0 < p_uncond < 1:
        eps = noise_in(shown, batch["image"])[0][:, 0, 0, 0]
        for other in (shown["lam"], eps):
            assert stats.ks_2samp(other[dropped], other[~dropped]).pvalue > 1e-3
        assert abs(stats.pearsonr(eps, shown["lam"]).statistic) < 4 / np.sqrt(size)


@pytest.mark.parametrize("stratified", [False, True])
def test_lambda_is_drawn_from_the_schedule(stratified):
    """p(lambda) is the schedule's: u = 1 - F(lambda) is uniform. Stratified, each of B equal parts
    of u holds exactly one draw, at a uniform place within it.
    """
    size = 1024
    draw = jax.jit(lambda key: losses.sample_lambda(key, schedules.Cosine(), size, stratified))
    low = np.arctan(np.exp(-10.0))
    u = (np.arctan(np.exp(-0.5 * np.float64(draw(jax.random.key(0))))) - low) / (
        np.pi / 2 - 2 * low
    )
    assert stats.kstest(u, "uniform").pvalue > 1e-3
    part = np.sort(np.floor(u * size))
    if stratified:
        assert np.mean(part == np.arange(size)) > 0.99  # but for a rounding at an edge
        assert stats.kstest(u * size % 1, "uniform").pvalue > 1e-3
    else:
        assert len(set(part)) < 0.7 * size


def test_a_stratified_loss_shows_the_network_one_level_in_each_part():
    *_, shown = run(losses.Denoising(stratified=True), linear(), batch_of(64))
    np.testing.assert_array_equal(np.sort(np.floor((4 - shown["lam"]) * 8)), np.arange(64))


# Of the signal-to-noise ratio, as their papers have them: on the error of eps, or on that of x.
OF_EPS = {"eps": lambda snr: 1, "p2": lambda snr: 1 / (1 + snr)}
OF_X = {
    "x": lambda snr: 1,
    "velocity": lambda snr: snr + 1,
    "truncated_snr": lambda snr: max(snr, 1),
    "min_snr": lambda snr: min(snr, 5),
    "edm": lambda snr: (1 / snr + 0.5**2) / (1 / snr * 0.5**2),
}


@pytest.mark.parametrize("reading", TRAINED)
@pytest.mark.parametrize("weight", weightings.WEIGHTS)
def test_a_weight_counts_the_error_of_eps_or_x_whatever_the_network_says(weight, reading):
    """One image a level: the loss there is the weight times the error that its paper weighs."""
    assert weightings.WEIGHTS.keys() == OF_EPS.keys() | OF_X.keys()
    x, eps, off = (draws(1, 4, 4, 1, seed=i).astype(np.float64) for i in range(3))
    for lam in (-4.0, -1.0, 0.0, 1.2, 2.0, 5.0):
        a, s = oracle.alpha(lam), oracle.sigma(lam)
        of_x = off if reading == "x" else -s * off if reading == "velocity" else -s / a * off
        of_eps = -a / s * of_x
        target = {"eps": eps, "x": x, "velocity": a * eps - s * x}[reading]
        found = losses.mean_square(
            *(jnp.float32(v) for v in (target + off, target)),
            jnp.float32([lam]),
            weight=weight,
            reading=logsnr.READINGS[reading],
        )
        snr = np.exp(lam)
        if weight in OF_EPS:
            wanted = OF_EPS[weight](snr) * np.mean(of_eps**2)
        else:
            wanted = OF_X[weight](snr) * np.mean(of_x**2)
        np.testing.assert_allclose(found, wanted, rtol=1e-4)


@pytest.mark.parametrize("name", TRAINED)
def test_a_weighted_loss_weighs_the_level_that_it_shows(name):
    batch = batch_of(64)
    total, _, _, shown = run(losses.Denoising(weight="min_snr"), linear(), batch, name)
    _, a, s = noise_in(shown, batch["image"])
    lam, label = (shown[key].reshape(-1, 1, 1, 1) for key in ("lam", "label"))
    said = 2 * shown["z"] + 0.1 * lam + 0.5 * label
    x = {"eps": (shown["z"] - s * said) / a, "x": said, "velocity": a * shown["z"] - s * said}[name]
    wanted = np.mean(np.minimum((a / s) ** 2, 5) * (x - batch["image"]) ** 2)
    np.testing.assert_allclose(total, wanted, rtol=1e-4)


def mixing(teacher, frozen):
    """A network that says what a guided teacher says: eq. (6) holds of any reading's output."""

    def apply(params, z, lam, cond, key=None):
        w = logsnr.expand(cond["w"], z)
        null = jnp.full_like(cond["label"], NULL)
        with_c, without = (
            teacher.apply(frozen, z, lam, {"label": c}) for c in (cond["label"], null)
        )
        return (1 + w) * with_c - w * without + params["off"]

    return Network(lambda key: {"off": jnp.float32(0)}, apply)


@pytest.mark.parametrize("name", TRAINED)
def test_a_student_that_says_what_its_guided_teacher_says_has_learned_it(name):
    """The loss is zero, to rounding, and for a student that is off by d it is d^2; w is uniform on
    its range, and no other draw knows it. Nothing reaches the teacher.
    """
    batch, teacher = batch_of(512), linear()
    frozen = teacher.init(None)
    loss = losses.Distillation(0.5, 3.0)
    told = {"teacher": teacher, "frozen": frozen}
    total, metrics, slope, shown = run(loss, mixing(teacher, frozen), batch, name, **told)
    said = 2 * np.abs(shown["z"]).max() + 4
    assert total < (1e-5 * said) ** 2 and abs(slope["off"]) < 1e-4 and metrics == {}
    assert stats.kstest(shown["w"], "uniform", (0.5, 2.5)).pvalue > 1e-3
    assert stats.kstest(noise_in(shown, batch["image"])[0].ravel(), "norm").pvalue > 1e-3
    assert abs(stats.pearsonr(shown["w"], shown["lam"]).statistic) < 4 / np.sqrt(512)
    np.testing.assert_array_equal(shown["label"], batch["label"])

    def off(params, frozen):
        return loss(
            params,
            frozen,
            batch,
            jax.random.key(1),
            network=mixing(teacher, teacher.init(None)),
            teacher=teacher,
            schedule=NARROW,
            reading=logsnr.READINGS[name],
            null_label=NULL,
        )[0]

    value, (ours, theirs) = jax.value_and_grad(off, (0, 1))({"off": jnp.float32(0.3)}, frozen)
    np.testing.assert_allclose(value, 0.09, rtol=1e-3)
    np.testing.assert_allclose(ours["off"], 0.6, rtol=1e-3)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(theirs))


def judge():
    """A classifier of 10 classes whose logits are a k times the sum of z."""

    def apply(params, z, lam, cond, key=None):
        assert cond == {} and lam.shape == z.shape[:1] and (key is None or key.shape == ())
        return params["a"] * z.sum((1, 2, 3))[:, None] * jnp.linspace(-1, 1, 10)

    return Network(lambda key: {"a": jnp.float32(0.7)}, apply)


@pytest.mark.parametrize("noisy", [True, False])
def test_classification_is_the_cross_entropy_of_what_it_shows(noisy):
    """Noisy: the z and lambda of eq. (1). Clean: the image itself, at the cleanest level."""
    batch = batch_of(256)
    total, metrics, slope, shown = run(losses.Classification(noisy), judge(), batch)
    if noisy:
        assert stats.kstest(noise_in(shown, batch["image"])[0].ravel(), "norm").pvalue > 1e-3
        assert stats.kstest(shown["lam"], "uniform", (-4, 8)).pvalue > 1e-3
    else:
        np.testing.assert_array_equal(shown["z"], batch["image"])
        np.testing.assert_array_equal(shown["lam"], np.full(256, 4.0))
    logits = 0.7 * shown["z"].sum((1, 2, 3))[:, None] * np.linspace(-1, 1, 10)
    log_p = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    of_label = (np.arange(256), batch["label"])
    np.testing.assert_allclose(total, -np.mean(log_p[of_label]), rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], np.mean(log_p.argmax(1) == batch["label"]))
    push = np.exp(log_p)
    push[of_label] -= 1
    np.testing.assert_allclose(slope["a"], np.sum(push * logits) / 0.7 / 256, rtol=1e-4)


def test_a_bound_classifier_says_the_log_probability_of_its_labels():
    """With a scalar lambda, and one lambda an image; over all labels the shares sum to one."""
    network = judge()
    params, z = network.init(jax.random.key(0)), batch_of(6)["image"]

    @jax.jit
    def said(label, lam):
        return losses.classifier_log_prob(network, params, label)(z, lam)

    logits = 0.7 * np.float64(z).sum((1, 2, 3))[:, None] * np.linspace(-1, 1, 10)
    log_p = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    label = np.array([3, 1, 4, 1, 5, 9])
    for lam in (np.float32(0), np.zeros(6, np.float32)):
        np.testing.assert_allclose(said(label, lam), log_p[np.arange(6), label], rtol=1e-4)


# samplers and their noise


def test_the_draws_of_an_image_depend_on_its_key_alone():
    """Alone, in any batch, in any order, and over eight devices: bit for bit the same."""
    keys = jax.random.split(jax.random.key(0), 16)
    draw = jax.jit(lambda keys, i: samplers.seeded_noise(keys, (4, 4, 3))(i))
    whole = np.asarray(draw(keys, 5))
    order = np.random.default_rng(0).permutation(16)
    np.testing.assert_array_equal(draw(keys[order], 5), whole[order])
    for i in (0, 7, 15):
        np.testing.assert_array_equal(draw(keys[i : i + 1], 5)[0], whole[i])
    mesh = jax.sharding.Mesh(np.array(jax.devices()), "data")
    spread = draw(jax.device_put(keys, jax.NamedSharding(mesh, jax.P("data"))), 5)
    assert len(spread.sharding.device_set) == 8
    np.testing.assert_array_equal(spread, whole)


def test_draws_are_unit_normals_and_no_two_are_alike():
    keys = jax.random.split(jax.random.key(1), 24)
    noise = samplers.seeded_noise(keys, (32,))
    z = np.asarray(jax.vmap(noise)(jnp.arange(40)), np.float64)  # [40, 24, 32]
    assert stats.kstest(z.ravel(), "norm").pvalue > 1e-3
    correlation = np.corrcoef(z.reshape(-1, 32))
    assert np.abs(correlation[np.triu_indices(40 * 24, 1)]).max() < 0.95
    assert len(np.unique(z)) > 0.98 * z.size


def test_an_image_of_a_chain_is_the_same_alone_and_in_any_batch():
    conditional, unconditional = pair_of_denoisers()
    keys, lams = jax.random.split(jax.random.key(0), 8), schedules.uniform_u(schedules.Cosine(), 32)

    @jax.jit
    def sample(keys):
        guided = guidance.ClassifierFree(1.0)(conditional, unconditional)
        return samplers.Ancestral(0.3)(guided, samplers.seeded_noise(keys, (2,)), lams).x

    whole = np.asarray(sample(keys))
    np.testing.assert_allclose(sample(keys[::-1]), whole[::-1], atol=1e-5)
    np.testing.assert_allclose(sample(keys[5:6])[0], whole[5], atol=1e-5)


@pytest.mark.parametrize("v", [0.0, 0.3, 1.0])
def test_ancestral_sampling_is_algorithm_2_written_by_hand(v, float64):
    """Level by level in NumPy, with a denoiser that is not linear and draws that are given."""
    lams = np.array([-5.0, -2.5, -2.0, 0.5, 3.0, 3.1])
    noise = draws(7, 4, 3, dtype=np.float64)
    seen = []

    def says(z, lam):
        return Prediction(jnp.tanh(z + 0.1 * lam), jnp.full_like(z, jnp.nan))

    path = samplers.Ancestral(v)(says, lambda i: jnp.asarray(noise)[i], jnp.asarray(lams))
    z = noise[0]
    for t, (lam, after) in enumerate(zip(lams, [*lams[1:], None], strict=True), start=1):
        x = np.tanh(z + 0.1 * lam)
        seen.append(x)
        if after is not None:
            on_z, on_x, variance = posterior(lam, after)
            std = np.sqrt(variance ** (1 - v) * forward_variance(lam, after) ** v)
            z = on_z * z + on_x * x + std * noise[t]
    np.testing.assert_allclose(path.xs, seen, rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(path.x, path.xs[-1])
    assert path.xs.shape == (6, 4, 3)


@pytest.mark.parametrize("steps", [1, 2, 17])
def test_a_chain_asks_its_denoiser_once_a_level(steps):
    """T evaluations and T clean estimates, the last of which is the image."""
    counter = Counter(lambda z, lam: Prediction(jnp.tanh(z), z))
    lams = jnp.linspace(-20, 20, steps)
    path = samplers.Ancestral(0.3)(counter, lambda i: jnp.asarray(draws(3, 2)), lams)
    jax.effects_barrier()
    assert counter.count == steps
    assert isinstance(path, Path) and path.xs.shape == (steps, 3, 2)
    np.testing.assert_array_equal(path.x, path.xs[-1])


def product(network, params, w, v, noise, lams, batch_size=4):
    """The four lines of the package, for a jit that has everything that may vary as an argument."""
    label = jnp.arange(batch_size) % NULL
    conditional = denoiser.denoiser(network, params, {"label": label})
    unconditional = denoiser.denoiser(network, params, {"label": jnp.full_like(label, NULL)})
    guided = guidance.ClassifierFree(w)(conditional, unconditional)
    return samplers.Ancestral(v)(denoiser.clipped(guided), noise, lams)


def test_the_four_lines_run_as_one_program_of_their_parameters():
    network = linear(0.5)
    params = network.init(jax.random.key(0))

    @jax.jit
    def sample(params, w, v, keys, lams):
        return product(network, params, w, v, samplers.seeded_noise(keys, (4, 4, 3)), lams).x

    keys, lams = jax.random.split(jax.random.key(0), 4), schedules.uniform_u(schedules.Cosine(), 16)
    one = sample(params, 1.0, 0.3, keys, lams)
    assert np.all(np.isfinite(one)) and np.abs(one).max() <= 1
    other = sample({**params, "a": jnp.float32(0.9)}, 3.0, 0.2, keys, lams)
    assert np.abs(one - other).max() > 0.01
    assert sample._cache_size() == 1


def test_unused_clean_estimates_cost_no_memory(optimised):
    """With only .x returned XLA drops the T estimates: scratch memory does not grow with T."""
    network, shape = linear(0.5), (32, 8, 8, 3)

    def scratch(steps, pick):
        @jax.jit
        def chain(params, start, lams):
            return pick(product(network, params, 1.0, 0.3, lambda i: start * i, lams, shape[0]))

        arguments = network.init(jax.random.key(0)), jnp.ones(shape), jnp.linspace(-20, 20, steps)
        return chain.lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    image = 4 * math.prod(shape)
    few, many = (scratch(steps, lambda path: path.x) for steps in (64, 512))
    assert many - few < 0.1 * (512 - 64) * image
    kept = scratch(512, lambda path: path.xs[::3])  # the control: here they are needed
    assert kept - many > 0.9 * 512 * image


# mixture


def test_a_mixtures_denoiser_is_bayes_rule_and_the_gradient_of_its_density(float64):
    """E[x|z] against NumPy, eps = -sigma grad log p(z), and the pair; with weights [B, K]."""
    means, stds = draws(3, 2, dtype=np.float64), np.array([0.2, 0.5, 1.1])
    weights = np.array([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0], [0.0, 0.5, 0.5], [0.9, 0.1, 0.0]])
    with np.errstate(divide="ignore"):
        model = mixture.Mixture(jnp.array(means), jnp.array(stds), jnp.array(np.log(weights)))
    z = draws(4, 2, seed=1, dtype=np.float64)

    @jax.jit
    def prediction_and_score(z, lam):
        return model.denoiser()(z, lam), jax.grad(lambda z: model.log_density(z, lam).sum())(z)

    for lam in (-8.0, -1.0, 0.5, 6.0):
        (x, eps), score = prediction_and_score(z, lam)
        truth = oracle.mixture_x(z, lam, means, stds, weights)
        np.testing.assert_allclose(x, truth, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(eps, -oracle.sigma(lam) * score, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(oracle.alpha(lam) * x + oracle.sigma(lam) * eps, z, rtol=1e-9)


def test_a_mixtures_density_integrates_to_one_and_its_classes_to_all():
    """On a grid in the plane, at lambda = inf (the data) and in the noise."""
    model = mixture.Mixture(
        jnp.array([[0.5, 0.0], [-0.5, 0.3], [0.0, -0.6]]),
        jnp.array([0.3, 0.2, 0.5]),
        jnp.log(jnp.array([1.0, 2.0, 3.0])),  # not normalised
    )
    side = np.linspace(-5, 5, 201, dtype=np.float32)
    z = np.stack(np.meshgrid(side, side), -1).reshape(-1, 2)
    density = jax.jit(lambda lam: jnp.exp(model.log_density(z, lam)))
    shares = jax.jit(
        lambda z, lam: [jnp.exp(model.log_prob(jnp.arange(3) == c)(z, lam)) for c in range(3)]
    )
    for lam in (jnp.inf, 0.0):
        assert abs(np.sum(density(lam)) * 0.05**2 - 1) < 1e-3
        # At the nodes far from every mean float32 still holds a ratio of densities of e^-1000.
        np.testing.assert_allclose(np.sum(shares(z[::41], lam), 0), 1, rtol=1e-3)


def test_a_mixtures_draws_have_its_moments():
    means, stds, weights = draws(3, 2), np.array([0.2, 0.5, 1.1]), np.array([0.2, 0.3, 0.5])
    model = mixture.Mixture(*map(jnp.asarray, (means, stds, np.log(weights))))
    x, component = model.sample(jax.random.key(0), (20_000,))
    shares = np.bincount(component, minlength=3) / 20_000
    np.testing.assert_allclose(shares, weights, atol=4 * np.sqrt(0.25 / 20_000))
    for k in range(3):
        own = np.float64(x[component == k])
        bound = 4 * stds[k] / np.sqrt(len(own))
        np.testing.assert_allclose(own.mean(0), means[k], atol=bound)
        np.testing.assert_allclose(own.std(0), stds[k], atol=bound)


def test_rules_and_samplers_are_frozen():
    for thing, field in ((guidance.ClassifierFree(), "w"), (samplers.Ancestral(), "v")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(thing, field, 0.5)


@pytest.mark.parametrize("betas", schedules.BETAS)
def test_a_learned_variance_is_that_of_the_published_chain(betas):
    """Against the respaced chain in its own terms (Ho et al., 2020; Nichol & Dhariwal, 2021, eqs.
    10 and 15), in float64: new betas from the products at the levels kept, and log variances
    between beta~ and beta, an element its own share.
    """
    T, schedule = 25, schedules.Discrete(betas)
    lams = schedules.uniform_u(schedule, T)
    noise = draws(T + 1, 5, 3)

    def said(z, xp):
        return xp.tanh(z), xp.sin(3 * z)  # eps, and v in [-1, 1]

    def network(z, lam):
        eps, share = said(z, jnp)
        return logsnr.EPS_AND_V.read(z, jnp.concatenate([eps, share], -1), lam)

    chain = samplers.Ancestral(learned_v=True)
    x = jax.jit(lambda: chain(denoiser.clipped(network), lambda i: jnp.asarray(noise)[i], lams).x)()

    alpha_sq = 1 / (1 + np.exp(-np.float64(lams)))[::-1]  # from data to noise
    before = np.append(1, alpha_sq[:-1])
    beta = 1 - alpha_sq / before
    smallest = beta * (1 - before) / (1 - alpha_sq)
    z = np.float64(noise[0])
    for t in reversed(range(T)):
        eps, share = said(z, np)
        clean = np.clip((z - np.sqrt(1 - alpha_sq[t]) * eps) / np.sqrt(alpha_sq[t]), -1, 1)
        mean = np.sqrt(before[t]) * beta[t] / (1 - alpha_sq[t]) * clean
        mean = mean + np.sqrt(1 - beta[t]) * (1 - before[t]) / (1 - alpha_sq[t]) * z
        if t == 0:
            z = mean
            break
        v = (share + 1) / 2
        std = np.exp(0.5 * (v * np.log(beta[t]) + (1 - v) * np.log(smallest[t])))
        z = mean + std * noise[T - t]
    np.testing.assert_allclose(x, z, atol=2e-3)


def test_guidance_keeps_the_variance_of_the_conditional_network():
    def told(shift):
        def denoise(z, lam):
            return logsnr.EPS_AND_V.read(z, jnp.concatenate([z - shift, z + shift], -1), lam)

        return denoise

    z, lam = draws(4, 3), jnp.float32(0.3)
    wanted = told(1.0)(z, lam).v
    rules = [
        guidance.ClassifierFree(0.5)(told(1.0), told(2.0)),
        guidance.ClassifierFree(jnp.full(4, 0.5))(told(1.0), told(2.0)),
        guidance.ClassifierGuidance(0.5)(told(1.0), lambda z, lam: z.sum(-1)),
        guidance.ScaledScore(0.5)(told(1.0)),
    ]
    for rule in rules:
        np.testing.assert_array_equal(denoiser.clipped(rule)(z, lam).v, wanted)


def test_a_variance_that_nobody_tells_is_asked_for_in_vain():
    model = mixture.Mixture(jnp.zeros((1, 2)), jnp.array([1.0]), jnp.zeros(1)).denoiser()
    with pytest.raises(UsageError, match=r"learned_v=True.*tells no variance"):
        samplers.Ancestral(learned_v=True)(model, lambda i: jnp.ones((1, 2)), jnp.arange(3.0))
    with pytest.raises(UsageError, match=r"eps_and_v.*train with reading='eps'"):
        logsnr.EPS_AND_V.target(0, 0, 0)
