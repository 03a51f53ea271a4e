"""A split pytree is put together again, from any numbers, and as JAX passes it on."""

import brainunit as u
import equinox as eqx
import jax
import jax.numpy as jnp
from hypothesis import given
from hypothesis import strategies as st
from vgrad_eqx._tree.flat import FlatTree, Split

from ..helpers import tree_allclose


LEAVES = st.sampled_from(
    [jnp.ones(2), jnp.arange(3), 2.0 * u.ms, jnp.ones(2) * u.mvolt, 1, "text", len]
)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner),
    max_leaves=8,
)


@given(TREES, st.data())
def test_a_split_is_the_pytree_again(tree, data):
    flat = FlatTree(tree)
    indices = data.draw(st.permutations(range(len(flat.leaves)))) if flat.leaves else []
    split = flat.split(indices[: len(indices) // 2])
    assert eqx.tree_equal(split.combine(), tree)
    leaves, structure = jax.tree.flatten(split)
    assert eqx.tree_equal(jax.tree.unflatten(structure, leaves).combine(), tree)


def test_other_numbers_get_the_units_of_their_places():
    split = FlatTree({"v": 1.0 * u.mvolt, "t": 2.0}).split([1, 0])
    assert split.diff == [1.0, 2.0]
    tree = split.rest.combine([3.0, 4.0])
    assert u.get_unit(tree["v"]) == u.mvolt
    assert tree_allclose(u.get_mantissa(tree["v"]), 3.0)
    assert tree["t"] == 4.0
    assert split.rest.arrange(["by v", "by t"]) == {"v": "by v", "t": "by t"}


def test_a_compiled_function_returns_a_split_with_anything_in_its_rest():
    @jax.jit
    def func(x):
        return FlatTree({"x": x, "text": "constant", "f": len}).split([2])

    split = func(jnp.ones(2))
    assert isinstance(split, Split)
    assert tree_allclose(split.combine(), {"x": jnp.ones(2), "text": "constant", "f": len})
