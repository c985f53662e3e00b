"""The U-Net of Dhariwal & Nichol (2021) from PyTorch's own layers: the opponent of the benchmark.

Modules are named as ours are in `cfg_jax/models`, so `load` copies parameters name by name. It is
written to be fast on a CPU: channels-last throughout, `group_norm`, `scaled_dot_product_attention`
and `linear` over tokens where the published code has reshapes and products of its own.
Images are [B, C, H, W] in channels-last memory.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


def groups(channels):
    return channels if channels < 32 else math.gcd(channels, 32)


def conv(c_in, c_out, stride=1):
    return nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1)


class Linear1x1(nn.Linear):
    """A linear map of the channels of an image; the permutations are views in channels-last."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Resample(nn.Module):
    def __init__(self, channels, resample):
        super().__init__()
        self.up = resample == "up"
        self.conv = conv(channels, channels, 1 if self.up else 2)

    def forward(self, h, embedding):
        return self.conv(F.interpolate(h, scale_factor=2.0) if self.up else h)


class ResBlock(nn.Module):
    def __init__(self, c_in, c_out, *, embedding, dropout, resample=None, scale_shift_norm=True):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups(c_in), c_in)
        self.conv1 = conv(c_in, c_out)
        self.embed = nn.Linear(embedding, c_out * (1 + scale_shift_norm))
        self.norm2 = nn.GroupNorm(groups(c_out), c_out)
        self.conv2 = conv(c_out, c_out)
        self.skip = None if c_in == c_out else Linear1x1(c_in, c_out)
        self.dropout = nn.Dropout(dropout)
        self.resample, self.scale_shift_norm = resample, scale_shift_norm

    def resampled(self, x):
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        return F.interpolate(x, scale_factor=2.0) if self.resample == "up" else x

    def forward(self, x, embedding):
        h = self.conv1(self.resampled(F.silu(self.norm1(x))))
        e = self.embed(embedding)[:, :, None, None]
        if self.scale_shift_norm:
            scale, shift = e.chunk(2, dim=1)
            h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        else:
            h = self.norm2(h + e)
        h = self.conv2(self.dropout(F.silu(h)))
        x = self.resampled(x)
        return h + (x if self.skip is None else self.skip(x))


class Attention(nn.Module):
    def __init__(self, channels, *, heads, order):
        super().__init__()
        self.norm = nn.GroupNorm(groups(channels), channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        self.heads, self.order = heads, order

    def forward(self, x, embedding=None):
        b, c, height, width = x.shape
        tokens = self.norm(x).permute(0, 2, 3, 1).reshape(b, height * width, c)
        qkv = self.qkv(tokens)
        if self.order == "new":
            q, k, v = qkv.view(b, -1, 3, self.heads, c // self.heads).unbind(2)
        else:
            q, k, v = qkv.view(b, -1, self.heads, 3, c // self.heads).unbind(3)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, -1, c)
        return x + self.proj(out).view(b, height, width, c).permute(0, 3, 1, 2)


class Block(nn.Module):
    def __init__(self, *members):
        super().__init__()
        self.layers = nn.ModuleList(members)

    def forward(self, h, embedding):
        for layer in self.layers:
            h = layer(h, embedding)
        return h


class TimeEmbedding(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.hidden = nn.Linear(channels, 4 * channels)
        self.out = nn.Linear(4 * channels, 4 * channels)
        half = channels // 2
        frequencies = torch.exp(-math.log(1e4) * torch.arange(half, dtype=torch.float32) / half)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, s):
        angles = s[:, None] * self.frequencies
        sinusoid = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.out(F.silu(self.hidden(sinusoid)))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList()


class UNet(nn.Module):
    """(z [B, C, H, W], s [B], label [B]) -> [B, out_channels, H, W]; the fields are `UNet`'s."""

    def __init__(
        self,
        *,
        image_size,
        num_classes,
        null_row=True,
        in_channels=3,
        out_channels=3,
        channels,
        channel_mult,
        num_res_blocks,
        attention_resolutions,
        num_heads=None,
        head_channels=None,
        head_order="new",
        dropout=0.0,
        resblock_updown=True,
        scale_shift_norm=True,
    ):
        super().__init__()

        def res(c_in, c_out, resample=None):
            return ResBlock(
                c_in,
                c_out,
                embedding=4 * channels,
                dropout=dropout,
                resample=resample,
                scale_shift_norm=scale_shift_norm,
            )

        def attention(c):
            return Attention(c, heads=num_heads or c // (head_channels or 64), order=head_order)

        def change(c, resample):
            return res(c, c, resample) if resblock_updown else Resample(c, resample)

        sides = [image_size >> level for level in range(len(channel_mult))]
        widths = [int(mult * channels) for mult in channel_mult]
        self.time = TimeEmbedding(channels)
        self.label = nn.Module()
        self.label.table = nn.Parameter(torch.empty(num_classes + bool(null_row), 4 * channels))
        self.encoder = Encoder()
        self.encoder.conv_in = conv(in_channels, widths[0])
        c, skips = widths[0], [widths[0]]
        for side, width in zip(sides, widths):
            for _ in range(num_res_blocks):
                members = [res(c, width)]
                c = width
                if side in attention_resolutions:
                    members.append(attention(c))
                self.encoder.blocks.append(Block(*members))
                skips.append(c)
            if side != sides[-1]:
                self.encoder.blocks.append(Block(change(c, "down")))
                skips.append(c)
        self.encoder.middle = Block(res(c, c), attention(c), res(c, c))
        self.decoder = nn.ModuleList()
        for side, width in zip(reversed(sides), reversed(widths)):
            for i in range(num_res_blocks + 1):
                members = [res(c + skips.pop(), width)]
                c = width
                if side in attention_resolutions:
                    members.append(attention(c))
                if side != sides[0] and i == num_res_blocks:
                    members.append(change(c, "up"))
                self.decoder.append(Block(*members))
        self.norm_out = nn.GroupNorm(groups(c), c)
        self.conv_out = conv(c, out_channels)

    def forward(self, z, s, label):
        embedding = F.silu(self.time(s) + F.embedding(label, self.label.table))
        h = self.encoder.conv_in(z)
        skips = [h]
        for block in self.encoder.blocks:
            h = block(h, embedding)
            skips.append(h)
        h = self.encoder.middle(h, embedding)
        for block in self.decoder:
            h = block(torch.cat([h, skips.pop()], dim=1), embedding)
        return self.conv_out(F.silu(self.norm_out(h)))


def translated(path: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    """The name and layout here of our parameter "encoder/conv_in/kernel": HWIO to OIHW, IO to OI.

    Gradients translate as parameters do.
    """
    *parents, leaf = path.split("/")
    if leaf == "kernel":
        array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
    name = {"kernel": "weight", "scale": "weight"}.get(leaf, leaf)
    return ".".join([*parents, name]), array


def load(network: nn.Module, flat: dict[str, np.ndarray]) -> None:
    """Copies our parameters, flat as `weights.flatten` makes them: each must have its place."""
    state = dict(translated(path, np.asarray(array)) for path, array in flat.items())
    network.load_state_dict({name: torch.tensor(array) for name, array in state.items()})
    network.to(memory_format=torch.channels_last)
