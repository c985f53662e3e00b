"""Guidance rules beside the paper's: identities, what they cost, and the units of an interval."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from cfg_jax import executed, experiment, hlo
from cfg_jax.diffusion import (
    clocks,
    corrections,
    denoiser,
    directions,
    guidance,
    logsnr,
    mixture,
    samplers,
    schedules,
    strengths,
)
from cfg_jax.types import Prediction, UsageError

ALL = (-np.inf, np.inf)
FREE = guidance.ClassifierFree

pytestmark = pytest.mark.usefixtures("float64")


D = 5
RNG = np.random.default_rng(0)
MEANS = RNG.standard_normal((D, D))
LAM = np.linspace(-8, 8, 9)
Z = 1.5 * RNG.standard_normal((9, D))


def says(x_of):
    """A denoiser from how it makes x of z, with z = alpha x + sigma eps."""

    def denoise(z, lam):
        x = x_of(z)
        return Prediction(x, logsnr.eps_from_x(z, x, lam))

    return denoise


# Two that differ at every z.
CONDITIONAL = says(lambda z: jnp.tanh(z @ MEANS[:, :1] + MEANS[0]) * jnp.tanh(z))
REFERENCE = says(lambda z: 0.6 * jnp.tanh(z - MEANS[1]))
WITH_C = np.tanh(Z @ MEANS[:, :1] + MEANS[0]) * np.tanh(Z)
WITHOUT = 0.6 * np.tanh(Z - MEANS[1])


@functools.cache
def program(kind, first, second):
    del kind  # see `oracle.by_kind`
    return jax.jit(lambda rule, z, lam: rule(first, second)(z, lam))


def said(rule, first=CONDITIONAL, second=REFERENCE, lam=LAM):
    """What a rule says of Z at lam, its numbers traced."""
    return program(str(jax.tree.structure(rule)), first, second)(rule, Z, lam)


def eps_of(x, lam=LAM):
    lam = np.broadcast_to(lam, 9)[:, None]
    return (Z - oracle.alpha(lam) * x) / oracle.sigma(lam)


def same(a, b, tolerance=1e-10):
    for one, other in zip(a, b, strict=True):
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


# Identities

NEUTRAL = {
    "an interval of all": lambda w: strengths.Interval(FREE(w), *ALL),
    "a constant shape": lambda w: strengths.Scheduled(FREE(w), jnp.ones_like),
    "apg without projection": lambda w: directions.AdaptiveProjected(w, eta=1.0),
    "apg without a bound": lambda w: directions.AdaptiveProjected(w, eta=1.0, bound=np.inf),
    "apg of a large bound": lambda w: directions.AdaptiveProjected(w, eta=1.0, bound=1e9),
    "no rescaling": lambda w: corrections.Rescale(FREE(w), 0.0),
    "all of them": lambda w: strengths.Interval(
        corrections.Rescale(directions.AdaptiveProjected(w, eta=1.0), 0.0), *ALL
    ),
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_a_rule_with_nothing_to_do_is_eq_6(name):
    """For one w and lambda for all, and for one of each an image."""
    for w, lam in [(-1.0, 0.7), (0.0, 0.7), (1.5, 0.7), (np.linspace(-1, 4, 9), LAM)]:
        level = np.broadcast_to(w, 9)[:, None]
        x = (1 + level) * WITH_C - level * WITHOUT
        same(said(NEUTRAL[name](w), lam=lam), (x, eps_of(x, lam)))


@pytest.mark.parametrize("name", NEUTRAL)
def test_w_minus_1_is_the_reference_alone(name):
    same(said(NEUTRAL[name](-1.0), lam=0.3), (WITHOUT, eps_of(WITHOUT, 0.3)))


def rule_of(name, w):
    entry = guidance.GUIDANCE[name]
    return entry(FREE(w) if "rule" in inspect.signature(entry).parameters else w)


REFERRING = [n for n in guidance.GUIDANCE if rule_of(n, 0.0).second == "reference"]


@pytest.mark.parametrize("name", REFERRING)
def test_a_model_guided_by_itself_is_not_guided(name):
    """Autoguidance with the model as its own weaker one, and a label that is its own negative."""
    for w in (-1.0, -0.4, 0.0) if name == "cfg_plus_plus" else (-1.0, 0.5, 4.0):
        out = said(rule_of(name, w), CONDITIONAL, CONDITIONAL, lam=1.2)
        same(out, (WITH_C, eps_of(WITH_C, 1.2)), 1e-9)  # in [-1, 1]: thresholds leave it


def log_prob(z, lam):
    return -jnp.sum(z**2, -1)


@pytest.mark.parametrize("name", guidance.GUIDANCE)
def test_a_rule_keeps_the_pair_or_says_that_it_does_not(name):
    rule = rule_of(name, -0.5)
    second = {"classifier": log_prob}.get(rule.second, REFERENCE)
    x, eps = said(rule, second=second)
    again = oracle.alpha(LAM)[:, None] * x + oracle.sigma(LAM)[:, None] * eps
    assert rule.keeps_pair == np.allclose(again, Z, rtol=1e-9)


def test_cfg_plus_plus_is_the_mixed_image_with_the_noise_of_the_reference():
    """Also inside a correction, and where the chain clips: x is moved, eps is not."""
    w, rule = -0.4, directions.PlusPlus(-0.4)
    x, eps = (1 + w) * WITH_C - w * WITHOUT, eps_of(WITHOUT)
    same(said(rule), (x, eps))
    same(said(directions.PlusPlus(-1.0), lam=0.3), (WITHOUT, eps_of(WITHOUT, 0.3)))
    shrunk = corrections.Rescale(rule, 1.0)
    assert not shrunk.keeps_pair
    factor = (WITH_C.std(1) / x.std(1))[:, None]
    same(said(shrunk), (factor * x, eps))
    clipped = denoiser.clipped(rule(CONDITIONAL, REFERENCE), -0.1, 0.1, keeps_pair=False)
    same(clipped(Z, LAM), (np.clip(x, -0.1, 0.1), eps))


def test_zero_star_is_eq_6_where_its_scale_is_1():
    """v(z, c) = v(z) + something orthogonal to it: then s = 1."""
    base = RNG.standard_normal((9, D))
    more = RNG.standard_normal((9, D))
    more -= np.sum(more * base, 1, keepdims=True) / np.sum(base**2, 1, keepdims=True) * base

    def of_velocity(velocity):
        return lambda z, lam: logsnr.VELOCITY.read(z, velocity, lam)

    both = of_velocity(base + more), of_velocity(base)
    same(said(directions.ZeroStar(1.5), *both), of_velocity(base + 2.5 * more)(Z, LAM))


def test_zero_star_takes_out_what_the_reference_explains():
    """v~ = v(z, c) + w (v(z, c) - s v(z)), where what is left is orthogonal to v(z)."""
    a, s = oracle.alpha(LAM)[:, None], oracle.sigma(LAM)[:, None]
    with_c, without = (a * eps_of(x) - s * x for x in (WITH_C, WITHOUT))
    x, eps = said(directions.ZeroStar(2.0))
    moved = a * np.asarray(eps) - s * x - with_c
    np.testing.assert_allclose(np.sum(moved * without, 1) / np.sum(without**2, 1), 0, atol=1e-9)
    scale = np.sum(with_c * without, 1) / np.sum(without**2, 1)
    assert np.abs(scale - 1).max() > 0.1
    expected = 2 * (with_c - scale[:, None] * without)
    np.testing.assert_allclose(moved, expected, rtol=1e-7, atol=1e-9)


def test_apg_moves_across_x_and_no_further_than_its_bound():
    across = np.asarray(said(directions.AdaptiveProjected(1.0)).x) - WITH_C
    np.testing.assert_allclose(np.sum(across * WITH_C, 1), 0, atol=1e-9)
    d = WITH_C - WITHOUT
    along = np.sum(d * WITH_C, 1, keepdims=True) / np.sum(WITH_C**2, 1, keepdims=True) * WITH_C
    np.testing.assert_allclose(across, d - along, rtol=1e-7, atol=1e-9)
    length = np.linalg.norm(d, axis=1)
    bound = np.median(length)
    moved = np.asarray(said(directions.AdaptiveProjected(1.0, 1.0, bound)).x) - WITH_C
    np.testing.assert_allclose(np.linalg.norm(moved, axis=1), np.minimum(length, bound), rtol=1e-8)


def test_apg_of_nothing_is_nothing():
    """Neither a difference nor an image of no length makes a NaN."""
    nothing = lambda z, lam: Prediction(jnp.zeros_like(z), jnp.zeros_like(z))  # noqa: E731
    rule = directions.AdaptiveProjected(2.0, bound=1.0)
    assert np.all(said(rule, nothing, nothing).x == 0)
    assert np.all(np.isfinite(said(directions.ZeroStar(2.0), nothing, nothing).x))


def test_rescaling_gives_the_spread_of_the_conditional_image():
    free = 5 * WITH_C - 4 * WITHOUT
    whole = said(corrections.Rescale(FREE(4.0), 1.0))
    np.testing.assert_allclose(np.std(whole.x, axis=1), WITH_C.std(1), rtol=1e-9)
    part = said(corrections.Rescale(FREE(4.0), 0.7))
    factor = (0.7 * WITH_C.std(1) / free.std(1) + 0.3)[:, None]
    np.testing.assert_allclose(part.x, factor * free, rtol=1e-9)


def test_a_dynamic_threshold_presses_the_wildest_values_to_one():
    free = 2 * WITH_C - WITHOUT
    s = np.maximum(1, np.quantile(np.abs(free), 0.5, axis=1))[:, None]
    pressed = np.clip(free, -s, s) / s
    same(said(corrections.DynamicThreshold(FREE(1.0), 0.5)), (pressed, eps_of(pressed)))
    # Images in the range are left alone, those beyond it have their largest value at its end.
    largest = np.linspace(0.5, 2, 9)[:, None]
    x = free / np.abs(free).max(1, keepdims=True) * largest
    by_largest = corrections.dynamic_threshold(jnp.asarray(x), 1.0)
    np.testing.assert_allclose(by_largest, x / np.maximum(1, largest), rtol=1e-9)


def test_the_mean_of_denoisers_is_the_geometric_mean_of_densities():
    """One alone is itself; of N(m_k, s^2) it is N(mean of m_k, s^2)."""
    same(denoiser.mixed([CONDITIONAL])(Z, LAM), (WITH_C, eps_of(WITH_C)))
    gaussians = [
        mixture.Mixture(jnp.array([m]), jnp.array([0.4]), jnp.zeros(1)).denoiser()
        for m in (*MEANS[:3], MEANS[:3].mean(0))
    ]
    same(denoiser.mixed(gaussians[:3])(Z, LAM), gaussians[3](Z, LAM))


def test_a_negative_label_in_place_of_null_guides_away_from_it():
    """Eq. (6) on N(m_c, s^2) and N(m_n, s^2) is N((1 + w) m_c - w m_n, s^2)."""
    at = [
        mixture.Mixture(jnp.array([m]), jnp.array([0.4]), jnp.zeros(1)).denoiser()
        for m in (MEANS[0], MEANS[1], 2.5 * MEANS[0] - 1.5 * MEANS[1])
    ]
    same(said(FREE(1.5), at[0], at[1]), at[2](Z, LAM))


def test_rules_inside_rules_are_what_they_are_by_hand():
    """The interval around the rescaling around APG, which is asked once for each of its parts."""
    low, high, w, phi, bound = -3.0, 4.1, 2.0, 0.6, 0.8
    apg = directions.AdaptiveProjected(w, 0.2, bound)
    x, eps = said(strengths.Interval(corrections.Rescale(apg, phi), low, high))
    c, d = WITH_C, WITH_C - WITHOUT
    d = d * np.minimum(1, bound / np.linalg.norm(d, axis=1))[:, None]
    along = np.sum(d * c, 1, keepdims=True) / np.sum(c**2, 1, keepdims=True) * c
    guided = c + w * (d - 0.8 * along)
    guided *= (phi * c.std(1) / guided.std(1) + 1 - phi)[:, None]
    inside = ((LAM >= low) & (LAM < high))[:, None]
    assert 0 < inside.sum() < 9
    expected = np.where(inside, guided, c)
    same((x, eps), (expected, eps_of(expected)), 1e-9)


@pytest.mark.parametrize(
    "make, shape",
    [
        (strengths.linear, lambda u: 2 * (1 - u)),
        (strengths.cosine, lambda u: 1 + np.cos(np.pi * u)),
        (strengths.power_cosine, lambda u: 0.5 * (1 - np.cos(np.pi * (1 - u) ** 4))),
    ],
)
def test_a_schedule_of_w_is_its_formula_in_the_time_of_the_cosine_schedule(make, shape):
    levels = np.linspace(-20, 20, 64)
    assert make(FREE(1.0)).passes(levels) == (64, 64), "a small w is not none"
    u = np.arctan(np.exp(-0.5 * LAM)) / (0.5 * np.pi)
    np.testing.assert_allclose(u, schedules.Cosine().u(LAM), atol=1e-4)  # that one is cut off
    for inner in (FREE, lambda w: corrections.Rescale(FREE(w), 0.3)):
        at_each = said(inner(1.5 * shape(u)))
        same(said(make(inner(1.5))), at_each)
    w = np.linspace(-1, 2, 9)  # one an image
    same(said(make(FREE(w)), lam=LAM[4]), said(FREE(w * shape(u[4])), lam=LAM[4]))
    if make is not strengths.power_cosine:
        between = (np.arange(1000) + 0.5) / 1000
        assert abs(np.mean(shape(between)) - 1) < 1e-6, "the area of a constant w"


# Cost

LEVELS = schedules.uniform_lambda(schedules.Uniform(-6.0, 6.0), 13)  # -6, -5, ..., 6


def counted_chain(first, second):
    """(rule, lams) -> how often a chain ran each of two denoisers, whatever was compiled."""
    counts = [0, 0]

    def count(i, inner):
        def denoise(z, lam):
            jax.debug.callback(lambda: counts.__setitem__(i, counts[i] + 1))
            return inner(z, lam)

        return denoise

    @jax.jit
    def chain(rule, lams):
        guided = rule(count(0, first), count(1, second))
        return samplers.Ancestral(0.3)(guided, lambda i: jnp.asarray(Z), lams).x

    def run(rule, lams):
        counts[:] = 0, 0
        x = jax.block_until_ready(chain(rule, lams))
        jax.effects_barrier()
        return tuple(counts), x

    return run, chain


ENDS = [(low, high) for low in (-9.0, -6.0, -2.5, 0.0) for high in (0.0, 1.0, 3.5, 6.0, 9.0)]


def test_outside_the_interval_the_second_pass_is_not_run():
    """Twenty pairs of ends, one program; half-open where an end is a level; and said beforehand."""
    run, chain = counted_chain(CONDITIONAL, REFERENCE)
    images = set()
    for low, high in ENDS:
        rule = strengths.Interval(FREE(1.0), low, high)
        counts, x = run(rule, LEVELS)
        inside = sum(low <= level < high for level in range(-6, 7))
        assert counts == rule.passes(LEVELS) == (13, inside)
        images.add(np.asarray(x).tobytes())
    assert len(ENDS) == 20 and chain._cache_size() == 1
    assert len(images) > 10, "the ends reach the images"


@pytest.mark.parametrize(
    "rule, counts",
    [
        (strengths.Interval(FREE(-1.0), -2.0, 2.0), (9, 4)),
        (strengths.Interval(FREE(0.0), -2.0, 2.0), (13, 0)),
        (strengths.Interval(corrections.Rescale(FREE(-1.0)), -2.0, 2.0), (13, 4)),
        (strengths.Interval(directions.PlusPlus(-1.0), -2.0, 2.0), (9, 4)),
        (corrections.DynamicThreshold(strengths.Interval(FREE(1.0), -2.0, 2.0)), (13, 4)),
        (strengths.linear(strengths.Interval(FREE(1.0), -2.0, 2.0)), (13, 4)),
        (strengths.Interval(strengths.cosine(FREE(1.0)), -2.0, 2.0), (13, 4)),
        (strengths.Scheduled(FREE(1.0), lambda lam: jnp.where(lam < 3, 0.0, 2.0)), (13, 4)),
    ],
)
def test_passes_are_counted_through_rules_inside_rules(rule, counts):
    assert (
        counted_chain(CONDITIONAL, REFERENCE)[0](rule, LEVELS)[0] == rule.passes(LEVELS) == counts
    )


def test_the_compiled_program_holds_the_second_network_in_a_branch_alone(optimised):
    """Of the products of the reference network none is where every level comes by."""
    wide = 97  # a size that nothing else has

    def network(width):
        a, b = jnp.ones((D, width)), jnp.ones((width, D))
        return lambda z, lam: Prediction(jnp.tanh(z @ a) @ b, z)

    def computations(rule):
        """Names of the computations with a product of the reference, and of those always run."""
        _, chain = counted_chain(network(11), network(wide))
        module = hlo.parse(chain.lower(rule, LEVELS).compile().as_text())

        def is_wide(i, c):
            sides = [*i.result, *(array for o in i.operands if o in c for array in c[o].result)]
            return executed.product_flops(i, c) > 0 and any(wide in side.dims for side in sides)

        holding = {
            name
            for name, c in module.computations.items()
            if any(is_wide(i, c) for i in c.values())
        }
        always, stack = set(), [module.entry]
        while stack:
            name = stack.pop()
            if name in always:
                continue
            always.add(name)
            for i in module.computations[name].values():
                stack += () if i.opcode == "conditional" else i.callees
        return holding, always

    for rule in (strengths.Interval(FREE(1.0), -2.0, 2.0), FREE(1.0)):
        holding, always = computations(rule)
        assert holding and not holding & always
    # One w an image has no one branch to take: both run, and the search above finds it.
    holding, always = computations(FREE(np.ones(9)))
    assert holding & always


# Units


def test_intervals_in_sigma_are_those_of_the_paper():
    """Kynkaanniemi et al. (2024), table 1."""
    sigma = np.array([[0.28, 2.90], [0.19, 1.61], [0.34, 1.02], [0.60, 5.00]])
    lam = clocks.lam_of_sigma(sigma)[:, ::-1]
    told = [[-2.13, 2.55], [-0.95, 3.32], [-0.04, 2.16], [-3.22, 1.02]]
    np.testing.assert_allclose(lam, told, atol=0.005)
    np.testing.assert_allclose(clocks.sigma_of(lam)[:, ::-1], sigma)
    assert clocks.lam_of_sigma(0.0) == np.inf
    default = strengths.Interval(FREE(1.0))
    np.testing.assert_allclose((default.low, default.high), told[0])
    level = -2 * np.log(oracle.sigma(LAM) / oracle.alpha(LAM))
    np.testing.assert_allclose(level, LAM, atol=1e-9)


def test_an_interval_of_steps_is_that_of_their_sigmas():
    """Steps 17 to 22 of the 32 of Karras et al. (2022) are sigma in (0.19, 1.61]."""
    ends = 80.0 ** (1 / 7), 0.002 ** (1 / 7)
    lams = clocks.lam_of_sigma((ends[0] + np.arange(32) / 31 * (ends[1] - ends[0])) ** 7)
    low, high = clocks.interval_of_steps(17, 22, lams)
    inside = np.flatnonzero(strengths.Interval(FREE(1.0), low, high).contains(lams))
    assert inside.tolist() == [*range(17, 23)]
    in_sigma = strengths.Interval(FREE(1.0), *map(float, clocks.lam_of_sigma([1.61, 0.19])))
    assert np.flatnonzero(in_sigma.contains(lams)).tolist() == inside.tolist()
    assert clocks.interval_of_steps(0, 31, lams) == (-np.inf, np.inf)
    # From the clean end, as timesteps count.
    low, high = clocks.interval_of_steps(9, 14, lams[::-1])
    again = strengths.Interval(FREE(1.0), low, high).contains(lams[::-1])
    assert np.flatnonzero(again).tolist() == [*range(9, 15)]


@pytest.mark.parametrize("name", schedules.SCHEDULES)
def test_u_and_lambda_are_two_ways_round(name):
    u, near = np.linspace(0, 1, 41), np.float32([1e-5, 1e-3, 0.3, 0.9, 0.999])
    schedule = schedules.SCHEDULES[name]()
    if name == "discrete":  # its levels are 1,000
        u, near = np.arange(0, 1000, 27) / 999, np.float32([1, 300, 900, 998]) / np.float32(999)
    np.testing.assert_allclose(schedule.u(schedule(u)), u, atol=1e-12)
    assert schedule.u(99.0) == 0 and schedule.u(-99.0) == 1
    with jax.enable_x64(False):
        np.testing.assert_allclose(schedule.u(schedule(near)), near, rtol=2e-4, atol=3e-8)


def test_timesteps_are_those_of_their_betas():
    """By the product of Ho et al. (2020), and the cosine of Nichol & Dhariwal (2021) itself."""
    for name, betas in {
        "linear": np.linspace(1e-4, 0.02, 1000),
        "scaled_linear": np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2,
    }.items():
        bar = np.cumprod(1 - betas)
        np.testing.assert_allclose(clocks.TIMESTEPS[name](), np.log(bar / (1 - bar)), rtol=1e-9)
    u = np.arange(1, 1000) / 1000
    bar = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    bar = np.append(bar, 0.001 * bar[-1])  # where beta is cut at 0.999
    np.testing.assert_allclose(clocks.TIMESTEPS["cosine"](), np.log(bar / (1 - bar)), rtol=1e-6)


@pytest.mark.parametrize("order", [1, -1])
def test_a_level_has_its_place_among_steps(order):
    lams = clocks.TIMESTEPS["linear"]()[::order]
    steps = np.array([0, 3, 500, 999])
    np.testing.assert_allclose(clocks.step_of(lams[steps], lams), steps, atol=1e-9)
    between = clocks.step_of(0.5 * (lams[10] + lams[11]), lams)
    np.testing.assert_allclose(between, 10.5)
    assert clocks.step_of(lams[0] + order * 9, lams) == 0


# Configs


def config(guided, sampler=None):
    digits = experiment.load_config("digits")
    digits["sample"] |= {"guidance": guided} | ({"sampler": sampler} if sampler else {})
    return digits


def test_a_config_nests_rules_as_dicts_do():
    section = {
        "name": "interval",
        "low": -2,
        "rule": {"name": "rescale", "phi": 0.5, "rule": {"name": "apg", "bound": 2}},
    }
    rule = experiment.build(config(section)).guidance(1.5)
    assert rule == strengths.Interval(
        corrections.Rescale(directions.AdaptiveProjected(1.5, 0.0, 2.0), 0.5), -2.0, 2.55
    )
    assert rule.w == 1.5 and rule.second == "reference" and rule.keeps_pair
    plain = experiment.build(config({"name": "cosine"})).guidance(2.0)
    assert plain.rule == FREE(2.0)


@pytest.mark.parametrize(
    "section, told",
    [
        ({"name": "interval", "rule": {"name": "apgg"}}, "sample.guidance.rule.name"),
        ({"name": "interval", "rule": {"phi": 1.0}}, "sample.guidance.rule.phi"),
        ({"name": "interval", "rule": {"w": 1.0}}, "sample.guidance.rule.w"),
        ({"name": "interval", "low": 3.0}, "low=3.0"),
        ({"name": "rescale", "rule": {"name": "scaled_noise"}}, "ScaledNoise"),
        ({"name": "cfg_plus_plus"}, "DDIM"),
        ({"name": "interval", "rule": {"name": "cfg_plus_plus"}}, "Ancestral"),
    ],
)
def test_a_rule_that_cannot_be_is_one_line(section, told):
    with pytest.raises(UsageError, match=told) as error:
        experiment.build(config(section))
    assert "\n" not in str(error.value)


def test_cfg_plus_plus_is_taken_by_a_sampler_that_uses_the_eps_it_is_told():
    built = experiment.build(config({"name": "cfg_plus_plus"}, {"name": "ddim"}))
    assert built.guidance(-0.5) == directions.PlusPlus(-0.5)
    assert built.sampler == samplers.DDIM()
    with pytest.raises(UsageError, match="can be: ddim\\."):
        experiment.check_pair(directions.PlusPlus(-0.5), samplers.Ancestral())


def test_a_negative_label_lies_in_the_classes():
    digits = config({})
    digits["sample"]["negative"] = [3, 10]
    with pytest.raises(UsageError, match=r"\[10\]"):
        experiment.build(digits)
