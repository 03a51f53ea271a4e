"""What a selector chooses, for people to read."""

import math
from collections.abc import Container, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._tree.flat import FlatTree, is_scalar
from .._tree.state import State
from .._tree.types import PyTree
from .._tree.units import split_unit
from .selectors import as_selector, select_any, SelectorLike


def summary(tree: PyTree, selector: SelectorLike = True) -> None:
    """Prints which leaves of a pytree a selector chooses, and which stay frozen.

    **Arguments:**

    - `tree`: any pytree.
    - `selector`: as in [`vgrad_eqx.states`][].

    **Returns:**

    Nothing. It prints a line for each array: its path, shape, dtype, unit (if any array has
    one) and number of elements, and whether it is chosen, frozen, or not differentiable;
    then the totals.

    **Raises:**

    - `TypeError`, `ValueError`: as [`vgrad_eqx.states`][].

    **Example:**

        >>> import jax.numpy as jnp
        >>> import vgrad_eqx as vg
        >>> bias, weight = jnp.zeros(3, "bfloat16"), jnp.zeros((2, 3), "bfloat16")
        >>> vg.summary({"b": bias, "n": jnp.zeros(2, "uint8"), "w": weight}, "w")
        path  shape   dtype     size
        b     (3,)    bfloat16     3  frozen
        n     (2,)    uint8        2  not differentiable
        w     (2, 3)  bfloat16     6  chosen
        chosen: 6 of 9 parameters, in 1 of 2 arrays
    """
    flat = FlatTree(tree)
    caller = "summary(selector=...)"
    chosen = set(select_any(flat, as_selector(selector), caller).indices)
    rows = [row for i in range(len(flat.leaves)) for row in _list_rows(flat, i, chosen)]
    _print_table(rows)
    chosen_sizes = [row.size for row in rows if row.fate == "chosen"]
    all_sizes = chosen_sizes + [row.size for row in rows if row.fate == "frozen"]
    print(
        f"chosen: {sum(chosen_sizes):,} of {sum(all_sizes):,} parameters, "
        f"in {len(chosen_sizes):,} of {len(all_sizes):,} arrays"
    )


class _Row(NamedTuple):
    path: str
    shape: tuple[int, ...]
    dtype: Any
    unit: Any
    size: int
    fate: str


def _list_rows(flat: FlatTree, index: int, chosen: Container[int]) -> Iterator[_Row]:
    """A row for each array in a leaf. A state may hold several, another leaf is one."""
    path, leaf = flat.names[index], flat.leaves[index]
    inner = {path: leaf}
    if isinstance(leaf, State):
        value = FlatTree(leaf.content.combine())
        paths = [f"{path}.{name}".strip(".") for name in value.names]
        inner = dict(zip(paths, value.leaves, strict=True))
    for path, each in inner.items():
        array, unit = split_unit(each)
        if unit is not None and is_scalar(array):
            array = np.asarray(array, jnp.result_type(array))
        if isinstance(array, jax.Array | jax.Ref | np.ndarray | np.generic):
            fate = "chosen" if index in chosen else "frozen"
            if not jnp.issubdtype(array.dtype, jnp.inexact):
                fate = "not differentiable"
            yield _Row(path, array.shape, array.dtype, unit, math.prod(array.shape), fate)


def _print_table(rows: list[_Row]) -> None:
    texts = [
        [
            row.path,
            str(row.shape),
            str(row.dtype),
            "" if row.unit is None else str(row.unit),
            f"{row.size:,}",
            row.fate,
        ]
        for row in rows
    ]
    texts.insert(0, ["path", "shape", "dtype", "unit", "size", ""])
    if all(row.unit is None for row in rows):
        texts = [[*line[:3], *line[4:]] for line in texts]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    for *cells, size, fate in texts:
        padded = [f"{cell:{width}}" for cell, width in zip(cells, widths, strict=False)]
        print("  ".join([*padded, f"{size:>{widths[-2]}}", fate]).rstrip())
