"""A pytree taken apart: its leaves, their names, and which of them can be trained."""

import dataclasses
import difflib
import functools as ft
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import equinox as eqx
import jax.core
import jax.tree_util as jtu

from .cache import Memory
from .state import State
from .units import quantity_test, split_unit


class FlatTree:
    """The leaves of a pytree, their dotted paths, and the way back to the pytree."""

    def __init__(self, tree: Any, nodes: list[Any] | None = None):
        """With `nodes`, puts every node of the pytree into it, the leaves too.

        `tree` must then be a module, and is held by weak reference.
        """
        is_leaf = quantity_test()
        if nodes is None:
            self._find_tree = lambda: tree
        else:
            self._find_tree = weakref.ref(tree)
            is_leaf = _watch(nodes, is_leaf)
        self.leaves, self.treedef = jtu.tree_flatten(tree, is_leaf=is_leaf)

    @property
    def tree(self) -> Any:
        return self._find_tree()

    @ft.cached_property
    def selections(self) -> Memory:
        """What is already known to be selected by some selector."""
        return Memory()

    def unflatten(self, leaves: Sequence[Any]) -> Any:
        return jtu.tree_unflatten(self.treedef, leaves)

    @ft.cached_property
    def differentiable(self) -> list[int]:
        """The indices of the leaves that can be trained: inexact arrays and Quantities."""
        types = list(map(type, self.leaves))
        dtypes = [getattr(leaf, "dtype", None) for leaf in self.leaves]
        samples = dict(zip(zip(types, dtypes, strict=True), self.leaves, strict=True))
        if is_any_traced(samples.values()):
            return [i for i, leaf in enumerate(self.leaves) if _can_train(leaf)]
        inexact = {kind for kind, leaf in samples.items() if _can_train(leaf)}
        # No list of pairs, which would set off the garbage collector in a large model.
        kinds = zip(types, dtypes, strict=True)
        return [i for i, kind in enumerate(kinds) if kind in inexact]

    @ft.cached_property
    def references(self) -> list[int]:
        """The indices of the states by reference."""
        if not any(issubclass(leaf_type, State) for leaf_type in set(map(type, self.leaves))):
            return []
        return [i for i, leaf in enumerate(self.leaves) if isinstance(leaf, State)]

    @ft.cached_property
    def key_paths(self) -> list[jtu.KeyPath]:
        with_path, _ = jtu.tree_flatten_with_path(self.tree, is_leaf=quantity_test())
        return [key_path for key_path, _ in with_path]

    @ft.cached_property
    def names(self) -> list[str]:
        """The dotted path of every leaf."""
        names = names_of(self.treedef)
        if names is None:
            return [name_of(key_path) for key_path in self.key_paths]
        return names

    def check_names(self) -> None:
        """Refuses two leaves with one dotted path, among those that can be chosen."""
        indices = [*self.differentiable, *self.references]
        names = [self.names[i] for i in indices]
        if len(set(names)) == len(names):
            return
        twice, _ = Counter(names).most_common(1)[0]
        both = [
            f"`{jtu.keystr(self.key_paths[i])}`"
            for i in sorted(indices)
            if self.names[i] == twice
        ]
        raise ValueError(
            f"Two leaves share the dotted path `{twice}`: {' and '.join(both)}. "
            "Gradients are named by that path, so rename one of the keys."
        )


def _can_train(leaf: Any) -> bool:
    number, unit = split_unit(leaf)
    # A Quantity is an array, even if its number is written in Python.
    return eqx.is_inexact_array(number) or (unit is not None and is_scalar(number))


def _watch(nodes: list[Any], is_leaf: Any) -> Callable[[Any], Any]:
    if is_leaf is None:
        return nodes.append  # returns `None`, so no node is a leaf for it
    return lambda node: nodes.append(node) or is_leaf(node)


def put(leaves: Sequence[Any], indices: Sequence[int], values: Sequence[Any]) -> list[Any]:
    """A copy of `leaves` with `values` at `indices`."""
    copy = list(leaves)
    for i, value in zip(indices, values, strict=True):
        copy[i] = value
    return copy


def is_any_traced(leaves: Iterable[Any]) -> bool:
    return any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)


def is_scalar(leaf: Any) -> bool:
    """Whether `leaf` is a Python number that JAX differentiates."""
    return isinstance(leaf, float | complex)


def name_of(key_path: jtu.KeyPath) -> str:
    return jtu.keystr(key_path, simple=True, separator=".")


def names_of(structure: Any) -> list[str] | None:
    """The dotted path of every leaf, or `None` if there are nodes of unknown types.

    The same as `name_of` each key path, but equal layers are looked at only once, and no
    key is made: a deep model is named in a fifth of the time.
    """
    try:
        names = _names_below(structure, {})
    except TypeError:  # a type without known keys, or a static field without a hash
        return None
    return ["" if name is None else name for name in names]


def _names_below(structure: Any, known: dict[Any, Any]) -> list[Any]:
    data = structure.node_data()
    if data is None:
        return [None]  # a leaf, whose path ends here
    if structure not in known:
        node_type, aux = data
        children = structure.children()
        keys = _keys_of(node_type, aux, len(children))
        known[structure] = [
            f"{key}" if name is None else f"{key}.{name}"
            for key, child in zip(keys, children, strict=True)
            for name in _names_below(child, known)
        ]
    return known[structure]


def _keys_of(node_type: type, aux: Any, num_children: int) -> Iterable[Any]:
    if node_type is dict:
        return aux
    if node_type in (list, tuple, type(None)):
        return range(num_children)
    if issubclass(node_type, eqx.Module):
        fields = dataclasses.fields(node_type)
        return [field.name for field in fields if not field.metadata.get("static", False)]
    raise TypeError(node_type)


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
