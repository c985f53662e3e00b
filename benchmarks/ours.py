"""Our side of the benchmark: the train job's own program, and the sampling jobs' own.

    python -m benchmarks.ours --config=NAME --task=train|sample --folder=DIR [--steps=T]

Asked line by line, as `turns.serve` says. It writes what the other side needs to do the same into
the folder: the config, parameters, a batch; and what came out of them here.
"""

import argparse
import functools
import importlib.metadata
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import turns
from cfg_jax import executed, experiment, generator, hlo, train, train_step
from cfg_jax.data import images
from cfg_jax.diffusion import samplers, schedules
from cfg_jax.models import weights
from cfg_jax.runtime import mesh as meshes

HERE = Path(__file__).parent


def load_config(name: str, steps: int | None = None) -> dict:
    """A config of this folder, of configs/, or a path, with `steps` levels and one batch size."""
    own = HERE / f"{name}.py"
    config = experiment.SCHEMA.complete(experiment.load_config(str(own) if own.exists() else name))
    config["sample"]["batch_size"] = config["train"]["batch_size"]
    config["sample"]["steps"] = steps or config["sample"]["steps"]
    return config


def alive(params, seed: int = 0):
    """Parameters without an array of zeros: else half of the network would not be compared."""
    rng = np.random.default_rng(seed)

    def one(p):
        p = np.asarray(p)
        scale = 0.1 if p.ndim == 1 else 0.5 / np.prod(p.shape[:-1]) ** 0.5
        return p if p.any() else (scale * rng.standard_normal(p.shape)).astype(np.float32)

    return jax.tree.map(one, params)


def products(function, *arguments) -> int:
    """FLOPs of convolutions and matrix products as `plan` counts them, before XLA's passes.

    As lowered for a TPU, for which nothing is rewritten: the same number on every machine, where
    the forms that are chosen for a CPU count otherwise.
    """
    lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",))
    return executed.flops(hlo.parse(lowered.as_text("hlo")))


def operations(model: experiment.Experiment, task: str) -> int:
    """FLOPs of a training step, or of a batch of guided images: two passes at each level."""
    size, key = model.train.batch_size, jax.random.key(0)
    params = jax.eval_shape(model.network.init, key)
    image, z = (
        jax.ShapeDtypeStruct((size, *model.dataset.image_shape), kind)
        for kind in (np.uint8, np.float32)
    )
    label, lam = (jax.ShapeDtypeStruct((size,), kind) for kind in (np.int32, np.float32))
    if task == "train":
        batch = {"image": image, "label": label}
        return products(jax.grad(lambda p, b: model.loss(p, {}, b, key)[0]), params, batch)
    passes = 2 * model.sample.steps
    return passes * products(model.network.apply, params, z, lam, {"label": label})


