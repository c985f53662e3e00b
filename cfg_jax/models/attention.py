"""Self-attention over pixels, how its heads are counted, and in what order weights have them.

`dtype` is the precision of the products; the softmax is float32 whatever it is.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from cfg_jax.models import affine, layers, once
from cfg_jax.types import Array, UsageError


def count_heads(channels: int, num_heads: int | None, head_channels: int | None) -> int:
    """How many attention heads, from their number or their width (64 if neither is given).

    Raises UsageError if both are given or the heads are not equal.
    """
    if num_heads and head_channels:
        raise UsageError(f"{num_heads=} and {head_channels=} are both given; give one of them")
    if (num_heads or 1) < 1 or (head_channels or 1) < 1:
        raise UsageError(f"{num_heads=} and {head_channels=} must be positive")
    width = head_channels or 64
    if channels % (num_heads or width):
        asked = f"{num_heads} heads" if num_heads else f"heads of {width} channels"
        raise UsageError(
            f"attention over {channels} channels does not split into {asked}; "
            "set num_heads or head_channels to a divisor"
        )
    return num_heads or channels // width


def split_heads(qkv: Array, heads: int, order: str) -> tuple[Array, Array, Array]:
    """[B, N, 3 C] -> q, k, v, each [B, N, heads, C / heads].

    The 3 C outputs are "new" (q, k, v; heads in each: ADM-64) or "legacy" (heads; q, k, v in each:
    ADM-128 and the classifiers). For a network trained from scratch they are the same.
    """
    b, n, _ = qkv.shape
    if order == "new":
        return tuple(x.reshape(b, n, heads, -1) for x in jnp.split(qkv, 3, axis=-1))
    return tuple(jnp.split(qkv.reshape(b, n, heads, -1), 3, axis=-1))


def _einsum(form: str, a: Array, b: Array, kind: jnp.dtype | None = None) -> Array:
    return jnp.einsum(form, a, b, precision=affine.precision(a), preferred_element_type=kind)


def _over_keys(weights: Array, of: Array, kind: jnp.dtype | None = None) -> Array:
    """[B, heads, N, N], [B, N, heads, d] -> sums over keys [B, N, heads, d].

    Asked for in that order, einsum would exchange the two sides: a product of d rows and not of N,
    which takes a CPU twice as long at 16 x 16.
    """
    return _einsum("bhqk,bkhd->bhqd", weights, of, kind).swapaxes(1, 2)


def _attend(q: Array, k: Array, v: Array):
    scale = q.shape[-1] ** -0.25
    q, k = q * scale, k * scale
    logits = _einsum("bqhd,bkhd->bhqk", q, k, jnp.float32)
    weights = jnp.exp(logits - logits.max(-1, keepdims=True))
    # The softmax's division comes last: over d channels a query, not over its N weights.
    total = weights.sum(-1).swapaxes(1, 2)[..., None]  # [B, N, heads, 1]
    weights = weights.astype(v.dtype)
    out = _over_keys(weights, v, jnp.float32) / total
    out = out.astype(v.dtype)
    return out, (q, k, v, weights, total, out)


@jax.custom_vjp
def attend(q: Array, k: Array, v: Array) -> Array:
    """softmax(q k / sqrt(d)) v, all [B, N, heads, d]; the scale is shared out to q and k.

    The gradient is jax's own but for what is kept for it: the weights as they were multiplied, in
    the precision of v, not the softmax in float32. They are most of the memory that attention over
    32 x 32 pixels takes and moves. Reverse mode only.
    """
    return _attend(q, k, v)[0]


def _attend_backward(saved: tuple[Array, ...], g: Array):
    q, k, v, weights, total, out = saved
    scale = q.shape[-1] ** -0.25
    share = g.astype(jnp.float32) / total  # where the softmax would be, its weights are
    # sum_k softmax_k (g v_k), which needs no sum over keys: Dao et al. (2022), appendix B.
    mean = (share * out).sum(-1).swapaxes(1, 2)[..., None]  # [B, heads, N, 1]
    share = share.astype(v.dtype)
    by_v = _einsum("bhqk,bqhd->bkhd", weights, share)
    by_weights = _einsum("bqhd,bkhd->bhqk", share, v, jnp.float32)
    by_logits = (weights * (by_weights - mean)).astype(v.dtype)
    by_q = _over_keys(by_logits, k)
    by_k = _einsum("bhqk,bqhd->bkhd", by_logits, q)
    return by_q * scale, by_k * scale, by_v


attend.defvjp(_attend, _attend_backward)


class Attention(nnx.Module):
    """x + projection of multi-head self-attention over the pixels of norm(x).

    Raises UsageError for an unknown `head_order` or channels that the heads do not divide.
    Dhariwal & Nichol (2021), section 3.
    """

    def __init__(
        self,
        rngs,
        channels,
        *,
        num_heads=None,
        head_channels=None,
        head_order="new",
        dtype=jnp.float32,
    ):
        if head_order not in ("new", "legacy"):
            raise UsageError(f"{head_order=} is not known; it is 'new' or 'legacy'")
        self.heads = count_heads(channels, num_heads, head_channels)
        self.norm = layers.GroupNorm(channels)
        self.qkv = layers.Linear(rngs, channels, 3 * channels, dtype=dtype)
        self.proj = layers.Linear(rngs, channels, channels, zero=True, dtype=dtype)
        self.head_order = head_order

    def __call__(self, x: Array, embedding: Array = None, key: Array | None = None) -> Array:
        del embedding, key
        b, h, w, c = x.shape
        qkv = self.qkv(self.norm(x).reshape(b, h * w, c))
        out = attend(*split_heads(qkv, self.heads, self.head_order))
        return once.settled(x + self.proj(out.reshape(b, h * w, c)).reshape(x.shape))
