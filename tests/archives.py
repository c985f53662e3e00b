"""Small archives of ImageNet in the layout of the true ones."""

import io
import tarfile

import numpy as np
import PIL.Image

TRAIN, VALIDATION = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
CLASSES = {"n02105855": 230, "n01440764": 0, "n15075141": 999}  # as the archive has them; labels
VALIDATION_LABELS = [65, 970, 230, 809, 516, 57, 334, 415, 674, 332, 109, 286]  # the first twelve


def picture(rng, height, width, mode="RGB", form="JPEG"):
    """An encoded image of smooth noise."""
    coarse = rng.integers(0, 256, (4, 5, len(mode)), np.uint8).squeeze()
    content = io.BytesIO()
    PIL.Image.fromarray(coarse, mode).resize((width, height)).save(content, form, quality=90)
    return content.getvalue()


def tar(files):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return content.getvalue()


def write(folder):
    """Both archives; gives {split: [(file name, label, encoded image)]} in order."""
    rng = np.random.default_rng(0)
    sizes = [(150, 200), (91, 64), (70, 75), (40, 50)]
    files = {
        wnid: [picture(rng, *sizes[i]) for i in range(4 - n)] for n, wnid in enumerate(CLASSES)
    }
    files["n02105855"].append(picture(rng, 80, 99, form="PNG"))
    files["n01440764"] += [picture(rng, 80, 99, "L"), picture(rng, 99, 80, "CMYK")]
    named = {
        wnid: [(f"{wnid}_{10 - i}.JPEG", content) for i, content in enumerate(contents)]
        for wnid, contents in files.items()
    }
    (folder / TRAIN).write_bytes(tar((f"{wnid}.tar", tar(named[wnid])) for wnid in named))
    held_out = [
        (f"ILSVRC2012_val_{i:08d}.JPEG", picture(rng, 60 + i, 90 - i)) for i in range(1, 13)
    ]
    (folder / VALIDATION).write_bytes(tar(held_out[::-1]))
    return {
        "train": [(name, CLASSES[w], data) for w in sorted(named) for name, data in named[w]],
        "validation": [
            (name, label, data) for (name, data), label in zip(held_out, VALIDATION_LABELS)
        ],
    }
