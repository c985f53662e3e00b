"""Pictures of one's own: every kind that people have, what is told of those that are bad, and runs
that were stopped.
"""

import concurrent.futures
import io
import json
import os
import zlib

import numpy as np
import PIL.Image
import pytest
from cli import ONE_LEVEL, network_flags

from cfg_jax import experiment, prepare
from cfg_jax.data import assembly, datasets, folder
from cfg_jax.types import UsageError

RED, BLUE = (250, 20, 30), (20, 30, 250)


@pytest.fixture(autouse=True)
def in_threads(monkeypatch):
    """Threads in place of processes, which need seconds to start."""
    threads = concurrent.futures.ThreadPoolExecutor
    monkeypatch.setattr(assembly.futures, "ProcessPoolExecutor", lambda n, *_: threads(n))


def image(width=96, height=64, left=RED, right=BLUE):
    """Two halves, so that one sees how a picture is turned and cropped."""
    pixels = np.empty((height, width, 3), np.uint8)
    pixels[:, : width // 2], pixels[:, width // 2 :] = left, right
    return PIL.Image.fromarray(pixels)


def save(picture, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, **options)


def huge_png(path, side):
    """A PNG of side x side grey pixels, all of them 0: its header and a few bytes of data."""

    def chunk(kind, data):
        check = zlib.crc32(kind + data).to_bytes(4, "big")
        return len(data).to_bytes(4, "big") + kind + data + check

    header = side.to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0])
    rows = zlib.compress(b"\0" * 1000)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)


# How a picture is stored -> the colours of the left and right halves of what becomes of it.
GREY = (100, 100, 100)
HALVES = (RED, BLUE)
GOOD = {
    "rgb.png": HALVES,
    "rgb.jpg": HALVES,
    "rgb.webp": HALVES,
    "rgb.bmp": HALVES,
    "rgb.TIFF": HALVES,
    "palette.gif": HALVES,
    "palette.png": HALVES,
    "grey.png": (GREY, (200, 200, 200)),
    "grey16.png": (GREY, (200, 200, 200)),
    "grey16.tif": (GREY, (200, 200, 200)),
    "grey_alpha.png": (GREY, (255, 255, 255)),
    "rgba.png": (RED, (255, 255, 255)),
    "palette_alpha.png": (RED, (255, 255, 255)),
    "cmyk.jpg": HALVES,
    "bits.png": ((0, 0, 0), (255, 255, 255)),
    "animated.gif": HALVES,
    "animated.webp": HALVES,
    "rotated.jpg": HALVES,  # stored lying on its side
    "deep/down/nested.png": HALVES,
    "content.png": HALVES,  # is a JPEG
    "small.png": HALVES,
    "name \u00e9.png": HALVES,
}


def write_good(root):
    both, mask = image(), image(left=(255,) * 3, right=(0,) * 3).convert("L")
    grey = np.asarray(image(left=GREY, right=(200,) * 3))[..., 0]
    for name in ("rgb.png", "rgb.bmp", "rgb.TIFF", "deep/down/nested.png", "name \u00e9.png"):
        save(both, root / name)
    save(both, root / "rgb.jpg", quality=95)
    save(both, root / "rgb.webp", lossless=True)
    save(both, root / "content.png", format="JPEG", quality=95)
    palette = both.quantize(4)
    save(palette, root / "palette.png")
    save(palette, root / "palette.gif")
    save(PIL.Image.fromarray(grey), root / "grey.png")
    for suffix in ("png", "tif"):
        save(PIL.Image.fromarray(grey.astype(np.uint16) * 257), root / f"grey16.{suffix}")
    rgba = both.copy()
    rgba.putalpha(mask)
    save(rgba, root / "rgba.png")
    grey_alpha = PIL.Image.fromarray(grey)
    grey_alpha.putalpha(mask)
    save(grey_alpha, root / "grey_alpha.png")
    clear = palette.copy()
    save(clear, root / "palette_alpha.png", transparency=int(np.asarray(palette)[0, -1]))
    save(both.convert("CMYK"), root / "cmyk.jpg", quality=95)
    save(image(left=(0,) * 3, right=(255,) * 3).convert("1"), root / "bits.png")
    second = image(left=(0, 255, 0), right=(0, 255, 0))
    frames = {"save_all": True, "append_images": [second]}
    save(both, root / "animated.gif", **frames)
    save(both, root / "animated.webp", lossless=True, **frames)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    save(both.rotate(90, expand=True), root / "rotated.jpg", exif=exif, quality=95)
    save(image(30, 12), root / "small.png")


