"""A readable table of what a selector chooses."""

import dataclasses
import html
import math
from collections.abc import Container, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from .._tree.flat import FlatTree
from .._tree.prompt import AtPrompt
from .._tree.state import read, State
from .._tree.text import check_flag
from .._tree.types import PyTree, Unit
from .._tree.units import split_unit
from .selectors import as_selector, select_any, SelectorLike


# What fits on a screen. Longer tables merge equal arrays of equal layers into one row.
_MOST_ROWS = 40
# For longer arrays, the range is shown instead of the elements.
_MOST_ELEMENTS = 4


class Row(NamedTuple):
    """An array, in the order of the columns."""

    path: str
    shape: tuple[int, ...]
    dtype: Any
    value: str | None
    unit: Unit
    size: int
    fate: str


@dataclasses.dataclass(frozen=True, repr=False)
class Summary(AtPrompt):
    """The table returned by [`vgrad_eqx.summary`][], whose `rows` are one for each array."""

    rows: tuple[Row, ...]

    @property
    def _totals(self) -> str:
        chosen = [row.size for row in self.rows if row.fate == "chosen"]
        all_sizes = chosen + [row.size for row in self.rows if row.fate == "frozen"]
        return (
            f"chosen: {sum(chosen):,} of {sum(all_sizes):,} parameters, "
            f"in {len(chosen):,} of {len(all_sizes):,} arrays"
        )

    @property
    def _texts(self) -> list[list[str]]:
        """The text of each cell. The first line has the column headers."""
        texts = [["path", "shape", "dtype", "value", "unit", "size", ""]]
        for path, rows in _group(self.rows):
            row, times = rows[0], f"{len(rows)} × " if len(rows) > 1 else ""
            unit = "" if row.unit is None else str(row.unit)
            size = sum(each.size for each in rows)
            cells = [path, f"{times}{row.shape}", str(row.dtype), row.value or "", unit]
            texts.append([*cells, f"{size:,}", row.fate])
        has_value = any(row.value is not None for row in self.rows)
        has_unit = any(row.unit is not None for row in self.rows)
        kept = [i for i in range(7) if (i != 3 or has_value) and (i != 4 or has_unit)]
        return [[line[i] for i in kept] for line in texts]

    def __repr__(self) -> str:
        texts, lines = self._texts, []
        widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
        for *cells, size, fate in texts:
            padded = [f"{cell:{width}}" for cell, width in zip(cells, widths, strict=False)]
            lines.append("  ".join([*padded, f"{size:>{widths[-2]}}", fate]).rstrip())
        return "\n".join([*lines, self._totals])

    def _repr_html_(self) -> str:
        """The table as shown in a notebook."""
        head, *lines = [[html.escape(cell) for cell in line] for line in self._texts]
        rows = [f"<tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr>"]
        for *cells, size, fate in lines:
            faded = "" if fate == "chosen" else ' style="opacity: 0.6"'
            left = "".join(f'<td style="text-align: left">{cell}</td>' for cell in cells)
            right = f'<td style="text-align: right">{size}</td><td>{fate}</td>'
            rows.append(f"<tr{faded}>{left}{right}</tr>")
        return f"<table>{''.join(rows)}</table><p>{html.escape(self._totals)}</p>"


def summary(tree: PyTree, selector: SelectorLike = True, *, values: bool = False) -> Summary:
    """Returns a table of the leaves of a pytree that a selector chooses or leaves frozen.

    **Arguments:**

    - `tree`: any pytree.
    - `selector`: as in [`vgrad_eqx.states`][].
    - `values`: whether to also show the values, for example of fitted parameters, in their
        units: the elements of arrays with at most four, and the minimum and maximum of others.

    **Returns:**

    A table, which can be printed, and is displayed at the prompt and in notebooks. It has a
    row for each array, with its path, shape, dtype, unit (if any array has one) and number of
    elements, and whether it is chosen, frozen, or not differentiable; then the totals. A table
    of more than 40 rows merges equal arrays of equal layers into one row, such as
    `layers.[0-11].weight`, unless it shows values. Its `rows` are tuples, one for each array.

    **Raises:**

    - `TypeError`, `ValueError`: as [`vgrad_eqx.states`][]; and if `values` is not a bool.

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
        >>> import brainunit as u
        >>> vg.summary({"tau": jnp.array([0.25, 4.0], "bfloat16") * u.ms}, values=True)
        path  shape  dtype     value    unit  size
        tau   (2,)   bfloat16  0.25, 4  ms       2  chosen
        chosen: 2 of 2 parameters, in 1 of 1 arrays
    """
    check_flag(values, "summary(values=...)")
    flat = FlatTree(tree)
    caller = "summary(selector=...)"
    chosen = set(select_any(flat, as_selector(selector), caller).indices)
    indices = range(len(flat.leaves))
    return Summary(tuple(row for i in indices for row in _list_rows(flat, i, chosen, values)))


