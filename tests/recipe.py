"""The weights of the reference networks of `fixtures/`, made from their names."""

import json
import pathlib
import zlib

import numpy as np

# Compiling is most of what a small network costs a test: this takes a quarter of the time.
QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
}

INCEPTION = pathlib.Path(__file__).parent / "fixtures" / "inception"
ADM = pathlib.Path(__file__).parent / "fixtures" / "adm"


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Unit normals that depend on the name of the array alone."""
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    return rng.standard_normal(shape).astype(np.float32)


def adm_weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    w = draw(name, shape)
    if name.endswith(".bias"):
        return np.float32(0.1) * w
    if len(shape) == 1:
        return 1 + np.float32(0.1) * w
    return w / np.sqrt(np.float32(np.prod(shape[1:])))


def inception_weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    w = draw(name, shape)
    if name.endswith("running_var"):
        return 1 + np.float32(0.1) * np.abs(w)
    if name.endswith((".running_mean", ".bias")):
        return np.float32(0.1) * w
    if len(shape) == 1:
        return 1 + np.float32(0.1) * w
    return w * np.sqrt(np.float32(2) / np.float32(np.prod(shape[1:])))


def inception_state() -> dict[str, np.ndarray]:
    """The arrays of the network of FID, under their published names."""
    shapes = json.loads((INCEPTION / "index.json").read_text())
    return {name: inception_weight(name, tuple(shape)) for name, shape in shapes.items()}


def adm_case(case: str):
    """-> (kind, published config, published state dict, {"x_nchw", "t", "y", "out"})."""
    entry = json.loads((ADM / "index.json").read_text())[case]
    state = {name: adm_weight(name, tuple(shape)) for name, shape in entry["params"].items()}
    return entry["kind"], entry["config"], state, dict(np.load(ADM / f"{case}.npz"))
