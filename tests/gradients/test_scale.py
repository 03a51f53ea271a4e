"""Long runs, and what is large."""

import gc
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import optax
import pytest
import vgrad_eqx as vg

from ..helpers import Counted, tree_allclose


TX = optax.adam(1e-3)


def mean_square(model, x):
    return jnp.mean(model(x) ** 2)


def make_model():
    return eqx.nn.MLP(3, 2, 8, 1, key=jr.key(0))


def loop_of_steps(loss):
    step = vg.train_step(loss, TX, check_states=False)
    state = step.init(make_model())

    def advance(x):
        nonlocal state
        state, _ = step(state, x)

    return advance


def loop_over_states(loss):
    model = make_model()
    states = {name: vg.State(leaf) for name, leaf in vg.states(model).items()}

    def func(x):
        values = {name: state.value for name, state in states.items()}
        return loss(vg.replace_states(model, values), x)

    step = vg.train_step(func, TX, states, check_states=False)
    state = step.init()

    def advance(x):
        nonlocal state
        state, _ = step(state, x)

    return advance


def loop_of_compiled_gradients(loss):
    gradient = vg.jit(vg.vector_grad(loss, True, check_states=False))
    model = make_model()

    def advance(x):
        nonlocal model
        model = vg.apply_updates(model, gradient(model, x))

    return advance


LOOPS: dict[str, Any] = {
    "train_step": loop_of_steps,
    "over states": loop_over_states,
    "vg.jit": loop_of_compiled_gradients,
}


def read_memory():
    """The memory of this process, in bytes."""
    gc.collect()
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * 4096


@pytest.mark.parametrize("num_steps", [500, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("make", LOOPS.values(), ids=LOOPS.keys())
def test_a_long_run_is_traced_once_in_the_same_memory(make, num_steps):
    loss, x = Counted(mean_square), jnp.ones(3)
    advance = make(loss)
    for _ in range(num_steps // 10):
        advance(x)
    arrays, memory = len(jax.live_arrays()), read_memory()
    for _ in range(num_steps):
        advance(x)
    assert loss.calls == 1
    assert len(jax.live_arrays()) <= arrays
    # An array of 100 bytes in each of 10 000 steps would be a megabyte.
    assert read_memory() - memory < 1_000_000


@pytest.mark.slow
def test_a_tree_of_20_000_leaves():
    tree = [{"weight": jnp.full(2, float(i)), "bias": jnp.ones(1)} for i in range(10_000)]

    @jax.custom_vjp
    def add_squares(x, weights):
        return sum([weight**2 for weight in weights], x)

    # JAX takes more than a minute to differentiate so many additions one by one.
    add_squares.defvjp(
        lambda x, weights: (add_squares(x, weights), weights),
        lambda weights, y: (jnp.sum(y), [2 * weight * y for weight in weights]),
    )

    def func(tree, x):
        return add_squares(x, [layer["weight"] for layer in tree])

    params = vg.states(tree, "*.weight")
    assert len(params) == 10_000
    assert len(vg.states(tree)) == 20_000
    with pytest.raises(ValueError, match=r"`0.bias`, .*, `4.bias`, and 9995 more\. Narrow"):
        vg.vector_grad(func, True)(tree, 3.0)
    grads = vg.vector_grad(func, "*.weight")(tree, 3.0)
    assert list(grads) == list(params)
    assert tree_allclose(grads["9999.weight"], jnp.full(2, 2 * 9999.0))
    opt = vg.Optimizer(optax.sgd(0.25), tree, "*.weight")
    tree, _ = opt.step(tree, grads)
    assert tree_allclose(tree[9999]["weight"], jnp.full(2, 9999 / 2))


@pytest.mark.slow
def test_a_leaf_of_2_gigabytes():
    # In a process of its own, which gives the memory back.
    code = """
        import jax.numpy as jnp, optax, vgrad_eqx as vg
        tree = {"w": jnp.ones(2**29, "float32"), "b": jnp.ones(3)}
        assert tree["w"].nbytes == 2**31
        func = lambda tree, x: x * tree["w"] ** 2
        assert vg.vector_grad(func, "w")(tree, 3.0)["w"][-1] == 6
        assert vg.jit(vg.vector_grad(func, "w"))(tree, jnp.array(3.0, "float32"))["w"][-1] == 6
        step = vg.train_step(func, optax.sgd(0.125), "w")
        state = step.init(tree)
        del tree
        for _ in range(3):
            state, metrics = step(state, 2.0)
            del metrics
        assert state.model["w"][-1] == 0.125
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_64_groups_of_optimizers():
    model = [eqx.nn.Linear(2, 2, key=key) for key in jr.split(jr.key(0), 64)]
    rates = [0.01 * (i + 1) for i in range(64)]
    opt = vg.Optimizer({f"{i}": optax.sgd(rate) for i, rate in enumerate(rates)}, model)
    grads = vg.states(jtu.tree_map(jnp.ones_like, vg.states(model)))
    after, _ = opt.step(model, grads)
    params = vg.states(model)
    expected = {name: leaf - rates[int(name.split(".")[0])] for name, leaf in params.items()}
    assert tree_allclose(vg.states(after), expected)
    step = vg.train_step(
        lambda model: sum(jnp.sum(leaf) for leaf in jtu.tree_leaves(vg.states(model))),
        {f"{i}": optax.sgd(rate) for i, rate in enumerate(rates)},
    )
    state, _ = step(step.init(model))
    assert tree_allclose(vg.states(state.model), expected)
