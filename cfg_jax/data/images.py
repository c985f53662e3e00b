"""Images between disk and model: uint8 <-> [-1, 1], flips, crops, resizing, grids, PNG files.

Every function of levels or layout takes numpy and jax arrays alike, and works inside jit.
"""

import functools
import io

import numpy as np
import PIL.Image
from etils import epath


def to_float(images):
    """uint8 -> float32 in [-1, 1]: x / 127.5 - 1, so that level 0 is -1 and level 255 is 1."""
    return images.astype(np.float32) / 127.5 - 1


def to_uint8(x):
    """Floats -> uint8, the one quantiser: clip to [-1, 1], then the nearest of the 256 levels.

    Halves go to the even level. The exact inverse of `to_float` on every level.
    """
    return ((x.astype(np.float32).clip(-1, 1) + 1) * 127.5).round().astype(np.uint8)


def flip(images):
    """[..., H, W, C] mirrored left to right."""
    return images[..., ::-1, :]


def central_square(image):
    """The largest centred square of [..., H, W, C]; the odd row or column goes from the far end."""
    height, width = image.shape[-3:-1]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return image[..., top : top + side, left : left + side, :]


def area_resize(image, height: int, width: int) -> np.ndarray:
    """[H, W, C] -> [height, width, C]: each new pixel is the mean of the area that it covers.

    The image is taken as constant over each of its pixels, which holds for any ratio of sizes, and
    for upscaling too. uint8 in, uint8 out, correctly rounded: the sums are integers, and exact.
    Other types come back as float64.
    """
    # Sums over rows stay under 2^24, what float32 holds exactly, and are most of the work.
    small = image.dtype == np.uint8 and len(image) < 1 << 16
    rows = _sums_of_lines(image, height, np.float32 if small else np.float64)
    sums = _sums_of_lines(rows.swapaxes(0, 1), width, np.float64).swapaxes(0, 1)
    means = sums / (image.shape[0] * image.shape[1])
    return means.round().astype(np.uint8) if image.dtype == np.uint8 else means


def _sums_of_lines(lines, new: int, dtype) -> np.ndarray:
    """[old, ...] -> [new, ...]: old times the mean of the lines that each new one covers."""
    places, lengths = _overlaps(len(lines), new)
    sums = np.zeros((new, *lines.shape[1:]), dtype)
    for place, length in zip(places, lengths.astype(dtype)):
        sums += length[:, None, None] * lines[place]
    return sums


@functools.lru_cache(maxsize=256)
def _overlaps(old: int, new: int) -> tuple[np.ndarray, np.ndarray]:
    """The old pixels that each new one meets, on a line of old * new units, and the common lengths.

    Both are [most that any meets, new]. The lengths of a new pixel sum to old; one that meets fewer
    has lengths of 0 at the end.
    """
    starts = np.arange(new) * old
    places = starts // new + np.arange(-(-old // new) + 1)[:, None]
    ends = np.minimum(starts + old, (places + 1) * new)
    lengths = np.maximum(ends - np.maximum(starts, places * new), 0)
    return np.minimum(places, old - 1), lengths


def grid(images, columns: int, *, margin: int = 1, scale: int = 1, background: int = 255):
    """Images side by side, row by row: uint8 [N, H, W, C] -> uint8 [height, width, C].

    `scale` enlarges each pixel to scale x scale (tiny images stay crisp), `margin` is the gap
    between images, in pixels of the result; places of the last row that have no image show the
    background.
    """
    images = np.asarray(images).repeat(scale, axis=1).repeat(scale, axis=2)
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    tiles = np.full(
        (rows * columns, height + margin, width + margin, channels), background, np.uint8
    )
    tiles[:count, :height, :width] = images
    tiles = tiles.reshape(rows, columns, height + margin, width + margin, channels)
    canvas = tiles.swapaxes(1, 2).reshape(rows * (height + margin), -1, channels)
    return canvas[: canvas.shape[0] - margin, : canvas.shape[1] - margin]


def save_png(path: epath.PathLike, image) -> None:
    """Writes uint8 [H, W, 1] or [H, W, 3] as a PNG file, to any path that etils opens."""
    epath.Path(path).write_bytes(png(image))


def png(image) -> bytes:
    """uint8 [H, W, 1] or [H, W, 3] as the content of a PNG file."""
    image = np.asarray(image)
    content = io.BytesIO()
    PIL.Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(content, "PNG")
    return content.getvalue()
