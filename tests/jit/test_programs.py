"""A step under `vg.jit` is the same program as a donated `jax.jit` over flat tuples by hand."""

import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
import pytest
import vgrad_eqx as vg

from ..helpers import count_instructions, make_mlp


TX = optax.adam(1e-2)


def loss(model, x):
    return jnp.sum(jnp.abs(jax.vmap(model)(x)) ** 2)


def make_step(x, model, opt_state):
    grads = eqx.filter_grad(loss)(model, x)
    updates, opt_state = TX.update(grads, opt_state, eqx.filter(model, eqx.is_inexact_array))
    return eqx.apply_updates(model, updates), opt_state


def make_problem(dtype, sharding=None):
    model = jtu.tree_map(lambda x: x.astype(dtype) if eqx.is_array(x) else x, make_mlp())
    trees = jnp.ones((4, 3), dtype), model, TX.init(eqx.filter(model, eqx.is_inexact_array))
    if sharding is None:
        return trees
    return jtu.tree_map(lambda x: jax.device_put(x, sharding) if eqx.is_array(x) else x, trees)


def lower_by_hand(trees):
    arrays, structures, statics = [], [], []
    for tree in trees:
        array, static = eqx.partition(tree, eqx.is_array)
        arrays.append(jtu.tree_leaves(array))
        structures.append(jtu.tree_structure(array))
        statics.append(static)

    def step(x, others):
        given = [
            jtu.tree_unflatten(s, a) for s, a in zip(structures, [x, *others], strict=True)
        ]
        result = make_step(*map(eqx.combine, given, statics))
        return jtu.tree_leaves(eqx.filter(result, eqx.is_array))

    return jax.jit(step, donate_argnums=1).lower(arrays[0], arrays[1:])


def measure(lowered) -> dict[str, Any]:
    compiled = lowered.compile()
    cost, text = compiled.cost_analysis(), compiled.as_text()
    memory = compiled.memory_analysis()
    return {
        "instructions": count_instructions(compiled),
        "aliased": len(re.findall(r"(may|must)-alias", text)),
        "flops": cost["flops"],
        "bytes": (memory.alias_size_in_bytes, memory.temp_size_in_bytes),
    }


@pytest.mark.parametrize("dtype", ["float32", "complex64", "bfloat16"])
@pytest.mark.parametrize("is_sharded", [False, True])
def test_a_donated_step_is_the_program_by_hand(dtype, is_sharded):
    mesh = jax.make_mesh((1,), ("data",))
    sharding = jax.NamedSharding(mesh, jax.P()) if is_sharded else None
    trees = make_problem(jnp.dtype(dtype), sharding)
    ours = measure(vg.jit(make_step, donate="all-except-first").lower(*trees))
    assert ours == measure(lower_by_hand(trees))
    assert ours["aliased"] == 19  # parameters and moments, six each, and the count
