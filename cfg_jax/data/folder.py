"""A folder of pictures, one folder a class, of any sizes and common formats -> array_record.

Each picture becomes its central square, resized by area, as PNG. What cannot be read is noted by
name in the record of its shard, and whether that matters is decided once all are seen. Shards are
those of `shards`: made by many processes, and kept when a run is stopped.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageOps
import tensorflow_datasets as tfds

from cfg_jax.data import assembly, images, shards
from cfg_jax.types import UsageError

# By these a file is taken for a picture; Pillow then goes by its content. The formats named are all
# it may try: some of its others run programs.
_SUFFIXES = frozenset(
    ".avif .bmp .gif .heic .heif .j2k .jfif .jp2 .jpe .jpeg .jpg .pbm .pgm .png .ppm .pnm .tga .tif"
    " .tiff .webp".split()
)
_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")
_PICTURES_A_SHARD = 1024
_NAMES_TOLD = 20

REFUSE, SKIP = "refuse", "skip"


class Found(NamedTuple):
    """What a folder holds; files are named from it on."""

    classes: tuple[str, ...]
    files: tuple[tuple[shards.File, ...], ...]  # of each class, in the order of their names
    empty: tuple[str, ...]  # folders without a picture: no classes
    # Files that are no pictures by their names, or lie outside the classes; links inside a class to
    # a folder, which may be one above it, or to nothing.
    others: tuple[str, ...]


def find(path: Path) -> Found:
    """The pictures below each folder of path, at any depth; what begins with a dot is passed over.

    A class, or a picture, may be a link. Raises UsageError where there are none.
    """
    if not path.is_dir():
        raise UsageError(f"--path={path} is no folder: give one that holds a folder a class.")
    entries = sorted(entry for entry in path.iterdir() if _is_seen(entry.name))
    others = [entry.name for entry in entries if not entry.is_dir()]
    classes, files, empty = [], [], []
    for folder in (entry for entry in entries if entry.is_dir()):
        pictures = []
        for name in _below(folder):
            if name.suffix.lower() not in _SUFFIXES or not name.is_file():
                others.append(str(name.relative_to(path)))
                continue
            status = name.stat()
            pictures.append(
                shards.File(
                    str(name.relative_to(path)),
                    offset=0,
                    size=status.st_size,
                    label=len(classes),
                    modified=status.st_mtime_ns,
                )
            )
        if pictures:
            classes.append(folder.name)
            files.append(tuple(pictures))
        else:
            empty.append(folder.name)
    if not classes:
        raise UsageError(
            f"--path={path} holds no folder with pictures: one folder a class is needed, such as "
            f"{path}/cats/1.jpg and {path}/dogs/1.jpg."
        )
    return Found(tuple(classes), tuple(files), tuple(empty), tuple(others))


def _is_seen(name: str) -> bool:
    return not name.startswith(".") and name != "__MACOSX"


def _below(folder: Path) -> list[Path]:
    """What is in a folder and the folders in it, but those, in the order of the names.

    A link to a folder is not followed, but is one of them, as is a link to nothing.
    """
    found = []
    for place, folders, names in os.walk(folder, onerror=_raise):
        folders[:] = filter(_is_seen, folders)
        links = [name for name in folders if Path(place, name).is_symlink()]
        found += [Path(place, name) for name in (*links, *filter(_is_seen, names))]
    return sorted(found)


def _raise(error: OSError) -> None:
    raise error


def square(path: Path, side: int) -> tuple[np.ndarray, str]:
    """A picture as one sees it: upright, on white where it is transparent, its first frame.

    uint8 [side, side, 3], and a remark or "". Raises whatever Pillow does for a file that it cannot
    read, and for one of more than twice PIL.Image.MAX_IMAGE_PIXELS.
    """
    PIL.Image.init()
    with PIL.Image.open(path, formats=[f for f in _FORMATS if f in PIL.Image.OPEN]) as picture:
        animated = getattr(picture, "is_animated", False)
        upright = PIL.ImageOps.exif_transpose(picture)
        image = np.asarray(_rgb(upright))
    remark = "the first of its frames" if animated else ""
    if min(image.shape[:2]) < side:
        remark = "enlarged"
    return images.area_resize(images.central_square(image), side, side), remark


def _rgb(picture: PIL.Image.Image) -> PIL.Image.Image:
    if picture.mode.startswith(("I", "F")):  # Pillow would cut 16 bits off at 255
        levels = np.asarray(picture)
        if levels.dtype.kind == "f" or levels.min() < 0 or levels.max() > 65535:
            raise ValueError("its levels are no 8 or 16 bits")
        levels = (levels.astype(np.int64) * 255 + 32767) // 65535
        return PIL.Image.fromarray(levels.astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = PIL.Image.new("RGBA", picture.size, "white")
        picture = PIL.Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def builder(
    name: str, side: int, classes: Sequence[str], data_dir: str | None
) -> tfds.core.DatasetBuilder:
    """What describes such a set to TFDS. Raises UsageError for a name that no set can have."""
    if not (name.isidentifier() and name.isascii() and name == name.lower()):
        raise UsageError(f"--name={name}: small letters, digits and _ are needed, such as my_cats.")
    if name in tfds.list_builders(with_community_datasets=False):
        raise UsageError(f"--name={name} is the name of a data set of TFDS: give another.")
    set_name = name

    class Folder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = set_name
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                description=f"Pictures of a folder: central squares of {side} pixels, by area.",
                supervised_keys=("image", "label"),
                features=shards.features(side, [_shown(name) for name in classes]),
            )

        def _split_generators(self, dl_manager):
            raise NotImplementedError("`prepare` of this module makes the files")

        def _generate_examples(self):
            raise NotImplementedError("`prepare` of this module makes the files")

    return Folder(data_dir=data_dir, file_format="array_record")


def prepare(
    path: os.PathLike | str,
    name: str,
    data_dir: str | None = None,
    *,
    side: int,
    held_out: int = 20,
    bad_files: str = REFUSE,
    workers: int | None = None,
    progress: Callable,
    say: Callable[[str], None],
) -> bool:
    """Makes the set `name` of the pictures below path; False if it was there already.

    Every held_out-th picture of a class becomes split `test`, 0 for none. bad_files is what becomes
    of pictures that cannot be read: "refuse" names them and makes no set, "skip" names them and
    leaves them out. progress and say are as in `imagenet.prepare`. UsageError where the folder or
    an option is not right, or another set of that name is there.
    """
    if side < 1 or held_out < 0 or held_out == 1:
        raise UsageError(
            f"--size={side}, --held_out={held_out}: a side of 1 or more, every 2nd on."
        )
    root = Path(path).absolute()
    try:
        found = find(root)
    except OSError as error:
        raise UsageError(f"--path={path} cannot be read: {error}") from error
    made = builder(name, side, found.classes, data_dir)
    if "://" in os.fspath(made.data_path):
        raise UsageError(f"{name} is made on a local disk: copy it to the bucket afterwards.")
    place = Path(made.data_path)
    folder = place.with_name(f"incomplete.{place.name}")
    plan = {
        split: _parts(made, folder, root, split, files, side)
        for split, files in _splits(found.files, held_out).items()
    }
    parts = [part for split in plan.values() for part in split]
    if place.exists():
        if assembly.sources(place) != [part.source for part in parts]:
            raise UsageError(
                f"{place} holds other pictures, or another --size or --held_out: delete it, or "
                "give another --name."
            )
        return False
    _tell(say, "folders without a picture, which are no classes", found.empty)
    _tell(
        say,
        "files passed over, no pictures by their names or links to folders or to nothing",
        found.others,
    )
    with assembly.held(folder):
        records = assembly.make_all(parts, workers or assembly.cores(), progress=progress, say=say)
        bad = [entry for part in parts for entry in records[part.shard.name]["bad"]]
        _tell(say, "pictures that cannot be read", [f"{file} ({why})" for file, _, why in bad])
        _check_bad(root, found, bad, bad_files)
        for remark in ("enlarged", "the first of its frames"):
            count = sum(record["remarks"].get(remark, 0) for record in records.values())
            if count:
                say(f"{count:,} pictures became: {remark}")
        of_splits = {split: [records[p.shard.name] for p in plan[split]] for split in plan}
        assembly.finish(made, folder, of_splits)
    return True


def _check_bad(root: Path, found: Found, bad: Sequence[tuple], bad_files: str) -> None:
    if bad and bad_files == REFUSE:
        total = sum(map(len, found.files))
        raise UsageError(
            f"{len(bad):,} of {total:,} pictures in {root} cannot be read, {_shown(bad[0][0])} "
            "first: mend or delete them, or say --bad_files=skip; the others are kept as made."
        )
    for label, name in enumerate(found.classes):
        if sum(entry[1] == label for entry in bad) == len(found.files[label]):
            raise UsageError(f"no picture of class {_shown(name)} in {root} can be read.")


def _splits(
    classes: Sequence[Sequence[shards.File]], held_out: int
) -> dict[str, list[shards.File]]:
    splits: dict[str, list[shards.File]] = {"train": [], "test": []}
    for files in classes:
        for i, file in enumerate(files, start=1):
            splits["test" if held_out and i % held_out == 0 else "train"].append(file)
    return {split: files for split, files in splits.items() if files}


def _parts(
    made: tfds.core.DatasetBuilder,
    folder: Path,
    root: Path,
    split: str,
    files: Sequence[shards.File],
    side: int,
) -> list[shards.Part]:
    count = -(-len(files) // _PICTURES_A_SHARD)
    return [
        shards.Part(root, share, side, shard, decode=square, lenient=True)
        for shard, share in assembly.spread(made, folder, split, files, count)
    ]


def _tell(say: Callable[[str], None], what: str, names: Sequence[str]) -> None:
    if names:
        more = f", and {len(names) - _NAMES_TOLD:,} more" if len(names) > _NAMES_TOLD else ""
        say(f"{len(names):,} {what}: {', '.join(map(_shown, names[:_NAMES_TOLD]))}{more}")


def _shown(name: str) -> str:
    """A file's name as text, for one that is no UTF-8 has none."""
    return name.encode(errors="replace").decode()
