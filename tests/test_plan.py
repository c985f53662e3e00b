"""The planning job: its report for this machine and for a TPU that is not here, and its errors."""

import importlib.util
import json
import types

import jax
import jax.numpy as jnp
import pytest

from cfg_jax import chips, experiment, plan, plan_report, programs, train
from cfg_jax.models import affine, doubled
from cfg_jax.runtime import mesh as meshes
from cfg_jax.types import UsageError

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason='THE TPU COMPILER IS NOT TESTED: python -m pip install -e ".[plan]" brings libtpu',
)


def report_of(cli, out, *args):
    result = cli("plan", *args, f"--out={out}")
    assert result.status == 0, result.err[-3000:]
    return json.loads((out / "plan.json").read_text()), result.out


def test_a_plan_for_this_machine(cli, tiny, tmp_path):
    """Also that it is the job's own programs, and that the second time nothing is compiled."""
    report, told = report_of(cli, tmp_path, *tiny, "--topology=cpu:2")
    step, sampler = report["step"], report["sampler"]
    assert report["devices"] == 2 and report["versions"]["jax"] == jax.__version__
    assert 0.9 < step["flops_ratio"] < 1.05
    assert {(c["kind"], c["dtype"]) for c in step["collectives"]} == {("all-reduce", "f32")}
    assert not sampler["collectives"], "no step of the chain exchanges anything"
    # Eight levels of two passes of half of 16 images; the gradient's step is three passes of them.
    assert 4 < sampler["model_flops"] / step["model_flops"] < 8 * 2 / 3 + 0.5
    assert step["memory"]["peak"] > 0 and step["memory"]["fits"] is None
    assert step["bound"] is None and "no bound on time" in told
    assert "DOES NOT FIT" not in told
    products = [line for line in told.splitlines() if line.startswith("  products ")]
    ratios = [f"the model's: {program['flops_ratio']:.3f}" for program in (step, sampler)]
    assert [line.endswith(ratio) for line, ratio in zip(products, ratios, strict=True)] == [
        True
    ] * 2
    kept = sorted((tmp_path / "compiled").iterdir())
    assert len(kept) == 2
    before = [file.stat().st_mtime_ns for file in kept]
    again, _ = report_of(cli, tmp_path, *tiny, "--topology=cpu:2")
    assert again["step"] == step
    assert [f.stat().st_mtime_ns for f in sorted((tmp_path / "compiled").iterdir())] == before


@pytest.mark.slow
def test_a_students_step_is_planned_with_its_teacher(cli, tiny, tmp_path):
    """Two passes forward of the teacher, three for the student's gradient; sampling takes one."""
    flags = ("--config=digits_distilled", "--topology=cpu:2")
    report, told = report_of(cli, tmp_path, *tiny[1:], *flags)
    step, sampler = report["step"], report["sampler"]
    assert 0.9 < step["flops_ratio"] < 1.05
    assert 1.4 < sampler["model_flops"] / step["model_flops"] < 1.8, "8 passes by 2 + 3"
    assert "8 levels, one pass at each" in told


@pytest.mark.slow
def test_variants_side_by_side(cli, tiny, tmp_path):
    flags = ("--topology=cpu:4", "--nosampler", "--variants=remat=blocks,fsdp=2")
    report, told = report_of(cli, tmp_path, *tiny, *flags)
    assert set(report["variants"]) == {"remat=blocks", "fsdp=2"} and report["sampler"] is None
    step, split = report["step"], report["variants"]["fsdp=2"]
    assert split["memory"]["arguments"] < 0.7 * step["memory"]["arguments"]
    gathers = [c for c in split["collectives"] if c["kind"] == "all-gather"]
    assert gathers and not any(c["in_loop"] for c in split["collectives"])
    assert split["model_flops"] == step["model_flops"]
    assert report["variants"]["remat=blocks"]["model_flops"] == step["model_flops"]
    assert "fsdp=2" in told.splitlines()[-3]


