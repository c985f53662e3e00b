"""The networks as functions: what they refuse, what a key does, what jax makes of them."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recipe
from flax import nnx

from cfg_jax import executed, hlo
from cfg_jax.models import (
    affine,
    attention,
    doubled,
    draws,
    layers,
    network,
    unet,
    weights,
    winograd,
)
from cfg_jax.types import UsageError

CLASSES = 3
TINY = {
    "image_size": 8,
    "num_classes": CLASSES,
    "in_channels": 1,
    "out_channels": 1,
    "channels": 8,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (4,),
    "num_heads": 2,
    "dropout": 0.5,
}
QUICK = functools.partial(jax.jit, compiler_options=recipe.QUICK)


def tiny(**fields):
    return network.network(
        network.make("unet", **(TINY | fields)), sinusoid_input=lambda lam: 25 * (lam + 20)
    )


def trained(build):
    """Parameters with no leaf at zero: at initialisation the output is zero whatever happens."""
    flat = weights.flatten(network.shapes(build))
    return weights.unflatten(
        {path: recipe.adm_weight(path.replace("/", "."), leaf.shape) for path, leaf in flat.items()}
    )


@pytest.fixture(scope="module")
def net():
    return tiny()


@pytest.fixture(scope="module")
def init(net):
    return QUICK(net.init)


@pytest.fixture(scope="module")
def fresh(init):
    return init(jax.random.key(0))


@pytest.fixture(scope="module")
def params():
    return trained(network.make("unet", **TINY))


@pytest.fixture(scope="module")
def apply(net):
    return QUICK(net.apply)


Z = jnp.asarray(recipe.draw("z", (8, 8, 8, 1)))
LAM = jnp.linspace(-20, 20, 8)
COND = {"label": jnp.arange(8) % (CLASSES + 1)}


def test_a_student_has_its_teachers_parameters_and_what_reads_w(params, apply):
    """Which starts at zero; once it does not, w moves the output, for each image by itself."""
    student = tiny(w_embedding=True)
    shapes = network.shapes(network.make("unet", **TINY, w_embedding=True))
    assert jax.tree.structure({**params, "strength": 0}) == jax.tree.structure(
        {**shapes, "strength": 0}
    )
    made = QUICK(student.init)(jax.random.key(0))["strength"]
    assert not np.any(made["out"]["kernel"]) and np.any(made["hidden"]["kernel"])
    say = QUICK(student.apply)
    w = jnp.linspace(0, 4, 8)
    said = apply(params, Z, LAM, COND)
    np.testing.assert_array_equal(say({**params, "strength": made}, Z, LAM, {**COND, "w": w}), said)
    made["out"]["kernel"] += 0.1
    one, other = (
        say({**params, "strength": made}, Z, LAM, {**COND, "w": v}) for v in (w, w.at[3].add(0.5))
    )
    changed = np.any(np.asarray(one != other), axis=(1, 2, 3))
    assert changed.tolist() == [i == 3 for i in range(8)]


# --- layers ---


@pytest.mark.parametrize("offset", [0, 1e3])
def test_group_norm_is_that_of_float64(offset):
    x = (offset + recipe.draw("x", (2, 5, 7, 96)) * np.linspace(0.01, 3, 96)).astype(np.float32)
    scale, shift = recipe.draw("scale, shift", (2, 2, 96))
    norm = layers.GroupNorm(96)
    norm.scale[...], norm.bias[...] = jnp.linspace(0.5, 2, 96), jnp.linspace(-1, 1, 96)
    wide = np.asarray(x, np.float64).reshape(2, 5 * 7, 32, 3)
    mean, var = wide.mean((1, 3), keepdims=True), wide.var((1, 3), keepdims=True)
    want = ((wide - mean) / np.sqrt(var + 1e-5)).reshape(x.shape)
    want = want * np.linspace(0.5, 2, 96) + np.linspace(-1, 1, 96)
    np.testing.assert_allclose(norm(x), want, atol=2e-3 if offset else 2e-6)
    want = want * (1 + scale)[:, None, None] + shift[:, None, None]
    np.testing.assert_allclose(
        norm(x, scale=scale, shift=shift), want, atol=5e-3 if offset else 1e-5
    )


@pytest.mark.parametrize("channels, groups", [(8, 8), (24, 24), (32, 32), (48, 16), (256, 32)])
def test_group_norm_has_32_groups_where_they_divide(channels, groups):
    x = recipe.draw("x", (2, 4, 4, channels)).astype(np.float32)
    wide = x.astype(np.float64).reshape(2, 16, groups, -1)
    mean, var = wide.mean((1, 3), keepdims=True), wide.var((1, 3), keepdims=True)
    want = ((wide - mean) / np.sqrt(var + 1e-5)).reshape(x.shape)
    np.testing.assert_allclose(layers.GroupNorm(channels)(x), want, atol=5e-6)


@pytest.mark.parametrize("stride, side", [(1, 5), (1, 8), (2, 8)])
@pytest.mark.parametrize("kernel_side", [1, 3])
def test_the_gradient_of_a_convolution_is_jaxs_own(stride, side, kernel_side):
    x = jnp.asarray(recipe.draw("x", (2, side, side, 3)), jnp.float32)
    kernel = jnp.asarray(recipe.draw("k", (kernel_side, kernel_side, 3, 4)), jnp.float32)

    def own(x, kernel):
        pad = kernel_side // 2
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (stride, stride),
            [(pad, pad)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    ours, pull = jax.vjp(lambda x, k: affine.convolve(x, k, stride), x, kernel)
    theirs, pull_own = jax.vjp(own, x, kernel)
    np.testing.assert_array_equal(ours, theirs)
    g = jnp.asarray(recipe.draw("g", ours.shape), jnp.float32)
    for got, want in zip(pull(g), pull_own(g), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def plain_attention(qkv, heads, order):
    """By its definition, of arrays taken apart by indices."""
    b, n, _ = qkv.shape
    if order == "new":
        q, k, v = jnp.moveaxis(qkv.reshape(b, n, 3, heads, -1), 2, 0)
    else:
        q, k, v = jnp.moveaxis(qkv.reshape(b, n, heads, 3, -1), 3, 0)
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits), v)


@pytest.mark.parametrize("order", ["new", "legacy"])
def test_the_gradient_of_attention_is_jaxs_own(order, float64):
    qkv = jax.random.normal(jax.random.key(0), (2, 6, 24))
    ours, pull = jax.vjp(lambda x: attention.attend(*attention.split_heads(x, 2, order)), qkv)
    theirs, their_pull = jax.vjp(lambda x: plain_attention(x, 2, order), qkv)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    g = jax.random.normal(jax.random.key(1), ours.shape)
    np.testing.assert_allclose(pull(g)[0], their_pull(g)[0], atol=1e-5)


def test_the_gradient_of_a_product_is_jaxs_own(float64):
    x, kernel, g = (
        jax.random.normal(jax.random.key(i), shape)
        for i, shape in enumerate(((2, 3, 5, 4), (4, 6), (2, 3, 5, 6)))
    )
    ours, theirs = (jax.vjp(f, x, kernel)[1](g) for f in (affine.multiply, jnp.matmul))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def _doubled_plainly(x, kernel):
    return affine.convolve(doubled.double(x), kernel)


def _with_gradients(convolve, x, kernel, g):
    @QUICK
    def run(x, kernel, g):
        out, pull = jax.vjp(convolve, x, kernel)
        return out, *pull(g)

    return [np.asarray(a, np.float32) for a in run(x, kernel, g)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_convolution_of_a_doubled_image_needs_no_doubled_image(dtype):
    """The same numbers and gradients; that of the kernel is never rounded to the image's dtype."""
    x = jnp.asarray(recipe.draw("x", (2, 4, 5, 3)), dtype)
    kernel = jnp.asarray(recipe.draw("k", (3, 3, 3, 4)), jnp.float32)
    g = jnp.asarray(recipe.draw("g", (2, 8, 10, 4)), dtype)
    (out, by_x, by_kernel), plain = (
        _with_gradients(convolve, x, kernel, g) for convolve in (doubled.convolve, _doubled_plainly)
    )
    assert out.shape == (2, 8, 10, 4)
    near = 1e-6 if dtype == "float32" else 2**-7
    for got, want in zip((out, by_x), plain[:2]):
        assert np.linalg.norm(got - want) < near * np.linalg.norm(want)
    np.testing.assert_allclose(by_kernel, plain[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("height, width", [(1, 4), (5, 8), (6, 20)])
def test_half_of_the_products_make_the_same_convolution(height, width):
    """Tiles of four columns: one that has no neighbours, ones at the ends, and ones between."""
    x, kernel, g = (
        jnp.asarray(recipe.draw(name, shape), jnp.float32)
        for name, shape in zip(
            "xkg", ((2, height, width, 7), (3, 3, 7, 5), (2, height, width, 5)), strict=True
        )
    )
    ours, plain = (
        _with_gradients(convolve, x, kernel, g)
        for convolve in (winograd.by_columns, affine.convolve)
    )
    for got, want in zip(ours, plain, strict=True):
        assert got.shape == want.shape
        assert np.linalg.norm(got - want) < 3e-6 * np.linalg.norm(want)


def _products(function, *arguments, platform):
    """FLOPs of the products of a function and its gradients, as lowered for a platform."""

    def both(*arguments):
        total = jax.value_and_grad(lambda *a: jnp.sum(function(*a) ** 2), (0, 1))
        return total(*arguments)

    lowered = jax.jit(both).trace(*arguments).lower(lowering_platforms=(platform,))
    return executed.flops(hlo.parse(lowered.as_text("hlo")))


def test_a_large_convolution_is_the_plain_one_and_keeps_its_arguments_only():
    x, kernel, g = (
        jnp.asarray(recipe.draw(name, shape), jnp.float32)
        for name, shape in zip("xkg", ((1, 3, 16, 64), (3, 3, 64, 64), (1, 3, 16, 64)), strict=True)
    )
    ours, plain = (
        _with_gradients(convolve, x, kernel, g) for convolve in (winograd.convolve, affine.convolve)
    )
    assert np.any(ours[0] != plain[0]), "the same form"
    for got, want in zip(ours, plain, strict=True):
        assert np.linalg.norm(got - want) < 3e-6 * np.linalg.norm(want)
    kept = jax.tree.leaves(jax.vjp(winograd.convolve, x, kernel)[1])
    assert sorted(a.shape for a in kept) == [(1, 3, 16, 64), (3, 3, 64, 64)]


HALF, ALL = 0.55, 1


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
@pytest.mark.parametrize(
    "share, width, channels, dtype",
    [
        (HALF, 16, (64, 64), "float32"),
        (ALL, 12, (64, 64), "float32"),
        (ALL, 18, (64, 64), "float32"),
        (ALL, 16, (32, 64), "float32"),
        (ALL, 16, (64, 32), "float32"),
        (ALL, 16, (64, 64), "bfloat16"),
    ],
)
def test_only_a_cpu_saves_products_of_large_convolutions(platform, share, width, channels, dtype):
    x, kernel = jnp.ones((1, 4, width, channels[0]), dtype), jnp.ones((3, 3, *channels))
    got, want = (
        _products(convolve, x, kernel, platform=platform)
        for convolve in (winograd.convolve, affine.convolve)
    )
    if platform == "cpu" and share == HALF:
        assert 0.45 * want < got < HALF * want
    else:
        assert got == want


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_only_a_cpu_takes_the_kernel_of_a_doubled_image_apart(platform):
    """Others multiply what the published network does, a CPU about half of it."""
    x, kernel = jnp.ones((1, 8, 8, 8)), jnp.ones((3, 3, 8, 8))
    got, want = (
        _products(convolve, x, kernel, platform=platform)
        for convolve in (doubled.convolve, _doubled_plainly)
    )
    if platform == "cpu":
        assert got < 0.6 * want
    else:
        assert got == want


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_products_that_are_kept_are_not_multiplied_again(platform):
    """Of every kind of layer, large enough for a CPU's forms: `remat` "products", not "blocks"."""

    def flops(remat):
        def build(rngs):
            res = functools.partial(layers.ResBlock, rngs, 64, 64, embedding=8)
            attend = attention.Attention(rngs, 64)
            return unet.Block(res(), attend, res(resample="up"), remat=remat)

        graph, state = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))))

        def run(state, x):
            return nnx.merge(graph, state)(x, jnp.ones((1, 8)))

        x = jax.ShapeDtypeStruct((1, 16, 16, 64), jnp.float32)
        return _products(run, state, x, platform=platform)

    none, products, blocks = map(flops, ("none", "products", "blocks"))
    assert products == pytest.approx(none, rel=1e-3)
    assert blocks > 1.2 * none


