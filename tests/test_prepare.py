"""The prepare job: real files, fake archives, and what it says when something is missing."""

import functools
import gzip
import importlib.util
import io
import json
import os
import pathlib
import tarfile

import numpy as np
import pytest
from tensorflow_datasets.core.download import resource

from cfg_jax import prepare
from cfg_jax.data import builders, datasets
from cfg_jax.types import UsageError


def place(builder, data_dir, content):
    """Puts fakes where TFDS keeps its downloads; it hashes a file only when it fetches it."""
    for url, info in builder.url_infos.items():
        name = resource.get_dl_fname(url, info.checksum)
        path = pathlib.Path(data_dir) / "downloads" / builder.name / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content(info.filename))
        note = {"dataset_names": [builder.name], "original_fname": info.filename, "urls": [url]}
        pathlib.Path(f"{path}.INFO").write_text(json.dumps(note))


def idx(array):
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return gzip.compress(bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes())


def by_content(image, label):
    """TFDS shuffles what it stores; this puts it into an order again."""
    table = np.concatenate([label[:, None], image.reshape(len(label), -1)], axis=1)
    return table[np.lexsort(table.T)]


def same(examples, image, label):
    np.testing.assert_array_equal(
        by_content(examples.images, examples.labels), by_content(image, label)
    )


def test_digits_and_again(tmp_path, capsys):
    expected = {"train": 1415, "test": 382}
    assert prepare.prepare("digits", str(tmp_path)) == expected
    assert "digits: now in" in capsys.readouterr().out
    assert prepare.prepare("digits", str(tmp_path)) == expected
    assert "digits: already in" in capsys.readouterr().out


def test_a_row_may_have_another_name_than_its_builder(tmp_path, monkeypatch):
    row = functools.partial(datasets.Tfds, builder="digits")
    monkeypatch.setitem(datasets.DATASETS, "small", row)
    assert prepare.prepare("small", str(tmp_path)) == {"train": 1415, "test": 382}


@pytest.mark.parametrize("name", ["mnist", "kmnist"])
def test_idx_files_without_tensorflow(tmp_path, name):
    rng = np.random.default_rng(0)
    sizes = {"train": 30, "test": 20}
    image = {split: rng.integers(0, 256, (n, 28, 28), np.uint8) for split, n in sizes.items()}
    label = {split: np.arange(n, dtype=np.uint8) % 10 for split, n in sizes.items()}

    def file(name):
        split = "train" if name.startswith("train") else "test"
        return idx(image[split] if "images" in name else label[split])

    place(builders.builder(name, tmp_path), tmp_path, file)
    assert prepare.prepare(name, str(tmp_path)) == sizes
    for split in sizes:
        got = datasets.Tfds(builder=name, data_dir=str(tmp_path)).load(split)
        same(got, image[split], label[split])


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_archives_without_tensorflow(tmp_path, name):
    rng = np.random.default_rng(0)
    builder = builders.builder(name, tmp_path)
    info = builder._cifar_info
    columns = len(info.label_keys)
    made = {"train": [], "test": []}

    def archive(_):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as tar:

            def add(name, content):
                entry = tarfile.TarInfo(info.prefix + name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))

            for key, file in zip(info.label_keys, info.label_files):
                names = [f"{key}{i}" for i in range(builder.info.features[key].num_classes)]
                add(file, "\n".join(names).encode())
            for split, files in ("train", info.train_files), ("test", info.test_files):
                for file in files:
                    records = rng.integers(0, 10, (7, columns + 3072), np.uint8)
                    made[split].append(records)
                    add(file, records.tobytes())
        return buffer.getvalue()

    place(builder, tmp_path, archive)
    sizes = {split: 7 * len(files) for split, files in made.items()}
    assert prepare.prepare(name, str(tmp_path)) == sizes
    for split, records in made.items():
        records = np.concatenate(records)
        image = records[:, columns:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        got = datasets.Tfds(builder=name, data_dir=str(tmp_path)).load(split)
        same(got, image, records[:, columns - 1])  # cifar100: coarse label first, then the fine one
    named = datasets.Tfds(builder=name, data_dir=str(tmp_path))
    assert named.classes[3] == "label3"


def test_a_file_that_is_not_the_published_one(tmp_path):
    manual = tmp_path / "manual"
    manual.mkdir()
    with pytest.raises(UsageError, match=r"lacks .*-ubyte\.gz"):
        prepare.prepare("fashion_mnist", str(tmp_path), str(manual))
    for part in "train", "t10k":
        for kind in "images-idx3", "labels-idx1":
            (manual / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(b"other"))
    with pytest.raises(UsageError, match="wrong checksum") as error:
        prepare.prepare("fashion_mnist", str(tmp_path), str(manual))
    assert "\n" not in str(error.value)
    assert not builders.is_prepared(builders.builder("fashion_mnist", tmp_path))


def test_unknown_name():
    with pytest.raises(UsageError, match="did you mean fashion_mnist"):
        prepare.prepare("fashion-mnist")


def test_tensorflow_is_asked_for_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'cfg_jax\[prepare\]'"):
        prepare.prepare("imagenette/160px-v2", str(tmp_path))


def debian_files():
    """Where Debian's dataset-fashion-mnist is unpacked; skips, and says how to get it."""
    for folder in os.environ.get("FASHION_MNIST_DIR"), "/usr/share/datasets/fashion-mnist":
        if folder and os.path.exists(f"{folder}/train-images-idx3-ubyte.gz"):
            return folder
    return pytest.skip(
        "NOT TESTED: real Fashion-MNIST is not here. apt-get install dataset-fashion-mnist, or set"
        " FASHION_MNIST_DIR to a folder with its four .gz files"
    )


@pytest.mark.slow
def test_fashion_mnist_from_debian(tmp_path):
    folder = debian_files()
    sizes = prepare.prepare("fashion_mnist", str(tmp_path), folder)
    assert sizes == {"train": 60_000, "test": 10_000}
    fashion = datasets.DATASETS["fashion_mnist"](data_dir=str(tmp_path), pad=2)
    for split, prefix in ("train", "train"), ("test", "t10k"):
        got = fashion.load(split)
        assert got.images.shape[1:] == fashion.image_shape == (32, 32, 1)
        assert np.bincount(got.labels).tolist() == [sizes[split] // 10] * 10
        image = builders.read_idx(f"{folder}/{prefix}-images-idx3-ubyte.gz")
        label = builders.read_idx(f"{folder}/{prefix}-labels-idx1-ubyte.gz")
        same(datasets.InMemory(got.images[:, 2:-2, 2:-2], got.labels), image, label)
