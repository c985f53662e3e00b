"""PyTorch's checkpoint files without PyTorch, and without running what a pickle asks for.

A `.pt` or `.pth` file is a pickle of a dictionary whose tensors name their storages, and the bytes
of these: entries of a zip archive, or, in files older than PyTorch 1.6, what follows the pickle. A
pickle may call anything that it can import. Here the few names that a state dict needs are bound to
functions of this file, and any other name is refused.
"""

import collections
import io
import math
import pickle
import struct
import zipfile
from typing import IO, Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from etils import epath

from cfg_jax.types import UsageError

_DTYPES = {
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(jnp.bfloat16),
    "DoubleStorage": np.dtype("<f8"),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}
_ZIP_MAGIC = b"PK\x03\x04"
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype
    size: int  # elements

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


class _Tensor(NamedTuple):
    """A view of a storage, in elements; checked to lie inside it."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def over(self, data: bytes) -> np.ndarray:
        flat = np.frombuffer(data, self.storage.dtype)[self.offset :]
        strides = [stride * flat.itemsize for stride in self.strides]
        return np.lib.stride_tricks.as_strided(flat, self.shape, strides, writeable=False)


def read_state_dict(path: epath.PathLike) -> dict[str, np.ndarray]:
    """The tensors of a PyTorch state dict as read-only arrays, by name; bfloat16 stays bfloat16.

    Tensors that share a storage share memory, each storage is read once, and nothing is copied.
    Raises UsageError, in one line, for a file that is not a whole state dict, for one that holds
    anything but tensors, and for a pickle that asks for any name that a state dict does not need.
    """
    path = epath.Path(path)
    try:
        with path.open("rb") as file:
            magic = file.read(len(_ZIP_MAGIC))
            file.seek(0)
            read = _read_zip if magic == _ZIP_MAGIC else _read_legacy
            return read(file)
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist; give the path of a .pt or .pth file.") from None
    except _UNREADABLE as error:
        raise UsageError(f"{path} is not a PyTorch state dict that can be read: {error}") from None


class _Refused(Exception):
    """Why a file is not read; `read_state_dict` adds which file."""


# What zipfile, struct and numpy raise for damaged files, beside our own.
_UNREADABLE = (
    *(OSError, EOFError, RuntimeError, ValueError),
    *(struct.error, zipfile.BadZipFile, _Refused),
)


def _read_zip(file: IO[bytes]) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(file) as archive:
        entries = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise _Refused("it is a zip archive without the data.pkl of PyTorch")
        root = pickles[0].removesuffix("data.pkl")

        def read(name: str) -> bytes:
            info = entries.get(root + name)
            if info is None:
                raise _Refused(f"{name} is missing")
            if info.compress_type != zipfile.ZIP_STORED:  # PyTorch stores; no bombs either
                raise _Refused(f"{name} is compressed")
            return archive.read(info)

        if root + "byteorder" in entries and read("byteorder") != b"little":
            raise _Refused("its numbers are big-endian")
        tensors, storages = _unpickle(io.BytesIO(read("data.pkl")))
        data = {}
        for key, storage in storages.items():
            data[key] = read(f"data/{key}")
            _check_size(storage, len(data[key]))
    return {name: tensor.over(data[tensor.storage.key]) for name, tensor in tensors.items()}


def _read_legacy(file: IO[bytes]) -> dict[str, np.ndarray]:
    """Pickles of a magic number, a version, the machine, the object and the storages' keys; then
    the storages, each with its size in front.
    """
    if _Unpickler(file).checked() != _LEGACY_MAGIC:
        raise _Refused("it does not begin as one")
    _Unpickler(file).checked()  # the version of the format: there was one
    machine = _Unpickler(file).checked()
    if not (isinstance(machine, dict) and dict.get(machine, "little_endian", True)):
        raise _Refused("its numbers are big-endian")
    tensors, storages = _unpickle(file)
    keys = _Unpickler(file).checked()
    named = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
    if not (named and sorted(keys) == sorted(storages)):
        raise _Refused("its list of storages is not that of its tensors")
    left = -file.tell() + file.seek(0, 2)
    file.seek(-left, 2)
    if left < sum(8 + storage.nbytes for storage in storages.values()):
        raise _Refused("it is cut short")
    data = {}
    for key in keys:
        (size,) = struct.unpack("<q", file.read(8))
        _check_size(storages[key], size * storages[key].dtype.itemsize)
        data[key] = file.read(storages[key].nbytes)
    return {name: tensor.over(data[tensor.storage.key]) for name, tensor in tensors.items()}


def _check_size(storage: _Storage, nbytes: int) -> None:
    if nbytes != storage.nbytes:
        raise _Refused(f"storage {storage.key} has {nbytes} bytes instead of {storage.nbytes}")


def _unpickle(file: IO[bytes]) -> tuple[dict[str, _Tensor], dict[str, _Storage]]:
    """-> (the tensors by name, the storages by key) of a pickled state dict."""
    unpickler = _Unpickler(file)
    state = unpickler.checked()
    if not isinstance(state, dict):
        raise _Refused(f"it holds a {type(state).__name__} instead of a dictionary of tensors")
    state = dict(dict.items(state))  # a pickle can set attributes of an OrderedDict: .items, too
    for name, value in state.items():
        if not (isinstance(name, str) and isinstance(value, _Tensor)):
            raise _Refused(
                f"under {name!r} it holds a {type(value).__name__} instead of a tensor; save the "
                "state_dict() of the network alone"
            )
    return state, unpickler.storages


class _Unpickler(pickle.Unpickler):
    """Of all names a pickle may import, those of a state dict, each bound to something harmless.

    The functions are bound methods: a pickle can set no attribute of one.
    """

    def __init__(self, file: IO[bytes]):
        super().__init__(file, encoding="utf-8")  # for strings of Python 2, as PyTorch has it
        self.storages: dict[str, _Storage] = {}

    def checked(self) -> Any:
        try:
            return self.load()
        except _Refused:
            raise
        except Exception as error:  # a broken or hostile pickle can raise almost anything
            raise _Refused(f"{type(error).__name__} in its pickle: {error}") from None

    def find_class(self, module: str, name: str) -> Any:
        match module, name:
            case "collections", "OrderedDict":
                return collections.OrderedDict
            case "torch._utils", "_rebuild_tensor_v2" | "_rebuild_tensor":
                return self._tensor
            case "torch._utils", "_rebuild_parameter":
                return self._parameter
            case "torch", _ if name in _DTYPES:
                return _DTYPES[name]
        raise _Refused(f"its pickle asks for {module}.{name}, which no state dict needs")

    def persistent_load(self, pid: Any) -> _Storage:
        match pid:
            case ("storage", np.dtype() as dtype, str(key), _, int(size), *view) if view in (
                [],
                [None],
            ):
                storage = _Storage(key, dtype, size)
                if size < 0 or self.storages.setdefault(key, storage) != storage:
                    raise _Refused(f"storage {key} is described in two ways")
                return storage
        raise _Refused("a storage is not described as PyTorch does since version 0.4")

    def _tensor(self, storage, offset, shape, strides, *unused) -> _Tensor:
        del unused  # whether it wants a gradient, and hooks
        numbers = [offset, *shape, *strides]
        fits = (
            isinstance(storage, _Storage)
            and all(isinstance(n, int) and n >= 0 for n in numbers)
            and len(shape) == len(strides)
        )
        if fits:
            last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides))
            empty = math.prod(shape) == 0
            fits = offset <= storage.size if empty else last < storage.size
        if not fits:
            raise _Refused("a tensor does not lie inside its storage")
        return _Tensor(storage, offset, tuple(shape), tuple(strides))

    def _parameter(self, tensor, *unused) -> _Tensor:
        del unused
        return tensor
