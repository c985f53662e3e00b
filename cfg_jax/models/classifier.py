"""The noise-conditional classifier of Dhariwal & Nichol (2021), section 4: it guides, and is the
baseline that classifier-free guidance replaces."""

import jax
import jax.numpy as jnp
from flax import nnx

from cfg_jax.models import attention, layers, unet
from cfg_jax.types import Array, Cond


class AttentionPool(nnx.Module):
    """[B, H, W, C] -> [B, C]: attention from the mean of the pixels to itself and all of them.

    `proj` then makes it [B, c_out].

    Radford et al. (2021), CLIP, section 2.4: the mean is token 0, positions are learned.
    """

    def __init__(self, rngs, side, channels, c_out, *, heads, dtype=jnp.float32):
        position = jax.random.normal(rngs.params(), (1 + side**2, channels), jnp.float32)
        self.position = nnx.Param(position / channels**0.5)
        self.qkv = layers.Linear(rngs, channels, 3 * channels, dtype=dtype)
        self.proj = layers.Linear(rngs, channels, c_out)
        self.heads = heads

    def __call__(self, x: Array) -> Array:
        tokens = x.reshape(len(x), -1, x.shape[-1])
        tokens = jnp.concatenate([tokens.mean(1, keepdims=True), tokens], axis=1)
        q, k, v = attention.split_heads(self.qkv(tokens + self.position[...]), self.heads, "new")
        return attention.attend(q[:, :1], k, v).reshape(len(x), -1)  # only token 0 is read


class Classifier(nnx.Module):
    """(z [B, H, W, C], s [B], cond, key=None) -> logits of p(c|z), float32 [B, num_classes].

    s is what enters the sinusoid, as in `unet.UNet`; cond is not read: the class is the answer.
    Raises UsageError, when built, for fields that do not fit together.
    The U-Net's encoder with attention pooling; Dhariwal & Nichol (2021), section 4.1 and table 12.
    """

    def __init__(  # the defaults are the 64 x 64 classifier of Dhariwal & Nichol; see unet.UNet
        self,
        rngs,
        *,
        image_size: int,
        num_classes: int,
        in_channels: int = 3,
        channels: int = 128,
        channel_mult: tuple[float, ...] = (1, 2, 3, 4),
        num_res_blocks: int = 4,
        attention_resolutions: tuple[int, ...] = (32, 16, 8),
        num_heads: int | None = None,
        head_channels: int | None = None,  # 64 if neither is given
        head_order: str = "legacy",  # of the blocks; the pooling's is always "new"
        dropout: float = 0.0,
        resblock_updown: bool = True,
        scale_shift_norm: bool = True,
        dtype: str = "float32",
        remat: str = "none",  # see unet.UNet
    ):
        compute = unet.compute_dtype(dtype)
        make = unet.parts(
            rngs,
            channels=channels,
            num_heads=num_heads,
            head_channels=head_channels,
            head_order=head_order,
            dropout=dropout,
            resblock_updown=resblock_updown,
            scale_shift_norm=scale_shift_norm,
            remat=remat,
            dtype=compute,
        )
        self.time = layers.TimeEmbedding(rngs, channels)
        self.encoder = unet.Encoder(
            rngs,
            make,
            image_size=image_size,
            in_channels=in_channels,
            channels=channels,
            channel_mult=tuple(channel_mult),
            num_res_blocks=num_res_blocks,
            attention_resolutions=tuple(attention_resolutions),
            dtype=compute,
        )
        side, c = self.encoder.sides[-1], self.encoder.widths[-1]
        heads = attention.count_heads(c, num_heads, head_channels)
        self.norm_out = layers.GroupNorm(c)
        self.pool = AttentionPool(rngs, side, c, num_classes, heads=heads, dtype=compute)

    def __call__(self, z: Array, s: Array, cond: Cond, key: Array | None = None) -> Array:
        return self.pool.proj(self.features(z, s, cond, key))

    def features(self, z: Array, s: Array, cond: Cond, key: Array | None = None) -> Array:
        """What the logits are an affine map of: [B, channels of the lowest level]."""
        del cond
        h, _ = self.encoder(z, nnx.silu(self.time(s)), key)
        return self.pool(self.norm_out(h.astype(jnp.float32), activate=True))
