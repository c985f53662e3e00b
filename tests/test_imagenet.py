"""ImageNet from archives of the true layout: what is in the set, and runs that were stopped."""

import concurrent.futures
import io
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from archives import CLASSES, TRAIN, VALIDATION, tar

from cfg_jax import prepare
from cfg_jax.data import assembly, builders, datasets, imagenet, shards
from cfg_jax.types import UsageError


def area(image, side):
    """The mean over areas: differences of the integral of the image, one axis after the other."""
    for _ in range(2):
        old = len(image)
        lines = image.reshape(old, -1)
        integral = np.insert(np.cumsum(lines, 0, dtype=np.float64), 0, 0, 0)
        edges, known = np.linspace(0, old, side + 1), np.arange(old + 1)
        at_edges = np.stack([np.interp(edges, known, line) for line in integral.T], axis=-1)
        image = (np.diff(at_edges, axis=0) * side / old).reshape(side, *image.shape[1:])
        image = image.swapaxes(0, 1)
    return image


def expected_image(content, side):
    with PIL.Image.open(io.BytesIO(content)) as opened:
        mode, image = opened.mode, np.asarray(opened).astype(np.float64)
    if mode == "L":
        image = np.stack([image] * 3, axis=-1)
    if mode == "CMYK":
        image = ((255 - image[..., :3]) * (255 - image[..., 3:]) / 255).round()
    height, width = image.shape[:2]
    short = min(height, width)
    top, left = (height - short) // 2, (width - short) // 2
    return area(image[top : top + short, left : left + short], side)


def make(data_dir, folder, **options):
    options = {"workers": 1, "partial": True, **options}
    return prepare.prepare("imagenet64", str(data_dir), str(folder), **options)


@pytest.fixture(scope="module")
def prepared(archives, tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("data")
    assert make(data_dir, archives[0], workers=2) == {"train": 12, "validation": 12}
    return data_dir


@pytest.fixture
def in_threads(monkeypatch):
    """Threads in place of processes, which need seconds to start."""
    threads = concurrent.futures.ThreadPoolExecutor
    monkeypatch.setattr(assembly.futures, "ProcessPoolExecutor", lambda n, *_: threads(n))


def shard_bytes(data_dir):
    place = data_dir / "imagenet64" / "1.0.0"
    return {path.name: path.read_bytes() for path in place.glob("*array_record*")}


@pytest.mark.parametrize("split", ["train", "validation"])
def test_images_are_central_squares_resized_by_area(archives, prepared, split):
    mine = datasets.DATASETS["imagenet64"](data_dir=str(prepared))
    assert mine.held_out == "validation" and mine.flip
    got, source = mine.load(split), builders.builder("imagenet64", prepared).as_data_source(split)
    wanted = archives[1][split]
    assert [row["file_name"].decode() for row in source] == [name for name, _, _ in wanted]
    assert got.labels.tolist() == [label for _, label, _ in wanted]
    for image, (name, _, content) in zip(got.images, wanted):
        assert np.abs(image - expected_image(content, 64)).max() <= 0.5 + 1e-9, name


def test_the_same_archives_at_128_pixels(archives, tmp_path, in_threads):
    counts = prepare.prepare(
        "imagenet128", str(tmp_path), str(archives[0]), workers=1, partial=True
    )
    assert counts == {"train": 12, "validation": 12}
    got = datasets.DATASETS["imagenet128"](data_dir=str(tmp_path)).load("train")
    wanted = archives[1]["train"]
    assert got.labels.tolist() == [label for _, label, _ in wanted]
    for image, (name, _, content) in zip(got.images, wanted):
        assert np.abs(image - expected_image(content, 128)).max() <= 0.5 + 1e-9, name


def test_other_shapes_of_the_same(archives):
    """128 pixels from the same function, and transparent or palette images, which are RGB too."""
    content = archives[1]["train"][0][2]
    image = shards.small(content, 128)
    assert np.abs(image - expected_image(content, 128)).max() <= 0.5 + 1e-9
    rgb = PIL.Image.fromarray(image)
    for mode in "RGBA", "LA", "P", "1":
        file = io.BytesIO()
        rgb.convert(mode).save(file, "PNG")
        assert shards.small(file.getvalue(), 64).shape == (64, 64, 3)


@pytest.mark.parametrize("side", [64, 128])
def test_known_with_nothing_on_the_disk(tmp_path, side):
    mine = datasets.DATASETS[f"imagenet{side}"](data_dir=str(tmp_path / "nothing"))
    assert (mine.image_shape, mine.num_classes) == ((side, side, 3), 1000)
    assert [mine.classes[label] for label in CLASSES.values()] == list(CLASSES)
    with pytest.raises(UsageError, match=f"cfg_jax.prepare --dataset=imagenet{side}"):
        mine.load()
    assert not (tmp_path / "nothing").exists()


KILLED = """
import multiprocessing, os, signal, sys
from cfg_jax.data import builders, imagenet

class Bar:
    done = 0

    def update(self, count):
        self.done += count
        if self.done == 4:
            with open(sys.argv[3], "w") as file:
                print(*[child.pid for child in multiprocessing.active_children()], file=file)
            os.kill(os.getpid(), signal.SIGKILL)

builder = builders.builder("imagenet64", sys.argv[1])
imagenet.prepare(builder, sys.argv[2], workers=1, partial=True, say=print,
                 progress=lambda total, unit, initial: Bar())
"""


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_killed_run_goes_on(archives, prepared, tmp_path, capsys, in_threads):
    workers = tmp_path / "workers"
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(archives[0]), str(workers)]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    deadline = time.monotonic() + 20
    while any(is_alive(pid) for pid in workers.read_text().split()):
        assert time.monotonic() < deadline, "workers outlive the run"
        time.sleep(0.05)

    folder = tmp_path / "imagenet64" / "incomplete.1.0.0"
    assert not builders.is_prepared(builders.builder("imagenet64", tmp_path))
    made = [folder / path.stem for path in sorted((folder / "records").glob("*.json"))]
    assert 4 <= len(made) < 15
    before = {path.name: path.stat().st_mtime_ns for path in made}
    cut, unrecorded, changed, *whole = made
    os.truncate(cut, cut.stat().st_size - 1)
    (folder / "records" / f"{unrecorded.name}.json").unlink()
    with changed.open("r+b") as file:
        file.write(b"?")
    capsys.readouterr()

    make(tmp_path, archives[0])
    assert f"{len(whole)} of 15 shards are there already" in capsys.readouterr().err
    place = tmp_path / "imagenet64" / "1.0.0"
    again = {name for name, time in before.items() if (place / name).stat().st_mtime_ns != time}
    assert again == {cut.name, unrecorded.name, changed.name}
    assert shard_bytes(tmp_path) == shard_bytes(prepared)  # which had two workers
    assert [path.name for path in place.parent.iterdir()] == ["1.0.0"]

    make(tmp_path, archives[0])
    assert "already in" in capsys.readouterr().out
    with pytest.raises(UsageError, match="holds a part of ImageNet, train 12, validation 12"):
        make(tmp_path, archives[0], partial=False)


