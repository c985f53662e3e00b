"""Figure 2: densities that are what section 3.1 says, and do what the paper says of them."""

import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from cfg_jax import figure2

CLASSES = figure2.three_classes()
STRENGTHS = (0.0, 1.0, 2.0, 4.0, 8.0)


@pytest.fixture(scope="module")
def guided():
    """By w, the guided conditionals on the plane, [K, N]."""
    points, area = figure2.plane()
    conditionals = [figure2.guided_conditionals(CLASSES, w, points, area) for w in STRENGTHS]
    return dict(zip(STRENGTHS, map(np.asarray, conditionals))), np.asarray(points), area


def test_without_guidance_it_is_the_marginal():
    """Whose normalisation is known: so the square holds all of it, and the sums are integrals."""
    points, area = figure2.plane()
    unequal = figure2.Mixture(CLASSES.means, CLASSES.stds, jnp.log(jnp.array([1.0, 2.0, 5.0])))
    for mixture in (CLASSES, unequal):
        marginal = np.exp(mixture.log_density(points, jnp.inf))
        assert marginal.sum() * area == pytest.approx(1, abs=1e-4)
        got = figure2.guided_mixture(mixture, 0.0, points, area)
        np.testing.assert_allclose(got, marginal, rtol=2e-4, atol=1e-6)


def test_each_is_the_guided_conditional_normalised_by_itself(guided):
    """p(z|c) p(c|z)^w / Z_c in float64 by other means, on a plane of twice the width."""
    by_w, points, area = guided
    wide = np.asarray(figure2.plane(2 * figure2.EXTENT, 2 * figure2.SIZE)[0], np.float64)
    means, spread = np.asarray(CLASSES.means, np.float64), float(CLASSES.stds[0])

    def unnormalised(z, c, w):
        likelihood = np.exp(-0.5 * ((z[:, None] - means) ** 2).sum(-1) / spread**2)
        return likelihood[:, c] * (likelihood[:, c] / likelihood.sum(1)) ** w

    for w, got in by_w.items():
        for c in range(3):
            expected = unnormalised(points, c, w) / (unnormalised(wide, c, w).sum() * area)
            np.testing.assert_allclose(got[c], expected, rtol=1e-3, atol=1e-5)
        assert figure2.guided_mixture(CLASSES, w, points, area).sum() * area == pytest.approx(1)


def test_mass_moves_away_from_the_other_classes_and_concentrates(guided):
    by_w, points, area = guided
    means = np.asarray(CLASSES.means)
    for c in range(3):
        outward = [area * by_w[w][c] @ points @ means[c] for w in STRENGTHS]
        assert outward[0] == pytest.approx(1, abs=1e-3), "the centre itself"
        assert np.all(np.diff(outward) > 0.03), outward
        to_others = np.linalg.norm(points[:, None] - np.delete(means, c, 0), axis=-1).min(1)
        near_others = [area * by_w[w][c] @ (to_others < 1) for w in STRENGTHS]
        assert np.all(np.diff(near_others) < 0), near_others
    entropy = [-np.sum(area * p[0] * np.log(p[0] + 1e-30)) for p in by_w.values()]
    assert np.all(np.diff(entropy) < -0.02), entropy


def test_the_command_draws_a_panel_for_each_w(cli, tmp_path):
    result = cli("figure2", "--w=0,2,6", f"--out={tmp_path}/pictures/two.png")
    assert result.status == 0, result.err[-2000:]
    assert "w=6 (scale 7)" in result.out
    picture = np.asarray(PIL.Image.open(tmp_path / "pictures" / "two.png").convert("L"))
    assert picture.shape == (405, 1080)
    dark = [(panel < 128).sum() for panel in np.split(picture, 3, axis=1)]
    assert all(count > 500 for count in dark) and len(set(dark)) == 3


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--w=0,-2"], "w=-2.0"),
        (["--w=0;1"], "--w=0,1,4"),
        (["--out=figure.pdf"], "ends in .png"),
    ],
)
def test_a_mistake_is_one_line(cli, tmp_path, flags, told):
    result = cli("figure2", f"--out={tmp_path}/figure.png", *flags)
    assert result.status == 2 and len(result.errors) == 1 and told in result.errors[0]
    assert not list(tmp_path.iterdir())
