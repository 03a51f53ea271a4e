"""Compiled, a gradient by selector is the same program as one written by hand."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import pytest
import vgrad_eqx as vg

from ..helpers import apply, count_instructions, make_mlp


def by_hand(model, names, x):
    leaves = jtu.tree_leaves_with_path(model)
    chosen = [
        i
        for i, (key_path, _) in enumerate(leaves)
        if jtu.keystr(key_path, simple=True, separator=".") in names
    ]
    leaves, structure = jtu.tree_flatten(model)

    def func(*diff):
        filled = list(leaves)
        for i, leaf in zip(chosen, diff, strict=True):
            filled[i] = leaf
        return jtu.tree_unflatten(structure, filled)(x)

    value, pull_back = jax.vjp(func, *[leaves[i] for i in chosen])
    return dict(zip(names, pull_back(jnp.ones_like(value)), strict=True)), value


def measure(func, model, x):
    params, static = eqx.partition(model, eqx.is_array)
    compiled = (
        jax.jit(lambda params, x: func(eqx.combine(params, static), x))
        .lower(params, x)
        .compile()
    )
    cost, instructions = compiled.cost_analysis(), count_instructions(compiled)
    assert cost is not None
    assert instructions > 5
    return instructions, cost["flops"], cost["bytes accessed"]


@pytest.mark.parametrize("check_states", [False, True])
@pytest.mark.parametrize("selector", ["**", "layers.*.weight", "layers.2"])
def test_same_instructions_flops_and_bytes_as_by_hand(selector, check_states):
    model, x = make_mlp(depth=3), jnp.ones(3)
    names = list(vg.states(model, selector))
    transform = vg.vector_grad(apply, selector, return_value=True, check_states=check_states)
    ours = measure(transform, model, x)
    assert ours == measure(lambda model, x: by_hand(model, names, x), model, x)


def test_debug_nan_costs_nothing_when_off():
    model, x = make_mlp(), jnp.ones(3)
    counts = [
        measure(vg.vector_grad(apply, True, debug_nan=debug_nan), model, x)[0]
        for debug_nan in (False, True)
    ]
    names = list(vg.states(model))
    by_hand_count = measure(lambda *args: by_hand(args[0], names, args[1])[0], model, x)[0]
    assert counts[0] == by_hand_count < counts[1]
