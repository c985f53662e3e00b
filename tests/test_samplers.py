"""The samplers beside the paper's: their limits and orders, their identities, and what they cost.

Known answers come from `oracle.py`, float64 NumPy that shares no line with the code under test.
What was measured stands beside each bound.
"""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from cfg_jax import experiment, request
from cfg_jax.diffusion import edm, guidance, mixture, multistep, samplers, schedules
from cfg_jax.types import Prediction, UsageError

STEPS = (64, 128, 256, 512)
# Those without noise after the start: they solve the probability flow.
FLOWS = {
    "ddim": samplers.DDIM(),
    "euler": edm.Euler(),
    "dpmpp_2m": multistep.DPMSolver2M(),
    "unipc": multistep.UniPC(),
    "heun": edm.Heun(),
}
# Those with noise, and the share of the reverse equation's that they add. Churn c puts back 2 c / T
# of lambda before a step of 40 / (T - 1), as noise.
NOISY = {
    "ddim, eta 1": (samplers.DDIM(1.0), 1),
    "ddim, eta 0.6": (samplers.DDIM(0.6), 0.36),
    "dpmpp_2m, eta 1": (multistep.DPMSolver2M(1.0), 1),
    "dpmpp_2m, eta 0.6": (multistep.DPMSolver2M(0.6), 0.36),
    "euler, churn 10": (edm.Euler(churn=10.0), 0.5),
    "heun, churn 10": (edm.Heun(churn=10.0), 0.5),
}
ALL = {"ancestral": samplers.Ancestral(), **FLOWS, **{k: s for k, (s, _) in NOISY.items()}}
# One of each kind, with noise where it can have some.
EACH = ("ddim, eta 0.6", "dpmpp_2m, eta 0.6", "unipc", "euler, churn 10", "heun, churn 10")


def gaussian(mean, std):
    return mixture.Mixture(jnp.full((1, 1), mean), jnp.array([std]), jnp.zeros(1)).denoiser()


# Limits and orders, on (b): two Gaussians of unequal spreads, guided


@oracle.by_kind
def flow_chain(sampler, w, lams):
    """The chains from z = 0 and z = 1, whatever is drawn later: [2]."""
    guided = guidance.ClassifierFree(w)(
        gaussian(*oracle.CONDITIONAL), gaussian(*oracle.UNCONDITIONAL)
    )
    starts = jnp.array([[0.0], [1.0]], lams.dtype)
    return sampler(guided, lambda i: jnp.where(i == 0, starts, 7 * starts - 3), lams).x[:, 0]


def flow_errors(sampler, w):
    """The errors of mean and spread for STEPS, in units of the spread: [4, 2]."""
    true_mean, true_std = oracle.guided_moments(
        oracle.CONDITIONAL, oracle.UNCONDITIONAL, w, share=0.0
    )
    errors = []
    for steps in STEPS:
        from_0, from_1 = flow_chain(sampler, w, uniform(steps))
        errors.append([from_0 - true_mean, abs(from_1 - from_0) - true_std])
    return np.array(errors) / true_std


def uniform(steps):
    return schedules.uniform_lambda(schedules.Cosine(), steps)


@pytest.mark.parametrize("w", [0.5, 2.0])
@pytest.mark.parametrize("name", FLOWS)
def test_a_sampler_without_noise_has_its_order_and_solves_the_flow(name, w, float64):
    """DDIM and Euler are of order one, 2M and Heun of two, UniPC of three, in mean and spread.

    Measured: orders 0.95 to 1.02 (DDIM, Euler), 1.98 to 2.18 (2M), 2.03 to 2.28 (Heun), 2.76 to
    3.37 (UniPC); at 512 levels off by 2.8 %, 0.07 %, 0.07 % and 0.003 % of a spread.
    """
    errors = np.abs(flow_errors(FLOWS[name], w))
    orders = [oracle.order(STEPS, error) for error in errors.T]
    low, high, last = {
        "ddim": (0.8, 1.2, 0.05),
        "euler": (0.8, 1.2, 0.05),
        "dpmpp_2m": (1.8, 2.5, 1e-3),
        "heun": (1.8, 2.5, 1e-3),
        "unipc": (2.6, 3.5, 1e-4),
    }[name]
    assert all(low < p < high for p in orders), (orders, errors)
    assert errors[-1].max() < last, errors


