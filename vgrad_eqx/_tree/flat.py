"""A flattened pytree: its leaves, their names, and a split into chosen leaves and the rest."""

import dataclasses
import functools as ft
import itertools
import operator
import sys
from collections.abc import Callable, Iterable, Sequence
from types import FunctionType, NoneType
from typing import Any, Self

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.typing import DTypeLike

from .types import PyTree
from .units import attach_unit, make_quantity_test, quantity_test, split_units


class FlatTree:
    """The leaves of a pytree with their dotted paths. A Quantity is a single leaf.

    `numbers` are the leaves with each Quantity replaced by its mantissa, and `units` are their
    units, or `None` if the tree has no Quantity. `differentiable` are the indices of the leaves
    that can have a gradient.
    """

    def __init__(self, tree: PyTree):
        self.tree = tree
        # Looked up here, so that `units.py` is not called if there are no units.
        self._is_leaf = is_leaf = make_quantity_test() if "saiunit" in sys.modules else None
        refuse_endless(tree)
        self.leaves, self.structure = jtu.tree_flatten(tree, is_leaf=is_leaf)
        self.numbers, self.units = self.leaves, None
        if is_leaf is not None and any(map(is_leaf, self.leaves)):
            self.numbers, self.units = split_units(self.leaves)
        pairs = zip(self.numbers, self.units or itertools.repeat(None), strict=False)
        self.differentiable = [
            i
            for i, (number, unit) in enumerate(pairs)
            # A Quantity is an array, even if its number is written in Python.
            if eqx.is_inexact_array(number) or (unit is not None and is_scalar(number))
        ]

    @ft.cached_property
    def key_paths(self) -> list[jtu.KeyPath]:
        pairs, _ = jtu.tree_flatten_with_path(self.tree, is_leaf=self._is_leaf)
        return list(map(operator.itemgetter(0), pairs))

    @ft.cached_property
    def names(self) -> list[str]:
        """The dotted path of every leaf."""
        return list(map(name_of, self.key_paths))

    def unflatten(self, leaves: Sequence[Any]) -> Any:
        """The pytree with these leaves instead."""
        return jtu.tree_unflatten(self.structure, leaves)

    def split(self, indices: Sequence[int]) -> "Split":
        """Splits off the leaves at `indices`."""
        constants = list(self.leaves)
        for i in indices:
            constants[i] = None
        units = None if self.units is None else [self.units[i] for i in indices]
        rest = Rest(self.structure, constants, indices, units)
        return Split([self.numbers[i] for i in indices], rest)


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


def refuse_foreign(tree: PyTree, caller: str) -> None:
    """Raises an error for quantities of other libraries, whose units would be lost or wrong."""
    refuse_endless(tree)
    nodes = filter(_is_foreign, jtu.tree_leaves(tree, is_leaf=_is_foreign))
    for node in nodes:
        library = type(node).__module__.partition(".")[0]
        raise TypeError(
            f"`{caller}` supports only units of brainunit. Got a `{type(node).__name__}` of "
            f"`{library}`. Pass its value in a fixed unit, or a `brainunit.Quantity`."
        )


def _is_foreign(node: object) -> bool:
    is_quantity = quantity_test()
    if is_quantity is not None and is_quantity(node):
        return False
    names = {base.__name__ for base in type(node).__mro__}  # of unxt, astropy and pint
    if names.isdisjoint({"Quantity", "AbstractQuantity", "PlainQuantity"}):
        return False
    return hasattr(node, "unit") or hasattr(node, "units")


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Rest:
    """What remains of a pytree without some of its leaves. It equals only itself.

    Units remain here: a Quantity that was split off is represented by its mantissa.
    """

    structure: Any
    constants: Sequence[Any]  # all leaves, with `None` in place of those split off
    indices: Sequence[int]
    units: Sequence[Any] | None  # of the leaves split off, unless no leaf at all has one

    def combine(self, numbers: Sequence[Any]) -> Any:
        """The pytree, with these numbers in its leaves."""
        leaves = list(self.constants)
        for i, number in zip(self.indices, numbers, strict=True):
            leaves[i] = number
        if self.units is not None:
            for i, unit in zip(self.indices, self.units, strict=True):
                leaves[i] = attach_unit(leaves[i], unit)
        return jtu.tree_unflatten(self.structure, leaves)

    def arrange(self, entries: Sequence[Any]) -> Any:
        """The pytree with these entries in place of the split leaves, and `None` elsewhere."""
        blank = [None] * self.structure.num_leaves
        return jtu.tree_unflatten(self.structure, replace_at(blank, self.indices, entries))


@jtu.register_pytree_node_class
class Split:
    """A pytree split into some of its leaves and the rest, which can be combined again.

    To JAX, it is a pytree of these leaves, so a compiled function can return one, whatever the
    rest contains.
    """

    __slots__ = ("diff", "rest")

    def __init__(self, diff: Sequence[Any], rest: Rest):
        self.diff = diff
        self.rest = rest

    def combine(self) -> Any:
        return self.rest.combine(self.diff)

    def tree_flatten(self) -> tuple[Sequence[Any], Rest]:
        return self.diff, self.rest

    @classmethod
    def tree_unflatten(cls, rest: Rest, diff: Sequence[Any]) -> Self:
        return cls(list(diff), rest)


def split_arrays(tree: PyTree, is_array: Callable[[Any], bool]) -> Split:
    """Splits a pytree into its arrays and the rest. Here, Quantities are nodes."""
    refuse_endless(tree)
    leaves, structure = jtu.tree_flatten(tree)
    indices = [i for i, leaf in enumerate(leaves) if is_array(leaf)]
    constants = replace_at(leaves, indices, [None] * len(indices))
    return Split([leaves[i] for i in indices], Rest(structure, constants, indices, None))


def replace_at(
    leaves: Sequence[Any], indices: Sequence[int], values: Sequence[Any]
) -> list[Any]:
    """A copy of `leaves` with `values` at `indices`."""
    copy = list(leaves)
    for i, value in zip(indices, values, strict=True):
        copy[i] = value
    return copy


def is_any_traced(leaves: Sequence[Any]) -> bool:
    return any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)


def is_scalar(leaf: object) -> bool:
    """Whether `leaf` is a Python number that JAX differentiates."""
    return isinstance(leaf, float | complex)


def widen(dtype: DTypeLike) -> Any:
    """The dtype to compute sums and means in, which is at least float32."""
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.dtype("float32")


def cast(leaf: Any, dtype: Any) -> Any:
    """A number as a JAX array of this dtype, without a weak type."""
    is_kept = eqx.is_array(leaf) and leaf.dtype == dtype and not jax.typeof(leaf).weak_type
    return leaf if is_kept else jnp.asarray(leaf, dtype)


name_of = ft.partial(jtu.keystr, simple=True, separator=".")
