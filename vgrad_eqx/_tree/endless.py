"""A check of users' pytrees before JAX flattens them."""

from collections.abc import Iterable
from types import FunctionType, NoneType
from typing import Any

import equinox as eqx
import jax
import jax.tree_util as jtu
import numpy as np

from .types import PyTree


_DEEPEST = 900  # JAX flattens a little more
# Types of leaves so common that asking JAX for their children would be slow. Array types, which
# have no public names, are added when first seen.
_LEAVES = {str, int, float, bool, NoneType, FunctionType, np.ndarray}


def refuse_endless(tree: PyTree) -> None:
    """Raises an error for a pytree that contains itself, which crashes Python in JAX 0.12.

    It takes a third of the time that JAX takes to flatten a module.
    """
    level: Any = [tree]
    for _ in range(_DEEPEST):
        level = {
            id(child): child
            for node in level
            for child in _list_children(node)
            if type(child) not in _LEAVES
        }.values()
        if not level:
            return
    raise ValueError(
        f"A pytree must not contain itself, or be nested more than {_DEEPEST} levels deep. Got "
        f"such a `{type(tree).__name__}`."
    )


def _list_children(node: Any) -> Iterable[Any]:
    node_type = type(node)
    if node_type is dict:
        return node.values()
    if node_type is list or node_type is tuple:
        return node
    if eqx.Module in node_type.__mro__:
        # Static fields are included; they have no cycles. `vars` would be ten times slower.
        return object.__getattribute__(node, "__dict__").values()
    if isinstance(node, jax.Array):
        _LEAVES.add(node_type)
        return ()
    children = jtu.default_registry.flatten_one_level(node)
    return () if children is None else children[0]
