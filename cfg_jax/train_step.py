"""One step of training: state, batch and key in, state and metrics out. Pure, and the same on any
mesh.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from cfg_jax import power_ema
from cfg_jax.types import Array, Batch, Network, Params, UsageError


class TrainState(NamedTuple):
    """Where a run stands. `step` is its only clock: keys, data, learning rate and EMA follow from
    it.
    """

    step: Array  # int32 []
    params: Params
    ema: Params
    opt_state: optax.OptState
    profiles: tuple[Params, ...] = ()  # averages of the lengths of Ema


@dataclasses.dataclass(frozen=True)
class Ema:
    """ema <- d ema + (1 - d) params in float32, d = min(decay, (1 + t) / (10 + t)) at step t.

    Beside it `track` keeps averages of other lengths, `power_ema`'s, of which `reconstruct` makes
    more after training. Raises UsageError for numbers out of range.
    """

    decay: float = 0.9999
    lengths: tuple[float, ...] = ()  # (0.05, 0.1) as in Karras et al. (2024); () keeps none
    snapshot_every: int = 1000  # steps between the averages that are written to WORKDIR/ema

    def __post_init__(self):
        if not 0 <= self.decay < 1:
            raise UsageError(
                f"ema.decay={self.decay}: must lie in [0, 1); the paper's code has 0.9999."
            )
        for sigma in self.lengths:
            power_ema.check_length("ema.lengths", sigma)
        if len(set(self.lengths)) < len(self.lengths) or self.snapshot_every < 1:
            raise UsageError(
                f"ema.lengths={self.lengths} must differ, and ema.snapshot_every="
                f"{self.snapshot_every} be at least 1."
            )

    def __call__(self, ema: Params, params: Params, step: Array) -> Params:
        t = step.astype(jnp.float32)
        rate = 1 - jnp.minimum(self.decay, (1 + t) / (10 + t))
        return jax.tree.map(lambda e, p: e + rate * (p - e), ema, params)

    def track(
        self, profiles: tuple[Params, ...], params: Params, step: Array
    ) -> tuple[Params, ...]:
        """The averages of `lengths`, one each, after the update of a step."""
        return tuple(
            power_ema.track(sigma, average, params, step)
            for sigma, average in zip(self.lengths, profiles, strict=True)
        )


def adam(
    *,
    learning_rate: float = 1e-4,
    warmup_steps: int = 1000,  # linear, from 1/warmup_steps of the rate
    clip_norm: float = 1.0,  # of the whole gradient; 0 does not clip
    b1: float = 0.9,
    b2: float = 0.999,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """Adam with linear warm-up and clipping by global norm; AdamW where weight_decay is not 0.

    Raises UsageError for a learning rate that is not positive, or a negative number elsewhere.
    """
    if not learning_rate > 0 or warmup_steps < 0 or not clip_norm >= 0 or not weight_decay >= 0:
        raise UsageError(
            f"optimizer: learning_rate={learning_rate} must be positive, "
            f"warmup_steps={warmup_steps}, clip_norm={clip_norm} and "
            f"weight_decay={weight_decay} not negative."
        )
    if not (0 <= b1 < 1 and 0 <= b2 < 1):
        raise UsageError(f"optimizer: b1={b1} and b2={b2} must lie in [0, 1).")

    def rate(step):
        return learning_rate * jnp.minimum(1.0, (step + 1) / max(warmup_steps, 1))

    return optax.chain(
        optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity(),
        optax.adamw(rate, b1=b1, b2=b2, weight_decay=weight_decay),
    )


def init_state(
    key: Array, network: Network, optimizer: optax.GradientTransformation, profiles: int = 0
) -> TrainState:
    """The state at step 0, a function of the key alone; every average starts at the parameters."""
    params = network.init(key)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=jax.tree.map(jnp.copy, params),
        opt_state=optimizer.init(params),
        profiles=tuple(jax.tree.map(jnp.copy, params) for _ in range(profiles)),
    )


def in_parts(gradient: Callable, count: int, *, unroll: bool) -> Callable:
    """`gradient` as its mean over `count` parts of the batch, one after the other: less memory.

    Part k holds rows k, k + count, ..., an equal share of the rows of every device, so that none
    moves; its key is fold_in(key, k). Sums are float32. `unroll` writes the parts out instead of
    looping over them, which XLA:CPU needs: it has no fast gradient of a kernel inside a loop.
    """

    def mean(params: Params, frozen: Params, batch: Batch, key: Array):
        parts = jax.tree.map(
            lambda rows: rows.reshape(-1, count, *rows.shape[1:]).swapaxes(0, 1), batch
        )

        def one(k: Array, rows: Batch):
            out = gradient(params, frozen, rows, jax.random.fold_in(key, k))
            return jax.tree.map(lambda a: a.astype(jnp.float32), out)

        def add(total, part):
            return jax.tree.map(jnp.add, total, one(*part)), None

        shapes = jax.eval_shape(one, 0, jax.tree.map(lambda rows: rows[0], parts))
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
        total, _ = jax.lax.scan(add, zeros, (jnp.arange(count), parts), unroll=unroll)
        return jax.tree.map(lambda a: a / count, total)

    return mean


def train_step(
    state: TrainState,
    frozen: Params,
    batch: Batch,
    key: Array,
    *,
    loss,
    optimizer,
    ema: Ema,
    gather: Callable[[Params, Params], tuple[Params, Params]] = lambda *both: both,
    accumulate: int = 1,
    unroll: bool = False,
) -> tuple[TrainState, dict[str, Array]]:
    """One update. The randomness of step t is fold_in(key, t).

    loss(params, frozen, batch, key) -> (scalar, metrics). The metrics returned are its own, with
    `loss`, `grad_norm` (before clipping) and `param_norm` (after the update): where all three are
    finite, so is the state returned. The loss sees what `gather` makes of parameters and frozen,
    once a step: the same numbers elsewhere or in another precision. `accumulate` and `unroll` are
    those of `in_parts`.
    """
    key = jax.random.fold_in(key, state.step)
    gradient = jax.value_and_grad(loss, has_aux=True)
    if accumulate > 1:
        gradient = in_parts(gradient, accumulate, unroll=unroll)
    (value, metrics), grads = gradient(*gather(state.params, frozen), batch, key)
    grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, state.params)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    norms = {"grad_norm": optax.global_norm(grads), "param_norm": optax.global_norm(params)}
    state = TrainState(
        step=state.step + 1,
        params=params,
        ema=ema(state.ema, params, state.step),
        opt_state=opt_state,
        profiles=ema.track(state.profiles, params, state.step),
    )
    return state, {"loss": value, **norms, **metrics}


OPTIMIZERS = {"adam": adam}
