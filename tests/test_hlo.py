"""What is read from XLA's text, against counts made by hand and collectives that must be there."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from cfg_jax import executed, hlo, traffic
from cfg_jax.models import affine
from cfg_jax.runtime import mesh as meshes

B, SIDE, C, D = 4, 6, 3, 5
# Of the 9 taps at each of SIDE x SIDE pixels those on the image: 3 SIDE - 2 along each side.
CONVOLUTION = 2 * B * (3 * SIDE - 2) ** 2 * C * D
X = jax.ShapeDtypeStruct((B, SIDE, SIDE, C), jnp.float32)
KERNEL = jax.ShapeDtypeStruct((3, 3, C, D), jnp.float32)


def both(function, *arguments):
    """Modules of a function before and after XLA's passes."""
    lowered = jax.jit(function).lower(*arguments)
    return hlo.parse(lowered.as_text("hlo")), hlo.parse(lowered.compile().as_text())


def square(count):
    """`count` products of a 4 x 8 array with an 8 x 8 one, in a loop."""
    return lambda x, k: jax.lax.scan(lambda x, _: (jnp.tanh(x @ k), None), x, None, count)[0]


ROWS = jax.ShapeDtypeStruct((4, 8), jnp.float32)
SQUARE = jax.ShapeDtypeStruct((8, 8), jnp.float32)
PRODUCT = 2 * 4 * 8 * 8


def test_a_matrix_product():
    for module in both(lambda x, k: jnp.tanh(x) @ k, ROWS, SQUARE):
        assert executed.flops(module) == PRODUCT


def test_a_batched_product():
    pairs = (
        jax.ShapeDtypeStruct((7, 4, 8), jnp.float32),
        jax.ShapeDtypeStruct((7, 8, 2), "float32"),
    )
    for module in both(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), *pairs):
        assert executed.flops(module) == 2 * 7 * 4 * 8 * 2