CASES = {
    "a chip of another maker": (["--topology=h100:8"], ["h100", "v5e"]),
    "a chip that the compiler refuses": (["--topology=v7x:2x2x1"], ["v7x", "v6e"]),
    "one dimension": (["--topology=v5e:16"], ["v5e:16", "2 dimensions", "v5e:4x4"]),
    "two of three dimensions": (["--topology=v4:4x4"], ["3 dimensions", "v4:4x4x4"]),
    "no number": (["--topology=cpu:many"], ["cpu:many", "cpu:8"]),
    "no GPU": (["--topology=gpu"], ["--topology=gpu", "none"]),
    "batch and slice": (
        ["--topology=cpu:3", "--config.train.batch_size=16"],
        ["batch_size=16", "3 devices", "try 15"],
    ),
    "fsdp and slice": (["--topology=cpu:4", "--config.train.fsdp=3"], ["fsdp=3", "4"]),
    "unknown variant": (["--topology=cpu:2", "--variants=width=3"], ["width=3", "remat, fsdp"]),
    "a variant that is no number": (["--topology=cpu:2", "--variants=fsdp=all"], ["whole number"]),
    "a variant that does not divide": (
        ["--topology=cpu:2", "--variants=fsdp=3"],
        ["--variants=fsdp=3", "2"],
    ),
    "gradients in bytes": (
        ["--topology=cpu:2", "--config.train.gradient_dtype=int8"],
        ["gradient_dtype='int8'", "float32"],
    ),
    "a search without a limit": (["--topology=cpu:2", "--search=1", "--nosampler"], ["--search"]),
}


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_one_line(cli, tiny, name):
    flags, words = CASES[name]
    result = cli("plan", *tiny, *flags)
    assert result.status == 2, result.err[-2000:]
    assert len(result.errors) == 1 and "Traceback" not in result.err
    for word in words:
        assert word in result.errors[0], result.errors[0]


def test_without_the_compiler_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'cfg_jax\[plan\]'"):
        chips.target("v5e:4x4")


def test_what_a_program_wants_that_does_not_fit():
    message = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
        "required for HLO temporaries (20.50G) exceeds available HBM (15.75G). HLO module: f."
    )
    assert programs.wanted(message) == 20.5 * 2**30
    assert programs.wanted("Used 512.0M of 1.5M hbm. Exceeded") == 2**29
    assert programs.wanted("INVALID_ARGUMENT: something else") is None


@pytest.mark.parametrize(
    "memory, first, largest",
    [
        (lambda b: 4 + 0.37 * b, 8, 32),  # a line
        (lambda b: 4 + 0.37 * b + 0.004 * b**2, 8, 25),  # somewhat more
        (lambda b: 4 + 3.1 * b, 8, 3),  # the first does not fit
        (lambda b: 20 + b, 8, 0),  # none does
    ],
)
@pytest.mark.parametrize("refuses", [False, True])
def test_the_largest_batch_is_found_in_few_compilations(memory, first, largest, refuses):
    """Where a compiler refuses what is too large, and where it makes that all the same."""
    tried = []

    def peak(batch):
        tried.append(batch)
        return None if refuses and memory(batch) > 16.0 else memory(batch)

    seen = programs.largest_batch(peak, {first: peak(first)}, 16.0, tries=6)
    assert max((b for b, p in seen.items() if p is not None and p <= 16.0), default=0) == largest
    assert len(tried) <= 7 and tried.count(first) == 1


def test_a_program_that_the_compiler_refused_does_not_fit_whatever_it_asked_for():
    """A wish may be of one part of the program alone, and below what a chip has."""
    refused = programs.Memory(15 * 2**30, capacity=15.75 * 2**30, refused=True)
    assert refused.fits is False
    report = programs.Report(refused, wall_seconds=1.0, cpu_seconds=1.0, model_flops=1e12).json()
    told = plan_report.describe_program(report)
    assert told[1].endswith("asked for 15.00 GiB of 15.75 GiB a device: DOES NOT FIT")
    assert "asked for 15.00 GiB" in plan_report.table({"one": report})[1]


def test_a_search_goes_on_from_what_is_refused():
    """A compiler that refuses more than 20 images."""
    config = experiment.load_config("digits")
    config["train"] |= {"batch_size": 64, "accumulate": 2}

    def report(model):
        images = model.train.batch_size
        memory = programs.Memory(float(images), capacity=20.0, refused=images > 20)
        return programs.Report(memory, wall_seconds=1.0, cpu_seconds=1.0, model_flops=1e9)

    compiler = types.SimpleNamespace(
        target=types.SimpleNamespace(devices=[None], capacity=20.0), training_step=report
    )
    found = plan.search(compiler, config, report(experiment.build(config)), tries=3)
    assert found["largest_batch_a_chip"] == 16
    assert list(found["tried"]) == [16, 28, 40, 64], "a quarter, then halves of what is left"


def test_a_bound_is_the_slowest_of_three():
    v5e = chips.CHIPS["v5e"]
    bound = chips.bound(v5e, flops=197e12, moved=0.5 * 819e9, sent=0.25 * 200e9)
    assert (bound.compute, bound.memory, bound.network) == pytest.approx((1, 0.5, 0.25))
    assert bound.seconds == bound.compute and bound.limited_by == "compute"


