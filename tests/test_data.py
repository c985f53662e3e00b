"""Data: what the sets hold, batches as a function of the step, and images."""

import math
import subprocess
import sys
import threading

import jax
import numpy as np
import PIL.Image
import pytest
import sklearn.datasets
import tensorflow_datasets as tfds

from cfg_jax.data import batches, builders, datasets, images
from cfg_jax.types import UsageError


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("tfds"))


@pytest.fixture(scope="module")
def digits(data_dir):
    return datasets.DATASETS["digits"](data_dir=data_dir)


def counting(size, *, shape=(4, 4, 1)):
    """Examples whose labels are their own indices, and whose images say so in their left column."""
    image = np.zeros((size, *shape), np.uint8)
    image[:, :, 0, :] = (np.arange(size) % 255 + 1)[:, None, None]
    return datasets.InMemory(image, np.arange(size, dtype=np.int32))


def make(examples, **options):
    options = {"batch_size": 8, "seed": 0, "flip": False, **options}
    return batches.Batches(examples=examples, **options)


def rows(batches_, steps):
    """The global rows of some steps: images and labels, one array each."""
    got = [batches_[step] for step in steps]
    return [np.concatenate([batch[key] for batch in got]) for key in ("image", "label")]


# Data sets


def sorted_rows(image, label):
    table = np.concatenate([label[:, None], image.reshape(len(label), -1)], axis=1)
    return table[np.lexsort(table.T)]


def test_digits_are_those_of_sklearn_split_by_writer(digits):
    expected = sklearn.datasets.load_digits()
    image = np.rint(expected.images * 255 / 16)
    for split, part in ("train", slice(1415)), ("test", slice(1415, None)):
        got = digits.load(split)
        assert got.images.dtype == np.uint8 and got.labels.dtype == np.int32
        assert got.images.shape[1:] == digits.image_shape == (8, 8, 1)
        np.testing.assert_array_equal(
            sorted_rows(got.images, got.labels), sorted_rows(image[part], expected.target[part])
        )


def test_digits_describe_themselves(digits):
    assert digits.splits() == {"train": 1415, "test": 382}
    assert digits.num_classes == 10 and digits.classes == tuple("0123456789") and not digits.flip
    counts = np.bincount(digits.load("train+test").labels)
    assert counts.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_split_language(digits):
    first, rest = digits.load("train[:90%]"), digits.load("train[90%:]")
    whole = digits.load("train")
    assert len(first) == 1274
    np.testing.assert_array_equal(np.concatenate([first.labels, rest.labels]), whole.labels)


@pytest.mark.parametrize("split", ["valid", "train[:x]", "train[:0]"])
def test_unknown_or_empty_split(digits, split):
    with pytest.raises(UsageError, match="split") as error:
        digits.load(split)
    assert split in str(error.value) and "\n" not in str(error.value)


def test_padding_and_resizing(data_dir, digits):
    plain = digits.load("test")
    padded = datasets.DATASETS["digits"](data_dir=data_dir, pad=2)
    assert padded.image_shape == padded.load("test").images.shape[1:] == (12, 12, 1)
    np.testing.assert_array_equal(padded.load("test").images[:, 2:-2, 2:-2], plain.images)
    assert padded.load("test").images.sum() == plain.images.sum(dtype=int)
    small = datasets.DATASETS["digits"](data_dir=data_dir, size=4)
    means = plain.images.reshape(-1, 4, 2, 4, 2, 1).mean((2, 4)).round()
    assert small.image_shape == (4, 4, 1)
    np.testing.assert_array_equal(small.load("test").images, means)


def test_large_sets_stay_on_disk(monkeypatch, digits):
    whole = digits.load("test")
    monkeypatch.setattr(datasets, "IN_MEMORY_BYTES", 382 * 64 - 1)
    lazy = digits.load("test")
    assert isinstance(lazy, datasets.OnDisk) and isinstance(whole, datasets.InMemory)
    for key in "image", "label":
        np.testing.assert_array_equal(lazy[[381, 0, 7]][key], whole[[381, 0, 7]][key])
        assert lazy[3:5][key].dtype == whole[3:5][key].dtype
        assert make(lazy)[3][key].tolist() == make(whole)[3][key].tolist()


