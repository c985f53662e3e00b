"""The exact denoiser and classifier of a mixture of isotropic Gaussians: an oracle beside the code.

Diffused to lam, component k of a mixture is N(alpha m_k, (alpha^2 s_k^2 + sigma^2) I), so that
densities, responsibilities, E[x|z] and E[eps|z] are closed forms. The tests hold every rule and
sampler against it; it is also the setting of the paper's figure 2.
"""

import dataclasses

import jax
import jax.numpy as jnp

from cfg_jax.diffusion import logsnr
from cfg_jax.types import Array, Denoiser, LogProb, Prediction


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mixture:
    """sum_k exp(log_weights_k) N(means_k, stds_k^2 I) over points [D] of any dimension.

    means [K, D]; stds [K]; log_weights [K], or [B, K] for a mixture of its own for each point of a
    batch. The weights need not be normalised.
    """

    means: Array
    stds: Array
    log_weights: Array

    def given(self, member: Array) -> "Mixture":
        """The conditional mixture of the components that member [K] or [B, K] is true for."""
        return dataclasses.replace(self, log_weights=jnp.where(member, self.log_weights, -jnp.inf))

    def log_density(self, z: Array, lam: Array) -> Array:
        """log p(z_lam) [B] for z [B, D]; lam = inf gives the density of the data."""
        return jax.nn.logsumexp(self._log_joint(z, lam), axis=-1)

    def denoiser(self) -> Denoiser:
        """E[x|z] and E[eps|z], exactly: eps = -sigma grad log p(z), section 2 of the paper."""

        def denoise(z: Array, lam: Array) -> Prediction:
            share = jax.nn.softmax(self._log_joint(z, lam), axis=-1)  # [B, K]
            alpha, sigma, variance, offset = self._levels(z, lam)
            gain = (share * alpha * self.stds**2 / variance)[..., None]
            x = jnp.sum(share[..., None] * self.means + gain * offset, axis=-2)
            eps = jnp.sum((share * sigma / variance)[..., None] * offset, axis=-2)
            return Prediction(x, eps)

        return denoise

    def log_prob(self, member: Array) -> LogProb:
        """The exact classifier log p(c|z) of the class with the components that member marks."""

        def log_prob(z: Array, lam: Array) -> Array:
            joint = self._log_joint(z, lam)
            of_class = jnp.where(member, joint, -jnp.inf)
            return jax.nn.logsumexp(of_class, axis=-1) - jax.nn.logsumexp(joint, axis=-1)

        return log_prob

    def sample(self, key: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
        """Draws x [*shape, D] and their components [*shape]; log_weights must be [K]."""
        key_component, key_normal = jax.random.split(key)
        component = jax.random.categorical(key_component, self.log_weights, shape=shape)
        normal = jax.random.normal(key_normal, (*shape, self.means.shape[-1]), self.means.dtype)
        return self.means[component] + self.stds[component][..., None] * normal, component

    def _levels(self, z: Array, lam: Array):
        """alpha, sigma [B or 1, 1], the variances [B or 1, K], and z - alpha m_k [B, K, D]."""
        lam = jnp.reshape(jnp.asarray(lam, z.dtype), (-1, 1))
        alpha, sigma = logsnr.alpha(lam), logsnr.sigma(lam)
        variance = alpha**2 * self.stds**2 + sigma**2
        return alpha, sigma, variance, z[:, None, :] - alpha[..., None] * self.means

    def _log_joint(self, z: Array, lam: Array) -> Array:
        """log weight_k N(z; alpha m_k, variance_k I), [B, K]."""
        _, _, variance, offset = self._levels(z, lam)
        square = jnp.sum(offset**2, axis=-1) / variance
        log_norm = z.shape[-1] * jnp.log(2 * jnp.pi * variance)
        log_weights = self.log_weights - jax.nn.logsumexp(self.log_weights, -1, keepdims=True)
        return log_weights - 0.5 * (square + log_norm)
