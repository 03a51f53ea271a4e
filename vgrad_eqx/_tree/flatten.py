"""Pytrees taken apart, and modules recognized that have been taken apart before."""

import dataclasses
import operator
import weakref
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import equinox as eqx

from .cache import Memory
from .flat import FlatTree


# The lists and dicts in a module, and what was in each of them.
Contents = Sequence[tuple[Collection[Any], Sequence[Any]]]


class Known(NamedTuple):
    """A module by weak reference, and what it held when it was taken apart."""

    module: weakref.ref[eqx.Module]
    flat: FlatTree
    contents: Contents

    def is_unchanged(self) -> bool:
        return all(
            len(node) == len(held) and all(map(operator.is_, node, held))
            for node, held in self.contents
        )


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
    known = recall(tree)
    if known is not None:
        return known.flat
    flat = FlatTree(tree, nodes := [])
    if _can_be_known(tree, nodes, flat):
        mutable = [each for node in nodes for each in _list_contents(node)]
        contents = [(each, list(each)) for each in mutable]
        key = id(tree)
        module = weakref.ref(tree, lambda _: _known.pop(key, None))
        _known[key] = Known(module, flat, contents)
    return flat


def recall(module: eqx.Module) -> Known | None:
    """What is known of an unchanged module that was taken apart before."""
    known = _known.get(id(module))
    if known is None or known.module() is not module or not known.is_unchanged():
        return None
    return known


def _can_be_known(module: eqx.Module, nodes: Sequence[Any], flat: FlatTree) -> bool:
    """Whether only its lists and dicts may change."""
    leaf_types = set(map(type, flat.leaves))
    node_types = set(map(type, nodes)) - leaf_types - {list, dict, type(None)}
    is_known = all(issubclass(node_type, eqx.Module | tuple) for node_type in node_types)
    return is_known and _is_frozen(module)


def _is_frozen(module: eqx.Module) -> bool:
    """Whether the `__init__` of a module is over."""
    for key, value in vars(module).items():
        try:
            setattr(module, key, value)
        except dataclasses.FrozenInstanceError:
            return True
        return False
    return True


def _list_contents(node: Any) -> list[Collection[Any]]:
    if type(node) is dict:
        return [node, node.values()]
    return [node] if type(node) is list else []
