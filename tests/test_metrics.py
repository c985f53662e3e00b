"""Metrics: published numbers, closed forms, invariances, and what is refused."""

import functools
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg

from cfg_jax.metrics import (
    bootstrap,
    features,
    frechet,
    inception_score,
    kid,
    neighbours,
    precision_recall,
)
from cfg_jax.metrics.frechet import Moments
from cfg_jax.types import UsageError

FIXTURES = Path(__file__).parent / "fixtures" / "metrics"


@pytest.fixture(scope="module")
def golden():
    """Features and logits, and what torch-fidelity says of them."""
    arrays = dict(np.load(FIXTURES / "metrics.npz"))  # logits: float16 holds them exactly
    return arrays, json.loads((FIXTURES / "metrics.json").read_text())


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def gaussian(mean, covariance):
    return Moments(np.asarray(mean, float), np.asarray(covariance, float))


def covariance(seed, size):
    a = normal(seed, size, size)
    return a @ a.T / size


def rotation(seed, size):
    return np.linalg.qr(normal(seed, size, size))[0]


def one_hot(labels, classes):
    """Logits of a classifier that is certain."""
    return 1000.0 * np.eye(classes)[labels]


# The published evaluators


def test_goldens(golden):
    arrays, expected = golden
    a, b = frechet.moments(arrays["generated"]), frechet.moments(arrays["real"])
    np.testing.assert_allclose(
        frechet.distance(a, b), expected["frechet_inception_distance"], rtol=1e-6
    )
    score = inception_score.inception_score(arrays["logits"], splits=10)
    np.testing.assert_allclose(score.mean, expected["inception_score_mean"], rtol=1e-9)
    np.testing.assert_allclose(score.std, expected["inception_score_std"], rtol=1e-9)
    got = precision_recall.precision_recall(arrays["generated"], arrays["real"], k=3)
    np.testing.assert_allclose(got.precision, expected["precision"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(got.recall, expected["recall"], rtol=0, atol=1e-6)


# Frechet distance


def test_moments_are_those_of_numpy_also_far_from_the_origin():
    x = normal(0, 2345, 7) @ rotation(1, 7) * 0.01 + 1e4
    got = frechet.moments(x)
    np.testing.assert_allclose(got.mean, x.mean(0), rtol=1e-14)
    np.testing.assert_allclose(got.covariance, np.cov(x, rowvar=False), rtol=1e-7, atol=1e-11)
    assert got.count == 2345 and got.covariance.dtype == np.float64


def test_float32_chunks_are_summed_in_float64():
    x = normal(0, 3000, 5).astype(np.float32)
    expected = np.cov(x.astype(np.float64), rowvar=False)
    np.testing.assert_allclose(frechet.moments(x).covariance, expected, rtol=1e-12, atol=1e-13)


def test_sums_stored_between_chunks_go_on_to_the_same_bits(tmp_path):
    x = normal(0, 3500, 6).astype(np.float32)
    total = frechet.sums(x[:1000]) + frechet.sums(x[1000:2000])
    np.savez(tmp_path / "sums.npz", **vars(total))
    stored = np.load(tmp_path / "sums.npz")
    total = frechet.Sums(int(stored["count"]), stored["mean"], stored["scatter"])
    total = total + frechet.sums(x[2000:3000]) + frechet.sums(x[3000:])
    straight = frechet.moments(x)
    np.testing.assert_array_equal(total.moments().mean, straight.mean)
    np.testing.assert_array_equal(total.moments().covariance, straight.covariance)
    # Another chunking is the same to rounding, uneven and single rows included.
    other = frechet.sums(x[:1]) + (frechet.sums(x[1:17]) + frechet.sums(x[17:]))
    np.testing.assert_allclose(other.moments().covariance, straight.covariance, atol=1e-13)


@pytest.mark.parametrize(
    "a, b, expected",
    [
        pytest.param(([1], [[4]]), ([-2], [[0.25]]), 9 + 1.5**2, id="one dimension"),
        pytest.param(
            ([1, 2], np.diag([1, 9])), ([0, 0], np.diag([4, 1])), 5 + 1 + 4, id="diagonal"
        ),
        pytest.param(
            (np.arange(5), covariance(0, 5)), (np.zeros(5), covariance(0, 5)), 30, id="shifted"
        ),
        # tr (uu' vv')^(1/2) = |u.v|
        pytest.param(
            ([0, 0, 0], np.outer([1, 2, 3], [1, 2, 3])),
            ([0, 0, 0], np.outer([2, 0, -1], [2, 0, -1])),
            14 + 5 - 2 * 1,
            id="rank one",
        ),
        # In the plane tr (AB)^(1/2) = (tr AB + 2 (det AB)^(1/2))^(1/2), commuting or not.
        pytest.param(
            ([0, 0], [[2, 1], [1, 2]]),
            ([0, 0], [[5, 0], [0, 1]]),
            4 + 6 - 2 * np.sqrt(12 + 2 * np.sqrt(15)),
            id="not commuting",
        ),
        pytest.param(([3, 4], np.zeros((2, 2))), ([0, 0], np.eye(2)), 25 + 2, id="a point"),
    ],
)
@pytest.mark.filterwarnings("ignore:all images")
def test_distance_of_gaussians_in_closed_form(a, b, expected):
    a, b = gaussian(*a), gaussian(*b)
    np.testing.assert_allclose(frechet.distance(a, b), expected, rtol=1e-13)
    np.testing.assert_allclose(frechet.distance(b, a), expected, rtol=1e-13)


def test_distance_is_that_of_the_matrix_root():
    a, b = gaussian(normal(0, 30), covariance(1, 30)), gaussian(normal(2, 30), covariance(3, 30))
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance).real
    expected = np.sum((a.mean - b.mean) ** 2) + np.trace(a.covariance + b.covariance - 2 * root)
    np.testing.assert_allclose(frechet.distance(a, b), expected, rtol=1e-8)


def test_fewer_images_than_dimensions_cost_no_digits():
    # In the 19 directions that the images span all is exact; around them there is nothing.
    x, y = normal(0, 20, 100), normal(1, 30, 100)
    a, b = frechet.moments(x), frechet.moments(y)
    assert frechet.distance(a, a) < 1e-11
    # The sum of the roots is that of the singular values of the centred data.
    singular = np.linalg.svd((x - x.mean(0)) @ (y - y.mean(0)).T, compute_uv=False)
    overlap = singular.sum() / np.sqrt(19 * 29)
    expected = np.sum((a.mean - b.mean) ** 2) + np.trace(a.covariance + b.covariance) - 2 * overlap
    np.testing.assert_allclose(frechet.distance(a, b), expected, rtol=1e-12)


def test_distance_does_not_see_rotation_translation_or_order():
    x, y = normal(0, 400, 9) * np.arange(1, 10), normal(1, 300, 9)
    expected = frechet.distance(frechet.moments(x), frechet.moments(y))
    turn, shift = rotation(2, 9), 50 * normal(3, 9)
    moved = frechet.moments((x @ turn + shift)[::-1]), frechet.moments(y @ turn + shift)
    np.testing.assert_allclose(frechet.distance(*moved), expected, rtol=1e-10)


def test_identical_images_are_told_of():
    one = frechet.moments(np.full((5, 3), 0.1, np.float32))
    with pytest.warns(UserWarning, match="the same features"):
        frechet.distance(one, gaussian([0, 0, 0], np.eye(3)))


def test_resampled_distance_is_that_of_the_drawn_rows():
    x, reference = normal(0, 50, 4) + 3, frechet.moments(normal(1, 60, 4))
    got = frechet.resampled(x, reference, replicates=3, seed=7)
    for value, drawn in zip(got, bootstrap.resamples(50, replicates=3, seed=7)):
        expected = frechet.distance(frechet.moments(x.repeat(drawn, axis=0)), reference)
        np.testing.assert_allclose(value, expected, rtol=1e-10)


# Inception score


def test_score_of_certain_classifiers_counts_the_classes():
    even = np.tile(np.arange(8), 40)
    assert inception_score.inception_score(one_hot(even, 8)) == pytest.approx((8, 0), abs=1e-9)
    assert inception_score.inception_score(np.zeros((10, 8))) == pytest.approx((1, 0), abs=1e-12)
    # Two classes, seen three to one: exp of the entropy.
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    got = inception_score.inception_score(one_hot([0, 0, 0, 1], 5))
    np.testing.assert_allclose(got.mean, np.exp(entropy), rtol=1e-12)


def test_splits_are_consecutive():
    labels = np.repeat([0, 1, 2, 3], 3)  # sorted by class
    assert inception_score.inception_score(one_hot(labels, 4), splits=1).mean == pytest.approx(4)
    assert inception_score.inception_score(one_hot(labels, 4), splits=4).mean == pytest.approx(1)
    labels = np.array([0, 1, 2, 0, 0, 0])
    got = inception_score.inception_score(one_hot(labels, 3), splits=2)
    assert got == pytest.approx((2, 1), abs=1e-9)  # scores 3 and 1


def test_one_split_sees_no_order_and_no_offset():
    logits = 2 * normal(0, 60, 12)
    expected = inception_score.inception_score(logits).mean
    shuffled = logits[np.random.default_rng(1).permutation(60)]
    shifted = shuffled + 700 * normal(2, 60, 1)
    np.testing.assert_allclose(inception_score.inception_score(shifted).mean, expected, rtol=1e-11)
    ten = [inception_score.inception_score(x, splits=10).mean for x in (logits, shuffled)]
    assert abs(ten[0] - ten[1]) > 1e-3


def test_sets_are_of_5000_images_and_what_is_left():
    logits = 2 * normal(0, 10_001, 4)

    def of(*parts):
        return np.mean([inception_score.inception_score(p, splits=1).mean for p in parts])

    for count, parts in (
        (4990, [logits[:4990]]),
        (10_000, [logits[:5000], logits[5000:10_000]]),
        (7000, [logits[:5000], logits[5000:7000]]),
        (10_001, [logits[:5000], logits[5000:]]),  # no set of one image
    ):
        assert inception_score.inception_score(logits[:count]).mean == pytest.approx(of(*parts))


def test_resampled_score_is_that_of_the_drawn_rows():
    logits = 2 * normal(0, 1200, 6)
    got = inception_score.resampled(logits, replicates=3, seed=7)
    for value, drawn in zip(got, bootstrap.resamples(1200, replicates=3, seed=7)):
        expected = inception_score.inception_score(logits.repeat(drawn, axis=0)).mean
        np.testing.assert_allclose(value, expected, rtol=1e-12)


# Precision and recall


def brute_force(generated, real, k):
    """Precision and recall from the definition, all distances at once."""

    def distances(a, b):
        return np.linalg.norm(a[:, None] - b[None], axis=-1)

    def radii(x):
        return np.sort(distances(x, x), axis=1)[:, k]  # column 0 is the point itself

    d = distances(generated, real)
    return (d <= radii(real)).any(1).mean(), (d <= radii(generated)[:, None]).any(0).mean()


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_by_definition_over_several_blocks(monkeypatch, k):
    monkeypatch.setattr(features, "BLOCK", 16)
    generated, real = 0.7 * normal(0, 75, 3) + 0.3, normal(1, 50, 3)
    got = precision_recall.precision_recall(generated, real, k=k)
    assert got == pytest.approx(brute_force(generated, real, k), abs=1e-12)
    assert 0 < got.recall < got.precision < 1
    there = precision_recall.precision_recall(real, generated, k=k)
    assert there == got[::-1]


def test_a_ball_reaches_its_kth_neighbour_and_no_further():
    real = np.array([[0.0], [1.0], [2.0], [4.0]])  # with k = 1 the balls have radii 1, 1, 1, 2
    generated = np.array([[-1.0], [-1.01], [6.0], [6.01], [2.5]])
    inside = precision_recall.inside(generated, real, k=1)
    np.testing.assert_array_equal(inside.generated, [True, False, True, False, True])


def test_inside_says_which_images():
    near, far = normal(0, 30, 2), normal(1, 10, 2) + 100
    inside = precision_recall.inside(np.concatenate([near, far]), near, k=3)
    np.testing.assert_array_equal(inside.generated, [True] * 30 + [False] * 10)
    assert inside.real.all()


def test_precision_and_recall_far_from_the_origin():
    generated, real = 0.7 * normal(0, 60, 3) + 0.3, normal(1, 50, 3)
    turn = rotation(2, 3)
    expected = precision_recall.precision_recall(generated, real)
    moved = precision_recall.precision_recall(generated @ turn + 1e7, (real @ turn + 1e7)[::-1])
    assert moved == pytest.approx(expected, abs=1e-12)


def test_copies_are_at_no_distance_and_told_of():
    # One image nine times, far from the rest: its ball is a point, and copies of it lie inside.
    real = np.concatenate([normal(0, 40, 33), np.tile(1e3 * normal(1, 33), (9, 1))])
    generated = np.concatenate([real[-2:], real[-2:] * (1 + 1e-4)])
    with pytest.warns(UserWarning, match="9 of 49 real"):
        inside = precision_recall.inside(generated, real, k=3)
    np.testing.assert_array_equal(inside.generated, [True] * 2 + [False] * 2)


# Kernel distance


def test_discrepancy_by_definition():
    x, y = normal(0, 6, 3), normal(1, 5, 3) + 1

    def k(a, b):
        return (a @ b / 3 + 1) ** 3

    xx = np.mean([k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j])
    yy = np.mean([k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j])
    xy = np.mean([k(a, b) for a in x for b in y])
    np.testing.assert_allclose(kid.discrepancy(x, y), xx + yy - 2 * xy, rtol=1e-12)


def test_kid_and_its_error_in_closed_form():
    # (1 + xy)^3 compares three moments: 3 (dm1)^2 + 3 (dm2)^2 + (dm3)^2 for points of a line.
    expected = 3 * 0.5**2 + 3 * 0.25**2 + 1.625**2
    trials = [
        kid.kid(normal((1, i), 150, 1) + 0.5, normal((2, i), 150, 1), subsets=40) for i in range(60)
    ]
    values, errors = np.array(trials).T
    spread = values.std(ddof=1)
    assert abs(values.mean() - expected) < 4 * spread / np.sqrt(60)
    assert 0.7 < errors.mean() / spread < 1.4


def test_kid_has_no_bias_between_equal_distributions():
    values = [kid.kid(normal((1, i), 40, 8), normal((2, i), 60, 8), subsets=20) for i in range(60)]
    values = np.array([v.value for v in values])
    assert abs(values.mean()) < 4 * values.std() / np.sqrt(60)
    assert (values < 0).any()


def test_kid_of_sets_balanced_over_classes_is_too_low_by_what_its_page_says():
    classes, each, n = 5, 8, 40
    balanced = np.repeat(3 * np.eye(classes), each, axis=0)  # every image is its class
    within, between = (9 / classes + 1) ** 3, 1
    want = -2 * (classes - 1) / (classes * (n - 1)) * (within - between)
    np.testing.assert_allclose(kid.discrepancy(balanced, balanced), want, rtol=1e-12)
    rng = np.random.default_rng(0)
    draws = [3 * np.eye(classes)[rng.integers(0, classes, (2, n))] for _ in range(200)]
    assert abs(np.mean([kid.discrepancy(*pair) for pair in draws])) < 0.3 * abs(want)


def test_kid_follows_its_seed_and_its_subset_size():
    x, y = normal(0, 90, 5), normal(1, 80, 5)
    assert kid.kid(x, y, seed=3) == kid.kid(x, y, seed=3) != kid.kid(x, y, seed=4)
    assert kid.kid(x, y) == kid.kid(x, y, subset_size=40)
    turn = rotation(2, 5)
    assert kid.kid(x @ turn, y @ turn) == pytest.approx(kid.kid(x, y), rel=1e-9)


# Bootstrap


def test_the_interval_of_a_mean():
    values = normal(0, 400) + 5
    resampled = bootstrap.resampled_mean(values, replicates=2000)
    error = values.std() / 20
    np.testing.assert_allclose(resampled.std(), error, rtol=0.06)
    low, high = bootstrap.interval(values.mean(), resampled)
    expected = np.array([-1.96, 1.96]) * error
    np.testing.assert_allclose([low, high] - values.mean(), expected, rtol=0.08)
    # A biased statistic's interval is still around the estimate.
    assert bootstrap.interval(values.mean(), resampled + 9) == pytest.approx((low, high))


def test_resamples_pair_what_one_seed_made():
    drawn = bootstrap.resamples(30, replicates=5, seed=1)
    assert drawn.shape == (5, 30) and (drawn.sum(1) == 30).all() and drawn.max() > 1
    np.testing.assert_array_equal(bootstrap.resamples(30, replicates=9, seed=1)[:5], drawn)
    assert (bootstrap.resamples(30, replicates=5, seed=2) != drawn).any()
    values = normal(0, 30)
    better = bootstrap.resampled_mean(values + 0.1) - bootstrap.resampled_mean(values)
    np.testing.assert_allclose(better, 0.1, atol=1e-12)


# What is refused


GOOD = normal(0, 12, 3)
NAN, INFINITE = GOOD.copy(), GOOD.astype(np.float32)
NAN[5, 1] = np.nan
INFINITE[7, 2] = np.inf


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: frechet.moments(GOOD[:1]), "1 images were given; this metric needs 2"),
        (lambda: frechet.sums(GOOD[:1]).moments(), "2 or more"),
        (lambda: frechet.moments(GOOD[:, 0]), r"an array \[12\] of float64"),
        (lambda: frechet.moments(GOOD[:, :0]), "a matrix"),
        (lambda: frechet.moments(NAN), "NaN or infinity at image 5;"),
        (lambda: frechet.moments(INFINITE), "NaN or infinity at image 7;"),
        (lambda: frechet.moments(-INFINITE), "NaN or infinity at image 7;"),
        (lambda: frechet.moments(GOOD + 1j), "real numbers"),
        (lambda: frechet.sums(GOOD) + frechet.sums(GOOD[:, :2]), "3 and of 2 dimensions"),
        (lambda: frechet.distance(gaussian([0], [[1]]), gaussian([0, 0], np.eye(2))), "1 and of 2"),
        (lambda: gaussian([0, 0], np.eye(3)), r"a mean \[2\]"),
        (lambda: gaussian([0, np.nan], np.eye(2)), "NaN"),
        (lambda: gaussian([0, 0], [[1, 0.5], [0, 1]]), "symmetric"),
        (
            lambda: frechet.distance(
                gaussian([0, 0], np.diag([1, -1])), gaussian([0, 0], np.eye(2))
            ),
            "eigenvalue -1",
        ),
        (lambda: inception_score.inception_score(NAN), "logits: NaN"),
        (lambda: inception_score.inception_score(GOOD[:1]), "logits: 1 images"),
        (lambda: inception_score.inception_score(GOOD, splits=5), "splits=5: must divide the 12"),
        (lambda: inception_score.inception_score(GOOD, splits=24), "splits=24"),
        (lambda: inception_score.inception_score(GOOD, splits=12), "2 or more"),
        (lambda: inception_score.inception_score(GOOD, splits=0), "splits=0"),
        (lambda: inception_score.resampled(GOOD, replicates=1), "replicates=1"),
        (lambda: precision_recall.precision_recall(GOOD[:3], GOOD), "generated images: 3 images"),
        (lambda: precision_recall.precision_recall(GOOD, GOOD[:3]), "real images: 3 images"),
        (lambda: precision_recall.precision_recall(GOOD, NAN), "real images: NaN"),
        (lambda: precision_recall.precision_recall(GOOD, GOOD[:, :2]), "3 dimensions .* real"),
        (lambda: precision_recall.precision_recall(GOOD, GOOD, k=0), "k=0"),
        (lambda: kid.kid(GOOD, GOOD[:3]), "needs 4"),
        (lambda: kid.kid(INFINITE, GOOD), "generated images: NaN"),
        (lambda: kid.kid(GOOD, GOOD, subset_size=12), "subset_size=12: from 2 to 11"),
        (lambda: kid.kid(GOOD, GOOD, subset_size=1), "subset_size=1:"),
        (lambda: kid.kid(GOOD, GOOD, subsets=1), "subsets=1:"),
        (lambda: bootstrap.interval(0.0, [1, 2], level=95), "level=95"),
    ],
)
def test_degenerate_input_is_refused_in_one_line(call, message):
    with pytest.raises(UsageError, match=message) as refused:
        call()
    assert "\n" not in str(refused.value)


