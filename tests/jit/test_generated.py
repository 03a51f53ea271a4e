from collections import OrderedDict
from typing import Any, NamedTuple

import equinox as eqx
import jax.tree_util as jtu
import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st
from vgrad_eqx._jit.generated import make_builder, make_reader


class Pair(NamedTuple):
    left: Any
    right: Any


class Node(eqx.Module):
    first: Any
    second: Any
    label: Any = eqx.field(static=True)


ARRAYS = [np.full(i, float(i)) for i in range(4)]
LEAVES = st.sampled_from(ARRAYS) | st.sampled_from([None, 1, True, 1.0, "text", len])
KEYS = st.sampled_from(["a", "b", "c", "d"])


def extend(children):
    pairs = st.tuples(children, children)
    return st.one_of(
        st.lists(children, max_size=4),
        st.lists(children, max_size=3).map(tuple),
        st.dictionaries(KEYS, children, max_size=4),
        st.dictionaries(KEYS, children, max_size=2).map(OrderedDict),
        pairs.map(lambda pair: Pair(*pair)),
        st.builds(Node, children, children, st.sampled_from([0, 1, None, "x", (1, 2)])),
    )


TREES = st.recursive(LEAVES, extend, max_leaves=12)


def is_array(leaf):
    return isinstance(leaf, np.ndarray)


def list_arrays(tree):
    return [leaf for leaf in jtu.tree_leaves(tree) if is_array(leaf)]


def describe(tree):
    leaves, structure = jtu.tree_flatten(tree)
    return structure, [None if is_array(leaf) else (type(leaf), leaf) for leaf in leaves]


def is_same(some, others):
    return len(some) == len(others) and all(map(lambda x, y: x is y, some, others))


@given(TREES)
def test_reads_the_arrays_in_leaf_order(tree):
    reader = make_reader(tree, is_array)
    copy = jtu.tree_map(lambda leaf: leaf, tree)
    for each in (tree, copy):
        found = reader(each)
        assert found is not None
        assert is_same(found, list_arrays(tree))


@given(TREES, TREES)
def test_refuses_another_kind_of_tree(tree, other):
    # JAX takes these for the same static field, and a reader may tell them apart.
    assume(not any(leaf is True for leaf in jtu.tree_leaves([tree, other])))
    found = make_reader(tree, is_array)(other)
    if describe(tree) == describe(other):
        assert found is not None
        assert is_same(found, list_arrays(other))
    else:
        # In the place of an array, nothing is looked at.
        assert (
            found is None
            or not all(map(is_array, found))
            or len(found) != len(list_arrays(other))
        )


@given(TREES.filter(lambda tree: len(list_arrays(tree)) > 0), st.data())
def test_refuses_a_tree_with_another_constant(tree, data):
    leaves, structure = jtu.tree_flatten(tree)
    i = data.draw(st.integers(0, len(leaves) - 1))
    assume(not is_array(leaves[i]))
    leaves[i] = "another"
    assert make_reader(tree, is_array)(structure.unflatten(leaves)) is None


def test_leaves_of_unknown_types_are_checked():
    checked = []
    reader = make_reader([ARRAYS[0]], is_array, lambda kind: kind is np.ndarray, checked.append)
    assert is_same(reader([ARRAYS[2]]), [ARRAYS[2]])
    assert reader([1.0]) is None
    assert checked == [[1.0]]


def test_nodes_nest_deeper_than_python_nests_loops():
    tree = ARRAYS[1]
    for _ in range(100):
        tree = (tree,)
    assert is_same(make_reader(tree, is_array)(tree), [ARRAYS[1]])


def test_fields_that_a_wrapper_gives_are_compared():
    def make(name):
        node = Node(ARRAYS[1], 0, 0)
        object.__setattr__(node, "__name__", name)
        return node

    reader = make_reader(make("a"), is_array)
    assert reader(make("a")) is not None
    assert reader(make("b")) is None
    assert reader(Node(ARRAYS[1], 0, 0)) is None


def test_a_guard_knows_one_module():
    items, names = [1, 2], {"a": 3}
    module, other = Node(items, names, 0), Node(items, names, 0)
    contents = [(items, list(items)), (names, list(names)), (names.values(), [3])]
    guard = make_guard(module, contents, ["known"], lambda tree: ["read"], print)
    assert guard(module) == ["known"]
    assert guard(other) == ["read"]
    names["a"] = 4
    assert guard(module) == ["read"]
    names["a"] = 3
    items[0] = 5
    assert guard(module) == ["read"]
