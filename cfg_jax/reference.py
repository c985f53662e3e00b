"""What generated images are compared with: real images as an extractor sees them, from a data set
or from a file.

Files have the layout of the published `VIRTUAL_imagenet*.npz` of Dhariwal & Nichol (2021): mu and
sigma of the features and mu_s and sigma_s of the features of places, over a whole set, and arr_0,
images of it for the metrics of neighbours. Ours also hold the features of arr_0 and, in `recipe`,
what they are of.
"""

import dataclasses
import hashlib
import json
import zipfile
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from cfg_jax import features, scores
from cfg_jax.metrics import frechet, neighbours
from cfg_jax.runtime import logging as runlog
from cfg_jax.runtime import mesh as meshes
from cfg_jax.types import UsageError

KEPT = 10_000  # images for the metrics of neighbours, as in the published files
MOMENTS = {"features": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


@dataclasses.dataclass(frozen=True)
class Reference:
    """Real images: as the scores want them, some of themselves, and what they are."""

    seen: scores.Reference
    images: np.ndarray  # uint8 [M, H, W, C]: those whose features `seen` has
    recipe: Mapping[str, Any]


def of_dataset(
    look: features.Extractor, dataset: Any, progress: Callable[[int], Any] = lambda n: None
) -> Reference:
    """The images of the data set's split, of which few are in memory at a time.

    The moments are of all, summed in the order of the set; the neighbours of KEPT of them, evenly
    spread over it, at most.
    """
    examples = dataset.load(dataset.split)
    count = len(examples)
    spread = np.linspace(0, count - 1, min(count, KEPT)).round().astype(int)
    sums, rows, images, digest = {}, [], [], hashlib.sha256()
    for start in range(0, count, frechet.CHUNK):
        some = examples[start : start + frechet.CHUNK]
        digest.update(np.ascontiguousarray(some["image"]).tobytes())
        digest.update(np.asarray(some["label"], np.int32).tobytes())
        seen = look(some["image"])
        for name in MOMENTS.keys() & seen.keys():
            of_chunk = frechet.sums(seen[name])
            sums[name] = sums[name] + of_chunk if name in sums else of_chunk
        here = spread[(spread >= start) & (spread < start + len(some["image"]))] - start
        rows.append(seen["features"][here])
        images.append(some["image"][here])
        progress(len(some["image"]))
    moments = {name: total.moments() for name, total in sums.items()}
    seen = scores.Reference(np.concatenate(rows), moments["features"], moments.get("spatial"))
    recipe = {
        "dataset": dataset.name,
        "split": dataset.split,
        "images": count,
        "image_shape": list(dataset.image_shape),
        "resize": dataset.resize,
        "sha256": digest.hexdigest(),
        "extractor": {"name": look.name, "parameters": look.fingerprint},
        **_of_neighbours(seen),
    }
    return Reference(seen, np.concatenate(images), recipe)


def kept(look: features.Extractor, dataset: Any, folder: epath.Path) -> Reference:
    """`of_dataset`, read from the folder where it was made before, else made and kept there."""
    of = {**dataclasses.asdict(dataset), "data_dir": None, "extractor": look.fingerprint}
    name = hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:12]
    path = folder / f"{look.name}_{name}.npz"
    if meshes.all_agree(path.exists()):
        return load(path, look, image_shape=dataset.image_shape, resize=dataset.resize)
    runlog.say(f"looking at the real images of {dataset.name}, {dataset.split}")
    bar = runlog.progress_bar(len(dataset.load(dataset.split)), "image")
    made = of_dataset(look, dataset, bar.update)
    bar.close()
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        save(path, made)
    return made


def _of_neighbours(seen: scores.Reference) -> dict[str, Any]:
    """How many images have neighbours; and "nn", their mean distance to the nearest other one."""
    nn = float(neighbours.among(seen.features).mean())
    return {"neighbours": len(seen.features), "features": seen.features.shape[1], "nn": nn}


