"""Orbax writes a sharded training by shards, on eight devices in a process of their own."""

import json
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
import pytest
import vgrad_eqx as vg
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ..helpers import NUM_DEVICES, run_on_eight_devices, tree_allclose


ocp = pytest.importorskip("orbax.checkpoint")

X = jnp.arange(64.0).reshape(8, 8) / 64
inside = pytest.mark.skipif(
    jax.device_count() < NUM_DEVICES, reason="runs in a process with eight devices, see below"
)


@pytest.mark.slow
@pytest.mark.skipif(jax.device_count() >= NUM_DEVICES, reason="this is that process")
def test_on_eight_devices():
    output = run_on_eight_devices(__file__)
    assert re.search(r"\d passed, 1 deselected", output), output


def loss(model, x, key):
    noise = 0.1 * jr.normal(key) * model.layers[0].bias[0]
    return jnp.mean(jax.vmap(model)(x) ** 2) + noise


def begin(num_devices, seed=0):
    """A training, of which each device has a share of the arrays."""
    devices = jax.devices()[:num_devices]
    mesh = jax.make_mesh((num_devices,), ("x",), (AxisType.Auto,), devices=devices)
    split = NamedSharding(mesh, P("x"))
    model = eqx.nn.MLP(8, 8, 16, 2, key=jr.key(seed))
    model = jtu.tree_map(lambda x: jax.device_put(x, split) if eqx.is_array(x) else x, model)
    step = vg.train_step(loss, optax.adam(1e-2))
    return step, step.init(model, key=jr.key(seed))


def run(step, state, times):
    values = []
    for _ in range(times):
        state, metrics = step(state, X)
        values.append(float(metrics.value))
    return state, values


def save(path, state):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, jax.tree.leaves(state))


def load(path, like):
    leaves, structure = jax.tree.flatten(like)
    with ocp.StandardCheckpointer() as checkpointer:
        return jax.tree.unflatten(structure, checkpointer.restore(path, leaves))


@inside
@pytest.mark.parametrize("num_devices", [8, 4, 2, 1])
@pytest.mark.filterwarnings("ignore")  # what orbax deprecates is its own concern
def test_a_sharded_training_goes_on_on_another_number_of_devices(tmp_path, num_devices):
    step, state = begin(8)
    state, _ = run(step, state, 3)
    save(tmp_path / "checkpoint", state)
    other_step, like = begin(num_devices, seed=1)
    resumed = load(tmp_path / "checkpoint", like)
    assert resumed.count == 3
    pairs = zip(*map(jax.tree.leaves, (resumed, state, like)), strict=True)
    for leaf, saved, blank in pairs:
        np.testing.assert_array_equal(leaf, saved, strict=True)
        if isinstance(leaf, jax.Array):
            assert leaf.sharding.is_equivalent_to(blank.sharding, leaf.ndim)
    resumed, values = run(other_step, resumed, 3)
    state, expected = run(step, state, 3)
    if num_devices == 8:
        assert values == expected
    assert tree_allclose(jnp.array(values), jnp.array(expected))
    assert resumed.count == 6


@inside
@pytest.mark.filterwarnings("ignore")
def test_each_shard_is_written_by_itself(tmp_path):
    _, state = begin(8)
    save(tmp_path / "checkpoint", state)
    text = (tmp_path / "checkpoint" / "array_metadatas" / "process_0").read_text()
    written = [each["array_metadata"] for each in json.loads(text)["array_metadatas"]]
    shapes = {tuple(each["write_shape"]) for each in written}
    assert {(2, 8), (2, 16), (1, 16), (2,), (1,)} <= shapes
    assert (16, 16) not in shapes
