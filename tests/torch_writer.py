"""PyTorch's two formats of a state dict, written by hand: what the reader is tested against where
PyTorch is missing.
"""

import collections
import io
import pickle
import struct
import zipfile


class Name:
    """Pickled as a name of a module, whether that exists here or not."""

    def __init__(self, module, name):
        self.module, self.name = module, name


class Call(collections.namedtuple("Call", "function arguments")):
    """Pickled as a call."""


class _Pickler(pickle._Pickler):  # the one in Python, which can be told to write any name
    def persistent_id(self, value):
        return value if isinstance(value, tuple) and value[:1] == ("storage",) else None

    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, Name):
            self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
        elif isinstance(obj, Call):
            self.save(obj.function)
            self.save(tuple(obj.arguments))
            self.write(pickle.REDUCE)
        else:
            super().save(obj, save_persistent_id)


def pickled(value) -> bytes:
    file = io.BytesIO()
    _Pickler(file, protocol=2).dump(value)
    return file.getvalue()


def storage(key, size, kind="FloatStorage", *view):
    return ("storage", Name("torch", kind), key, "cpu", size, *view)


def tensor(storage, offset, shape, strides):
    rebuild = Name("torch._utils", "_rebuild_tensor_v2")
    hooks = collections.OrderedDict()
    return Call(rebuild, (storage, offset, shape, strides, False, hooks))


def write_zip(path, value, data, **others):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled(value))
        for key, array in data.items():
            archive.writestr(f"archive/data/{key}", array.tobytes())
        for name, text in others.items():
            archive.writestr(f"archive/{name}", text)
    return path


def write_legacy(path, value, data):
    machine = {"protocol_version": 1001, "little_endian": True}
    heads = [0x1950A86A20F9469CFC6C, 1001, machine, value, list(data)]
    arrays = (struct.pack("<q", a.size) + a.tobytes() for a in data.values())
    path.write_bytes(b"".join(map(pickled, heads)) + b"".join(arrays))
    return path


def state_dict(arrays):
    """(value, data) for the writers: contiguous float32 arrays by name, each a storage."""
    value, data = collections.OrderedDict(), {}
    for i, (name, array) in enumerate(arrays.items()):
        key, items = str(i), array.itemsize
        strides = tuple(stride // items for stride in array.strides)
        value[name] = tensor(storage(key, array.size), 0, array.shape, strides)
        data[key] = array
    return value, data
