"""The output of a function, taken apart for differentiation and put together again."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax.tree_util as jtu

from ._flat import FlatTree, is_scalar, put


class Output(NamedTuple):
    """What remains of an output, and of the auxiliary data, without their arrays."""

    diff_indices: Sequence[int]
    array_indices: Sequence[int]
    others: Sequence[Any]
    structure: Any
    value_structure: Any

    def join(self, diff: Sequence[Any], arrays: Sequence[Any]) -> tuple[Any, Any]:
        """The value and the auxiliary data, with arrays in their places."""
        others = put(self.others, self.array_indices, arrays)
        value_leaves, aux = jtu.tree_unflatten(self.structure, others)
        value_leaves = put(value_leaves, self.diff_indices, diff)
        return jtu.tree_unflatten(self.value_structure, value_leaves), aux


def split_output(
    value: Any, aux: Any, name: str
) -> tuple[tuple[Any, ...], tuple[Any, ...], Output]:
    """The inexact leaves of `value`, all other arrays, and what remains.

    Only arrays may leave a traced function, while an output may hold anything.
    """
    flat = FlatTree(value)
    scalars = [i for i, leaf in enumerate(flat.leaves) if is_scalar(leaf)]
    diff_indices = sorted({*flat.differentiable, *scalars})
    if not diff_indices:
        raise TypeError(
            f"`{name}(func=...)` must return an inexact array or a float, or a pytree with "
            f"one in it. Got {eqx.tree_pformat(value)}, in which nothing can be "
            "differentiated."
        )
    diff = tuple([flat.leaves[i] for i in diff_indices])
    value_leaves = put(flat.leaves, diff_indices, [None] * len(diff))
    others, structure = jtu.tree_flatten((value_leaves, aux))
    array_indices = [i for i, leaf in enumerate(others) if eqx.is_array(leaf)]
    arrays = tuple([others[i] for i in array_indices])
    others = put(others, array_indices, [None] * len(arrays))
    output = Output(diff_indices, array_indices, others, structure, flat.treedef)
    return diff, arrays, output