def test_a_gradient_comes_in_the_precision_of_the_parameter_it_is_of():
    x = jnp.ones((2, 4, 4, 3), jnp.bfloat16)
    image, kernel = jnp.ones((2, 4, 4, 3), jnp.bfloat16), jnp.full((3, 3, 3, 5), 0.1)
    for layer, parameter in (
        (affine.convolve, kernel),
        (doubled.convolve, kernel),
        (affine.multiply, kernel[0, 0]),
        (affine.add_bias, kernel[0, 0, :, 0]),
    ):
        assert layer(x, parameter).dtype == jnp.bfloat16
        for dtype in (jnp.float32, jnp.bfloat16):
            given = parameter.astype(dtype)
            by_x, by_parameter = jax.grad(
                lambda x, p, layer=layer: jnp.sum(layer(x, p).astype(jnp.float32) ** 2), (0, 1)
            )(image, given)
            assert (by_x.dtype, by_parameter.dtype) == (jnp.bfloat16, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_config_says_in_what_gradients_are_summed(dtype):
    config = experiment.load_config("digits")
    config["model"] |= {"channels": 8, "head_channels": 8, "dtype": "bfloat16"}
    model = experiment.build(config)
    mesh = meshes.make_mesh()
    step = train.make_step(model, mesh)
    handed = jax.eval_shape(meshes.whole(mesh, model.dtypes(), dtype), step.shapes.params)
    grads, _ = jax.eval_shape(
        jax.grad(model.loss, has_aux=True), handed, {}, step.rows, jax.random.key(0)
    )
    kinds = jax.tree.map(lambda g, d: (g.dtype, d), grads, model.dtypes())
    for got, read in jax.tree.leaves(kinds, is_leaf=lambda leaf: isinstance(leaf, tuple)):
        assert got == jnp.promote_types(read, dtype)


def test_versions_are_told():
    assert {"cfg_jax", "jax", "jaxlib", "python"} <= plan.versions().keys()


BFLOAT16 = "--config.model.dtype=bfloat16"
# Wide enough that a quarter of a kernel still fills tiles of 8 x 128.
WIDER = ("--config.model.channels=32", "--config.model.head_channels=32")


@needs_libtpu
@pytest.mark.slow
def test_a_plan_for_tpus(cli, tiny_two_levels, tmp_path):
    flags = ("--topology=v5e:2x2", BFLOAT16, "--variants=gradient_dtype=bfloat16,fsdp=4")
    report, told = report_of(cli, tmp_path, *tiny_two_levels, *WIDER, *flags)
    step, sampler = report["step"], report["sampler"]
    assert (report["devices"], report["device_kind"]) == (4, "TPU v5 lite")
    assert step["memory"]["fits"] and step["flops_ratio"] <= 1.05
    assert not sampler["collectives"]
    (sums,) = step["collectives"]
    assert (sums["kind"], sums["dtype"], sums["devices"]) == ("all-reduce", "f32", 4)
    halved = report["variants"]["gradient_dtype=bfloat16"]["collectives"]
    assert {c["kind"] for c in halved} == {"all-reduce"}
    assert sum(c["bytes"] for c in halved) < 0.7 * sums["bytes"]
    split = report["variants"]["fsdp=4"]
    assert split["memory"]["arguments"] < 0.6 * step["memory"]["arguments"]
    assert not any(c["in_loop"] for c in split["collectives"])
    assert report["run"]["days"] > 0 and "not a measurement" in told


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("topology, devices", [("v4:2x2x1", 4), ("v5p:2x2x1", 4)])
def test_every_chip_is_one_device(cli, tiny, tmp_path, topology, devices):
    report, _ = report_of(cli, tmp_path, *tiny, f"--topology={topology}", "--nosampler", BFLOAT16)
    assert report["devices"] == devices and report["step"]["memory"]["fits"]


@needs_libtpu
@pytest.mark.slow
def test_the_search_begins_at_what_fits(cli, tiny, tmp_path):
    flags = ("--topology=v6e:1x1", "--nosampler", "--search=1", BFLOAT16)
    report, told = report_of(cli, tmp_path, *tiny, *flags)
    assert report["devices"] == 1 and report["step"]["memory"]["fits"]
    assert report["search"]["largest_batch_a_chip"] == 32, "twice what is known"
    assert "fits: 32 a chip" in told


@needs_libtpu
@pytest.mark.slow
def test_what_does_not_fit_is_told(cli, tmp_path):
    """Wide images of few layers: memory for a step, which the compiler refuses at once."""
    flags = (
        "--config=imagenet64",
        "--topology=v5e:1x1",
        "--config.model.channels=64",
        "--config.model.channel_mult=(1,)",
        "--config.model.num_res_blocks=1",
        "--config.model.attention_resolutions=()",
        "--config.train.batch_size=1024",
        "--nosampler",
        "--search=1",
    )
    report, told = report_of(cli, tmp_path, *flags)
    assert report["step"]["memory"]["fits"] is False and "DOES NOT FIT" in told
    assert report["run"] is None
    assert report["search"]["largest_batch_a_chip"] is None
    assert "256 a chip" in told and "fits: none" in told
