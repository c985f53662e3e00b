"""The experiments' files: each builds, and the networks have the sizes that are published."""

import math

import jax
import pytest

from cfg_jax import experiment

# Of the networks with a null row; the tables of Dhariwal & Nichol (2021) round to millions.
PARAMETERS = {
    "imagenet64": (295_900_035, 296),
    "imagenet128": (421_523_715, 422),
    "imagenet64_classifier": (None, 65),
    "imagenet128_classifier": (None, 43),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_of_the_published_sizes(name):
    exact, millions = PARAMETERS[name]
    model = experiment.build(experiment.load_config(name))
    shapes = jax.tree.leaves(jax.eval_shape(model.network.init, jax.random.key(0)))
    count = sum(math.prod(leaf.shape) for leaf in shapes)
    assert round(count / 1e6) == millions
    assert exact in (None, count)
    assert {leaf.dtype for leaf in shapes} == {jax.numpy.dtype("float32")}
