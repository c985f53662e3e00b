"""The U-Net of Dhariwal & Nichol (2021), "ADM", which is the paper's network (section 4).

The encoder half is shared with `classifier.py`. Block i of the encoder is `input_blocks.{i + 1}` of
the published PyTorch network, layer j of it is its `.{j}`, and so on: `weights.py` relies on it.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from cfg_jax.models import attention, layers
from cfg_jax.types import Array, Cond, UsageError


def _is_product(primitive, *_, name=None, **__) -> bool:
    """A convolution goes by its name, as its form is not the same on all platforms."""
    named = primitive.name == "name" and name == layers.CONVOLVED
    return named or primitive.name == "dot_general"


# What the gradient keeps of a block; it computes the rest again, from the block's input.
REMAT = {"none": None, "products": _is_product, "blocks": jax.checkpoint_policies.nothing_saveable}


class Block(nnx.Module):
    """Layers that see the embedding, in turn: the unit that is rematerialised."""

    def __init__(self, *members, remat="none"):
        self.layers = nnx.List(members)
        self.remat = remat

    def __call__(self, h: Array, embedding: Array, key: Array | None = None) -> Array:
        run = Block._in_turn
        if self.remat != "none":
            run = nnx.remat(run, policy=REMAT[self.remat])
        return run(self, h, embedding, key)

    def _in_turn(self, h: Array, embedding: Array, key: Array | None) -> Array:
        for layer, k in zip(self.layers, layers.keys(key)):
            h = layer(h, embedding, k)
        return h


class Parts(NamedTuple):
    """Makers of the layers of one network: what all its blocks have in common is bound."""

    block: Callable[..., Block]  # (*layers)
    res: Callable[..., nnx.Module]  # (c_in, c_out)
    attention: Callable[..., nnx.Module]  # (channels,)
    resample: Callable[..., nnx.Module]  # (channels, "down" | "up")


def parts(
    rngs,
    *,
    channels,
    num_heads,
    head_channels,
    head_order,
    dropout,
    resblock_updown,
    scale_shift_norm,
    remat,
    dtype,
) -> Parts:
    """Bind the fields shared by U-Net and classifier. Raises UsageError for values out of range."""
    if remat not in REMAT:
        raise UsageError(f"{remat=} is not known; it is one of {', '.join(REMAT)}")
    if not 0 <= dropout < 1:
        raise UsageError(f"{dropout=} is not a rate; it lies in [0, 1)")
    if channels < 2 or channels % 2:
        raise UsageError(f"{channels=} must be positive and even, for the sinusoid of the time")
    res = functools.partial(
        layers.ResBlock,
        rngs,
        embedding=4 * channels,
        dropout=dropout,
        scale_shift_norm=scale_shift_norm,
        dtype=dtype,
    )
    attend = functools.partial(
        attention.Attention,
        rngs,
        num_heads=num_heads,
        head_channels=head_channels,
        head_order=head_order,
        dtype=dtype,
    )
    block = functools.partial(Block, remat=remat)
    if resblock_updown:
        return Parts(block, res, attend, lambda c, resample: res(c, c, resample=resample))
    return Parts(block, res, attend, functools.partial(layers.Resample, rngs, dtype=dtype))


def compute_dtype(name: str) -> jnp.dtype:
    """The precision of a config's `dtype`. Raises UsageError but for "float32" and "bfloat16"."""
    if name not in ("float32", "bfloat16"):
        raise UsageError(f"dtype={name!r} is not known; it is 'float32' or 'bfloat16'")
    return jnp.dtype(name)


def check_sides(image_size, channel_mult, attention_resolutions) -> tuple[int, ...]:
    """The side of the image at every level. Raises UsageError where the fields do not agree."""
    if not channel_mult or min(channel_mult) <= 0:
        raise UsageError(f"{channel_mult=} needs a positive number for each level")
    halvings = len(channel_mult) - 1
    if image_size % 2**halvings:
        raise UsageError(
            f"{image_size=} cannot be halved {halvings} times, as the {halvings + 1} levels of "
            f"{channel_mult=} do; use a multiple of {2**halvings}, or fewer levels"
        )
    sides = tuple(image_size >> level for level in range(halvings + 1))
    if unknown := sorted(set(attention_resolutions) - set(sides)):
        raise UsageError(
            f"{attention_resolutions=} holds {unknown}, but the levels of {image_size=} "
            f"with {channel_mult=} are {sides}"
        )
    return sides