def refused(tmp_path, train, validation=None, **options):
    """The line told of archives with this content."""
    for name, content in (TRAIN, train), (VALIDATION, validation):
        if content is not None:
            (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError) as error:
        make(tmp_path, tmp_path, **options)
    assert "\n" not in str(error.value)
    assert not builders.is_prepared(builders.builder("imagenet64", tmp_path))
    return str(error.value)


def test_archives_that_are_not_the_published_ones(archives, tmp_path):
    train, held_out = ((archives[0] / name).read_bytes() for name in (TRAIN, VALIDATION))
    assert "holds 3 classes, not 1,000" in refused(tmp_path, train, held_out, partial=False)
    assert "no whole tar file" in refused(tmp_path, train[: len(train) // 2])
    assert "n00000000.tar" in refused(tmp_path, tar([("n00000000.tar", b"")]))
    assert "val_00050001" in refused(tmp_path, train, tar([("ILSVRC2012_val_00050001.JPEG", b"")]))
    assert "MD5" in refused(tmp_path, train, held_out, check_archives=True)
    (tmp_path / VALIDATION).unlink()
    assert f"there is no {tmp_path / VALIDATION}" in refused(tmp_path, train, partial=False)


def test_an_image_that_cannot_be_decoded(archives, tmp_path, in_threads):
    good = archives[1]["train"][0]
    files = [("n01440764.tar", tar([(good[0], good[2])]))]
    broken = tar([("n15075141_1.JPEG", good[2][: len(good[2]) // 2])])
    line = refused(tmp_path, tar([*files, ("n15075141.tar", broken)]))
    assert "n15075141_1.JPEG" in line and "cannot be decoded" in line
    records = tmp_path / "imagenet64" / "incomplete.1.0.0" / "records"
    assert [path.name[-19:] for path in records.iterdir()] == ["00000-of-00002.json"]
    # The inner tar is cut short, the outer one is whole.
    assert "n15075141.tar" in refused(tmp_path, tar([*files, ("n15075141.tar", broken[:700])]))


def test_one_run_at_a_time(archives, tmp_path):
    with assembly.held(tmp_path / "imagenet64" / "incomplete.1.0.0"):
        with pytest.raises(UsageError, match="another process is at work"):
            make(tmp_path, archives[0])


def test_a_missing_archive_is_one_line(cli, tmp_path):
    result = cli("prepare", "--dataset=imagenet64", f"--data_dir={tmp_path}")
    assert result.status == 2 and result.err.count("\n") == len(result.errors) == 1
    assert str(tmp_path / "downloads" / "manual" / TRAIN) in result.err
    assert "https://image-net.org/download-images" in result.err
    assert not any(tmp_path.iterdir())


def test_the_other_small_imagenet_comes_with_a_caveat(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(builders, "prepare", lambda builder, manual_dir: builder)
    monkeypatch.setattr(builders, "count", lambda builder: {})
    prepare.prepare("imagenet_resized/64x64", str(tmp_path))
    told = capsys.readouterr().err
    with pytest.raises(UsageError) as error:
        datasets.Tfds(builder="imagenet_resized/64x64", data_dir=str(tmp_path)).load()
    for text in told, f"{error.value}\n":
        assert text.count("\n") == 1 and "box" in text and "order" in text
        assert "--dataset=imagenet64" in text


def test_a_thousand_shards_may_be_open_at_once():
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, limits[1]))
        datasets._allow_open_files(1050)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == min(512 + 1050, limits[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_the_published_counts():
    assert imagenet.COUNTS == {"train": 1_281_167, "validation": 50_000}
    assert len(imagenet.wnids()) == 1000 == len(set(imagenet.wnids()))