def test_stock_names_need_no_code(tmp_path):
    kmnist = datasets.DATASETS["tfds"](builder="kmnist", pad=2, data_dir=str(tmp_path))
    assert (kmnist.num_classes, kmnist.image_shape) == (10, (32, 32, 1))
    assert kmnist.classes[:3] == ("o", "ki", "su")
    cifar10 = datasets.DATASETS["cifar10"]()
    assert (cifar10.image_shape, cifar10.classes[9], cifar10.flip) == ((32, 32, 3), "truck", True)
    assert len(cifar10.classes) == cifar10.num_classes
    varied = datasets.Tfds(builder="imagenette/160px-v2")
    with pytest.raises(UsageError, match="size=64"):
        _ = varied.image_shape
    assert datasets.Tfds(builder="imagenette/160px-v2", size=64).image_shape == (64, 64, 3)


def test_images_of_many_sizes_become_one(tmp_path):
    rng = np.random.default_rng(0)
    photos = [rng.integers(0, 256, (*sides, 3), np.uint8) for sides in [(9, 14), (30, 17), (8, 8)]]

    class Photos(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(),
                "label": tfds.features.ClassLabel(names="abc"),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {"validation": builders._records(photos, range(3))}

        def _generate_examples(self):
            pass

    Photos(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    mine = datasets.Tfds(builder="photos", size=8, data_dir=str(tmp_path))
    assert (mine.classes, mine.image_shape) == (("a", "b", "c"), (8, 8, 3))
    got = mine.load("validation")
    for image, label in zip(got.images, got.labels):
        square = images.central_square(photos[label])
        np.testing.assert_array_equal(image, images.area_resize(square, 8, 8))


def test_unknown_builder_names_its_neighbours():
    with pytest.raises(UsageError, match="did you mean fashion_mnist"):
        _ = datasets.Tfds(builder="fashon_mnist").num_classes
    with pytest.raises(UsageError, match="160px-v2"):
        _ = datasets.Tfds(builder="imagenette/99").num_classes


def test_no_labels():
    with pytest.raises(UsageError, match="has no label"):
        _ = datasets.Tfds(builder="downsampled_imagenet/64x64").num_classes


def test_not_prepared_says_the_command(tmp_path):
    with pytest.raises(UsageError) as error:
        datasets.DATASETS["fashion_mnist"]().load(data_dir=str(tmp_path))
    command = f"python -m cfg_jax.prepare --dataset=fashion_mnist --data_dir={tmp_path}"
    assert command in str(error.value) and "\n" not in str(error.value)


FIRST_USE = """
import sys
from cfg_jax.data import datasets
digits = datasets.DATASETS["digits"](data_dir=sys.argv[1])
digits.num_classes  # all imports done
print("ready", flush=True)
sys.stdin.readline()
print(len(digits.load("train+test")))
"""


def test_first_use_by_two_processes_at_once(tmp_path):
    command = [sys.executable, "-c", FIRST_USE, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as racer:
        assert racer.stdout.readline() == "ready\n"
        racer.stdin.write("go\n")
        racer.stdin.flush()
        assert len(datasets.DATASETS["digits"](data_dir=tmp_path).load("train+test")) == 1797
        out, err = racer.communicate(timeout=120)
    assert out.endswith("1797\n") and racer.returncode == 0, err
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]


def test_loser_of_the_race_reads_what_the_winner_wrote(tmp_path, monkeypatch):
    """The same race, in the order that hurts: both have written before either renames."""
    winner, loser = (builders.builder("digits", tmp_path) for _ in range(2))
    builders.prepare(winner)
    answers = iter([False, True])  # not yet, when it looked first; by now, after its rename failed
    monkeypatch.setattr(builders, "is_prepared", lambda builder: next(answers))
    assert builders.count(builders.prepare(loser)) == {"train": 1415, "test": 382}
    assert next(answers, None) is None
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]


# Batches


@pytest.mark.parametrize("processes", [2, 4])
def test_the_same_rows_for_any_number_of_processes(processes):
    examples = counting(29)
    one = make(examples, flip=True, seed=3)
    many = [
        make(examples, flip=True, seed=3, process_index=index, process_count=processes)
        for index in range(processes)
    ]
    for step in (0, 3, 4, 1000):  # step 3 straddles two epochs
        parts = [part[step] for part in many]
        assert all(len(part["label"]) == 8 // processes for part in parts)
        for key in "image", "label":
            joined = np.concatenate([part[key] for part in parts])
            np.testing.assert_array_equal(joined, one[step][key])


def test_every_epoch_is_another_permutation():
    _, labels = rows(make(counting(20), seed=1), range(15))  # 120 rows: 6 epochs, most straddled
    epochs = labels.reshape(6, 20)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(20), (6, 1)))
    assert len(np.unique(epochs, axis=0)) == 6
    assert not (epochs == np.arange(20)).all(axis=1).any()


