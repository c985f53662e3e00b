"""References: from a data set, to a file and back; published files; what is refused."""

import dataclasses

import jax
import numpy as np
import pytest

from cfg_jax import features, panel, paper, reference, sweep
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
    at = [np.flatnonzero((everything == image).all((1, 2, 3))).item() for image in some.images]
    assert (at[0], at[-1]) == (0, COUNT - 1) and {*np.diff(at)} == {23, 24}, "2,299 / 99 = 23.2"
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


@dataclasses.dataclass(frozen=True)
class Described:
    """Pictures as a data set describes itself."""

    split: str = "train"
    data_dir: str | None = None
    name, image_shape, resize = Pictures.name, Pictures.image_shape, Pictures.resize

    def load(self, split):
        return Pictures(30 if split == "train" else 20).examples


def test_what_was_seen_is_kept_for_the_same_network_and_images(tmp_path):
    first = reference.kept(linear(), Described(), tmp_path)
    (path,) = tmp_path.iterdir()
    again = reference.kept(linear(), Described(data_dir="/elsewhere"), tmp_path)
    assert again.recipe == {"file": str(path), **first.recipe}
    np.testing.assert_array_equal(again.seen.features, first.seen.features)
    others = [(linear(parameters="abd"), Described()), (linear(), Described(split="test"))]
    for i, (look, dataset) in enumerate(others):
        assert "file" not in reference.kept(look, dataset, tmp_path).recipe
        assert len(list(tmp_path.iterdir())) == 2 + i


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


# --- several extractors ---


def test_scores_say_whose_features_they_are_of(made):
    """Names of one network's own are plain; of the rest only those of the first extractor are."""
    rng = np.random.default_rng(2)
    images = rng.integers(0, 256, (40, 4, 4, 1), dtype=np.uint8)
    judge = dataclasses.replace(
        linear("judge"), names={"fd": "fd_judge", "is": "is_judge"}, judge="of three classes"
    )
    network = dataclasses.replace(linear(), names={"fd": "fid", "sfd": "sfid", "is": "is"})
    saw = network(images)
    saw = {"inception": saw, "judge": {name: saw[name] for name in ("features", "logits")}}

    labels = np.arange(40) % 3

    def names(*looks, labels=labels):
        of = panel.Panel(looks, [made] * len(looks))
        return set(of.score([saw[look.name] for look in looks], labels, resample=False))

    own = {"fd_judge", "is_judge", "fid", "sfid", "is"}
    rest = {"precision", "recall", "kid", "nn"}
    of_judge, of_network = (
        {f"{name}_{whose}" for name in rest} for whose in ("judge", "inception")
    )
    assert names(judge, network) == own | rest | of_network | {"accuracy"}
    assert names(network, judge) == own | rest | of_judge | {"accuracy_judge"}
    assert names(network) == own - {"fd_judge", "is_judge"} | rest
    assert names(judge, labels=None) == {"fd_judge", "is_judge"} | rest


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
