"""The start-up probes find the mistakes that they are for, and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfg_jax import probes
from cfg_jax.types import Network


def outputs_of(row, shake=0.0):
    """The probe's outputs of a network that adds row(params, label) to z."""

    def apply(params, z, lam, cond, key=None):
        return z + row(params, cond["label"])[:, None, None, None]

    network = Network(init=None, apply=apply)
    params = {"table": jnp.array([0.0, 0.0, 0.0, 0.0])}  # three classes and null, all of them zero
    outputs = probes.outputs(network, (4, 4, 1), {"label": jnp.array([0, 2, 3])})
    return np.asarray(outputs(params, shake))


@pytest.mark.parametrize(
    "deaf, told", [(None, None), ("label", "two labels"), ("w", "two strengths")]
)
def test_a_student_that_does_not_hear_its_label_or_w_is_found(deaf, told):
    def apply(params, z, lam, cond, key=None):
        heard = {k: 0 * v if k == deaf else v for k, v in cond.items()}
        said = params["a"].sum() * heard["label"] + params["b"].sum() * heard["w"]
        return z + said[:, None, None, None]

    cond = {"label": jnp.array([0.0, 9.0, 0.0]), "w": jnp.array([4.0, 4.0, 0.0])}
    outputs = probes.outputs(Network(init=None, apply=apply), (4, 4, 1), cond)
    said = np.asarray(outputs({"a": jnp.zeros(3), "b": jnp.zeros(3)}, 0.1))
    if deaf is None:
        probes.student_listens(said)
    else:
        with pytest.raises(probes.ProbeError, match=told):
            probes.student_listens(said)


def test_a_label_with_a_row_of_its_own_passes_once_shaken():
    probes.labels_differ(outputs_of(lambda p, label: p["table"][label], shake=0.1))


def test_a_fresh_network_that_says_zero_needs_the_shake():
    with pytest.raises(probes.ProbeError):
        probes.labels_differ(outputs_of(lambda p, label: p["table"][label]))


def test_a_label_that_is_not_used_is_found():
    with pytest.raises(probes.ProbeError):
        probes.labels_differ(outputs_of(lambda p, label: p["table"][0 * label], shake=0.1))


def test_a_null_label_clamped_to_the_last_class_is_found():
    """What an embedding without a null row does: JAX clamps an index that is out of range."""
    with pytest.raises(probes.ProbeError, match="null label"):
        probes.labels_differ(outputs_of(lambda p, label: p["table"][:3][label], shake=0.1))


def test_labels_that_matter_only_against_null_are_found():
    with pytest.raises(probes.ProbeError, match="two labels"):
        probes.labels_differ(outputs_of(lambda p, label: jnp.where(label == 3, 1.0, 0.0)))


@pytest.mark.parametrize("p_uncond", [0.1, 0.5])
def test_a_drop_rate_is_held_to_its_binomial_band(p_uncond):
    count = 6400
    dropped = jax.random.bernoulli(jax.random.key(0), p_uncond, (count,)).mean()
    probes.drop_rate_holds(float(dropped), count, p_uncond)
    for wrong in (0.0, p_uncond / 2, 1 - p_uncond / 2):
        with pytest.raises(probes.ProbeError, match=f"p_uncond={p_uncond}"):
            probes.drop_rate_holds(wrong, count, p_uncond)
