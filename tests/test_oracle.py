"""Whole chains against known answers, as distributions: no clipping and no network.

The denoisers are those of Gaussian mixtures, exact by `mixture.Mixture`; the answers come from
`oracle.py`, which shares no line with the code under test. What was measured stands beside each
bound.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from cfg_jax.diffusion import guidance, mixture, samplers, schedules
from cfg_jax.types import Prediction


def gaussian(mean, std, dimensions=1):
    """The exact denoiser of N(mean, std^2 I)."""
    means = jnp.full((1, dimensions), mean)
    return mixture.Mixture(means, jnp.array([std]), jnp.zeros(1)).denoiser()


# (a) Equal spreads: the guidance term is the same at every z.

M_C, M_0, S = 0.5, -0.3, 0.35


@jax.jit
def pointwise(w, z, lam):
    return guidance.ClassifierFree(w)(gaussian(M_C, S), gaussian(M_0, S))(z, lam)


@pytest.mark.parametrize("w", [-1.0, 0.0, 0.5, 4.0])
def test_guiding_equal_gaussians_is_the_denoiser_of_the_gaussian_beyond_them(w, float64):
    """Eq. (6) on N(m_c, s^2) and N(m_0, s^2) is N((1+w) m_c - w m_0, s^2), at every lambda."""
    z, lam = (
        a.reshape(-1, 1) for a in np.meshgrid(np.linspace(-4, 4, 33), np.linspace(-20, 20, 9))
    )
    x, eps = pointwise(w, z, lam[:, 0])
    on_z, rest = oracle.gaussian_x(lam, (1 + w) * M_C - w * M_0, S)
    np.testing.assert_allclose(x, on_z * z + rest, rtol=1e-11, atol=1e-11)
    unexplained = z - oracle.alpha(lam) * (on_z * z + rest)
    np.testing.assert_allclose(oracle.sigma(lam) * eps, unexplained, rtol=1e-11, atol=1e-11)


@functools.partial(jax.jit, static_argnames="dimensions")
def paper_chain(w, noise_or_keys, *, dimensions=1):
    """The chain of (a) as the paper runs it: its v, its T, its grid; in float32."""
    lams = schedules.uniform_u(schedules.Cosine(), 256)
    conditional, unconditional = gaussian(M_C, S, dimensions), gaussian(M_0, S, dimensions)
    guided = guidance.ClassifierFree(w)(conditional, unconditional)
    if noise_or_keys is None:
        noise = oracle.impulses(lams)
    else:
        noise = samplers.seeded_noise(noise_or_keys, (dimensions,))
    return samplers.Ancestral(0.3)(guided, noise, lams).x


@pytest.mark.parametrize("w", [-1.0, 0.0, 0.5, 4.0])
def test_the_papers_chain_has_the_moments_of_the_guided_gaussian(w):
    """Mean and spread to 2 %, without Monte Carlo; and no noise enters the image after the last
    level.

    Measured: mean to 2e-5 of s, spread -1.23 % at every w.
    """
    mean, std, last_response = oracle.impulse_moments(paper_chain(w, None))
    assert abs(mean - ((1 + w) * M_C - w * M_0)) / S < 1e-3
    assert abs(std / S - 1) < 0.02
    assert last_response == 0


def test_seeded_noise_gives_the_moments_that_impulses_foretell():
    """8,192 independent coordinates drawn from seeds agree with the impulses to four standard
    errors.
    """
    mean, std, _ = oracle.impulse_moments(paper_chain(0.5, None))
    keys = jax.random.split(jax.random.key(0), 2048)
    x = np.asarray(paper_chain(0.5, keys, dimensions=4), np.float64)
    assert abs(x.mean() - mean) < 4 * std / np.sqrt(x.size)
    assert abs(x.var() / std**2 - 1) < 4 * np.sqrt(2 / x.size)
    correlation = np.corrcoef(x.T)[np.triu_indices(4, 1)]
    assert np.abs(correlation).max() < 4 / np.sqrt(len(x))


# (b) Unequal spreads: the guidance term depends on z. (a) alone passes rules that mishandle that.

CONDITIONAL, UNCONDITIONAL = oracle.CONDITIONAL, oracle.UNCONDITIONAL
STEPS = (64, 128, 256, 512)


@functools.partial(jax.jit, static_argnames="rule")
def unequal_chain(w, v, lams, *, rule):
    guided = rule(w)(gaussian(*CONDITIONAL), gaussian(*UNCONDITIONAL))
    return samplers.Ancestral(v)(guided, oracle.impulses(lams), lams).x


def unequal_errors(w, v, steps, rule=guidance.ClassifierFree):
    """The errors of mean and spread, in units of the spread, against the limit of many steps."""
    lams = schedules.uniform_lambda(schedules.Cosine(), steps)
    mean, std, _ = oracle.impulse_moments(unequal_chain(w, v, lams, rule=rule))
    true_mean, true_std = oracle.guided_moments(CONDITIONAL, UNCONDITIONAL, w)
    return np.array([mean - true_mean, std - true_std]) / true_std


@pytest.mark.parametrize("v", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("w", [0.5, 1.0])
def test_guided_chains_tend_to_the_moment_equation_with_order_one(w, v, float64):
    """For every v the same limit, to which mean and spread come with order 1 in the step.

    Measured: orders 1.03 of the mean, 0.95 to 1.04 of the spread; at 512 levels the mean is off by
    0.6 % of a spread, the spread by 2.3 % (v = 0), 1.3 % (0.3), 1.2 % (1); extrapolated, by 0.07 %.
    """
    errors = np.array([unequal_errors(w, v, steps) for steps in STEPS])
    for error in np.abs(errors.T):
        assert 0.8 < oracle.order(STEPS, error) < 1.2
    assert np.abs(errors[-1]).max() < 0.03
    # The first-order part removed, what is left at no step at all must be the limit itself.
    limit = (511 * errors[-1] - 255 * errors[-2]) / (511 - 255)
    assert np.abs(limit).max() < 1.5e-3


def rule_from(mix):
    """A rival rule of guidance, from how it makes x of the two denoisers; eps is left alone."""

    def rule(w):
        def bind(conditional, unconditional):
            def denoise(z, lam):
                at = lambda denoiser: lambda z: denoiser(z, lam).x  # noqa: E731
                x = mix(w, z, at(conditional), at(unconditional))
                return Prediction(x, conditional(z, lam).eps)

            return denoise

        return bind

    return rule


RIVALS = {
    "w is the scale": rule_from(lambda w, z, c, u: w * c(z) + (1 - w) * u(z)),
    "one too many": rule_from(lambda w, z, c, u: (2 + w) * c(z) - (1 + w) * u(z)),
    "x not mixed": rule_from(lambda w, z, c, u: c(z)),
    "weights sum to 1 + w": rule_from(lambda w, z, c, u: (1 + w) * c(z)),
    "the passes swapped": rule_from(lambda w, z, c, u: (1 + w) * u(z) - w * c(z)),
    # The next agrees with eq. (6) everywhere in (a): only unequal spreads tell them apart.
    "a constant push": rule_from(lambda w, z, c, u: c(z) + w * (c(0 * z) - u(0 * z))),
}


@pytest.mark.parametrize("rival", RIVALS)
def test_the_moment_equation_tells_rival_rules_from_eq_6(rival, float64):
    """The test above can fail: a wrong rule lies ten times its bound away."""
    errors = unequal_errors(0.5, 0.3, 512, rule=RIVALS[rival])
    assert np.abs(errors).max() > 0.3


# (c) A mixture, as in the paper's figure 2.

MEANS, STDS, WEIGHTS = oracle.MEANS, oracle.STDS, oracle.WEIGHTS
likely_class = oracle.likely_class


def classes():
    return mixture.Mixture(jnp.array(MEANS), jnp.array(STDS), jnp.log(jnp.array(WEIGHTS)))


@jax.jit
def mixture_chain(w, members, noise, lams):
    """The chain of each trajectory given its own classes, members [B, 3]; noise: draws or keys."""
    model = classes()
    guided = guidance.ClassifierFree(w)(model.given(members).denoiser(), model.denoiser())
    if jnp.issubdtype(noise.dtype, jax.dtypes.prng_key):
        draw = samplers.seeded_noise(noise, (2,))
    else:
        draw = lambda i: noise[i]  # noqa: E731
    return samplers.Ancestral(0.3)(guided, draw, lams).x


@pytest.mark.parametrize("w", [1.0, 4.0])
def test_a_guided_mixture_follows_its_reverse_equation(w):
    """Class by class, mean, covariance and the share that the classifier reads as the class.

    The chain of 256 levels in float32 against two steps of Heun for each of its own in float64,
    driven by the same Brownian motion, so that what differs is the error and not the draw.
    Measured: means to 3.3 % of a spread, covariances to 4.9 % (as for one Gaussian on this grid),
    shares to 0.4 %.
    """
    size, steps, finer = 1500, 256, 2
    label = np.arange(size) % 3
    lams = np.linspace(-20, 20, finer * (steps - 1) + 1)
    rng = np.random.default_rng(0)
    start = rng.standard_normal((size, 2))
    normals = rng.standard_normal((len(lams) - 1, size, 2))

    def guided_x(z, lam):
        with_c = oracle.gaussian_x(lam, MEANS[label], STDS[label, None])
        without = oracle.mixture_x(z, lam, MEANS, STDS, WEIGHTS)
        return (1 + w) * (with_c[0] * z + with_c[1]) - w * without

    fine = oracle.heun(guided_x, start, normals, lams)
    # One draw of a coarse step: the fine kicks within it, summed, and scaled to be a unit normal.
    kicks = oracle.sigma(0.5 * (lams[1:] + lams[:-1])).reshape(-1, finer, 1, 1)
    normals = normals.reshape(steps - 1, finer, size, 2)
    coarse = np.sum(kicks * normals, 1) / np.sqrt(np.sum(kicks**2, 1))
    draws = np.concatenate([start[None], coarse, np.zeros((1, size, 2))]).astype(np.float32)
    members = label[:, None] == np.arange(3)
    grid = schedules.uniform_lambda(schedules.Cosine(), steps)
    x = np.asarray(mixture_chain(w, members, draws, grid), np.float64)

    for c in range(3):
        ours, true = x[label == c], fine[label == c]
        spread = np.sqrt(np.trace(np.cov(true.T)) / 2)
        assert np.abs(ours.mean(0) - true.mean(0)).max() < 0.05 * spread
        assert np.abs(np.cov(ours.T) - np.cov(true.T)).max() < 0.07 * spread**2
        shares = [np.mean(likely_class(sample) == c) for sample in (ours, true)]
        assert abs(shares[0] - shares[1]) < 0.01


def drawn(members, seed, size):
    """Points [size, 2] of the data itself, given that the class is one of members [3]."""
    model = classes().given(jnp.array(members))
    return np.asarray(model.sample(jax.random.key(seed), (size,))[0], np.float64)


SIZE = 1500


def chain_sample(w, members, seed=1):
    keys = jax.random.split(jax.random.key(seed), SIZE)
    lams = schedules.uniform_lambda(schedules.Cosine(), 256)
    members = jnp.broadcast_to(jnp.array(members), (SIZE, 3))
    return np.asarray(mixture_chain(w, members, keys, lams), np.float64)


@pytest.mark.parametrize("w, members", [(0.0, [True, True, False]), (-1.0, [True, True, True])])
def test_w_0_samples_the_conditional_and_w_minus_1_the_marginal(w, members):
    """Moments, class shares and energy distance against direct draws.

    The condition "class 0 or 1" is a mixture too. The threshold of the distance is the largest of
    100 random splits of the same points.
    Measured: distances 0.0009 and 0.0011, thresholds 0.0040 and 0.0049.
    """
    x = chain_sample(w, [True, True, False])
    weights = WEIGHTS * members / np.sum(WEIGHTS * members)
    mean = weights @ MEANS
    covariance = np.einsum("k,ki,kj->ij", weights, MEANS - mean, MEANS - mean)
    covariance += weights @ STDS**2 * np.eye(2)
    direct = drawn(members, 2, SIZE)
    far, splits = oracle.energy_distance(x, direct, splits=100, rng=np.random.default_rng(0))
    standard_error = np.sqrt(np.diag(covariance) / SIZE)
    assert np.all(np.abs(x.mean(0) - mean) < 4 * standard_error)
    scale = np.trace(covariance) / 2
    assert np.abs(np.cov(x.T) - covariance).max() < (4 * np.sqrt(2 / SIZE) + 0.02) * scale
    shares = [np.bincount(likely_class(points), minlength=3) / SIZE for points in (x, direct)]
    assert np.abs(shares[0] - shares[1]).max() < 4 * np.sqrt(0.5 / SIZE)
    assert far < splits.max()


def test_the_energy_distance_tells_a_weak_guidance_from_none():
    """The threshold of the test above can be crossed: w = 1 crosses it, on the same draws."""
    members = [True, True, False]
    x, direct = chain_sample(1.0, members), drawn(members, 2, SIZE)
    far, splits = oracle.energy_distance(x, direct, splits=100, rng=np.random.default_rng(0))
    assert far > 2 * splits.max()


# Classifier guidance with the exact classifier: section 3 of the paper.


@jax.jit
def three_ways(model, w, z, lam):
    """The Prediction by eq. (6), by the classifier on p(z|c), and by the classifier on p(z)."""
    member = jnp.arange(z.shape[0])[:, None] % 3 == jnp.arange(3)
    conditional, unconditional = model.given(member).denoiser(), model.denoiser()
    log_prob = model.log_prob(member)
    return (
        guidance.ClassifierFree(w)(conditional, unconditional)(z, lam),
        guidance.ClassifierGuidance(w)(conditional, log_prob)(z, lam),
        guidance.ClassifierGuidance(w + 1)(unconditional, log_prob)(z, lam),
    )


@pytest.mark.parametrize("w", [0.0, 0.5, 4.0, np.array([-1.0, 0.0, 0.3, 1.0, 4.0, 0.0, 2.0])])
def test_three_ways_to_guide_an_exact_model_are_one(w, float64):
    """p(z|c) p(c|z)^w is p(z) p(c|z)^(w+1) up to a constant, and its eps is that of eq. (6).

    So the classifier with weight w on the conditional denoiser, with weight w + 1 on the
    unconditional one, and classifier-free guidance with w give one Prediction, at every lambda and
    for a w of each image's own. Measured: x to 1e-11, at lambda = -20, where 1 / alpha = 22,026.
    """
    lam = np.repeat(np.linspace(-20, 20, 9), 7)
    z = 0.5 * oracle.alpha(lam)[:, None] + np.random.default_rng(0).standard_normal((63, 2))
    free, *by_classifier = three_ways(classes(), np.tile(w, 9) if np.ndim(w) else w, z, lam)
    for way in by_classifier:
        np.testing.assert_allclose(way.x, free.x, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(way.eps, free.eps, rtol=1e-12, atol=1e-12)