def test_a_classifiers_logits_are_an_affine_map_of_its_features():
    fields = {k: v for k, v in TINY.items() if k != "out_channels"}
    build = network.make("classifier", **fields)
    clock = {"sinusoid_input": lambda lam: 25 * (lam + 20)}
    logits, features = (network.network(build, **clock, **m) for m in ({}, {"method": "features"}))
    params = trained(build)
    seen = features.apply(params, Z, LAM, {})
    proj = params["pool"]["proj"]
    assert seen.shape == (8, proj["kernel"].shape[0])
    np.testing.assert_allclose(
        logits.apply(params, Z, LAM, {}), seen @ proj["kernel"] + proj["bias"], atol=1e-5
    )


def test_group_norm_of_bfloat16_has_float32_statistics():
    x = jnp.asarray(100 + recipe.draw("x", (2, 16, 16, 64)), jnp.bfloat16)
    norm = layers.GroupNorm(64)
    assert norm(x).dtype == jnp.bfloat16
    want = norm(x.astype(jnp.float32))
    np.testing.assert_allclose(norm(x).astype(jnp.float32), want, rtol=2**-8)


def test_halve_and_double():
    x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    np.testing.assert_array_equal(layers.halve(x)[0, :, :, 0], [[2.5, 4.5], [10.5, 12.5]])
    np.testing.assert_array_equal(layers.halve(doubled.double(x)), x)
    np.testing.assert_array_equal(
        doubled.double(x)[0, :4, :4, 0], [[0, 0, 1, 1]] * 2 + [[4, 4, 5, 5]] * 2
    )


