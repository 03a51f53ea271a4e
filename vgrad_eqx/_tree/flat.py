"""A flattened pytree: its leaves, their names, and a split into some of them and the rest."""

import dataclasses
import functools as ft
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Self

import equinox as eqx
import jax.core
import jax.tree_util as jtu

from .units import attach_unit, quantity_test, split_units


class FlatTree:
    """The leaves of a pytree, of which a Quantity is one, with their dotted paths."""

    def __init__(self, tree: Any):
        self.tree = tree
        self.leaves, self.structure = jtu.tree_flatten(tree, is_leaf=quantity_test())

    @ft.cached_property
    def differentiable(self) -> list[int]:
        """The indices of the leaves with a gradient: inexact arrays and Quantities."""
        numbers, units = split_units(self.leaves)
        if units is None:
            return [i for i, leaf in enumerate(numbers) if eqx.is_inexact_array(leaf)]
        # A Quantity is an array, even if its number is written in Python.
        return [
            i
            for i, (number, unit) in enumerate(zip(numbers, units, strict=True))
            if eqx.is_inexact_array(number) or (unit is not None and is_scalar(number))
        ]

    @ft.cached_property
    def key_paths(self) -> list[jtu.KeyPath]:
        pairs, _ = jtu.tree_flatten_with_path(self.tree, is_leaf=quantity_test())
        return [key_path for key_path, _ in pairs]

    @ft.cached_property
    def names(self) -> list[str]:
        """The dotted path of every leaf."""
        return list(map(name_of, self.key_paths))

    def check_names(self, indices: Sequence[int]) -> None:
        """Refuses two leaves with one dotted path among those at `indices`."""
        names = [self.names[i] for i in indices]
        if len(set(names)) == len(names):
            return
        twice, _ = Counter(names).most_common(1)[0]
        both = [f"`{jtu.keystr(self.key_paths[i])}`" for i in indices if self.names[i] == twice]
        raise ValueError(
            f"Two leaves share the dotted path `{twice}`: {' and '.join(both)}. "
            "Gradients are named by that path, so rename one of the keys."
        )

    def unflatten(self, leaves: Sequence[Any]) -> Any:
        """The pytree with other leaves."""
        return jtu.tree_unflatten(self.structure, leaves)

    def split(self, indices: Sequence[int]) -> "Split":
        """Takes the leaves at `indices` out."""
        numbers, units = split_units([self.leaves[i] for i in indices])
        constants = replace_at(self.leaves, indices, [None] * len(indices))
        return Split(numbers, Rest(self.structure, constants, indices, units))


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Rest:
    """What remains of a pytree without some of its leaves. Each is equal to itself alone.

    The leaves are numbers: what is in a Quantity, whose unit remains here.
    """

    structure: Any
    constants: Sequence[Any]  # all leaves, with `None` in the place of those taken out
    indices: Sequence[int]
    units: Sequence[Any] | None  # of the leaves taken out, unless none of them has one

    def combine(self, numbers: Sequence[Any]) -> Any:
        """The pytree, with these numbers in its leaves."""
        if self.units is not None:
            numbers = list(map(attach_unit, numbers, self.units))
        return jtu.tree_unflatten(
            self.structure, replace_at(self.constants, self.indices, numbers)
        )

    def arrange(self, entries: Sequence[Any]) -> Any:
        """A pytree with any entries in the place of the leaves, and `None` in all others."""
        blank = [None] * self.structure.num_leaves
        return jtu.tree_unflatten(self.structure, replace_at(blank, self.indices, entries))


@jtu.register_pytree_node_class
class Split:
    """A pytree as some of its leaves, the rest, and the way back.

    To JAX it is a pytree of these leaves, so a compiled function may return one, whatever the
    rest holds.
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


def split_arrays(tree: Any, is_array: Callable[[Any], bool]) -> Split:
    """Splits a pytree, whose Quantities are nodes, into its arrays and the rest."""
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


def is_scalar(leaf: Any) -> bool:
    """Whether `leaf` is a Python number that JAX differentiates."""
    return isinstance(leaf, float | complex)


def name_of(key_path: jtu.KeyPath) -> str:
    return jtu.keystr(key_path, simple=True, separator=".")
