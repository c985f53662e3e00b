"""References: from a data set, to a file and back; published files; what is refused."""

import jax
import numpy as np
import pytest

from cfg_jax import features, paper, reference, sweep
from cfg_jax.data import datasets
from cfg_jax.metrics import frechet, neighbours
from cfg_jax.runtime import mesh as meshes
from cfg_jax.types import UsageError

COUNT = 2300  # images: more than two chunks of sums


class Pictures:
    """A data set of random pictures."""

    name, split, image_shape, resize = "pictures", "train", (4, 4, 1), "as stored"

    def __init__(self, count=COUNT):
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (count, 4, 4, 1), dtype=np.uint8)
        self.examples = datasets.InMemory(images, rng.integers(0, 3, count).astype(np.int32))

    def load(self, split=None):
        assert split in (None, "train")
        return self.examples


def linear(name="inception", parameters="abc", width=6):
    """An extractor that is a random matrix."""
    rng = np.random.default_rng(1)
    kernel = rng.standard_normal((16, width)).astype(np.float32)

    def look(params, batch):
        x = batch.reshape(len(batch), -1) / np.float32(255)
        return {"features": x @ params, "logits": x @ params, "spatial": (x @ params)[:, :4]}

    mesh = meshes.make_mesh(devices=jax.devices()[:1])
    recipe = {"name": name, "parameters": parameters}
    return features.Extractor(
        name=name, names={"sfd": "sfid"}, look=look, params=kernel, mesh=mesh, recipe=recipe
    )


@pytest.fixture(scope="module")
def made():
    return reference.of_dataset(linear(), Pictures())


def test_moments_are_those_of_all_images(made):
    look, examples = linear(), Pictures().examples
    seen = look(examples.images)
    for name, ours in (("features", made.seen.moments), ("spatial", made.seen.spatial)):
        want = frechet.moments(seen[name])
        assert ours.count == COUNT
        np.testing.assert_array_equal(ours.mean, want.mean)
        np.testing.assert_array_equal(ours.covariance, want.covariance)
    np.testing.assert_array_equal(made.seen.features, seen["features"])
    assert made.recipe["nn"] == pytest.approx(neighbours.among(seen["features"]).mean())
    other = Pictures()
    other.examples.images[-1, 0, 0] ^= 1
    assert reference.of_dataset(look, other).recipe["sha256"] != made.recipe["sha256"]


def test_neighbours_are_of_some_images_evenly_spread(monkeypatch):
    monkeypatch.setattr(reference, "KEPT", 100)
    some = reference.of_dataset(linear(), Pictures())
    assert some.images.shape == (100, 4, 4, 1) and some.recipe["neighbours"] == 100
    everything = Pictures().examples.images
    np.testing.assert_array_equal(some.images[[0, -1]], everything[[0, -1]])
    np.testing.assert_array_equal(some.seen.features, linear()(some.images)["features"])
    assert some.seen.moments.count == some.recipe["images"] == COUNT


def test_a_file_gives_back_what_was_written(made, tmp_path):
    path = tmp_path / "reference.npz"
    reference.save(path, made)
    back = reference.load(path, linear(), image_shape=(4, 4, 1), resize="as stored")
    np.testing.assert_array_equal(back.seen.features, made.seen.features)
    np.testing.assert_array_equal(back.seen.moments.covariance, made.seen.moments.covariance)
    np.testing.assert_array_equal(back.seen.spatial.mean, made.seen.spatial.mean)
    assert back.recipe == {"file": str(path), **made.recipe}


def published(tmp_path, made, **others):
    """A file of the published layout: no recipe, no features."""
    path = tmp_path / "VIRTUAL_pictures.npz"
    moments = {"features": made.seen.moments, "spatial": made.seen.spatial}
    arrays = {"arr_0": made.images}
    for name, (mean, covariance) in reference.MOMENTS.items():
        arrays |= {mean: moments[name].mean, covariance: moments[name].covariance}
    np.savez(path, **{key: a for key, a in (arrays | others).items() if a is not None})
    return path


def test_a_published_file_is_looked_at(made, tmp_path):
    path = published(tmp_path, made)
    back = reference.load(path, linear(), image_shape=(4, 4, 1), resize="as stored")
    np.testing.assert_array_equal(back.seen.features, made.seen.features)
    assert back.seen.moments.count is None and back.recipe["images"] is None
    assert back.recipe["resize"] == "not said" and back.recipe["nn"] == made.recipe["nn"]


def test_what_does_not_fit_is_one_line(made, tmp_path):
    path = tmp_path / "reference.npz"
    reference.save(path, made)
    fits = {"image_shape": (4, 4, 1), "resize": "as stored"}
    cases = [
        (path, linear(), fits | {"image_shape": (8, 8, 1)}, r"images \[4, 4, 1\].*\[8, 8, 1\]"),
        (path, linear("judge"), fits, "features of inception, and judge"),
        (path, linear(width=5), fits, "6 features, and inception sees 5"),
        (path, linear(parameters="abd"), fits, "another inception"),
        (path, linear(), fits | {"resize": "by area"}, r"resized otherwise \(as stored\)"),
        (published(tmp_path, made), linear("judge"), fits, "features of inception"),
        (tmp_path / "absent.npz", linear(), fits, "does not exist"),
    ]
    for where, look, how, words in cases:
        with pytest.raises(UsageError, match=words) as error:
            reference.load(where, look, **how)
        assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match="has no mu, sigma: it has arr_0, mu_s, sigma_s"):
        reference.load(published(tmp_path, made, mu=None, sigma=None), linear(), **fits)
    with pytest.raises(UsageError, match=r"arr_0 is float32 .*uint8"):
        floats = published(tmp_path, made, arr_0=np.float32(made.images))
        reference.load(floats, linear(), **fits)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UsageError, match=r"not a whole \.npz"):
        reference.load(path, linear(), **fits)


# --- labels ---


def test_labels_come_as_often_as_in_training():
    pictures = Pictures()
    labels = sweep.LABELS["training"](COUNT, pictures)
    np.testing.assert_array_equal(np.bincount(labels), np.bincount(pictures.examples.labels))
    assert (labels != np.sort(labels)).any(), "never sorted by class"
    np.testing.assert_array_equal(sweep.LABELS["training"](100, pictures), labels[:100])
    twice = sweep.LABELS["training"](2 * COUNT, pictures)
    np.testing.assert_array_equal(np.bincount(twice), 2 * np.bincount(labels))


# --- the paper's tables ---


def test_the_papers_curves_are_those_of_the_data_set():
    """The paper: Table 1, w = 0.1 at p_uncond = 0.1, and Table 2, w = 4 at T = 256."""
    first = paper.curves({"dataset": {"name": "imagenet64"}})
    assert list(first) == ["p_uncond=0.1", "p_uncond=0.2", "p_uncond=0.5"]
    assert first["p_uncond=0.1"][1] == (0.1, 1.55, 66.11)
    second = paper.curves({"dataset": {"name": "imagenet128"}})
    assert list(second) == ["T=128", "T=256", "T=1024"]
    assert second["T=256"][-1] == (4.0, 21.53, 421.03)
    assert all(len(rows) == 14 for rows in (first | second).values())
    assert paper.curves({"dataset": {"name": "digits"}}) == {}