# --- the network as two functions ---


def test_output_is_zero_at_initialisation(fresh, apply):
    out = apply(fresh, Z, LAM, COND)
    assert out.shape == Z.shape and out.dtype == jnp.float32
    assert not out.any()


class Ladder(nnx.Module):
    """Twelve steps alike: sorted as strings, step "10" would come before step "2"."""

    def __init__(self, rngs):
        self.steps = nnx.List([layers.LabelEmbedding(rngs, 1, 1) for _ in range(12)])

    def __call__(self, z, s, cond, key=None):
        return z * jnp.stack([step.table[0, 0] for step in self.steps])


def test_keys_are_strings_and_lists_keep_their_order():
    ladder = network.network(Ladder, sinusoid_input=lambda lam: lam)
    params = ladder.init(jax.random.key(0))
    assert list(params["steps"]) == [str(i) for i in range(12)]
    params = {"steps": {str(i): {"table": jnp.full((1, 1), i)} for i in (10, 2, *range(12))}}
    out = ladder.apply(jax.tree.map(jnp.asarray, params), jnp.ones((1, 12)), 0.0, {})
    np.testing.assert_array_equal(out[0], range(12))


def test_init_depends_on_the_key_and_has_pytorchs_spread(init, fresh):
    def kernel(params):
        return np.asarray(params["encoder"]["middle"]["layers"]["0"]["conv1"]["kernel"])

    bound = (9 * 16) ** -0.5
    assert np.abs(kernel(fresh)).max() <= bound
    assert abs(kernel(fresh).std() * 3**0.5 / bound - 1) < 0.05
    assert not np.array_equal(kernel(fresh), kernel(init(jax.random.key(1))))