def test_a_batch_may_hold_several_epochs():
    label = make(counting(3), batch_size=8)[0]["label"]
    assert sorted(label[:3]) == sorted(label[3:6]) == [0, 1, 2]


def test_orders_are_fair():
    """Each example is equally likely at each place: chi-squared over 4,000 epochs of 6."""
    _, labels = rows(make(counting(6), batch_size=6), range(4000))
    counts = np.stack([np.bincount(place, minlength=6) for place in labels.reshape(-1, 6).T])
    chi2 = ((counts - 4000 / 6) ** 2 / (4000 / 6)).sum()
    assert chi2 < 25 + 5 * math.sqrt(2 * 25)  # 25 degrees of freedom


def test_seeds_differ_and_their_epochs_too():
    """Also seed s + 1 is not seed s one epoch on."""
    orders = [rows(make(counting(20), batch_size=20, seed=seed), range(4))[1] for seed in range(3)]
    assert len(np.unique(np.reshape(orders, (12, 20)), axis=0)) == 12


def test_random_access_is_sequential_and_repeatable():
    examples = counting(29)
    forward = rows(make(examples, flip=True), range(10))
    backward = [make(examples, flip=True)[step] for step in reversed(range(10))][::-1]
    np.testing.assert_array_equal(forward[0], np.concatenate([b["image"] for b in backward]))
    np.testing.assert_array_equal(forward[1], np.concatenate([b["label"] for b in backward]))


def test_the_stream_is_the_one_that_runs_were_trained_on():
    """A change of the order would resume old runs on other rows: it must be meant."""
    batch = make(counting(29), flip=True, seed=5)[100]
    assert batch["label"].tolist() == [26, 11, 28, 5, 2, 20, 1, 21]
    assert (batch["image"][:, 0, 0, 0] == 0).tolist() == [0, 0, 1, 1, 0, 0, 1, 0]


def test_flips_are_half_and_only_where_allowed():
    image, label = rows(make(counting(29), flip=True, batch_size=1000), range(20))
    original = counting(29).images[label]
    flipped = image[:, 0, 0, 0] == 0
    np.testing.assert_array_equal(image[~flipped], original[~flipped])
    np.testing.assert_array_equal(image[flipped], original[flipped][:, :, ::-1])
    assert abs(flipped.mean() - 0.5) < 4 * 0.5 / math.sqrt(len(flipped))
    # An example has another coin each time it is shown, and neighbours have their own.
    assert all(0.4 < flipped[label == index].mean() < 0.6 for index in range(29))
    assert abs((flipped[1:] == flipped[:-1]).mean() - 0.5) < 4 * 0.5 / math.sqrt(len(flipped))
    image, label = rows(make(counting(29), flip=False, batch_size=1000), range(2))
    np.testing.assert_array_equal(image, counting(29).images[label])


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"process_count": 3}, {"seed": -1}])
def test_wrong_batches(options):
    with pytest.raises(UsageError):
        make(counting(29), **options)


def test_iterate_yields_the_steps_in_order_from_any_start():
    data = make(counting(29), flip=True)
    stream = batches.iterate(data, 7, threads=3)
    for expected in range(7, 20):
        step, batch = next(stream)
        assert step == expected
        np.testing.assert_array_equal(batch["image"], data[step]["image"])