def test_as_few_images_as_each_metric_can_do_with():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        few = normal(0, 4, 2)
        assert frechet.moments(few[:2]).count == 2
        assert inception_score.inception_score(few, splits=2).mean >= 1
        assert precision_recall.precision_recall(few, few) == (1, 1)
        assert np.isfinite(kid.kid(few, few + 1)).all()


# --- neighbours, strata ---


def test_nearest_by_definition_over_several_blocks(monkeypatch):
    monkeypatch.setattr(features, "BLOCK", 16)
    generated, real = normal(0, 45, 3), 5 + normal(1, 50, 3)
    generated[7] = real[33]
    want = np.linalg.norm(generated[:, None] - real[None], axis=-1).min(1)
    got = neighbours.nearest(generated, real)
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert got[7] == 0
    apart = np.linalg.norm(real[:, None] - real[None], axis=-1) + np.diag(np.full(50, np.inf))
    np.testing.assert_allclose(neighbours.among(real), apart.min(1), atol=1e-6)


def test_strata_are_resampled_within_themselves():
    strata = np.arange(50) % 7
    drawn = bootstrap.resamples(50, replicates=20, seed=3, strata=strata)
    for value in range(7):
        assert (drawn[:, strata == value].sum(1) == np.sum(strata == value)).all()
    assert len(np.unique(drawn, axis=0)) == 20
    np.testing.assert_array_equal(
        drawn[:5], bootstrap.resamples(50, replicates=5, seed=3, strata=strata)
    )
    # A value that its stratum decides does not move; without strata it does.
    assert np.ptp(bootstrap.resampled_mean(strata, strata=strata)) < 1e-12
    assert np.std(bootstrap.resampled_mean(strata)) > 0.1


def test_the_frechet_distance_and_the_score_take_strata():
    rows, strata = normal(0, 60, 4), np.arange(60) % 6
    rows += 10 * np.eye(6)[strata, :4]
    logits = 8.0 * np.eye(6)[strata]
    for resampled in (
        functools.partial(frechet.resampled, rows, frechet.moments(rows)),
        functools.partial(inception_score.resampled, logits),
    ):
        assert np.std(resampled(replicates=50, strata=strata)) < 0.5 * np.std(
            resampled(replicates=50)
        )