def save(path: epath.PathLike, reference: Reference) -> None:
    """Writes a reference, whole or not at all."""
    arrays = {"arr_0": reference.images, "features": reference.seen.features}
    for name, of in (("features", reference.seen.moments), ("spatial", reference.seen.spatial)):
        if of is not None:
            mean, covariance = MOMENTS[name]
            arrays |= {mean: of.mean, covariance: of.covariance}
    path = epath.Path(path)
    beside = path.with_name(path.name + ".tmp")
    with beside.open("wb") as file:
        np.savez(file, **arrays, recipe=json.dumps(reference.recipe))
    beside.replace(path)


def load(
    path: epath.PathLike,
    look: features.Extractor,
    *,
    image_shape: tuple[int, int, int],
    resize: str | None = None,
    flag: str = "--reference",
) -> Reference:
    """A reference from a file of ours, or a published one, which is of the Inception graph.

    Raises UsageError where it is no such file, or of other features, images of another size than
    `image_shape`, or resized otherwise than by `resize`, where both are known.
    """
    arrays = arrays_of(flag, path, ("mu", "sigma", "arr_0"))
    images = arrays["arr_0"]
    recipe = json.loads(str(arrays["recipe"])) if "recipe" in arrays else {}
    if images.shape[1:] != tuple(image_shape):
        raise UsageError(
            f"{flag}={path} is of images {list(images.shape[1:])}, and those to be scored are "
            f"{list(image_shape)}: take a reference of their size."
        )
    of = recipe.get("extractor", {"name": "inception", "parameters": None})
    one = jax.ShapeDtypeStruct((1, *image_shape), np.uint8)
    if of["parameters"] not in (None, look.fingerprint) and of["name"] == look.name:
        raise UsageError(
            f"{flag}={path} was made with another {look.name} than the one given: make it again "
            "with evaluate's --make_reference."
        )
    if of["name"] != look.name:
        raise UsageError(
            f"{flag}={path} has features of {of['name']}, and {look.name} is to look: take a "
            "reference of the same features."
        )
    width = jax.eval_shape(look.look, look.params, one)["features"].shape[1]
    if len(arrays["mu"]) != width:
        raise UsageError(
            f"{flag}={path} has {len(arrays['mu'])} features, and {look.name} sees {width}."
        )
    if resize and recipe.get("resize", resize) != resize:
        raise UsageError(
            f"{flag}={path} is of images resized otherwise ({recipe['resize']}) than those "
            f"that the model learned from ({resize}): their distance would be of the resizing."
        )
    rows = arrays["features"] if "features" in arrays else look(images)["features"]
    moments = {
        name: frechet.Moments(arrays[mean], arrays[covariance], recipe.get("images"))
        for name, (mean, covariance) in MOMENTS.items()
        if mean in arrays
    }
    seen = scores.Reference(rows, moments["features"], moments.get("spatial"))
    unknown = {
        "dataset": epath.Path(path).name,
        "split": "a split that it does not say",
        "images": None,
        "image_shape": list(images.shape[1:]),
        "resize": "not said",
    }
    if not recipe:
        recipe = unknown | _of_neighbours(seen)
    return Reference(seen, images, {"file": str(path), **recipe})


def arrays_of(flag: str, path: epath.PathLike, needed: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The arrays of an .npz. Raises UsageError unless it has those needed, and arr_0 is images."""
    try:
        with epath.Path(path).open("rb") as file:
            arrays = dict(np.load(file))  # a .npy is no mapping
    except FileNotFoundError:
        raise UsageError(f"{flag}={path} does not exist.") from None
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UsageError(f"{flag}={path} is not a whole .npz file: {error}") from None
    if missing := [key for key in needed if key not in arrays]:
        raise UsageError(
            f"{flag}={path} has no {', '.join(missing)}: it has {', '.join(sorted(arrays))}; the "
            f"published layout has {', '.join(needed)}."
        )
    images = arrays["arr_0"]
    colours = images.shape[-1:] in ((1,), (3,))
    if images.ndim != 4 or images.dtype != np.uint8 or not colours or len(images) < 4:
        raise UsageError(
            f"{flag}={path}: arr_0 is {images.dtype} {list(images.shape)}; images are uint8 "
            "[N, H, W, C] with 1 or 3 channels, 4 of them or more."
        )
    return arrays