@oracle.by_kind
def noisy_chain(sampler, w, lams):
    guided = guidance.ClassifierFree(w)(
        gaussian(*oracle.CONDITIONAL), gaussian(*oracle.UNCONDITIONAL)
    )
    return sampler(guided, oracle.impulses(lams), lams).x


@pytest.mark.parametrize("name", NOISY)
def test_a_sampler_with_noise_solves_its_own_reverse_equation(name, float64):
    """The limit is the one of its share; of order two for 2M, whose noise is exact, else of one.

    Measured: orders 0.95 (DDIM), 2.05 (2M), 0.97 (Euler) and 1.1 (Heun) of the distance that mean
    and spread make; at 512 levels off by 2.3 %, 0.03 %, 2 % and 0.2 % of a spread, extrapolated by
    at most 0.1 %.
    """
    sampler, share = NOISY[name]
    w = 1.0
    true_mean, true_std = oracle.guided_moments(
        oracle.CONDITIONAL, oracle.UNCONDITIONAL, w, share=share
    )
    errors = []
    for steps in STEPS:
        mean, std, _ = oracle.impulse_moments(noisy_chain(sampler, w, uniform(steps)))
        errors.append(np.array([mean - true_mean, std - true_std]) / true_std)
    assert np.abs(errors[-1]).max() < 0.05, errors
    order = oracle.order(STEPS, np.hypot(*np.transpose(errors)))
    assert (1.8 if "2m" in name else 0.9) < order < 2.5, order
    # The first-order part removed, what is left at no step at all must be the limit itself.
    limit = (511 * errors[-1] - 255 * errors[-2]) / (511 - 255)
    assert np.abs(limit).max() < 1.5e-3, limit
    # The bound tells the shares apart: the flow and twice the noise lie beyond it.
    for other in (0.0, 2 * share):
        moments = oracle.guided_moments(oracle.CONDITIONAL, oracle.UNCONDITIONAL, w, share=other)
        assert np.abs(np.subtract(moments, (true_mean, true_std))).max() / true_std > 0.05


# (c) A mixture of three classes in the plane, guided


def classes(dtype):
    weights = jnp.array(np.log(oracle.WEIGHTS), dtype)
    return mixture.Mixture(jnp.array(oracle.MEANS, dtype), jnp.array(oracle.STDS, dtype), weights)


@oracle.by_kind
def mixture_flow(sampler, w, members, start, lams):
    model = classes(jnp.float64)
    guided = guidance.ClassifierFree(w)(model.given(members).denoiser(), model.denoiser())
    return sampler(guided, lambda i: start, lams).x


@functools.cache
def fine_flow(w, size):
    start = np.random.default_rng(0).standard_normal((size, 2))
    label = np.arange(size) % 3

    def guided_x(z, lam):
        on_z, rest = oracle.gaussian_x(lam, oracle.MEANS[label], oracle.STDS[label, None])
        without = oracle.mixture_x(z, lam, oracle.MEANS, oracle.STDS, oracle.WEIGHTS)
        return (1 + w) * (on_z * z + rest) - w * without

    return start, label, oracle.flow(guided_x, start, np.linspace(-20, 20, 401))


@pytest.mark.slow
@pytest.mark.parametrize("name", FLOWS)
def test_a_guided_mixture_follows_the_flow(name, float64):
    """Point by point from the same starts, for 256 levels; w = 2.

    Measured: off by 3.9 % of the spread at most (DDIM, Euler), 0.15 % (2M, Heun), 0.008 % (UniPC).
    """
    start, label, true = fine_flow(2.0, 300)
    members = label[:, None] == np.arange(3)
    x = np.asarray(mixture_flow(FLOWS[name], 2.0, members, start, uniform(256)))
    bound = {"ddim": 0.05, "euler": 0.05, "dpmpp_2m": 4e-3, "heun": 4e-3, "unipc": 4e-4}[name]
    assert np.abs(x - true).max() < bound * true.std(), np.abs(x - true).max() / true.std()
    shares = [np.mean(oracle.likely_class(points) == label) for points in (x, true)]
    assert abs(shares[0] - shares[1]) < 0.01


# Identities


def bend(z, lam):
    """A clean estimate that is not linear, with its pair's eps."""
    x = jnp.tanh(z + 0.1 * lam) + 0.2 * jnp.sin(z)
    return Prediction(x, (z - jnp.sqrt(jax.nn.sigmoid(lam)) * x) / jnp.sqrt(jax.nn.sigmoid(-lam)))


