"""What the convolution's own rule for its input gradient is worth.

    JAX_PLATFORMS=cpu python benchmarks/input_gradient.py

Eight 3 x 3 convolutions and their gradient by the input, 16 times in a scan, as classifier guidance
takes it; our rule and jax's in turns. Prints milliseconds a gradient and the ratio of the medians.
"""

import statistics
import time

import jax
import jax.numpy as jnp

from cfg_jax.models import operations

BATCH, SIDE, CHANNELS, DEPTH, STEPS, ROUNDS = 64, 8, 32, 8, 16, 7


def jaxs_own(x, kernel):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def chain(convolve):
    """z -> STEPS gradient steps of a small convolutional network, in a scan."""

    def energy(z, kernels):
        for kernel in kernels:
            z = jax.nn.silu(convolve(z, kernel))
        return jnp.sum(z)

    def step(kernels, z):
        return z + 1e-3 * jax.grad(energy)(z, kernels)

    return jax.jit(
        lambda z, kernels: jax.lax.scan(
            lambda z, _: (step(kernels, z), None), z, None, length=STEPS
        )[0]
    )


def main():
    keys = jax.random.split(jax.random.key(0), DEPTH + 1)
    z = jax.random.normal(keys[0], (BATCH, SIDE, SIDE, CHANNELS))
    shape = (3, 3, CHANNELS, CHANNELS)
    kernels = [jax.random.normal(k, shape) / (9 * CHANNELS) ** 0.5 for k in keys[1:]]
    programs = {"ours": chain(operations.convolve), "jax": chain(jaxs_own)}
    outputs = {name: program(z, kernels) for name, program in programs.items()}
    gap = float(jnp.abs(outputs["ours"] - outputs["jax"]).max())
    times = {name: [] for name in programs}
    for _ in range(ROUNDS):
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(z, kernels))
            times[name].append((time.perf_counter() - start) / STEPS * 1e3)
    medians = {name: statistics.median(t) for name, t in times.items()}
    kind = jax.devices()[0].device_kind
    for name, median in medians.items():
        spread = f"{min(times[name]):.2f} to {max(times[name]):.2f}"
        print(f"{name:5}{median:8.2f} ms a gradient ({spread})")
    ratio = medians["jax"] / medians["ours"]
    print(f"ratio {ratio:.1f} on {kind}; the outputs differ by {gap:.1e}")


if __name__ == "__main__":
    main()
