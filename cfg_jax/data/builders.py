"""TFDS builders by name, and how they become array_record files that are read without TensorFlow.

The MNIST and CIFAR families are prepared without TensorFlow too: their TFDS builders need it only
to open archives and to encode PNG, which Python's own gzip and tarfile, and Pillow, do as well.
"""

import contextlib
import difflib
import functools
import gzip
import importlib.util
import io
import tarfile
import tempfile
import types
import uuid

import numpy as np
import PIL.Image
import tensorflow_datasets as tfds
from etils import epath, epy
from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError
from tensorflow_datasets.core.download.util import DownloadError

from cfg_jax.data import imagenet
from cfg_jax.types import UsageError

with epy.lazy_imports():
    import sklearn.datasets  # only to prepare the digits, and slow to import

FORMAT = "array_record"


class Digits(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """The handwritten digits of scikit-learn: 1,797 grey 8x8 images, shipped with that package.

    They stand there writer by writer: 13 people, in 14 runs of about 130. `test` is the last three
    runs, so that its hands are not those of `train`; a random split flatters a classifier (logistic
    regression: 98 % against 91 %). Levels 0..16 become 0..255.
    """

    name = "digits"
    needs_tensorflow = False
    VERSION = tfds.core.Version("1.0.0")
    _FIRST_TEST = 1415

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description="Handwritten digits of scikit-learn, 8x8, split by writer.",
            homepage="https://archive.ics.uci.edu/dataset/80",
            supervised_keys=("image", "label"),
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        digits = sklearn.datasets.load_digits()
        images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
        train, test = slice(self._FIRST_TEST), slice(self._FIRST_TEST, None)
        return {
            "train": _records(images[train], digits.target[train]),
            "test": _records(images[test], digits.target[test]),
        }

    def _generate_examples(self):
        raise NotImplementedError("abstract in TFDS; each split brings its own generator")


def builder(name: str, data_dir: epath.PathLike | None = None) -> tfds.core.DatasetBuilder:
    """The builder of that name: ours, any of the TFDS catalogue, or one prepared in data_dir.

    `name` may carry a configuration, as in imagenet_resized/64x64. UsageError where there is no
    such.
    """
    options = {"data_dir": data_dir, "file_format": FORMAT}
    ours = {"digits": Digits, **imagenet.BUILDERS}
    if name in ours:
        return ours[name](**options)
    bare = name.split("/")[0].split(":")[0]
    known = [*ours, *tfds.list_builders(with_community_datasets=False)]
    own_place = epath.Path(data_dir or tfds.core.constants.DATA_DIR) / bare
    # Asked here, because TFDS looks for unknown names on the network, and with TensorFlow.
    if bare not in known and not _holds_a_set(own_place):
        near = difflib.get_close_matches(bare, known)
        hint = f"did you mean {' or '.join(near)}?" if near else "tfds.list_builders() names them;"
        raise UsageError(
            f"there is no data set {name!r} in {own_place.parent}: {hint} pictures of your own are "
            "prepared by  python -m cfg_jax.prepare --dataset=image_folder --path=DIR "
            f"--name={bare} --data_dir={own_place.parent}"
        )
    try:
        found = tfds.builder(name, data_dir=data_dir)
    except (ValueError, AssertionError) as error:  # of the configuration or the version
        configs = sorted(tfds.builder_cls(bare).builder_configs)
        reason = f"configurations are {', '.join(configs)}" if configs else error
        raise UsageError(f"there is no data set {name!r}: {reason}") from error
    if is_prepared(found):
        return found
    own = _without_tensorflow(type(found))
    return own(config=found.builder_config, **options) if own else tfds.builder(name, **options)


def _holds_a_set(place: epath.Path) -> bool:
    return place.exists() and any(not p.name.startswith("incomplete.") for p in place.iterdir())


def describes_itself(name: str) -> bool:
    """Whether a set can be described where its files are not: those of the catalogue and ours."""
    bare = name.split("/")[0].split(":")[0]
    ours = {"digits", *imagenet.BUILDERS}
    return bare in ours or bare in tfds.list_builders(with_community_datasets=False)


def is_prepared(builder: tfds.core.DatasetBuilder) -> bool:
    return builder.data_path.exists()


def prepare(
    builder: tfds.core.DatasetBuilder, manual_dir: epath.PathLike | None = None
) -> tfds.core.DatasetBuilder:
    """Downloads and converts a data set, unless it is there; returns the builder that reads it.

    Files that cannot be downloaded are taken from manual_dir under the names that their source
    gives them. UsageError where TensorFlow is needed and missing, and where a file is missing or
    differs.
    """
    if isinstance(builder, Digits):
        return _prepare_aside(builder)
    if not is_prepared(builder):
        _require_tensorflow(builder)
        with tempfile.TemporaryDirectory() as scratch:
            if manual_dir and builder.name == "fashion_mnist":
                manual_dir = _restore_gzip_headers(builder, epath.Path(manual_dir), scratch)
            config = tfds.download.DownloadConfig(manual_dir=manual_dir)
            try:
                builder.download_and_prepare(download_config=config, file_format=FORMAT)
            except (OSError, AssertionError, DownloadError, NonMatchingChecksumError) as error:
                reason = " ".join(str(error).split())
                raise UsageError(f"{builder.name} was not prepared: {reason}") from error
    return builder


def count(builder: tfds.core.DatasetBuilder) -> dict[str, int]:
    """The number of examples of each split, of which the first and the last are read to be sure."""
    counts = {}
    for split, info in builder.info.splits.items():
        source = builder.as_data_source(split)
        if len(source) != info.num_examples or not (source[0] and source[-1 + len(source)]):
            raise UsageError(f"{builder.data_path} is damaged: {split} has {len(source)} examples")
        counts[split] = len(source)
    return counts


def _prepare_aside(builder: Digits) -> Digits:
    """Prepares in a directory of its own, then renames it, so that many may do it at once."""
    if is_prepared(builder):
        return builder
    # TFDS renames too, but from a name drawn by `random`, which forked or seeded processes share.
    aside = epath.Path(builder.data_dir_root) / f"incomplete.{uuid.uuid4().hex}"
    try:
        copy = type(builder)(data_dir=aside, file_format=FORMAT)
        with contextlib.redirect_stdout(io.StringIO()):  # it would tell of a place that goes away
            copy.download_and_prepare()
        builder.data_path.parent.mkdir(parents=True, exist_ok=True)
        copy.data_path.rename(builder.data_path)
    except OSError as error:
        if not is_prepared(builder):  # else another process was first, with the same content
            raise UsageError(
                f"cannot write to {builder.data_dir_root}: give another data_dir ({error})"
            ) from error
    finally:
        aside.rmtree(missing_ok=True)
    return type(builder)(data_dir=builder.data_dir_root, file_format=FORMAT)


def _records(images, labels):
    """(key, example) of each; as Pillow images, since TFDS encodes arrays with TensorFlow."""
    for key, (image, label) in enumerate(zip(images, labels)):
        yield key, {"image": PIL.Image.fromarray(image.squeeze()), "label": int(label)}


@functools.cache
def _without_tensorflow(stock: type) -> type | None:
    """A builder of the same name, files and content as one of the two families, else None.

    Which files there are, where, with which hashes, and what they mean stays with the TFDS class.
    """
    from tensorflow_datasets.image_classification import cifar, mnist

    class Idx(stock, skip_registration=True):
        name, url_infos = stock.name, stock.url_infos
        needs_tensorflow = False

        def _split_generators(self, dl_manager):
            return super()._split_generators(
                types.SimpleNamespace(download_and_extract=dl_manager.download)
            )

        def _generate_examples(self, num_examples, data_path, label_path):
            del num_examples  # the files say it
            return _records(read_idx(data_path), read_idx(label_path))

    class Cifar(stock, skip_registration=True):
        name, url_infos = stock.name, stock.url_infos
        needs_tensorflow = False

        def _split_generators(self, dl_manager):
            # Held by the builder, because the generators read from it after this returns.
            self._extracted = tempfile.TemporaryDirectory()

            def download_and_extract(url):
                with epath.Path(dl_manager.download(url)).open("rb") as file:
                    with tarfile.open(fileobj=file) as archive:
                        archive.extractall(self._extracted.name, filter="data")
                return self._extracted.name

            return super()._split_generators(
                types.SimpleNamespace(download_and_extract=download_and_extract)
            )

        def _generate_examples(self, split_prefix, filepaths):
            keys = self._cifar_info.label_keys
            key = 0
            for path in filepaths:
                rows = np.frombuffer(epath.Path(path).read_bytes(), np.uint8)
                for row in rows.reshape(-1, len(keys) + 3 * 32 * 32):
                    image = row[len(keys) :].reshape(3, 32, 32).transpose(1, 2, 0)
                    labels = dict(zip(keys, row.tolist()))
                    name = f"{split_prefix}{key:05d}"
                    yield key, {"id": name, "image": PIL.Image.fromarray(image.copy()), **labels}
                    key += 1

    if stock in (mnist.MNIST, mnist.FashionMNIST, mnist.KMNIST):
        return Idx
    return Cifar if stock in (cifar.Cifar10, cifar.Cifar100) else None


def read_idx(path: epath.PathLike) -> np.ndarray:
    """The uint8 array of a gzipped IDX file, MNIST's format: two zeros, type, rank, sizes, data."""
    data = gzip.decompress(epath.Path(path).read_bytes())
    rank = data[3]
    shape = np.frombuffer(data, ">i4", count=rank, offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)


def _require_tensorflow(builder: tfds.core.DatasetBuilder) -> None:
    needs = getattr(builder, "needs_tensorflow", True)
    if needs and importlib.util.find_spec("tensorflow") is None:
        raise UsageError(
            f"{builder.name} is prepared with TensorFlow, which is not installed:"
            " pip install 'cfg_jax[prepare]' (it is needed once; nothing reads with it)"
        )


# When the four files of Fashion-MNIST were compressed, by whether their name begins with "train".
_FASHION_MNIST_TIMES = {True: 1504176606, False: 1504176627}


def _restore_gzip_headers(
    builder: tfds.core.DatasetBuilder, manual_dir: epath.Path, scratch: str
) -> epath.Path:
    """A directory like manual_dir, in which Fashion-MNIST's files have their published headers.

    Debian packages that set (dataset-fashion-mnist) with name and time taken out of the gzip
    headers, as its rules of reproducible builds want it. With both back the hashes are the
    published ones, which TFDS then verifies.
    """
    for info in builder.url_infos.values():
        path = manual_dir / info.filename
        if not path.exists():
            raise UsageError(f"{manual_dir} lacks {info.filename}, which {builder.name} is made of")
        data = path.read_bytes()
        if data[:4] == b"\x1f\x8b\x08\x00":  # gzip, deflate, no name
            time = _FASHION_MNIST_TIMES[info.filename.startswith("train")].to_bytes(4, "little")
            name = info.filename.removesuffix(".gz").encode() + b"\0"
            data = b"\x1f\x8b\x08\x08" + time + b"\x00\x03" + name + data[10:]
        (epath.Path(scratch) / info.filename).write_bytes(data)
    return epath.Path(scratch)