LAMS = np.array([-6.0, -3.5, -2.0, -1.9, 0.5, 2.0, 5.0])
DRAWS = np.random.default_rng(3).standard_normal((len(LAMS) + 1, 4, 3))


@oracle.by_kind
def path(sampler, lams, draws):
    return sampler(bend, lambda i: draws[i], lams)


PAIRS = {
    "ddim, eta 1, is ancestral, v 0": (samplers.DDIM(1.0), samplers.Ancestral(0.0), 7),
    "euler is ddim": (edm.Euler(), samplers.DDIM(), 7),
    "2m begins as ddim does": (multistep.DPMSolver2M(), samplers.DDIM(), 2),
    "2m with noise begins as ancestral does": (
        multistep.DPMSolver2M(1.0),
        samplers.Ancestral(0.0),
        2,
    ),
    "unipc begins as ddim does": (multistep.UniPC(), samplers.DDIM(), 2),
    "one level is one estimate": (multistep.UniPC(), edm.Heun(), 1),
    "of which all make the same": (samplers.Ancestral(), multistep.DPMSolver2M(1.0), 1),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_samplers_that_are_the_same(pair, float64):
    one, other, T = PAIRS[pair]
    for ours, theirs in zip(path(one, LAMS[:T], DRAWS), path(other, LAMS[:T], DRAWS)):
        np.testing.assert_allclose(ours, theirs, rtol=1e-11, atol=1e-12)
    if 1 < T < 7:  # and no longer than that
        long = path(one, LAMS, DRAWS), path(other, LAMS, DRAWS)
        assert np.abs(long[0].x - long[1].x).max() > 1e-3


@pytest.mark.parametrize("name", ALL)
def test_only_those_with_noise_read_a_draw_after_the_start(name):
    other = DRAWS.copy()
    other[1:] = -DRAWS[1:]
    one, two = (path(ALL[name], LAMS, draws).x for draws in (DRAWS, other))
    assert np.array_equal(one, two) == (name in FLOWS)


def test_ddim_is_its_eq_12_with_the_eps_that_it_is_told(float64):
    """In alpha-bars, with an eps that is not what x leaves of z."""
    eta, z = 0.7, DRAWS[0]
    bars = 1 / (1 + np.exp(-LAMS))  # alpha-bar, from noise to clean
    denoiser = lambda z, lam: Prediction(jnp.tanh(z) + 0.1 * lam, jnp.cos(z))  # noqa: E731
    x = samplers.DDIM(eta)(denoiser, lambda i: jnp.array(DRAWS)[i], jnp.array(LAMS)).x
    for t in range(1, len(LAMS)):
        here, after = bars[t - 1], bars[t]
        std = eta * np.sqrt((1 - after) / (1 - here)) * np.sqrt(1 - here / after)
        clean, eps = np.tanh(z) + 0.1 * LAMS[t - 1], np.cos(z)
        z = np.sqrt(after) * clean + np.sqrt(1 - after - std**2) * eps + std * DRAWS[t]
    np.testing.assert_allclose(x, np.tanh(z) + 0.1 * LAMS[-1], rtol=1e-10)


@pytest.mark.parametrize("second_order", [False, True])
def test_euler_and_heun_are_algorithm_2_of_karras(second_order, float64):
    """Step by step in their sigma and their z, which is ours over alpha; churn in an interval."""
    churn, noise, low, high = 1.5, 1.1, -4.0, 1.0
    options = {"churn": churn, "churn_noise": noise, "churn_low": low, "churn_high": high}
    sampler = edm.Heun(**options) if second_order else edm.Euler(**options)

    def denoised(x, sigma):
        lam = -2 * np.log(sigma)
        return np.asarray(bend(jnp.asarray(x * oracle.alpha(lam)), lam).x)

    sigmas = np.exp(-0.5 * LAMS)
    x = DRAWS[0] * oracle.sigma(LAMS[0]) / oracle.alpha(LAMS[0]) / oracle.sigma(LAMS[0])
    for i, (sigma, after) in enumerate(zip(sigmas, [*sigmas[1:], 0.0])):
        inside = np.exp(-0.5 * high) <= sigma <= np.exp(-0.5 * low)
        hat = sigma * (1 + inside * min(churn / len(LAMS), np.sqrt(2) - 1))
        x = x + np.sqrt(hat**2 - sigma**2) * noise * DRAWS[i + 1]
        slope = (x - denoised(x, hat)) / hat
        end = x + (after - hat) * slope
        if second_order and after > 0:
            end = x + (after - hat) * 0.5 * (slope + (end - denoised(end, after)) / after)
        x = end
    np.testing.assert_allclose(path(sampler, LAMS, DRAWS).x, x, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["dpmpp_2m", "unipc"])
def test_a_sampler_that_remembers_integrates_a_polynomial_through_its_estimates(name, float64):
    """Over levels of uneven distance, by quadrature; s = lam / 2."""
    s, nodes = LAMS / 2, np.polynomial.legendre.leggauss(20)

    def through(*known):
        def x(at):
            others = [[b for b in known if b != a] for a in known]
            shares = [
                np.prod([(at - s[b]) / (s[a] - s[b]) for b in rest])
                for a, rest in zip(known, others)
            ]
            return sum(share * seen[a] for share, a in zip(shares, known))

        return x

    def step(z, i, x):
        """z' = (sigma' / sigma) z + alpha' int e^(s - s') x(s) ds from level i on."""
        half = (s[i + 1] - s[i]) / 2
        at = s[i] + half * (nodes[0] + 1)
        total = sum(half * w * np.exp(a - s[i + 1]) * x(a) for a, w in zip(at, nodes[1]))
        shrunk = oracle.sigma(LAMS[i + 1]) / oracle.sigma(LAMS[i])
        return shrunk * z + oracle.alpha(LAMS[i + 1]) * total

    z = begin = DRAWS[0]
    seen = []
    for i, lam in enumerate(LAMS):
        seen.append(np.asarray(bend(jnp.asarray(z), lam).x))
        if name == "unipc" and i == 1:
            z = step(begin, 0, lambda _: (seen[0] + seen[1]) / 2)
        elif name == "unipc" and i > 1:
            z = step(begin, i - 1, through(i - 2, i - 1, i))
        begin = z
        if i + 1 < len(LAMS):
            middle = through(*range(max(i - 1, 0), i + 1))((s[i] + s[i + 1]) / 2)
            z = step(z, i, lambda _, x=middle: x)
    np.testing.assert_allclose(path(FLOWS[name], LAMS, DRAWS).xs, seen, rtol=1e-9, atol=1e-10)


def test_churn_stays_between_the_first_level_and_its_bounds():
    lams = jnp.linspace(-10, 10, 21)
    levels = edm.Euler(churn=1e6, churn_low=-15.0, churn_high=3.5).levels(lams)
    back = lams - levels
    np.testing.assert_allclose(back[1:14], 2 * np.log(np.sqrt(2)), atol=1e-5)
    assert np.all(back[14:] == 0) and levels[0] == lams[0]


# What a chain costs, and where it looks


class Recorder:
    """Tells at which levels a denoiser was called, as it ran."""

    def __init__(self, inner):
        self.inner, self.lams = inner, []

    def __call__(self, z, lam):
        jax.debug.callback(lambda lam: self.lams.append(float(lam)), lam, ordered=True)
        return self.inner(z, lam)


@pytest.mark.parametrize("T", [1, 2, 7])
@pytest.mark.parametrize("name", EACH)
def test_a_sampler_tells_at_which_levels_it_asks(name, T):
    """In their order; T of them, and 2 T - 1 for Heun. A clean estimate of each of the T."""
    recorder, lams = Recorder(bend), jnp.asarray(LAMS[:T], jnp.float32)
    out = ALL[name](recorder, lambda i: jnp.asarray(DRAWS, jnp.float32)[i], lams)
    jax.effects_barrier()
    np.testing.assert_allclose(recorder.lams, ALL[name].levels(lams), rtol=1e-6)
    assert len(recorder.lams) == (2 * T - 1 if "heun" in name else T)
    assert out.xs.shape == (T, 4, 3)
    np.testing.assert_array_equal(out.x, out.xs[-1])


@pytest.mark.parametrize("name", EACH)
def test_the_denoiser_is_compiled_once(name):
    program = jax.make_jaxpr(lambda draws: path(ALL[name], jnp.array(LAMS), draws))(DRAWS)
    assert str(program).count(" tanh ") == 1


# One seed, one image; float32


@oracle.by_kind
def seeded(sampler, keys):
    model = classes(jnp.float32)
    guided = guidance.ClassifierFree(1.0)(
        model.given(jnp.arange(3) == 0).denoiser(), model.denoiser()
    )
    lams = uniform(24)
    return sampler(guided, samplers.seeded_noise(keys, (2,)), lams).x


@pytest.mark.slow
@pytest.mark.parametrize("name", EACH)
def test_an_image_is_the_same_alone_in_any_batch_and_on_eight_devices(name):
    keys = jax.random.split(jax.random.key(0), 8)
    whole = np.asarray(seeded(ALL[name], keys))
    np.testing.assert_allclose(seeded(ALL[name], keys[::-1]), whole[::-1], atol=1e-5)
    np.testing.assert_allclose(seeded(ALL[name], keys[5:6])[0], whole[5], atol=1e-5)
    mesh = jax.sharding.Mesh(np.array(jax.devices()), "data")
    spread = seeded(ALL[name], jax.device_put(keys, jax.NamedSharding(mesh, jax.P("data"))))
    assert len(spread.sharding.device_set) == 8
    np.testing.assert_allclose(spread, whole, atol=1e-5)


@oracle.by_kind
def clipped_path(sampler, draws):
    """On the paper's grid, whose first step is ten units of lambda, with x kept in [-1, 1]."""

    def denoiser(z, lam):
        x = jnp.clip(3 * z - 0.5, -1, 1)
        return Prediction(
            x, (z - jnp.sqrt(jax.nn.sigmoid(lam)) * x) / jnp.sqrt(jax.nn.sigmoid(-lam))
        )

    lams = schedules.uniform_u(schedules.Cosine(), 64)
    return sampler(denoiser, lambda i: draws[i], lams.astype(draws.dtype))


@pytest.mark.parametrize("name", EACH)
def test_float32_is_float64_to_its_rounding_on_the_papers_grid(name):
    """Step by step from lambda = -20 to 20. Measured: at most 4e-5, of those with noise."""
    draws = np.random.default_rng(1).standard_normal((65, 16, 2))
    single = clipped_path(ALL[name], draws.astype(np.float32))
    with jax.enable_x64(True):
        double = clipped_path(ALL[name], draws)
    assert single.x.dtype == np.float32 and double.x.dtype == np.float64
    # An estimate at the edge of what is clipped tells of every earlier step.
    np.testing.assert_allclose(single.xs, double.xs, atol=2e-4)


# Configs


def build(sample, **sections):
    config = experiment.load_config("digits")
    return experiment.build({**config, "sample": sample, **sections})


def test_a_name_alone_stands_for_its_section():
    """As a saved config of before has it: `grid` was a string."""
    model = build({"grid": "uniform_lambda", "sampler": "unipc", "steps": 5})
    assert model.config["sample"]["grid"] == {"name": "uniform_lambda"}
    assert isinstance(model.sampler, multistep.UniPC)
    np.testing.assert_allclose(model.lams(), np.linspace(-20, 20, 5), atol=1e-5)
    assert build({}).config["sample"]["grid"] == {"name": "uniform_u"}


def test_more_steps_than_levels_are_refused():
    model = build({"steps": 1200}, schedule={"name": "discrete"})
    with pytest.raises(UsageError, match=r"sample.steps=1200.*fewer steps"):
        request.levels(model)


def test_a_grid_that_is_too_coarse_for_a_sampler_is_told():
    with pytest.warns(UserWarning, match="'dpmpp_2m' on sample.grid 'uniform_u' with 16 steps"):
        request.levels(build({"sampler": "dpmpp_2m", "steps": 16}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        request.levels(build({"sampler": "ddim", "steps": 16}))
        request.levels(build({"sampler": "dpmpp_2m", "steps": 16, "grid": "uniform_lambda"}))


def test_a_grid_has_its_options():
    model = build({"grid": {"name": "edm", "rho": 5, "sigma_max": 50}, "steps": 5})
    theirs = schedules.edm(schedules.Cosine(), 5, rho=5.0, sigma_max=50.0)
    np.testing.assert_array_equal(model.lams(), theirs)
    model = build({"grid": {"name": "explicit", "lams": [-5, 0, 5]}, "steps": 3})
    np.testing.assert_array_equal(model.lams(), [-5, 0, 5])
    with pytest.raises(UsageError, match="give steps=2"):
        build({"grid": {"name": "explicit", "lams": (0.0, 1.0)}, "steps": 3})
    with pytest.raises(UsageError, match="lams is missing"):
        build({"grid": "explicit", "steps": 3})


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_every_row_can_be_built_and_tells_whether_it_needs_the_pair(name):
    sampler = build({"sampler": name}).sampler
    assert sampler.needs_pair == (name != "ddim")
    assert len(sampler.levels(jnp.linspace(-5, 5, 6))) == (11 if name == "heun" else 6)
