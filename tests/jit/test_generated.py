import functools as ft
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


def check(arrays, others):
    return all(map(is_array, [*arrays, *others]))


def read_like(tree, other):
    """What a reader for `tree` reads in `other`, as the first argument and as another one."""
    read = make_reader(tree, {"a": tree, "b": 3}, is_array, check)
    found = read(other, other, 3)
    if found is not None:
        assert is_same(*found)
    return None if found is None else found[0]


@given(TREES)
def test_reads_the_arrays_in_leaf_order(tree):
    copy = jtu.tree_map(lambda leaf: leaf, tree)
    for each in (tree, copy):
        found = read_like(tree, each)
        assert found is not None
        assert is_same(found, list_arrays(tree))


@given(TREES, TREES)
def test_refuses_another_kind_of_tree(tree, other):
    # JAX takes these for the same static field, and a reader may tell them apart.
    assume(not any(leaf is True for leaf in jtu.tree_leaves([tree, other])))
    found = read_like(tree, other)
    if describe(tree) == describe(other):
        assert found is not None
        assert is_same(found, list_arrays(other))
    else:
        assert found is None


@given(TREES, st.data())
def test_builds_the_same_pytree_with_other_arrays(tree, data):
    leaves, structure = jtu.tree_flatten(tree)
    new = [np.ones(data.draw(st.integers(0, 3))) for _ in list_arrays(tree)]
    given = iter(new)
    expected = structure.unflatten([next(given) if is_array(x) else x for x in leaves])
    built = make_builder(tree, is_array)(new)
    assert describe(built) == describe(expected)
    assert is_same(list_arrays(built), new)
    assert repr(built) == repr(expected)  # the fields of modules stand in their order


@given(TREES.filter(lambda tree: len(list_arrays(tree)) > 0), st.data())
def test_refuses_a_tree_with_another_constant(tree, data):
    leaves, structure = jtu.tree_flatten(tree)
    i = data.draw(st.integers(0, len(leaves) - 1))
    assume(not is_array(leaves[i]))
    leaves[i] = "another"
    assert read_like(tree, structure.unflatten(leaves)) is None


def test_leaves_of_unknown_types_are_checked():
    checked = []

    def check(*arrays):
        checked.append(arrays)
        return len(checked) == 1

    read = make_reader([ARRAYS[0]], {"a": ()}, is_array, check)
    assert read([ARRAYS[2]], ()) == ([ARRAYS[2]], [])
    assert read([1.0], ()) == ([1.0], [])
    assert read([2.0], ()) is None
    assert checked == [([1.0], []), ([2.0], [])]


def test_nodes_nest_a_hundred_deep():
    tree: Any = ARRAYS[1]
    for _ in range(100):
        tree = (Node({"a": [tree]}, 1, 2),)
    assert is_same(read_like(tree, tree), [ARRAYS[1]])
    assert describe(make_builder(tree, is_array)([ARRAYS[2]])) == describe(tree)


def test_fields_that_a_wrapper_gives_are_compared():
    def make(name):
        node = Node(ARRAYS[1], 0, 0)
        object.__setattr__(node, "__name__", name)
        return node

    assert read_like(make("a"), make("a")) is not None
    assert read_like(make("a"), make("b")) is None
    assert read_like(make("a"), Node(ARRAYS[1], 0, 0)) is None
    assert read_like(Node(ARRAYS[1], 0, 0), make("a")) is None
    assert make_builder(make("a"), is_array)([ARRAYS[2]]).__name__ == "a"


class Cached(eqx.Module):
    array: Any

    @ft.cached_property
    def double(self):
        return 2 * self.array


def test_a_cached_property_does_not_count():
    with_value, without = Cached(ARRAYS[1]), Cached(ARRAYS[1])
    assert with_value.double == 2.0
    for tree, other in ((with_value, without), (without, with_value)):
        assert is_same(read_like(tree, other), [ARRAYS[1]])
    assert make_builder(with_value, is_array)([ARRAYS[3]]).double[0] == 6.0


def test_a_field_that_was_never_set_stays_so():
    def make(*names):
        node = object.__new__(Node)
        for name in names:
            object.__setattr__(node, name, ARRAYS[1])
        return node

    assert is_same(read_like(make("first"), make("first")), [ARRAYS[1]])
    assert read_like(make("first"), make("second")) is None
    assert read_like(make("first"), make("first", "second")) is None
    assert not hasattr(make_builder(make("first"), is_array)([ARRAYS[2]]), "second")
