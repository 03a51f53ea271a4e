"""The check of elementwise derivatives raises no false alarm, and misses nothing.

Programs are drawn, which differ in all that decides how XLA rounds, and networks for each. A
program is compiled once for all its networks. In a process with eight devices, see below, the
points are sharded over them.
"""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
import vgrad_eqx as vg
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ..helpers import NUM_DEVICES, run_on_eight_devices


pytestmark = pytest.mark.optimized
ACTIVATIONS = [
    *(jnp.tanh, jnp.sin, jax.nn.gelu, jax.nn.silu, jax.nn.softplus, jax.nn.sigmoid, jax.nn.elu),
    *(jax.nn.selu, jax.nn.mish, jax.nn.log_sigmoid, lambda x: jnp.exp(-(x**2)), jax.nn.relu),
]
# What is mixed is this part of the largest derivative of its row.
DTYPES = {"float32": 1e-4, "bfloat16": 0.08, "float16": 0.01}
DTYPES |= {"float64": 1e-4} if jax.config.read("jax_enable_x64") else {}
WAYS = {
    "eager": lambda loss: loss,
    "compiled": lambda loss: eqx.filter_jit(loss),
    "compiled gradient": lambda loss: eqx.filter_jit(eqx.filter_grad(loss)),
    "train_step": lambda loss: take_step(loss),
    "gradient by vg.jit": lambda loss: vg.jit(vg.grad(loss, "**", check_states=False)),
}
IS_SHARDED = jax.device_count() >= NUM_DEVICES


def take_step(loss):
    step = vg.train_step(loss, optax.sgd(0.1), check_states=False)
    return lambda net, *args: jax.tree.leaves(step(step.init(net), *args)[0].model)


def draw_arrays(generator, arrays):
    """Weights of another network, which are scaled by one factor in all layers."""
    factor = generator.uniform(0.5, 2.0)
    drawn = [
        generator.uniform(-1.0, 1.0, each.shape) * factor / np.sqrt(each.shape[-1])
        for each in arrays
    ]
    pairs = zip(drawn, arrays, strict=True)
    return jax.device_put([new.astype(old.dtype) for new, old in pairs])


def shard(points):
    if not IS_SHARDED:
        return points
    mesh = jax.make_mesh((NUM_DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    return jax.device_put(points, NamedSharding(mesh, P("data")))


def draw_program(generator, mixing=None):
    """A loss of the derivative of a network over a batch, in one of the ways.

    Returns a function that draws a network and points, and runs the program.
    """
    dtype = generator.choice(list(DTYPES))
    order, width, depth = map(int, generator.integers((1, 2, 1), (5, 17, 3)))
    size = int(generator.choice([16, 80 if IS_SHARDED else 77, 256]))
    # JAX leaves out the second derivative of a relu, and with it the check, from a gradient.
    activations = ACTIVATIONS if mixing is None else ACTIVATIONS[:-1]
    activation = activations[generator.integers(len(activations))]
    net = eqx.nn.MLP(2, "scalar", width, depth, activation, key=jr.key(0), dtype=dtype)

    def loss(net, t, x, i, j):
        def func(x):
            y = jax.vmap(lambda t, x: net(jnp.stack([t, x])))(t, x)
            return y if mixing is None else mixing(y, x, i, j, DTYPES[dtype])

        derivative = vg.elementwise_grad(func, order=order, check_states=False)(x)
        return jnp.mean(derivative.astype(float) ** 2)

    # A training step that fails says so after its state is gone.
    way = generator.choice([way for way in WAYS if mixing is None or way != "train_step"])
    program = WAYS[way](loss)
    arrays, rest = eqx.partition(net, eqx.is_array)
    leaves, structure = jax.tree.flatten(arrays)

    def run():
        drawn = jax.tree.unflatten(structure, draw_arrays(generator, leaves))
        t, x = (shard(jnp.asarray(generator.normal(size=size), dtype)) for _ in range(2))
        i, j = map(np.int32, generator.choice(size, 2, replace=False))
        value = program(eqx.combine(drawn, rest), t, x, i, j)
        return jax.block_until_ready(jax.tree.leaves(value))

    return run


def mix_a_pair(y, x, i, j, much):
    """One output depends on another element, by a part of its largest derivative."""
    own = jax.lax.stop_gradient(jnp.abs(y[i]) + 1)
    return y.at[i].set((own * (x[i] + much * x[j])).astype(y.dtype))


# Seeds of programs, and how many networks there are of each: 300 in CI, 10 000 for a release.
STUDY = {
    "few": [(0, 3)],
    "slow": [(seed, 25) for seed in range(1, 13)],
    "nightly": [(seed, 50) for seed in range(13, 213)],
}
if IS_SHARDED:
    STUDY = {"few": [(seed, 15) for seed in range(3)]}
programs = pytest.mark.parametrize(
    ("seed", "number"),
    [
        pytest.param(*each, marks=[] if mark == "few" else getattr(pytest.mark, mark))
        for mark, drawn in STUDY.items()
        for each in drawn
    ],
)


@programs
def test_no_false_alarm_for_drawn_networks(seed, number):
    run = draw_program(np.random.default_rng(seed))
    for _ in range(number):
        run()


@pytest.mark.skipif(
    IS_SHARDED, reason="XLA waits for the device whose callback failed, and then aborts"
)
@programs
def test_no_mixing_is_missed_in_drawn_networks(seed, number):
    run = draw_program(np.random.default_rng(seed), mix_a_pair)
    for _ in range(number):
        with pytest.raises(Exception, match="depends on other elements of `args"):
            run()


@pytest.mark.slow
@pytest.mark.skipif(IS_SHARDED, reason="this is that process")
def test_points_may_be_sharded_over_eight_devices():
    output = run_on_eight_devices(__file__)
    assert re.search("3 passed, 3 skipped, 1 deselected", output), output