def test_lambda_and_label_reach_the_output(params, apply):
    out = apply(params, Z[:1].repeat(8, 0), LAM, {"label": jnp.zeros(8, int)})
    assert distinct(out)
    # every class and the null label, its last row, by turns
    out = apply(params, Z[:1].repeat(8, 0), LAM[:1].repeat(8), COND)
    assert distinct(out[: CLASSES + 1])
    np.testing.assert_allclose(out[:4], out[4:], rtol=1e-4, atol=1e-4)


def distinct(images):
    gaps = jnp.abs(images[:, None] - images[None]).max((2, 3, 4))
    return (gaps + jnp.eye(len(images)) > 1e-3).all()


def test_one_lambda_serves_the_batch(params, apply):
    np.testing.assert_array_equal(
        apply(params, Z, jnp.float32(2), COND), apply(params, Z, jnp.full(8, 2, jnp.float32), COND)
    )


def test_each_image_is_alone(params, apply):
    out = apply(params, Z, LAM, COND)
    flipped = apply(params, Z[::-1], LAM[::-1], {"label": COND["label"][::-1]})
    np.testing.assert_allclose(flipped[::-1], out, rtol=1e-4, atol=1e-4)


def test_a_label_without_a_row_is_not_another_label():
    table = layers.LabelEmbedding(nnx.Rngs(0), CLASSES, 4)
    out = table(jnp.array([0, CLASSES - 1, CLASSES, -1]))
    assert np.isnan(out).all(axis=1).tolist() == [False, False, True, True]


