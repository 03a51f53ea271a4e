"""Assigns the leaves of an optax state to parameters, and to groups of parameters."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import jax.tree_util as jtu

from .._tree.text import show
from .._tree.types import PyTree
from .hyperparams import is_hyperparam
from .partition import GroupStates
from .unitful import UnitfulState


class Entry(NamedTuple):
    """A leaf of an optax state: its path, the parameters of its group, and its own parameter.

    Inside a `unitful`, `scales` has the scales of the parameters.
    """

    path: jtu.KeyPath  # without the labels of groups
    group: tuple[str, ...]
    name: str | None
    leaf: Any
    scales: Mapping[str, Any] = {}


def locate(opt_state: PyTree, names: tuple[str, ...]) -> Iterator[Entry]:
    """The leaves of an optax state, in JAX's order.

    Optax keeps the state of each parameter in a dict like the dict of parameters.
    """
    keys = set(names)

    def is_known(node: object) -> bool:
        return isinstance(node, _OURS) or (isinstance(node, dict) and node.keys() == keys)

    for path, node in jtu.tree_flatten_with_path(opt_state, is_leaf=is_known)[0]:
        if isinstance(node, _OURS):
            for entry in _locate_inside(node, names):
                yield entry._replace(path=path + entry.path)
        elif is_known(node):
            for inner_path, leaf in jtu.tree_leaves_with_path(node):
                yield Entry(path + inner_path[1:], names, inner_path[0].key, leaf)
        else:
            yield Entry(path, names, None, node)


_OURS = (GroupStates, UnitfulState)


def _locate_inside(node: Any, names: tuple[str, ...]) -> Iterator[Entry]:
    if isinstance(node, GroupStates):
        for label, group in node.groups:
            yield from locate(node[label], group)
    else:
        for entry in locate(node.inner_state, names):
            yield entry._replace(scales=node.units.scales)


def carry_over(
    fresh: Sequence[Entry], old: Sequence[Entry], old_names: Collection[str]
) -> list[Any]:
    """The leaves of a fresh state, with those of an old state for parameters that stay."""
    by_name: dict[Any, Entry] = {
        _identify(entry, entry.name): entry for entry in old if entry.name is not None
    }
    # A leaf that belongs to no parameter, such as a count, belongs to all of its group.
    shared = {
        _identify(entry, name): entry
        for entry in old
        if entry.name is None
        for name in entry.group
    }
    leaves = []
    for entry in fresh:
        name, leaf = entry.name, entry.leaf
        found = by_name.get(_identify(entry, name))
        if name is None:  # it comes from where most of the group was
            votes = [
                shared.get(_identify(entry, each)) for each in entry.group if each in old_names
            ]
            ids = list(map(id, votes))
            found = max(votes, key=lambda entry: ids.count(id(entry)), default=None)
        if found is not None and _is_alike(found.leaf, leaf):
            leaf = found.leaf
        elif found is not None and name is None:
            raise ValueError(
                "`Optimizer.reselect` keeps the optimizer state of each leaf. Got a state "
                f"that mixes the leaves, in a {show(found.leaf)} that would be a "
                f"{show(leaf)}, as `optax.flatten` does. Make a new optimizer instead."
            )
        leaves.append(leaf)
    return leaves


def _identify(entry: Entry, name: str | None) -> Any:
    """The path, the parameter, and the scale that its values are relative to."""
    scale = None if name is None or is_hyperparam(entry.path) else entry.scales.get(name)
    return entry.path, name, scale and scale[1:]


def _is_alike(old: PyTree, new: PyTree) -> bool:
    return jnp.shape(old) == jnp.shape(new) and jnp.result_type(old) == jnp.result_type(new)
