"""PyTorch's files are read without PyTorch, as PyTorch reads them; hostile ones are refused."""

import collections
import os
import pickle
import struct
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
from torch_writer import Call, Name, pickled, storage, tensor, write_legacy, write_zip

from cfg_jax.models import torch_files
from cfg_jax.types import UsageError

A = np.arange(12, dtype=np.float32)


def example(*view):
    """Two views of one storage, one transposed and one with an offset, and a scalar count."""
    state = {
        "t.weight": tensor(storage("0", 12, "FloatStorage", *view), 0, (4, 3), (1, 4)),
        "part": tensor(storage("0", 12, "FloatStorage", *view), 8, (2, 2), (2, 1)),
        "count": tensor(storage("7", 1, "LongStorage", *view), 0, (), ()),
    }
    return collections.OrderedDict(state), {"0": A, "7": np.array([5])}


def assert_example(state):
    assert list(state) == ["t.weight", "part", "count"]
    np.testing.assert_array_equal(state["t.weight"], A.reshape(3, 4).T)
    np.testing.assert_array_equal(state["part"], [[8, 9], [10, 11]])
    assert state["count"] == 5 and state["count"].dtype == np.int64
    assert np.shares_memory(state["t.weight"], state["part"])  # one storage, read once


def test_both_formats_by_hand(tmp_path):
    assert_example(torch_files.read_state_dict(write_zip(tmp_path / "z.pt", *example())))
    assert_example(torch_files.read_state_dict(write_legacy(tmp_path / "l.pth", *example(None))))


def test_every_kind_of_number_is_read_as_it_is(tmp_path):
    kinds = {
        "Float": np.float32,
        "Half": np.float16,
        "BFloat16": jnp.bfloat16,
        "Double": np.float64,
        "Long": np.int64,
        "Int": np.int32,
        "Short": np.int16,
        "Char": np.int8,
        "Byte": np.uint8,
        "Bool": np.bool_,
    }
    data = {kind: np.array([0, 1, -3, 100]).astype(of) for kind, of in kinds.items()}
    state = {kind: tensor(storage(kind, 4, f"{kind}Storage"), 0, (4,), (1,)) for kind in kinds}
    read = torch_files.read_state_dict(write_zip(tmp_path / "z.pt", state, data))
    assert sorted(read) == sorted(kinds)
    for kind, array in read.items():
        assert array.dtype == kinds[kind]
        np.testing.assert_array_equal(array, data[kind])


def refusal(path):
    with pytest.raises(UsageError) as error:
        torch_files.read_state_dict(path)
    assert len(str(error.value).splitlines()) == 1 and str(path) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("write", [write_zip, write_legacy])
def test_a_pickle_that_would_run_something_is_refused_by_name(write, tmp_path):
    marker = tmp_path / "marker"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(marker),)

    module = os.mkdir.__module__
    assert f"asks for {module}.mkdir," in refusal(write(tmp_path / "evil.pt", {"a": Evil()}, {}))
    for name in ["builtins.eval", "torch.load", "torch._utils.x", "collections.Counter"]:
        call = Call(Name(*name.rsplit(".", 1)), ("0",))
        assert f"asks for {name}," in refusal(write(tmp_path / "evil.pt", {"a": call}, {}))
    assert not marker.exists()


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [
        (0, (13,), (1,)),
        (1, (4, 3), (1, 4)),
        (-1, (2,), (1,)),
        (0, (2,), (-1,)),
        (0, (2, 2), (1,)),
        (13, (0,), (1,)),
        (0, (2.0,), (1,)),
    ],
)
def test_a_tensor_outside_its_storage_is_refused(offset, shape, strides, tmp_path):
    value = {"a": tensor(storage("0", 12), offset, shape, strides)}
    assert "does not lie inside" in refusal(write_zip(tmp_path / "a.pt", value, {"0": A}))


def test_files_that_are_no_whole_state_dict_are_refused(tmp_path):
    path = tmp_path / "a.pt"
    assert "does not exist" in refusal(path)
    for content in [b"", b"text", b"PK\x03\x04 cut", pickle.dumps([1]), b"\x80\x02."]:
        path.write_bytes(content)
        refusal(path)
    value, data = example()
    assert "data.pkl" in refusal(_zip_of(path, {"other": b""}))
    assert "data/7 is missing" in refusal(write_zip(path, value, {"0": A}))
    assert "12 bytes instead of 48" in refusal(write_zip(path, value, data | {"0": A[:3]}))
    assert "big-endian" in refusal(write_zip(path, value, data, byteorder="big"))
    nested = {"epoch": 3, "state_dict": value}
    assert "under 'epoch' it holds a int" in refusal(write_zip(path, nested, data))
    assert "list instead of a dict" in refusal(write_zip(path, [1], {}))
    twice = {
        "a": tensor(storage("0", 12), 0, (1,), (1,)),
        "b": tensor(storage("0", 6), 0, (1,), (1,)),
    }
    assert "two ways" in refusal(write_zip(path, twice, data))
    whole = write_legacy(path, *example(None)).read_bytes()
    path.write_bytes(whole[:-1])
    assert "cut short" in refusal(path)
    path.write_bytes(whole.replace(struct.pack("<q", 12), struct.pack("<q", 11)))
    assert "storage 0 has 44 bytes instead of 48" in refusal(path)
    old = storage("0", 12, "FloatStorage", ("1", 0, 12))
    refusal(write_legacy(path, {"a": tensor(old, 0, (1,), (1,))}, {"0": A}))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", pickled(value))
        archive.writestr("a/data/0", A.tobytes())
    assert "compressed" in refusal(path)


def _zip_of(path, entries):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("as_zip", [True, False], ids=["zip", "legacy"])
def test_as_pytorch_writes_them(as_zip, tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is missing: pip install -e '.[parity]'")
    whole = torch.randn(6, 8)
    layer = torch.nn.BatchNorm2d(3)
    state = collections.OrderedDict(
        {f"{kind}": torch.randn(3, 4).to(getattr(torch, kind)) for kind in ["float32", "float16"]},
        bfloat16=torch.randn(5).to(torch.bfloat16),
        float64=torch.randn(2, dtype=torch.float64),
        int64=torch.tensor([-(2**62), 3]),
        uint8=torch.arange(5, dtype=torch.uint8),
        bool=torch.tensor([True, False]),
        transposed=whole.T,
        rows=whole[2:4],
        every_other=whole[::2, 1::3],
        expanded=torch.ones(1).expand(4, 2),
        empty=torch.zeros(0, 3),
        scalar=torch.tensor(2.5),
        channels_last=torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        parameter=torch.nn.Parameter(torch.randn(2)),
    )
    for content in (state, layer.state_dict(), {}):  # a module's dict carries metadata
        path = tmp_path / "state.pt"
        torch.save(content, path, _use_new_zipfile_serialization=as_zip)
        ours = torch_files.read_state_dict(path)
        assert list(ours) == list(content)
        for name, theirs in content.items():
            theirs, mine = theirs.detach(), ours[name]
            if theirs.dtype == torch.bfloat16:
                assert mine.dtype == jnp.bfloat16
                theirs, mine = theirs.float(), mine.astype(np.float32)
            assert mine.dtype == theirs.numpy().dtype, name
            np.testing.assert_array_equal(mine, theirs.numpy(), err_msg=name)
        if content is state:
            assert np.shares_memory(ours["transposed"], ours["rows"])
    torch.save(torch.nn.Linear(2, 2), path, _use_new_zipfile_serialization=as_zip)
    assert "torch.nn.modules.linear.Linear" in refusal(path)