def test_rows_of_the_label_embedding():
    def rows(**fields):
        return network.shapes(network.make("unet", **(TINY | fields)))["label"]["table"].shape[0]

    assert rows() == CLASSES + 1
    assert rows(null_row=False) == CLASSES


def test_without_classes_the_condition_is_not_read():
    net = tiny(num_classes=None)
    shapes = jax.eval_shape(net.init, jax.random.key(0))
    assert "label" not in shapes
    assert jax.eval_shape(net.apply, shapes, Z, LAM, {}).shape == Z.shape


@pytest.mark.parametrize(
    "fields",
    [
        {"resblock_updown": False},
        {"scale_shift_norm": False},
        {"num_heads": None, "head_channels": 4, "head_order": "legacy"},
        {"channel_mult": (0.5, 1, 2), "num_res_blocks": 2, "out_channels": 2},
        {"attention_resolutions": ()},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_every_field_keeps_the_shape(fields):
    net = tiny(**fields)
    shapes = jax.eval_shape(net.init, jax.random.key(0))
    out = jax.eval_shape(net.apply, shapes, Z, LAM, COND)
    assert out.shape == (8, 8, 8, fields.get("out_channels", 1))


def test_classifier_gives_float32_logits():
    fields = {name: TINY[name] for name in TINY if name != "out_channels"}
    build = network.make("classifier", **(fields | {"dtype": "bfloat16"}))
    net = network.network(build, sinusoid_input=lambda lam: lam)
    params = jax.eval_shape(net.init, jax.random.key(0))
    out = jax.eval_shape(net.apply, params, Z, LAM, {})
    assert out.shape == (8, CLASSES) and out.dtype == jnp.float32


# --- dropout ---


def test_dropout_follows_the_key(params, apply):
    clean = apply(params, Z, LAM, COND)
    first, second = (apply(params, Z, LAM, COND, jax.random.key(i)) for i in range(2))
    np.testing.assert_array_equal(first, apply(params, Z, LAM, COND, jax.random.key(0)))
    assert jnp.abs(first - clean).max() > 1e-2 and jnp.abs(first - second).max() > 1e-2
    none = tiny(dropout=0.0).apply
    with_key = jax.jit(none).lower(params, Z, LAM, COND, jax.random.key(0)).as_text()
    assert "xor" not in with_key  # threefry


def test_dropout_keeps_the_mean_and_drops_the_rate():
    x = layers.dropout(jnp.ones((1000, 1000)), 0.3, jax.random.key(0))
    assert abs((x == 0).mean() - 0.3) < 5 * (0.3 * 0.7 / 1e6) ** 0.5
    assert abs(x.mean() - 1) < 5 * (0.3 / 0.7 / 1e6) ** 0.5


@pytest.mark.parametrize("count, size", [(1, 1), (3, 7), (16, 1024)])
def test_a_cpu_draws_what_others_draw(count, size):
    """Halves of jax's words, with other keys and counters, too; with its own without a loop."""
    for impl, partitionable in (("threefry2x32", True), ("threefry2x32", False), ("rbg", True)):
        key = jax.random.key(7, impl=impl)
        with jax.threefry_partitionable(partitionable):
            drawn = jax.jit(draws.draws, static_argnums=(1, 2))(key, count, size)
            words = np.asarray(jax.random.bits(key, (count, -(-size // 2))))
        want = np.concatenate([words & 0xFFFF, words >> 16], axis=1)[:, :size]
        np.testing.assert_array_equal(drawn, want)

    def text(draw, platform):
        draw = jax.jit(draw).trace(jax.random.key(0))
        return draw.lower(lowering_platforms=(platform,)).as_text()

    def ours(key):
        return draws.draws(key, count, size)

    def theirs(key):
        return jax.random.bits(key, (count, -(-size // 2)))

    assert "while" not in text(ours, "cpu") and "while" in text(theirs, "cpu")
    for platform in ("tpu", "cuda"):
        both = [text(draw, platform) for draw in (ours, theirs)]
        assert both[0].count("xor") == both[1].count("xor"), "jax's rounds, and no others"
        assert "barrier" not in both[0]


def test_every_layer_draws_its_own_mask(net, params, monkeypatch):
    seen = []
    monkeypatch.setattr(layers, "dropout", lambda x, rate, key: seen.append(key) or x)

    @QUICK
    def keys(key):  # the network itself is dead code here
        net.apply(params, Z, LAM, COND, key)
        return jnp.stack([jax.random.key_data(key) for key in seen])

    drawn = {tuple(key) for key in np.asarray(keys(jax.random.key(0))).tolist()}
    assert len(drawn) == len(seen) == 10  # 2 down + 1 halving + 2 middle + 4 up + 1 doubling


# --- precision, gradients, jax ---


def test_bfloat16_compute_is_close_to_float32(params, apply):
    want = apply(params, Z, LAM, COND)
    out = QUICK(tiny(dtype="bfloat16").apply)(params, Z, LAM, COND)
    assert out.dtype == jnp.float32
    error = jnp.linalg.norm(out - want) / jnp.linalg.norm(want)
    assert 1e-4 < error < 3e-2  # and it did compute in bfloat16


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_float32_is_multiplied_as_such_and_bfloat16_is_left_alone(platform):
    """Every convolution and product of the layers and of their gradients, as they are lowered."""

    def layers_of(x, kernel, down, matrix):
        h = affine.convolve(affine.convolve(x, kernel), down, 2)
        h = affine.multiply(h.reshape(2, 16, 8), matrix).reshape(2, 16, 2, 4)
        return jnp.sum(attention.attend(h, h, h).astype(jnp.float32) ** 2)

    shapes = (2, 8, 8, 8), (3, 3, 8, 8), (3, 3, 8, 8), (8, 8)
    for dtype, wanted in ((jnp.float32, "HIGHEST"), (jnp.bfloat16, "DEFAULT")):
        image, *kernels = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
        image = jax.ShapeDtypeStruct(image.shape, dtype)
        program = jax.jit(jax.grad(layers_of, (0, 1, 2, 3))).trace(image, *kernels)
        text = program.lower(lowering_platforms=(platform,)).as_text()
        products = re.findall(r".*stablehlo\.(?:dot_general|convolution).*", text)
        assert len(products) == 15, "3 of each convolution and matrix, 6 of attention"
        for product in products:
            said = re.findall(r"DEFAULT|HIGHEST|HIGH", product) or ["DEFAULT"]
            assert set(said) == {wanted}, product


def test_a_parameter_in_the_dtype_that_is_read_gives_the_same_bits(params):
    build = network.make("unet", **TINY, dtype="bfloat16")
    dtypes = network.dtypes(build)
    assert jax.tree.structure(dtypes) == jax.tree.structure(params)
    flat = weights.flatten(dtypes)
    assert {
        str(flat[path]) for path in ("time/hidden/kernel", "norm_out/scale", "label/table")
    } == {"float32"}
    assert flat["encoder/conv_in/kernel"] == flat["encoder/middle/layers/1/qkv/bias"] == "bfloat16"
    apply = QUICK(tiny(dtype="bfloat16").apply)
    cast = jax.tree.map(lambda p, dtype: jnp.asarray(p, dtype), params, dtypes)
    np.testing.assert_array_equal(apply(cast, Z, LAM, COND), apply(params, Z, LAM, COND))


@pytest.mark.slow
def test_rematerialising_changes_the_work_and_not_the_gradient(params):
    def gradient(remat):
        net = tiny(remat=remat)

        def loss(params):
            return jnp.square(net.apply(params, Z, LAM, COND, jax.random.key(3))).mean()

        program = jax.jit(jax.grad(loss)).lower(params)
        flops = program.cost_analysis()["flops"]
        grads = program.compile(compiler_options=recipe.QUICK)(params)
        return flops, jnp.concatenate([g.ravel() for g in jax.tree.leaves(grads)])

    flops, want = gradient("none")
    # A forward pass is a third of the whole; what is elementwise is far less.
    for remat, least in (("products", 1.001), ("blocks", 1.2)):
        more_flops, got = gradient(remat)
        assert jnp.linalg.norm(got - want) < 1e-5 * jnp.linalg.norm(want)
        assert more_flops > least * flops


def test_gradients_are_finite_and_reach_every_leaf(net, params):
    def loss(params, key):
        return jnp.square(net.apply(params, Z, LAM, COND, key)).mean()

    grads = weights.flatten(QUICK(jax.grad(loss))(params, jax.random.key(0)))
    assert all(jnp.isfinite(g).all() for g in grads.values())
    assert [path for path, g in grads.items() if not g.any()] == []


def test_scan_is_the_loop(net, params, apply):
    """Parameters are closed over by the scan and enter the jitted program as an argument."""

    @QUICK
    def chain(params, z):
        def step(z, lam):
            return z - 0.1 * net.apply(params, z, lam, COND), None

        return jax.lax.scan(step, z, LAM[:3])[0]

    z = Z
    for lam in LAM[:3]:
        z = z - 0.1 * apply(params, z, lam, COND)
    np.testing.assert_allclose(chain(params, Z), z, rtol=1e-4, atol=1e-5)


def test_sharded_batch_and_parameters(net, params, apply):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def shard(leaf):
        rows = leaf.ndim and leaf.shape[0] % 8 == 0
        spec = jax.sharding.PartitionSpec("data" if rows else None)
        return jax.device_put(leaf, jax.sharding.NamedSharding(mesh, spec))

    out = apply(*jax.tree.map(shard, (params, Z, LAM, COND)))
    np.testing.assert_allclose(out, apply(params, Z, LAM, COND), rtol=1e-4, atol=1e-5)


# --- mistakes ---


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_size": 9}, "image_size=9 cannot be halved 1 times.*multiple of 2"),
        ({"attention_resolutions": (5, 4)}, r"attention_resolutions=.*\[5\].*\(8, 4\)"),
        ({"num_heads": 3}, "16 channels does not split into 3 heads"),
        ({"num_heads": None}, "16 channels does not split into heads of 64 channels"),
        ({"head_channels": 8}, "num_heads=2 and head_channels=8 are both given"),
        ({"head_order": "old"}, "head_order='old'.*'new' or 'legacy'"),
        ({"channels": 7, "num_heads": 1}, "channels=7 must be positive and even"),
        ({"dropout": 1.0}, r"dropout=1.0.*\[0, 1\)"),
        ({"dtype": "float16"}, "dtype='float16'.*'float32' or 'bfloat16'"),
        ({"remat": "some"}, "remat='some'.*none, products, blocks"),
        ({"chanels": 8}, "no field chanels; it has image_size, num_classes,.*dtype"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ",
)
def test_mistakes_are_told_in_one_line(fields, message):
    with pytest.raises(UsageError, match=message) as error:
        net = tiny(**fields)
        jax.eval_shape(
            lambda: net.apply(net.init(jax.random.key(0)), Z, LAM, COND)
        )  # odd channels show when called
    assert "\n" not in str(error.value)


def test_unknown_model_and_missing_field():
    with pytest.raises(UsageError, match="'unett' is not known; it is one of unet, classifier"):
        network.make("unett")
    with pytest.raises(UsageError, match="needs image_size, num_classes"):
        network.make("unet")


def test_images_of_another_size(net):
    shapes = jax.eval_shape(net.init, jax.random.key(0))
    with pytest.raises(UsageError, match=r"\[8, 8, 1\].*was given \[16, 16, 1\]"):
        jax.eval_shape(net.apply, shapes, jnp.zeros((8, 16, 16, 1)), LAM, COND)


# --- safetensors ---


def test_safetensors_round_trip_is_exact(tmp_path, params):
    params = dict(params) | {"steps": {"10": jnp.arange(3)}, "scalar": jnp.float32(2)}
    weights.save_safetensors(tmp_path / "ema.safetensors", params, {"step": "7"})
    loaded, metadata = weights.load_safetensors(tmp_path / "ema.safetensors")
    assert metadata == {"step": "7"}
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    for ours, theirs in zip(jax.tree.leaves(loaded), jax.tree.leaves(params)):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
    assert [path.name for path in tmp_path.iterdir()] == ["ema.safetensors"]


def test_half_precision_halves_the_file(tmp_path, params):
    sizes = {}
    for dtype in ("float32", "float16"):
        path = tmp_path / f"{dtype}.safetensors"
        weights.save_safetensors(path, params, {}, dtype=dtype)
        sizes[dtype] = path.stat().st_size
        loaded, _ = weights.load_safetensors(path)
        for ours, theirs in zip(jax.tree.leaves(loaded), jax.tree.leaves(params)):
            assert ours.dtype == np.float32
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-7)
    assert sizes["float16"] < 0.6 * sizes["float32"]
    with pytest.raises(UsageError, match="dtype='bfloat16'"):
        weights.save_safetensors(path, params, {}, dtype="bfloat16")


def test_a_file_that_is_not_safetensors(tmp_path, fresh):
    path = tmp_path / "ema.safetensors"
    with pytest.raises(UsageError, match=r"ema\.safetensors does not exist"):
        weights.load_safetensors(path)
    weights.save_safetensors(path, fresh, {})
    whole = path.read_bytes()
    for data in (b"", b"PK\x03\x04 a zip", whole[:-1], whole[:100]):
        path.write_bytes(data)
        with pytest.raises(UsageError, match=r"is not a whole \.safetensors file"):
            weights.load_safetensors(path)
