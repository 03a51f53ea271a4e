"""A pytree taken apart: its leaves, their names, and which of them can be trained."""

import difflib
import functools as ft
import operator
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax.core
import jax.tree_util as jtu

from ._units import quantity_test


_dtype_of = operator.attrgetter("dtype")


class FlatTree:
    """The leaves of a pytree, their dotted paths, and the way back to the pytree."""

    __slots__ = ("__dict__", "leaves", "tree", "treedef")

    def __init__(self, tree: Any):
        self.tree = tree
        self.leaves, self.treedef = jtu.tree_flatten(tree, is_leaf=quantity_test())

    def unflatten(self, leaves: Sequence[Any]) -> Any:
        return jtu.tree_unflatten(self.treedef, leaves)

    @ft.cached_property
    def kinds(self) -> tuple[Any, ...]:
        """What decides, besides the structure, whether a leaf can be trained."""
        leaves = self.leaves
        try:
            dtypes = tuple(map(_dtype_of, leaves))
        except AttributeError:
            dtypes = tuple([getattr(leaf, "dtype", None) for leaf in leaves])
        return tuple(map(type, leaves)), dtypes

    @ft.cached_property
    def differentiable(self) -> list[int]:
        """The indices of the leaves that can be trained: the inexact arrays."""
        known: dict[Any, bool] = {}
        indices = []
        for i, (leaf, kind) in enumerate(
            zip(self.leaves, zip(*self.kinds, strict=True), strict=True)
        ):
            inexact = known.get(kind)
            if inexact is None:
                inexact = eqx.is_inexact_array(leaf)
                if not isinstance(leaf, jax.core.Tracer):
                    known[kind] = inexact
            if inexact:
                indices.append(i)
        return indices

    @ft.cached_property
    def key_paths(self) -> list[jtu.KeyPath]:
        with_path, _ = jtu.tree_flatten_with_path(self.tree, is_leaf=quantity_test())
        return [key_path for key_path, _ in with_path]

    @ft.cached_property
    def names(self) -> list[str]:
        """The dotted path of every leaf."""
        return [name_of(key_path) for key_path in self.key_paths]

    def check_names(self) -> None:
        """Refuses two differentiable leaves with one dotted path."""
        names = [self.names[i] for i in self.differentiable]
        if len(set(names)) == len(names):
            return
        twice, _ = Counter(names).most_common(1)[0]
        both = [
            f"`{jtu.keystr(self.key_paths[i])}`"
            for i in self.differentiable
            if self.names[i] == twice
        ]
        raise ValueError(
            f"Two leaves share the dotted path `{twice}`: {' and '.join(both)}. "
            "Gradients are named by that path, so rename one of the keys."
        )


def map_leaves(func: Callable[[Any], Any], tree: Any) -> Any:
    return jtu.tree_map(func, tree, is_leaf=quantity_test())


def put(leaves: Sequence[Any], indices: Sequence[int], values: Sequence[Any]) -> list[Any]:
    """A copy of `leaves` with `values` at `indices`."""
    copy = list(leaves)
    for i, value in zip(indices, values, strict=True):
        copy[i] = value
    return copy


def is_scalar(leaf: Any) -> bool:
    """Whether `leaf` is a Python number that JAX differentiates."""
    return isinstance(leaf, float | complex)


def name_of(key_path: jtu.KeyPath) -> str:
    return ".".join([_segment(key) for key in key_path])


def names_without_leaves(tree: Any) -> list[str]:
    """The dotted paths of the `None`s and of the empty nodes."""
    nodes, _ = jtu.tree_flatten_with_path(tree, is_leaf=lambda n: not jtu.tree_leaves(n))
    return [name_of(key_path) for key_path, node in nodes if not jtu.tree_leaves(node)]


def near_misses(text: str, flat: FlatTree) -> str:
    """A sentence with the paths that are spelt most like `text`."""
    names = dict.fromkeys(
        name_of(key_path[: i + 1]) for key_path in flat.key_paths for i in range(len(key_path))
    )
    near = difflib.get_close_matches(text, names, n=3, cutoff=0.4) or list(names)[:3]
    listed = ", ".join(f"`{name}`" for name in near)
    return f"Its nearest paths are {listed}." if near else "It has no leaves."


def _segment(key: Any) -> str:
    # `jtu.keystr(..., simple=True, separator=".")`, three times as fast: the first
    # choice in a tree of 10 000 leaves spends a third of its time on their names.
    attribute = _KEY_ATTRIBUTES.get(type(key))
    return str(key if attribute is None else getattr(key, attribute))


_KEY_ATTRIBUTES = {
    jtu.GetAttrKey: "name",
    jtu.SequenceKey: "idx",
    jtu.DictKey: "key",
    jtu.FlattenedIndexKey: "key",
}
