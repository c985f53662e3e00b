"""What bfloat16 compute costs in accuracy: loss curves side by side, and one forward pass.

    JAX_PLATFORMS=cpu python benchmarks/precision.py [--config=digits] [--steps=300]

Trains the config twice from the same seed, batches and draws, its convolutions and products in
float32 and in bfloat16, and prints the mean loss of every tenth of the run; then the relative error
||bfloat16 - float32|| / ||float32|| of the network's output for the float32 run's EMA, over the
levels that training draws, and at single ones from noise to clean. At clean levels it grows, for
rounding z drowns noise that is as small, which the network does not see well either: its output is
small there, and is multiplied by a small sigma.
"""

import argparse
import json
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from cfg_jax import experiment, stored, train
from cfg_jax.data import images
from cfg_jax.diffusion import logsnr, losses
from cfg_jax.runtime import mesh as meshes

DTYPES = ("float32", "bfloat16")
COUNT = 512  # images
LAMS = (-10.0, -5.0, -2.0, 0.0, 2.0, 5.0, 10.0)


def outputs(config: dict, params, lam) -> list[np.ndarray]:
    """In float32 and in bfloat16, for training images diffused to lam [B]."""
    model = experiment.build(config)
    rows = model.dataset.load()[: len(lam)]
    x = images.to_float(jnp.asarray(rows["image"]))
    z = logsnr.diffuse(x, losses.sample_eps(jax.random.key(1), x), lam)
    cond = {"label": jnp.asarray(rows["label"])}
    out = []
    for dtype in DTYPES:
        network = experiment.build({**config, "model": {**config["model"], "dtype": dtype}}).network
        out.append(np.asarray(jax.jit(network.apply)(params, z, lam, cond), np.float64))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="digits")
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    config = experiment.SCHEMA.complete(experiment.load_config(options.config))
    config["train"] |= {
        "steps": options.steps,
        "log_every": max(1, options.steps // 10),
        "checkpoint_every": options.steps,
        "sample_every": 0,
    }
    model = experiment.build(config)
    meshes.split_cpu(model.train.batch_size, model.cpu_devices)
    with tempfile.TemporaryDirectory() as home:
        curves = {}
        for dtype in DTYPES:
            workdir = Path(home) / dtype
            train.train({**config, "model": {**config["model"], "dtype": dtype}}, str(workdir))
            lines = (workdir / "metrics.jsonl").read_text().splitlines()
            curves[dtype] = [json.loads(line) for line in lines]
        _, ema = stored.load_ema(f"{home}/float32", experiment.build(config))
    print("| up to step | loss, float32 | loss, bfloat16 |")
    print("|---|---|---|")
    for single, half in zip(curves["float32"], curves["bfloat16"], strict=True):
        print(f"| {single['step']} | {single['loss']:.4f} | {half['loss']:.4f} |")
    drawn = losses.sample_lambda(
        jax.random.key(0), experiment.build(config).schedule, COUNT, stratified=True
    )
    levels = {"p(lambda)": drawn} | {f"lam={lam:g}": jnp.full(COUNT, lam) for lam in LAMS}
    print("\n| level | relative error | root mean square of the output |")
    print("|---|---|---|")
    for name, lam in levels.items():
        single, half = outputs(config, ema, lam)
        error = np.linalg.norm(half - single) / np.linalg.norm(single)
        print(f"| {name} | {100 * error:.2f} % | {np.sqrt(np.mean(single**2)):.3f} |")


if __name__ == "__main__":
    main()