class Ours:
    """The step or the sampler of one config."""

    def __init__(self, config: str, task: str, folder: str, steps: int | None = None):
        self.base_mib = turns.resident_mib()
        config = load_config(config, steps)
        self.model = experiment.build(config)
        at_most = self.model.cpu_devices if task == "train" else None
        meshes.split_cpu(self.model.train.batch_size, at_most)
        self.mesh = meshes.make_mesh()
        self.folder, self.task = Path(folder), task
        self.key = jax.random.key(0)
        size, dataset = self.model.train.batch_size, self.model.dataset
        rng = np.random.default_rng(1)
        self.rows = {
            "image": rng.integers(0, 256, (size, *dataset.image_shape), np.uint8),
            "label": rng.integers(0, dataset.num_classes, size, np.int32),
        }
        self.noise = rng.standard_normal((size, *dataset.image_shape)).astype(np.float32)
        self.lam = np.linspace(-10, 10, size, dtype=np.float32)
        self.params = alive(self.model.network.init(self.key))
        self._start()

    def _start(self) -> None:
        if self.task == "sample":
            params = jax.device_put(self.params, meshes.replicated(self.mesh))
            self.sampled = generator.Generator(self.model, {"model": params}, mesh=self.mesh)
            return
        step = train.make_step(self.model, self.mesh)
        self.program, shardings = step.run, step.shardings
        state = jax.jit(step.init, out_shardings=shardings)(self.key)
        self.state = state._replace(
            params=jax.device_put(self.params, shardings.params),
            ema=jax.device_put(self.params, shardings.ema),
        )

    def run(self, count: int) -> float:
        """Seconds that `count` steps, or batches of images, take, from numpy rows to the end."""
        start = time.perf_counter()
        for i in range(count):
            if self.task == "sample":
                self.sampled.batch(self.rows["label"], np.arange(len(self.noise)), 1.0, i)
                continue
            rows = meshes.shard_local(self.mesh, self.rows)
            self.state, metrics = self.program(self.state, {}, rows, self.key)
        if self.task == "train":
            jax.block_until_ready((self.state, metrics))
        return time.perf_counter() - start

    def prepare(self) -> dict:
        """The first call, which compiles, and the memory of later ones."""
        first = self.run(1)
        again = self.run(1)
        turns.reset_peak()
        self.run(2)
        return {
            "compile_s": first - again,
            "base_mib": self.base_mib,
            "peak_mib": turns.resident_mib(),
            "parallel": f"{self.mesh.size} XLA devices",
        }

    def describe(self) -> dict:
        """What is the same on both sides: sizes, and the products' operations a unit of work."""
        levels = self.model.sample.steps
        return {
            "parameters": sum(p.size for p in jax.tree.leaves(self.params)),
            "batch_size": len(self.noise),
            "image_shape": self.noise.shape[1:],
            "levels": None if self.task == "train" else levels,
            "flops": operations(self.model, self.task),
        }

    def check(self) -> dict:
        """Leaves inputs and outputs for the other side in the folder."""
        model, label = self.model, self.rows["label"]
        cond = {"label": label}
        inputs = {"z": self.noise, "s": schedules.sinusoid_input(self.lam), "label": label}

        def loss(params, frozen, batch, key):
            out = model.network.apply(params, self.noise, self.lam, cond)
            return jnp.mean((out - images.to_float(batch["image"])) ** 2), {}

        outputs = {}
        if self.task == "train":
            out, grads = jax.jit(
                lambda params: (
                    model.network.apply(params, self.noise, self.lam, cond),
                    jax.grad(loss, has_aux=True)(params, {}, self.rows, None)[0],
                )
            )(self.params)
            state = train_step.init_state(self.key, model.network, model.optimizer)
            state = state._replace(params=self.params, ema=self.params)
            state, _ = jax.jit(
                functools.partial(
                    train_step.train_step,
                    loss=loss,
                    optimizer=model.optimizer,
                    ema=model.ema,
                )
            )(state, {}, self.rows, self.key)
            outputs = {
                "output": out,
                **_flat("gradient", grads),
                **_flat("moved", jax.tree.map(jnp.subtract, state.params, self.params)),
                **_flat("ema moved", jax.tree.map(jnp.subtract, state.ema, self.params)),
            }
        else:
            noise = samplers.seeded_noise(
                generator.keys(np.uint32(0), np.arange(len(label))), model.dataset.image_shape
            )
            inputs["noise"] = jnp.stack([noise(i) for i in range(model.sample.steps)])
            inputs["lams"] = model.lams()
            outputs["images"] = self.sampled.batch(label, np.arange(len(label)), 1.0, 0)
        np.savez(self.folder / "params.npz", **_flat("", self.params))
        np.savez(self.folder / "inputs.npz", image=self.rows["image"], **inputs)
        np.savez(self.folder / "outputs.npz", **outputs)
        (self.folder / "config.json").write_text(json.dumps(model.config))
        return {}

    def peak(self) -> float:
        """FLOP/s of a wide convolution forward, a part of the batch on each device: the best of
        several runs, which is what this machine can do where nothing is in the way. Taps on the
        padding are not counted, as they are not in `products`."""
        size, side, width, repeats = 8 * self.mesh.size, 32, 256, 5
        x = jax.device_put(
            np.ones((size, side, side, width), np.float32), meshes.batch_sharding(self.mesh)
        )
        kernel = jax.device_put(
            np.ones((3, 3, width, width), np.float32), meshes.replicated(self.mesh)
        )
        program = jax.jit(
            lambda x, kernel: jax.lax.conv_general_dilated(
                x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        )
        best = min(_seconds(lambda: program(x, kernel).block_until_ready()) for _ in range(repeats))
        return 2 * (3 * side - 2) ** 2 * size * width**2 / best

    def versions(self) -> dict:
        names = ("jax", "jaxlib", "flax", "optax", "numpy")
        return {name: importlib.metadata.version(name) for name in names}


def _seconds(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _flat(prefix: str, tree) -> dict[str, np.ndarray]:
    flat = weights.flatten(tree)
    return {f"{prefix}/{path}".lstrip("/"): np.asarray(leaf) for path, leaf in flat.items()}


def main() -> None:
    """Serves one side of a comparison to `turns.Worker`, until its input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", required=True)
    parser.add_argument("--task", choices=("train", "sample"), required=True)
    parser.add_argument("--folder", required=True)
    parser.add_argument("--steps", type=int)
    turns.serve(Ours(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
