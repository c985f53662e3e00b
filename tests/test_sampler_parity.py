"""Step by step the samplers of Hugging Face's diffusers, on random estimates.

Each side is told the same clean estimates, the same draws and the same levels, sigma / alpha =
e^(-lam / 2), and goes all the way to the image. Where definitions differ, a test says so.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfg_jax.diffusion import multistep, samplers
from cfg_jax.types import Prediction

try:
    import diffusers
    import torch
except ModuleNotFoundError:
    pytest.skip(
        'NOT TESTED: agreement with diffusers needs it: pip install -e ".[parity]"',
        allow_module_level=True,
    )

T, SHAPE = 12, (2, 3, 4, 4)
RNG = np.random.default_rng(0)
LAMS = np.sort(RNG.uniform(-9, 9, T))
DRAWS = RNG.standard_normal((T + 1, *SHAPE))
SAID = RNG.standard_normal((T, *SHAPE))


def estimate(z, said):
    """Clean estimates that tell of z, so that every step shows in the next."""
    return said + 0.5 * np.sin(z)


@functools.partial(jax.jit, static_argnames="kind")
def ours(sampler, lams, draws, said, *, kind):
    del kind  # see `oracle.by_kind`

    def denoiser(z, lam):
        x = said[jnp.argmin(jnp.abs(lams - lam))] + 0.5 * jnp.sin(z)
        return Prediction(x, (z - jnp.sqrt(jax.nn.sigmoid(lam)) * x) * jnp.sqrt(1 + jnp.exp(lam)))

    return sampler(denoiser, lambda i: draws[i], lams).xs


def chain(step):
    """The estimates [T, ...] of theirs: step(i, x, z) -> z of the next level."""
    z, seen = torch.from_numpy(DRAWS[0]), []
    for i in range(T):
        x = torch.from_numpy(estimate(z.numpy(), SAID[i]))
        seen.append(x.numpy())
        z = step(i, x, z)
    # Their last step goes to a level without noise, where z is the estimate: ours ends there too.
    np.testing.assert_allclose(z, seen[-1], rtol=1e-6)
    return np.stack(seen)


def compare(sampler, theirs):
    with jax.enable_x64(True):
        seen = np.asarray(ours(sampler, LAMS, DRAWS, SAID, kind=type(sampler)))
    for mine, yours in zip(seen, theirs, strict=True):
        assert np.linalg.norm(mine - yours) < 1e-5 * np.linalg.norm(yours)


def multistep_scheduler(kind, **options):
    """Theirs at our levels, in float64: its own tables are of 1,000 steps and float32."""
    scheduler = kind(prediction_type="sample", final_sigmas_type="zero", **options)
    scheduler.set_timesteps(T)
    scheduler.sigmas = torch.from_numpy(np.append(np.exp(-0.5 * LAMS), 0.0))
    return scheduler


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim(eta):
    scheduler = diffusers.DDIMScheduler(
        num_train_timesteps=T, prediction_type="sample", clip_sample=False
    )
    scheduler.set_timesteps(T)
    scheduler.alphas_cumprod = torch.from_numpy(
        1 / (1 + np.exp(-LAMS[::-1]))
    )  # from clean to noise

    def step(i, x, z):
        noise = torch.from_numpy(DRAWS[i + 1]) if i + 1 < T else torch.zeros(SHAPE)
        options = {"eta": eta, "variance_noise": noise if eta else None}
        return scheduler.step(x, T - 1 - i, z, **options).prev_sample

    compare(samplers.DDIM(eta), chain(step))


@pytest.mark.parametrize("eta, name", [(0.0, "dpmsolver++"), (1.0, "sde-dpmsolver++")])
def test_dpm_solver_2m(eta, name):
    scheduler = multistep_scheduler(
        diffusers.DPMSolverMultistepScheduler, algorithm_type=name, solver_order=2
    )

    def step(i, x, z):
        noise = torch.from_numpy(DRAWS[i + 1])
        return scheduler.step(x, scheduler.timesteps[i], z, variance_noise=noise).prev_sample

    compare(multistep.DPMSolver2M(eta), chain(step))


def test_unipc():
    """bh2 of order 2, their defaults; their bh1, and other orders, are other samplers."""

    def steps(order):
        scheduler = multistep_scheduler(
            diffusers.UniPCMultistepScheduler, solver_order=order, solver_type="bh2"
        )
        return chain(lambda i, x, z: scheduler.step(x, scheduler.timesteps[i], z).prev_sample)

    compare(multistep.UniPC(), steps(2))
    with pytest.raises(AssertionError):
        compare(multistep.UniPC(), steps(3))