def write_bad(root):
    content = io.BytesIO()
    image().save(content, "PNG")
    root.mkdir(parents=True, exist_ok=True)
    (root / "cut.png").write_bytes(content.getvalue()[:100])
    (root / "empty.jpg").write_bytes(b"")
    (root / "text.jpg").write_text("no picture")
    (root / "script.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    huge_png(root / "huge.png", 60_000)
    PIL.Image.fromarray(np.full((70, 70), 1e9, np.float32)).save(root / "floats.tiff")
    return ["cut.png", "empty.jpg", "floats.tiff", "huge.png", "script.jpg", "text.jpg"]


def make(root, data_dir, **options):
    options = {"side": 16, "held_out": 0, "workers": 1, **options}
    return prepare.prepare_folder(str(root), "mine", str(data_dir), **options)


def test_every_kind_of_picture_is_what_one_sees(tmp_path, capsys):
    root, data = tmp_path / "pictures", tmp_path / "data"
    write_good(root / "all kinds")
    save(image(64, 96, BLUE, RED), root / "b" / "1.jpg", quality=95)
    (root / "nothing").mkdir()
    (root / "b" / ".hidden.png").write_bytes(b"")
    (root / ".git").mkdir()
    save(image(), root / ".git" / "no.png")
    (root / "b" / "notes.txt").write_text("")
    save(image(), root / "stray.png")
    (root / "b" / "gone.png").symlink_to(root / "nowhere.png")
    (root / "b" / "loop").symlink_to(root)
    (root / "linked").symlink_to(root / "b")
    (root / "b" / "2.jpg").symlink_to(root / "b" / "1.jpg")
    assert make(root, data) == {"train": len(GOOD) + 4}
    told = capsys.readouterr().err
    assert "1 folders without a picture, which are no classes: nothing" in told
    assert "7 files passed over" in told
    inside = [
        f"{name}/{left}" for name in ("b", "linked") for left in ("gone.png", "loop", "notes.txt")
    ]
    assert f"nothing: stray.png, {', '.join(inside)}" in told
    assert "1 pictures became: enlarged" in told
    assert "2 pictures became: the first of its frames" in told
    assert not any(passed in told for passed in ("hidden", ".git"))

    mine = datasets.DATASETS["image_folder"](builder="mine", data_dir=str(data))
    assert (mine.classes, mine.image_shape) == (("all kinds", "b", "linked"), (16, 16, 3))
    names = [row["file_name"].decode() for row in mine._prepared(None).as_data_source("train")]
    others = ["b/1.jpg", "b/2.jpg", "linked/1.jpg", "linked/2.jpg"]
    assert names == [*sorted(f"all kinds/{name}" for name in GOOD), *others]
    examples = mine.load()
    assert examples.labels.tolist() == [0] * len(GOOD) + [1, 1, 2, 2]
    for name, picture in zip(names, examples.images):
        halves = GOOD.get(name.removeprefix("all kinds/"), (BLUE, RED))
        lossy = name.endswith(("jpg", "content.png"))
        # Columns 7 and 8 lie where JPEG blurs the edge.
        for side, colour in zip((picture[:, :6], picture[:, 10:]), halves):
            assert np.abs(side.astype(int) - colour).max() <= (12 if lossy else 1), name


def test_bad_pictures_are_refused_or_skipped_and_named(tmp_path, capsys):
    root, data = tmp_path / "pictures", tmp_path / "data"
    save(image(), root / "a" / "good.png")
    save(image(), root / "b" / "good.png")
    bad = write_bad(root / "a")
    with pytest.raises(UsageError, match=r"6 of 8 pictures.*a/cut\.png first.*--bad_files=skip"):
        make(root, data)
    told = capsys.readouterr().err
    assert "6 pictures that cannot be read: " in told
    for name in bad:
        assert f"a/{name} (" in told
    assert not (data / "mine" / "1.0.0").exists()

    assert make(root, data, bad_files="skip") == {"train": 2}
    told = capsys.readouterr().err
    assert "1 of 1 shards are there already" in told, "what was made is not made again"
    assert "6 pictures that cannot be read: a/cut.png (" in told
    (record,) = json.loads((data / "mine" / "1.0.0" / "shards.json").read_text())["train"]
    assert [name for name, _, _ in record["bad"]] == [f"a/{name}" for name in bad]

    assert make(root, data, bad_files="skip") == {"train": 2}
    assert "mine: already in" in capsys.readouterr().out
    for other in ({"side": 8}, {"held_out": 2}):
        with pytest.raises(UsageError, match="holds other pictures"):
            make(root, data, bad_files="skip", **other)
    save(image(), root / "a" / "cut.png")
    with pytest.raises(UsageError, match="holds other pictures"):
        make(root, data, bad_files="skip")


def test_a_mended_picture_is_read_again(tmp_path):
    root, data = tmp_path / "pictures", tmp_path / "data"
    save(image(), root / "a" / "1.png")
    whole = (root / "a" / "1.png").read_bytes()
    (root / "a" / "1.png").write_bytes(whole[:60] + bytes(len(whole) - 60))  # of the same size
    with pytest.raises(UsageError, match="1 of 1 pictures"):
        make(root, data)
    with pytest.raises(UsageError, match="no picture of class a"):
        make(root, data, bad_files="skip")
    (root / "a" / "1.png").write_bytes(whole)
    assert make(root, data) == {"train": 1}


def test_every_so_manieth_of_a_class_is_held_out(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "_PICTURES_A_SHARD", 4)
    root, data = tmp_path / "pictures", tmp_path / "data"
    for name, count in {"a": 7, "b": 2, "c": 3}.items():
        for i in range(count):
            save(image(left=(i, 0, 0), right=(i, 0, 0)), root / name / f"{i}.png")
    (root / "a" / "4.png").write_bytes(b"")
    (root / "c" / "2.png").write_bytes(b"")
    with pytest.raises(UsageError, match="2 of 12 pictures"):
        make(root, data, held_out=2)  # in as many shards of either split
    made = make(root, data, held_out=3, bad_files="skip")
    assert made == {"train": 8, "test": 2}
    shards = sorted(path.name for path in (data / "mine" / "1.0.0").glob("mine-*"))
    wanted = [f"mine-train.array_record-0000{i}-of-00003" for i in range(3)]
    assert shards == ["mine-test.array_record-00000-of-00001", *wanted], "of this run alone"
    mine = datasets.DATASETS["image_folder"](builder="mine", data_dir=str(data))
    test = mine.load("test")
    assert (test.images[:, 0, 0, 0].tolist(), test.labels.tolist()) == ([2, 5], [0, 0])
    train = mine.load("train")
    assert train.images[:, 0, 0, 0].tolist() == [0, 1, 3, 6, 0, 1, 0, 1]
    assert train.labels.tolist() == [0, 0, 0, 0, 1, 1, 2, 2]


def test_a_split_of_bad_pictures_alone_is_none(tmp_path):
    save(image(), tmp_path / "pictures" / "a" / "1.png")
    (tmp_path / "pictures" / "a" / "2.png").write_bytes(b"")
    made = make(tmp_path / "pictures", tmp_path / "data", held_out=2, bad_files="skip")
    assert made == {"train": 1}


def test_sixteen_bits_become_the_nearest_of_eight(tmp_path):
    levels = [0, 128, 129, 25700 - 128, 25700, 25700 + 128, 25700 + 129, 65535 - 129, 65535]
    for level, wanted in zip(levels, [0, 0, 1, 100, 100, 100, 101, 254, 255], strict=True):
        PIL.Image.fromarray(np.full((8, 8), level, np.uint16)).save(tmp_path / "grey.png")
        pixels, _ = folder.square(tmp_path / "grey.png", 8)
        assert np.all(pixels == wanted), level


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"root": "none"}, "is no folder"),
        ({"root": "flat"}, r"no folder with pictures: one folder a class.*cats/1\.jpg"),
        ({"root": None}, "needs --path=DIR"),
        ({"name": "My-Pictures"}, "--name=My-Pictures: small letters"),
        ({"name": "cifar10"}, "name of a data set of TFDS"),
        ({"side": 0}, "--size=0"),
        ({"held_out": 1}, "--held_out=1"),
    ],
)
def test_mistakes_are_one_line(options, wanted, tmp_path):
    save(image(), tmp_path / "flat" / "1.png")
    save(image(), tmp_path / "good" / "a" / "1.png")
    root, name = options.pop("root", "good"), options.pop("name", "mine")
    options = {"side": 16, **options}
    with pytest.raises(UsageError, match=wanted) as error:
        prepare.prepare_folder(
            root and str(tmp_path / root), name, str(tmp_path / "data"), **options
        )
    assert "\n" not in str(error.value)
    assert not (tmp_path / "data").exists()