@pytest.mark.parametrize("stride, taps", [(1, (3 * SIDE - 2) ** 2), (2, (3 * SIDE // 2 - 1) ** 2)])
def test_a_convolution_and_its_two_gradients_count_the_same(stride, taps):
    forward = 2 * B * taps * C * D
    for module in both(functools.partial(affine.convolve, stride=stride), X, KERNEL):
        assert executed.flops(module) == forward

    def loss(x, k):
        return jnp.sum(affine.convolve(x, k, stride) ** 2)

    for argument in (0, 1):
        # As it is written down for accelerators: CPU has another form of the second.
        traced = jax.jit(jax.grad(loss, argument)).trace(X, KERNEL)
        lowered = traced.lower(lowering_platforms=("tpu",))
        module = hlo.parse(lowered.as_text("hlo"))
        assert executed.flops(module) == 2 * forward, "the output, and one gradient"


def test_a_depthwise_convolution():
    def depthwise(x, k):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, k, (1, 1), "VALID", dimension_numbers=numbers, feature_group_count=C
        )

    kernel = jax.ShapeDtypeStruct((3, 3, 1, C), jnp.float32)
    module, _ = both(depthwise, X, kernel)
    assert executed.flops(module) == 2 * B * (SIDE - 2) ** 2 * 9 * C


def test_a_batched_product_written_as_a_dilated_convolution():
    """As the TPU's compiler writes attention: of the 5 x 5 pairs of batch only the diagonal is."""
    window = "window={size=5 stride=4 pad=0_0 lhs_dilate=5}, dim_labels=b0f_0io->b0f"
    text = f"""ENTRY %main (a: f32[4,5,8], b: f32[5,8,3]) -> f32[4,5,3] {{
  %a = f32[4,5,8]{{2,1,0}} parameter(0)
  %b = f32[5,8,3]{{2,1,0}} parameter(1)
  ROOT %c = f32[4,5,3]{{2,1,0}} convolution(%a, %b), {window}
}}
"""
    assert executed.flops(hlo.parse(text)) == 2 * 4 * 5 * 8 * 3


def test_the_dimensions_of_a_window_are_numbered():
    """As the gradient of a kernel may be written: its spatial dimensions in no order."""
    window = "window={size=1x6 pad=0_0x1_1}, dim_labels=f10b_i10o->1b0f"
    text = f"""ENTRY %main (a: f32[4,6,1,3], b: f32[4,6,1,5]) -> f32[3,3,1,5] {{
  %a = f32[4,6,1,3]{{3,2,1,0}} parameter(0)
  %b = f32[4,6,1,5]{{3,2,1,0}} parameter(1)
  ROOT %c = f32[3,3,1,5]{{3,2,1,0}} convolution(%a, %b), {window}
}}
"""
    assert executed.flops(hlo.parse(text)) == 2 * 4 * 3 * 5 * (3 * 6 - 2)


def test_loops_count_as_often_as_they_run():
    for module in both(square(13), ROWS, SQUARE):
        assert executed.flops(module) == 13 * PRODUCT

    def nested(x, k):
        return jax.lax.fori_loop(0, 3, lambda _, x: square(5)(x, k), x)

    for module in both(nested, ROWS, SQUARE):
        assert executed.flops(module) == 15 * PRODUCT


def test_a_loop_that_does_not_say_how_often_it_runs_is_refused():
    def until(x, k):
        return jax.lax.while_loop(lambda x: jnp.sum(x) > jnp.sum(k), lambda x: x @ k, x)

    module, _ = both(until, ROWS, SQUARE)
    with pytest.raises(ValueError, match="how often"):
        executed.flops(module)


def test_rematerialisation_is_seen():
    def loss(x, k):
        return jnp.sum(jnp.tanh(jnp.tanh(x @ k) @ k))

    policy = jax.checkpoint_policies.nothing_saveable
    plain = both(jax.value_and_grad(loss), ROWS, SQUARE)
    again = both(jax.value_and_grad(jax.checkpoint(loss, policy=policy)), ROWS, SQUARE)
    assert [executed.flops(m) for m in plain] == [4 * PRODUCT] * 2
    assert executed.flops(again[0]) == 6 * PRODUCT, "both products once more, before XLA's passes"


def test_of_two_branches_the_one_that_multiplies_most_counts():
    def guided(w, x, k):
        return jax.lax.cond(w == 0, lambda: x @ k, lambda: jnp.tanh(x @ k) @ k)

    for module in both(guided, jax.ShapeDtypeStruct((), jnp.float32), ROWS, SQUARE):
        assert executed.flops(module) == 2 * PRODUCT


def test_what_nothing_needs_does_not_count():
    def dead(x, k):
        def inner(x):
            return x @ k, jnp.tanh(x @ k) @ k

        return jax.jit(inner)(x)[0]

    module, _ = both(dead, ROWS, SQUARE)
    assert executed.flops(module) == PRODUCT


def test_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.parse("nothing of the kind")


def over(mesh, shape, *spec):
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)


def crossing(function, *arguments):
    compiled = jax.jit(function).lower(*arguments).compile()
    return traffic.collectives(hlo.parse(compiled.as_text()))


def test_collectives_of_eight_devices():
    mesh = meshes.make_mesh()
    (sum_,) = crossing(lambda x, k: (x @ k).sum(0), over(mesh, (16, 8), "data"), SQUARE)
    assert (sum_.kind, sum_.dtype, sum_.devices, sum_.count) == ("all-reduce", "f32", 8, 1)
    assert sum_.bytes == 8 * 4 and not sum_.in_loop
    assert sum_.sent == pytest.approx(2 * 7 / 8 * sum_.bytes)

    def gather(x):
        return jax.lax.with_sharding_constraint(x, meshes.replicated(mesh)) * 2

    (gathered,) = crossing(gather, over(mesh, (16, 8), "data"))
    assert (gathered.kind, gathered.devices) == ("all-gather", 8)
    assert gathered.bytes == 16 * 8 * 4 and gathered.sent == pytest.approx(7 / 8 * gathered.bytes)


def test_collectives_of_a_part_of_the_devices():
    mesh = meshes.make_mesh(fsdp=4)
    (sum_,) = crossing(lambda x: x.sum(0), over(mesh, (16, 8), "fsdp"))
    assert sum_.devices == 4


def test_collectives_in_a_loop_count_as_often_as_it_runs():
    mesh = meshes.make_mesh()

    def loop(x):
        def step(total, _):
            return total + jnp.sum(jnp.tanh(x * total)), None

        return jax.lax.scan(step, jnp.float32(1), None, 6)[0]

    (sums,) = crossing(loop, over(mesh, (16, 8), "data"))
    assert sums.in_loop and sums.count == 6


def test_a_tile_is_filled_up():
    (array,) = hlo.arrays("bf16[8,64,64,192]{3,0,2,1:T(8,128)(2,1)}")
    assert array.bytes == 8 * 64 * 64 * 192 * 2
    assert array.padded_bytes == 8 * 64 * 64 * 256 * 2
    (array,) = hlo.arrays("f32[3,3,16,1]{2,3,1,0:T(1,128)S(1)}")
    assert array.padded_bytes == 9 * 128 * 4 and array.space == 1
    first, second = hlo.arrays("(f32[], /*index=1*/pred[3]{0:T(1024)})")
    assert (first.bytes, second.bytes, second.padded_bytes) == (4, 3, 1024)


def test_what_is_moved():
    """Two operands and a result; of a slice what it takes, to read and to write."""
    module = hlo.parse("""%body (p: f32[100,8], q: s32[]) -> f32[1,8] {
  %p = f32[100,8]{1,0} parameter(0)
  %q = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %s = f32[1,8]{1,0} dynamic-slice(%p, %q, %zero), dynamic_slice_sizes={1,8}
}

ENTRY %main (a: f32[100,8], i: s32[], b: f32[8,8]) -> f32[1,8] {
  %a = f32[100,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %b = f32[8,8]{1,0:S(1)} parameter(2)
  %row = f32[1,8]{1,0} fusion(%a, %i), kind=kLoop, calls=%body
  ROOT %c = f32[1,8]{1,0} dot(%row, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
""")
    row, index = 8 * 4, 4
    assert traffic.memory(module).bytes == (row + row + index) + (row + row), "b is not in memory"


def test_exchanges_that_a_tpu_fuses():
    """A gather that runs beside other work stands in several fusions; a sum of which each device
    keeps a slice is a scattered one.
    """
    groups = "channel_id=7, replica_groups={{0,1,2,3}}"
    beside = groups + ', backend_config={"async_collective_fusion_config":{"flag_start":"2"}}'
    module = hlo.parse(f"""%start (p: bf16[2,8]) -> bf16[8,8] {{
  %p = bf16[2,8] parameter(0)
  ROOT %g = bf16[8,8] all-gather(%p), dimensions={{0}}, {beside}
}}

%done (p.1: bf16[2,8]) -> bf16[8,8] {{
  %p.1 = bf16[2,8] parameter(0)
  ROOT %g.1 = bf16[8,8] all-gather(%p.1), dimensions={{0}}, {beside}
}}

%scattered (p.2: f32[8]) -> f32[2] {{
  %p.2 = f32[8] parameter(0)
  %zero = u32[] constant(0)
  %s = f32[8] all-reduce(%p.2), to_apply=%add, {groups}
  ROOT %mine = f32[2] dynamic-slice(%s, %zero), dynamic_slice_sizes={{2}}
}}

ENTRY %main (a: bf16[2,8], b: f32[8]) -> (bf16[8,8], bf16[8,8], f32[2]) {{
  %a = bf16[2,8] parameter(0)
  %b = f32[8] parameter(1)
  %one = bf16[8,8] fusion(%a), kind=kCustom, calls=%start
  %two = bf16[8,8] fusion(%a), kind=kCustom, calls=%done
  %three = f32[2] fusion(%b), kind=kCustom, calls=%scattered
  ROOT %t = (bf16[8,8], bf16[8,8], f32[2]) tuple(%one, %two, %three)
}}
""")
    gather, scatter = traffic.collectives(module)
    assert (gather.kind, gather.count, gather.bytes) == ("all-gather", 1, 128)
    assert (scatter.kind, scatter.count, scatter.bytes) == ("reduce-scatter", 1, 32)
    assert scatter.sent == 24