def _list_rows(
    flat: FlatTree, index: int, chosen: Container[int], values: bool
) -> Iterator[Row]:
    """A row for each array in a leaf. A state may contain several; any other leaf is one."""
    path, leaf = flat.names[index], flat.leaves[index]
    inner = {path: leaf}
    if isinstance(leaf, State):
        value = FlatTree(leaf.content.combine())
        paths = [f"{path}.{name}".strip(".") for name in value.names]
        inner = dict(zip(paths, value.leaves, strict=True))
    for path, each in inner.items():
        array, unit = split_unit(each)
        if unit is not None and isinstance(array, int | float | complex):
            array = np.asarray(array, jnp.result_type(array))
        if isinstance(array, jax.Array | jax.Ref | np.ndarray | np.generic):
            fate = "chosen" if index in chosen else "frozen"
            if not jnp.issubdtype(array.dtype, jnp.inexact):
                fate = "not differentiable"
            text = _show_value(array) if values else None
            size = math.prod(array.shape)
            yield Row(path, array.shape, array.dtype, text, unit, size, fate)


def _show_value(array: Any) -> str:
    """The elements of a small array, or the range of a larger one."""
    array = read(array) if isinstance(array, jax.Ref) else array
    is_known = not isinstance(array, jax.Array) or (
        not isinstance(array, jax.core.Tracer) and array.is_fully_addressable
    )
    dtype = array.dtype
    is_number = jnp.issubdtype(dtype, jnp.number)
    if not is_known or not (is_number or jnp.issubdtype(dtype, jnp.bool_)):
        return ""
    numbers = np.asarray(array)
    if is_number and not np.issubdtype(dtype, np.number):  # such as bfloat16
        numbers = numbers.astype("float32")
    if numbers.size <= _MOST_ELEMENTS:
        return ", ".join(f"{number:.6g}" for number in numbers.ravel())
    if np.iscomplexobj(numbers):
        return ""
    return f"{numbers.min():.3g} ... {numbers.max():.3g}"


def _group(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Rows by path. In a long table, equal arrays of equal layers are grouped."""
    groups = [(row.path.split("."), [row]) for row in rows]
    if len(rows) > _MOST_ROWS and all(row.value is None for row in rows):
        for place in range(max(len(path) for path, _ in groups)):
            groups = _merge(groups, place)
    return [(".".join(path), found) for path, found in groups]


def _merge(
    groups: list[tuple[list[str], list[Row]]], place: int
) -> list[tuple[list[str], list[Row]]]:
    """Merges groups whose paths differ only in the number at one place."""
    merged: dict[Any, tuple[list[str], list[int], list[Row]]] = {}
    for path, rows in groups:
        is_number = place < len(path) and path[place].isdecimal()
        others = (*path[:place], None if is_number else place, *path[place + 1 :])
        key = others if is_number else tuple(path), rows[0]._replace(path="")
        _, numbers, found = merged.setdefault(key, (path, [], []))
        numbers += [int(path[place])] if is_number else []
        found += rows
    return [
        ([*path[:place], _show_numbers(numbers), *path[place + 1 :]], rows)
        if len(numbers) > 1
        else (path, rows)
        for path, numbers, rows in merged.values()
    ]


def _show_numbers(numbers: Sequence[int]) -> str:
    """Numbers as ranges: `[0-2,5]`."""
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    texts = [f"{first}" if first == last else f"{first}-{last}" for first, last in ranges]
    return f"[{','.join(texts)}]"
