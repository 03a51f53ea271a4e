"""Laws that hold for every function and every tree, and agreement with peers."""

import operator
from collections import OrderedDict
from typing import NamedTuple

import equinox as eqx
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import saiunit
import vgrad_eqx as vg

from ..helpers import column_sums, tree_allclose


# Few shapes, because each new one is compiled again.
shapes = st.sampled_from([(), (0,), (2,), (2, 3)])
names = st.sampled_from(["a", "b", "weight", "layers"])
seeds = st.integers(0, 2**31 - 1)


def normal(seed, shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def trees(dtypes):
    leaves = st.builds(
        lambda shape, dtype, seed: jnp.asarray(normal(seed, shape), dtype),
        shapes,
        st.sampled_from(dtypes),
        seeds,
    )
    others = st.sampled_from([3, "text", jnp.arange(2), jnp.sin, None])
    return st.dictionaries(
        names,
        st.recursive(
            leaves | others,
            lambda children: (
                st.lists(children, min_size=1, max_size=3)
                | st.dictionaries(names, children, min_size=1, max_size=2)
            ),
            max_leaves=4,
        ),
        min_size=1,
        max_size=3,
    ).filter(lambda tree: any(map(eqx.is_inexact_array, jtu.tree_leaves(tree))))


class RandomFunc:
    """Mixes all inexact leaves of a tree, smoothly, into outputs of several shapes."""

    def __init__(self, seed, is_scalar=False):
        self.seed = seed
        self.is_scalar = is_scalar

    def __call__(self, tree):
        arrays = [x for x in jtu.tree_leaves(tree) if eqx.is_inexact_array(x)]
        hidden = jnp.zeros(4, jnp.float32)
        for i, x in enumerate(arrays):
            mixing = normal(self.seed + i, (4, x.size))
            hidden = jnp.tanh(hidden + mixing @ x.astype(jnp.float32).ravel())
        if self.is_scalar:
            return jnp.sum(hidden**2)
        rows = 2 * (self.seed % 2)
        mixed = normal(self.seed, (rows, 4)) @ hidden
        own = jnp.sin(arrays[0].astype(jnp.float32))
        return {"y": (mixed, hidden[0]), "own": own, "n": rows}


funcs = st.builds(RandomFunc, seeds)
scalar_funcs = st.builds(RandomFunc, seeds, st.just(True))
real_trees = trees([jnp.float32])


class Node(eqx.Module):
    static: int = eqx.field(static=True)
    child: object
    missing: object = None


class Pair(NamedTuple):
    first: object
    second: object


nodes = st.recursive(
    st.just(1.0) | st.none(),
    lambda children: st.one_of(
        st.lists(children, max_size=3),
        st.lists(children, max_size=3).map(tuple),
        st.dictionaries(names | st.just("") | st.just("a.b"), children, max_size=3),
        st.dictionaries(st.integers(0, 3), children, max_size=2),
        st.builds(Node, st.integers(0, 1), children),
        st.builds(Pair, children, children),
        st.dictionaries(names, children, max_size=2).map(OrderedDict),
    ),
    max_leaves=8,
)


@hypothesis.settings(max_examples=200)
@hypothesis.given(nodes)
def test_paths_are_those_of_keystr(tree):
    arrays = jtu.tree_map(jnp.asarray, tree)
    with_path, _ = jtu.tree_flatten_with_path(arrays)
    expected = [jtu.keystr(key_path, simple=True, separator=".") for key_path, _ in with_path]
    hypothesis.assume(expected and len(set(expected)) == len(expected))
    states = vg.states(arrays)
    assert list(states) == sorted(expected)
    # In JAX's order, so that iterating it agrees with its leaves.
    assert all(map(operator.is_, states.values(), jtu.tree_leaves(states)))


@hypothesis.given(funcs, trees([jnp.float32, jnp.bfloat16, jnp.float16]))
def test_argument_gradient_is_the_column_sums_of_the_jacobian(func, tree):
    grads, value = vg.vector_grad(func, return_value=True)(tree)
    diff, nondiff = eqx.partition(tree, eqx.is_inexact_array)
    # In float32, because in half precision adding up a Jacobian rounds differently.
    wide = jtu.tree_map(lambda x: x.astype(jnp.float32), diff)

    def inexact_outputs(diff):
        return eqx.filter(func(eqx.combine(diff, nondiff)), eqx.is_inexact_array)

    jacobian = jax.jit(jax.jacrev(inexact_outputs))(wide)
    expected = column_sums(jacobian, inexact_outputs(wide), diff)
    assert tree_allclose(grads, expected, rtol=2e-2, atol=2e-2)
    assert jtu.tree_structure(value) == jtu.tree_structure(func(tree))


@hypothesis.given(funcs, real_trees)
def test_selected_gradient_is_the_column_sums_of_the_jacobian(func, tree):
    params = vg.states(tree)

    def of_params(params):
        return eqx.filter(func(vg.replace_states(tree, params)), eqx.is_inexact_array)

    jacobian = jax.jit(jax.jacrev(of_params))(params)
    expected = column_sums(jacobian, of_params(params), params)
    grads = vg.vector_grad(func, True, check_states=False)(tree)
    assert list(grads) == list(params)
    assert tree_allclose(grads, expected, rtol=1e-4, atol=1e-4)


@hypothesis.given(scalar_funcs, real_trees)
def test_gradient_of_a_scalar_is_that_of_equinox(func, tree):
    assert tree_allclose(vg.vector_grad(func)(tree), eqx.filter_grad(func)(tree))


@hypothesis.given(funcs, real_trees, st.data())
def test_gradient_does_not_depend_on_the_form_of_the_selector(func, tree, data):
    every = vg.states(tree)
    chosen = data.draw(st.sets(st.sampled_from(list(every)), min_size=1))
    all_names = {
        jtu.keystr(key_path, simple=True, separator="."): i
        for i, (key_path, _) in enumerate(jtu.tree_leaves_with_path(tree))
    }
    mask = [False] * len(all_names)
    for name in chosen:
        mask[all_names[name]] = True
    spec = jtu.tree_unflatten(jtu.tree_structure(tree), mask)
    leaves = [every[name] for name in chosen]
    forms = {
        "path": vg.path(*chosen),
        "braces": "{" + ",".join(chosen) + "}",
        "filter spec": spec,
        "at": vg.at(lambda tree: [jtu.tree_leaves(tree)[all_names[n]] for n in chosen]),
        "leaf": vg.leaf(lambda leaf: any(leaf is each for each in leaves)),
        "complement": ~~vg.path(*chosen),
        "both": vg.path("**") & vg.path(*chosen),
    }
    grads = {
        form: vg.vector_grad(func, selector, check_states=False)(tree)
        for form, selector in forms.items()
    }
    complete = vg.vector_grad(func)(tree)
    expected = {name: grad for name, grad in vg.states(complete).items() if name in chosen}
    for form, grad in grads.items():
        assert tree_allclose(grad, expected), form


@hypothesis.given(funcs, real_trees, st.floats(-3, 3))
def test_gradient_is_linear_in_the_output(func, tree, scale):
    def plain(tree):
        return func(tree)["y"]

    def both(tree):
        return plain(tree), jtu.tree_map(lambda y: scale * y, plain(tree))

    once, twice = vg.vector_grad(plain)(tree), vg.vector_grad(both)(tree)
    expected = jtu.tree_map(lambda grad: (1 + scale) * grad, once)
    assert tree_allclose(twice, expected, rtol=1e-4, atol=1e-4)


ELEMENTARY = {
    "square": jnp.square,
    "sin": jnp.sin,
    "cumsum": jnp.cumsum,
    "softmax": jax.nn.softmax,
    "outer": lambda x: x[:, None] * x[None, :],
    "sort": jnp.sort,
}


@hypothesis.given(st.sampled_from(sorted(ELEMENTARY)), st.sampled_from([0, 1, 5]), seeds)
def test_agrees_with_saiunit(name, size, seed):
    func, x = ELEMENTARY[name], jnp.asarray(normal(seed, size))
    ours = vg.vector_grad(func, return_value=True)(x)
    theirs = saiunit.autograd.vector_grad(func, return_value=True)(x)
    assert tree_allclose(ours, tuple(theirs))
