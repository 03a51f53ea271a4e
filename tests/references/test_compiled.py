"""What a gradient over states hands to the compiler."""

import functools as ft
import re

import jax
import jax.numpy as jnp
import jax.ref
import pytest
import vgrad_eqx as vg
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from vgrad_eqx import vector_grad

from ..helpers import count_instructions, tree_allclose


X = jnp.array([0.5, -1.0, 2.0])


def test_a_jitted_helper_keeps_its_shardings():
    w = vg.State(jnp.ones(4))
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))

    @ft.partial(jax.jit, out_shardings=sharding)
    def helper(x):
        return x * w.value

    x = jnp.arange(4.0)
    text = jax.jit(lambda x: vector_grad(lambda x: helper(x) ** 2, w)(x)).lower(x).as_text()
    assert '"data"' in text
    assert tree_allclose(vector_grad(lambda x: helper(x) ** 2, w)(x), 2 * x**2)


def test_compiled_gradient_reads_the_current_value():
    w = vg.State(jnp.array(3.0))
    calls = []

    @jax.jit
    def gradient(x):
        def func(x):
            calls.append(1)
            return x * w.value**2

        return vector_grad(func, w)(x)

    assert gradient(1.0) == 6.0
    w.value = 10.0
    assert gradient(1.0) == 20.0
    assert len(calls) == 1


def test_func_is_called_once():
    w, calls = vg.State(jnp.ones(2)), []

    def func(x):
        calls.append(1)
        return x * w.value

    for count in (1, 2):
        vector_grad(func, w)(X[:2])
        assert len(calls) == count


def test_scopes_keep_their_names():
    w = vg.State(jnp.ones(3))

    def func(x):
        with jax.named_scope("first"):
            x = jnp.sin(x * w.value)
        with jax.named_scope("second"):
            return jnp.sin(x * w.value)

    text = jax.jit(lambda x: vector_grad(func, w)(x)).lower(X).as_text(debug_info=True)
    assert re.search(r"first\)*/cos", text)
    assert re.search(r"second\)*/cos", text)


POLICIES = {
    "alone": lambda func: func,
    "jit": jax.jit,
    "scan": lambda func: lambda x: lax.scan(lambda c, _: (func(c), None), x, length=2)[0],
}


@pytest.mark.parametrize("wrap", POLICIES.values(), ids=POLICIES.keys())
def test_checkpoint_keeps_its_policy(wrap):
    w = vg.State(jnp.ones(3))
    policy = jax.checkpoint_policies.everything_saveable
    func = wrap(jax.checkpoint(lambda x: jnp.sin(x * w.value), policy=policy))
    text = str(jax.make_jaxpr(lambda x: vector_grad(func, w)(x))(X))
    assert "policy=<function everything_saveable" in text


def test_intermediate_values_are_let_go():
    w, counts = vg.State(jnp.ones((17, 19))), []

    def func():
        x = w.value
        for _ in range(20):
            x = x + w.value
            jax.debug.callback(lambda _: counts.append(count()), x[0, 0], ordered=True)
        return x

    def count():
        return sum(array.shape == (17, 19) for array in jax.live_arrays())

    vector_grad(func, w)()
    jax.effects_barrier()
    assert len(counts) == 20
    assert max(counts) < min(counts) + 5


def test_compiled_program_has_the_cost_of_the_functional_one():
    names = [f"w{i}" for i in range(20)]
    params = {name: jnp.full((8, 8), 0.1) for name in names}
    states = {name: vg.State(value) for name, value in params.items()}

    def apply(read, x):
        for name in names:
            x = jnp.tanh(read(name) @ x)
        return x

    def measure(func, *args):
        compiled = jax.jit(func).lower(*args).compile()
        cost = compiled.cost_analysis()
        assert cost is not None
        return cost["flops"], count_instructions(compiled)

    def func(x):
        return apply(lambda name: states[name].value, x)

    ours = measure(lambda x: vector_grad(func, states)(x), jnp.ones(8))
    by_hand = measure(
        lambda p, x: vector_grad(lambda p, x: apply(p.get, x))(p, x), params, jnp.ones(8)
    )
    assert ours == by_hand