class Failing:
    def __len__(self):
        return 100

    def __getitem__(self, indices):
        raise OSError("the disk is gone")


def test_iterate_ends_its_threads_and_passes_errors_on():
    before = set(threading.enumerate())
    stream = batches.iterate(make(counting(29)), threads=2)
    next(stream)
    started = set(threading.enumerate()) - before
    assert started  # ahead of its reader
    stream.close()
    for thread in started:
        thread.join(5)
    assert not any(thread.is_alive() for thread in started)
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches.iterate(make(Failing())))


# Images


def test_every_level_survives_there_and_back():
    levels = np.arange(256, dtype=np.uint8)
    floats = images.to_float(levels)
    assert floats.dtype == np.float32 and floats[0] == -1 and floats[255] == 1
    np.testing.assert_array_equal(images.to_uint8(floats), levels)
    there_and_back = jax.jit(lambda x: images.to_uint8(images.to_float(x)))(levels)
    assert there_and_back.dtype == np.uint8
    np.testing.assert_array_equal(there_and_back, levels)


def test_quantiser_clips_and_takes_the_nearest_level():
    x = np.array([-1e9, -1.01, 1.01, np.inf, 0.4 / 127.5 - 1, 0.6 / 127.5 - 1])
    for quantised in images.to_uint8(x), jax.jit(images.to_uint8)(x):
        assert np.asarray(quantised).tolist() == [0, 0, 255, 255, 0, 1]


def area_by_hand(image, height, width):
    """The definition: split every pixel until both grids fit into one, and average blocks."""
    fine = image.repeat(height, axis=0).repeat(width, axis=1).astype(np.float64)
    blocks = fine.reshape(height, image.shape[0], width, image.shape[1], -1)
    return blocks.mean(axis=(1, 3))


@pytest.mark.parametrize("sizes", [(7, 5, 3, 2), (9, 13, 9, 4), (5, 4, 8, 11), (32, 30, 8, 7)])
def test_area_resize_is_the_mean_over_the_area(sizes):
    height, width, new_height, new_width = sizes
    image = np.random.default_rng(sum(sizes)).integers(0, 256, (height, width, 3), np.uint8)
    expected = area_by_hand(image, new_height, new_width)
    means = images.area_resize(image.astype(np.float32), new_height, new_width)
    np.testing.assert_allclose(means, expected, atol=1e-10)
    levels = images.area_resize(image, new_height, new_width)
    assert levels.dtype == np.uint8
    assert np.abs(levels - expected).max() <= 0.5 + 1e-10


def test_central_square():
    image = np.arange(5 * 8).reshape(5, 8, 1)
    np.testing.assert_array_equal(images.central_square(image), image[:, 1:6])
    np.testing.assert_array_equal(
        images.central_square(image.swapaxes(0, 1))[:, :, 0].T, image[:, 1:6, 0]
    )


def test_flip_mirrors_left_and_right():
    image = np.arange(6).reshape(1, 2, 3, 1)
    assert images.flip(image)[0, :, :, 0].tolist() == [[2, 1, 0], [5, 4, 3]]


def test_grid_places_images_row_by_row():
    tiles = np.arange(1, 4, dtype=np.uint8).reshape(3, 1, 1, 1)
    sheet = images.grid(tiles, 2, margin=1, scale=2, background=9)[:, :, 0]
    assert sheet.tolist() == [
        [1, 1, 9, 2, 2],
        [1, 1, 9, 2, 2],
        [9, 9, 9, 9, 9],
        [3, 3, 9, 9, 9],
        [3, 3, 9, 9, 9],
    ]
    assert images.grid(tiles, 3, margin=0)[:, :, 0].tolist() == [[1, 2, 3]]


@pytest.mark.parametrize("channels", [1, 3])
def test_png_is_lossless(tmp_path, channels):
    image = np.random.default_rng(0).integers(0, 256, (5, 7, channels), np.uint8)
    images.save_png(tmp_path / "x.png", image)
    read = np.asarray(PIL.Image.open(tmp_path / "x.png")).reshape(5, 7, channels)
    np.testing.assert_array_equal(read, image)