class Encoder(nnx.Module):
    """(z [B, H, W, C], embedding, key) -> h at the lowest resolution, and the skips on the way."""

    def __init__(
        self,
        rngs,
        make: Parts,
        *,
        image_size,
        in_channels,
        channels,
        channel_mult,
        num_res_blocks,
        attention_resolutions,
        dtype,
    ):
        sides = check_sides(image_size, channel_mult, attention_resolutions)
        if num_res_blocks < 1:
            raise UsageError(f"{num_res_blocks=}: a level has at least one block")
        widths = [int(mult * channels) for mult in channel_mult]
        self.input_shape = (image_size, image_size, in_channels)
        self.conv_in = layers.Conv(rngs, in_channels, widths[0], dtype=dtype)
        c, skips, blocks = widths[0], [widths[0]], []
        for side, width in zip(sides, widths):
            for _ in range(num_res_blocks):
                members = [make.res(c, width)]
                c = width
                if side in attention_resolutions:
                    members.append(make.attention(c))
                blocks.append(make.block(*members))
                skips.append(c)
            if side != sides[-1]:
                blocks.append(make.block(make.resample(c, "down")))
                skips.append(c)
        self.blocks = nnx.List(blocks)
        self.middle = make.block(make.res(c, c), make.attention(c), make.res(c, c))
        self.sides, self.widths, self.skips = sides, tuple(widths), tuple(skips)

    def __call__(self, z: Array, embedding: Array, key: Array | None = None):
        if z.shape[1:] != self.input_shape:
            raise UsageError(
                f"the network reads images {list(self.input_shape)} (image_size, image_size, "
                f"in_channels), and was given {list(z.shape[1:])}"
            )
        h = self.conv_in(z)
        skips, keys = [h], layers.keys(key)
        for block, k in zip(self.blocks, keys):
            h = block(h, embedding, k)
            skips.append(h)
        return self.middle(h, embedding, next(keys)), skips


class UNet(nnx.Module):
    """(z [B, H, W, C], s [B], {"label": [B], "w": [B]}, key=None) -> float32 [B, H, W,
    out_channels].

    s is what enters the sinusoid: a reading of lambda between about 0 and 1000. The null label is
    `num_classes`, the last row of the embedding; a label that has no row gives NaN. w, the strength
    of guidance, is read with `w_embedding` only, which changes nothing at initialisation. The
    output is zero at initialisation. Raises UsageError, when built, for fields that do not fit
    together. Dhariwal & Nichol (2021), section 3 and table 11.
    """

    def __init__(  # the defaults are the paper's 64 x 64 network
        self,
        rngs,
        *,
        image_size: int,  # the side of z in pixels
        num_classes: int | None,  # None: no label embedding, cond is not read
        null_row: bool = True,  # False: classes only, as published; then there is no null label
        w_embedding: bool = False,  # True: a student, which is told the strength of guidance
        in_channels: int = 3,
        out_channels: int = 3,  # 6 for published weights with a learned variance
        channels: int = 192,  # at the first level
        channel_mult: tuple[float, ...] = (
            1,
            2,
            3,
            4,
        ),  # one a level; the side halves between levels
        num_res_blocks: int = 3,  # a level, on the way down; one more on the way up
        attention_resolutions: tuple[int, ...] = (32, 16, 8),  # sides in pixels
        num_heads: int | None = None,  # give this or head_channels
        head_channels: int | None = None,  # 64 if neither is given
        head_order: str = "new",  # "legacy": heads are split before q, k, v, as in ADM-128
        dropout: float = 0.1,  # only where a key is given
        resblock_updown: bool = True,  # False: strided convolutions instead of BigGAN's blocks
        scale_shift_norm: bool = True,  # False: the embedding is added instead
        dtype: str = "float32",  # of convolutions and products: "bfloat16" on TPU
        remat: str = "none",  # for less memory: "products" keeps those only, "blocks" keeps nothing
    ):
        compute = compute_dtype(dtype)
        make = parts(
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
        self.label = (
            layers.LabelEmbedding(rngs, num_classes + bool(null_row), 4 * channels)
            if num_classes is not None
            else None
        )
        self.strength = layers.StrengthEmbedding(rngs, channels) if w_embedding else None
        self.encoder = Encoder(
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
        self.decoder = nnx.List(self._decoder(make, num_res_blocks, attention_resolutions))
        c = self.encoder.widths[0]
        self.norm_out = layers.GroupNorm(c)
        # float32 in any case, as published: the output is not rounded to the compute dtype.
        self.conv_out = layers.Conv(rngs, c, out_channels, zero=True)

    def _decoder(self, make: Parts, num_res_blocks, attention_resolutions):
        """The way up, with one skip for every convolution, block and halving of the way down."""
        sides, widths, skips = self.encoder.sides, self.encoder.widths, list(self.encoder.skips)
        c = widths[-1]
        for side, width in zip(reversed(sides), reversed(widths)):
            for i in range(num_res_blocks + 1):
                members = [make.res(c + skips.pop(), width)]
                c = width
                if side in attention_resolutions:
                    members.append(make.attention(c))
                if side != sides[0] and i == num_res_blocks:
                    members.append(make.resample(c, "up"))
                yield make.block(*members)

    def __call__(self, z: Array, s: Array, cond: Cond, key: Array | None = None) -> Array:
        embedding = self.time(s)
        if self.label is not None:
            embedding = embedding + self.label(cond["label"])
        if self.strength is not None:
            embedding = embedding + self.strength(cond["w"])
        embedding = nnx.silu(embedding)  # every block begins with it: once for all of them
        keys = layers.keys(key)
        h, skips = self.encoder(z, embedding, next(keys))
        for block, k in zip(self.decoder, keys):
            h = block(jnp.concatenate([h, skips.pop()], axis=-1), embedding, k)
        return self.conv_out(self.norm_out(h.astype(jnp.float32), activate=True))
