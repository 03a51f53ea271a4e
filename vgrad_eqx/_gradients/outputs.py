"""The output of a function, taken apart for differentiation and put together again."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax.tree_util as jtu

from .._tree.flat import FlatTree, is_scalar, put
from .._tree.units import attach_unit, find_factors, scale_number, split_unit


class Output(NamedTuple):
    """What remains of an output, and of the auxiliary data, without their arrays."""

    units: Sequence[Any]
    indices: Sequence[int]
    names: Sequence[str]  # of all leaves
    # The place of each differentiated leaf, or `None` if it is in a unit of its own, and so
    # is given back as one of the other arrays.
    places: Sequence[int | None]
    array_indices: Sequence[int]
    others: Sequence[Any]
    structure: Any
    value_structure: Any

    def fill(self, entries: Sequence[Any]) -> Any:
        """An entry in the place of each differentiated leaf, and `None` in the others."""
        leaves = [None] * self.value_structure.num_leaves
        return jtu.tree_unflatten(self.value_structure, put(leaves, self.indices, entries))

    def join(self, diff: Sequence[Any], arrays: Sequence[Any]) -> tuple[Any, Any]:
        """The value and the auxiliary data, with arrays in their places."""
        others = put(self.others, self.array_indices, arrays)
        value_leaves, aux = jtu.tree_unflatten(self.structure, others)
        for i, number, unit in zip(self.places, diff, self.units, strict=True):
            if i is not None:
                value_leaves[i] = attach_unit(number, unit)
        return jtu.tree_unflatten(self.value_structure, value_leaves), aux


def split_output(
    value: Any, aux: Any, name: str, adds_up: bool = True
) -> tuple[tuple[Any, ...], tuple[Any, ...], Output]:
    """The inexact leaves of `value`, all other arrays, and what remains.

    What is to be added up is converted to the unit of the first leaf. Only arrays may leave a
    traced function, while an output may hold anything.
    """
    flat = FlatTree(value)
    scalars = [i for i, leaf in enumerate(flat.leaves) if is_scalar(leaf)]
    indices = sorted({*flat.differentiable, *scalars})
    if not indices:
        raise TypeError(
            f"`{name}(func=...)` must return an inexact array or a float, or a pytree with "
            f"one in it. Got {eqx.tree_pformat(value)}, in which nothing can be "
            "differentiated."
        )
    numbers, units = zip(*[split_unit(flat.leaves[i]) for i in indices], strict=True)
    factors = [1.0] * len(units)
    if adds_up:
        text = (
            f"`{name}(func=...)` must return outputs of one dimension, because it adds them up."
        )
        factors = find_factors(units, text, [flat.names[i] for i in indices])
    diff = tuple(map(scale_number, numbers, factors))
    places = [i if f == 1.0 else None for i, f in zip(indices, factors, strict=True)]
    value_leaves = [None if i in places else leaf for i, leaf in enumerate(flat.leaves)]
    others, structure = jtu.tree_flatten((value_leaves, aux))
    array_indices = [i for i, leaf in enumerate(others) if eqx.is_array(leaf)]
    arrays = tuple([others[i] for i in array_indices])
    others = put(others, array_indices, [None] * len(arrays))
    output = Output(
        units, indices, flat.names, places, array_indices, others, structure, flat.treedef
    )
    return diff, arrays, output
