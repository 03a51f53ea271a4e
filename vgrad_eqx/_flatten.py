"""Pytrees taken apart, and modules recognized that have been taken apart before."""

import operator
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx

from ._flat import FlatTree
from ._memory import Memory


class _Known(NamedTuple):
    """A module by weak reference, and what it held when it was taken apart."""

    module: weakref.ref[eqx.Module]
    flat: FlatTree
    contents: Sequence[tuple[Any, Sequence[Any]]]

    def is_unchanged(self) -> bool:
        return all(_is_same(_list_contents(node), held) for node, held in self.contents)


# By `id`, because the hash of a module is that of its leaves. Few, because the leaves of a
# module are kept alive until it is collected, and one that holds itself never is.
_known = Memory(16)


def flatten(tree: Any) -> FlatTree:
    """Takes a pytree apart. For an unchanged module that was done before, it is free.

    Modules are immutable, but for their `__init__` and for the lists and dicts in them,
    which are looked through again.
    """
    if not isinstance(tree, eqx.Module):
        return FlatTree(tree)
    known = _known.get(id(tree))
    if known is not None and known.module() is tree and known.is_unchanged():
        return known.flat
    flat = FlatTree(tree, nodes := [])
    if _can_be_known(nodes, flat):
        mutable = [vars(tree), *[node for node in nodes if type(node) in (list, dict)]]
        contents = [(node, _list_contents(node)) for node in mutable]
        key = id(tree)
        module = weakref.ref(tree, lambda _: _known.pop(key, None))
        _known[key] = _Known(module, flat, contents)
    return flat


def _can_be_known(nodes: Sequence[Any], flat: FlatTree) -> bool:
    """Whether only its lists and dicts may change."""
    leaf_types = set(map(type, flat.leaves))
    node_types = set(map(type, nodes)) - leaf_types - {list, dict, type(None)}
    return all(issubclass(node_type, eqx.Module | tuple) for node_type in node_types)


def _list_contents(node: Any) -> list[Any]:
    return [*node, *node.values()] if isinstance(node, dict) else list(node)


def _is_same(contents: Sequence[Any], held: Sequence[Any]) -> bool:
    return len(contents) == len(held) and all(map(operator.is_, contents, held))