def test_a_set_that_is_not_prepared_says_how(tmp_path):
    (tmp_path / "cats" / "incomplete.1.0.0").mkdir(parents=True)  # of a run that was stopped
    with pytest.raises(UsageError, match=r"--dataset=image_folder --path=DIR --name=cats"):
        _ = datasets.DATASETS["image_folder"](builder="cats", data_dir=str(tmp_path)).image_shape


@pytest.mark.slow
def test_two_commands_train_and_sample_ones_own_pictures(cli, tmp_path):
    """And the model says what it knows of them where they are not."""
    root, data, run = tmp_path / "pictures", tmp_path / "data", tmp_path / "run"
    for name, colours in {"left": HALVES, "right": HALVES[::-1]}.items():
        for i in range(8):
            save(image(40 + i, 40, *colours), root / name / f"{i}.jpg")
    done = cli(
        *("prepare", "--dataset=image_folder", f"--path={root}", f"--data_dir={data}"),
        *("--size=8", "--name=halves", "--workers=1"),
    )
    assert done.status == 0 and "halves: now in" in done.out, done.err[-3000:]
    command = ["train", "--config=image_folder", "--config.dataset.builder=halves"]
    command += [f"--config.dataset.data_dir={data}", f"--workdir={run}"]
    command += [*network_flags(ONE_LEVEL), "--config.model.dtype=float32"]
    command += ["--config.train.steps=6", "--config.train.batch_size=8"]
    command += ["--config.train.sample_every=0", "--config.sample.steps=4"]
    done = cli(*command)
    assert done.status == 0, done.err[-3000:]
    done = cli(*command, "--config.train.steps=8")
    assert done.status == 0 and "going on from step 6" in done.err, done.err[-3000:]
    os.rename(data, tmp_path / "elsewhere")
    config = json.loads((run / "config.json").read_text())
    assert experiment.build(config).dataset.classes == ("left", "right")
    done = cli("sample", f"--workdir={run}", "--w=0,1", "--per_label=2")
    assert done.status == 0, done.err[-3000:]
    assert np.load(run / "samples.npz")["images"].shape == (2, 4, 8, 8, 3)
