"""From a selector and a pytree to the leaves that are meant."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax.tree_util as jtu

from .._tree.cache import Memory
from .._tree.flat import FlatTree, names_without_leaves
from .kinds import as_selector, Selector


class Selection(NamedTuple):
    """The chosen leaves of a flat pytree, in leaf order."""

    indices: tuple[int, ...]
    names: tuple[str, ...]


class _Known(NamedTuple):
    """What a selector means in pytrees of one structure with leaves of the same types."""

    mask: Sequence[bool]
    candidates: list[int]
    selections: dict[tuple[Any, ...], Selection]


# Names and globs cost far more than a look here, and a model keeps its structure from step
# to step. Only dtypes remain to be compared, and only those of leaves that are meant.
_known = Memory()


def select(flat: FlatTree, selector: Selector, caller: str) -> Selection:
    """Chooses among the differentiable leaves of `flat`."""
    if not selector.structural or not _is_hashable((selector, flat.treedef)):
        return _choose(flat, selector, selector.mask(flat), caller)
    selection = flat.selections.get(selector)
    if selection is None:
        selection = flat.selections[selector] = _choose_as_before(flat, selector, caller)
    return selection


def select_any(flat: FlatTree, selector: Selector, caller: str) -> Selection:
    """Chooses among the differentiable leaves of `flat`, or else its states by reference."""
    if not flat.references:
        return select(flat, selector, caller)
    flat.check_names()
    mask = selector.mask(flat)
    chosen = tuple([i for i in flat.references if mask[i]])
    if not chosen:
        return select(flat, selector, caller)
    arrays = [flat.names[i] for i in flat.differentiable if mask[i]]
    if arrays:
        raise ValueError(
            f"`{caller}` must select arrays or states by reference, and not both. Got "
            f"{selector!r}, which selects the array `{arrays[0]}` and the state "
            f"`{flat.names[chosen[0]]}`. Select states by `vg.instance(vg.State)`, and arrays "
            "by `~vg.instance(vg.State)`."
        )
    return Selection(chosen, tuple([flat.names[i] for i in chosen]))


def _choose_as_before(flat: FlatTree, selector: Selector, caller: str) -> Selection:
    key = (selector, flat.treedef, tuple(map(type, flat.leaves)))
    known = _known.get(key)
    if known is None:
        mask = selector.mask(flat)
        arrays = [hasattr(leaf, "dtype") for leaf in flat.leaves]
        candidates = [i for i, is_array in enumerate(arrays) if is_array and mask[i]]
        known = _known[key] = _Known(mask, candidates, {})
    dtypes = tuple([flat.leaves[i].dtype for i in known.candidates])
    selection = known.selections.get(dtypes)
    if selection is None:
        selection = known.selections[dtypes] = _choose(flat, selector, known.mask, caller)
    return selection


def _is_hashable(key: Any) -> bool:
    try:
        hash(key)
    except TypeError:  # a static field without a hash
        return False
    return True


def _choose(flat: FlatTree, selector: Selector, mask: Sequence[bool], caller: str) -> Selection:
    flat.check_names()
    indices = tuple([i for i in flat.differentiable if mask[i]])
    if not indices:
        raise ValueError(
            f"`{caller}` must select inexact arrays. Got {selector!r}, which selects "
            f"{_describe_chosen(flat, mask)} of the `{type(flat.tree).__name__}`. "
            f"{_describe_choice(flat)}{_describe_references(flat, mask)}"
        )
    return Selection(indices, tuple([flat.names[i] for i in indices]))


def _describe_chosen(flat: FlatTree, mask: Any) -> str:
    chosen = [
        f"`{name}` ({eqx.tree_pformat(leaf)})"
        for name, leaf, is_chosen in zip(flat.names, flat.leaves, mask, strict=True)
        if is_chosen
    ]
    return shorten(chosen) or "nothing"


def _describe_choice(flat: FlatTree) -> str:
    names = [f"`{flat.names[i]}`" for i in flat.differentiable]
    empty = [f"`{name}`" for name in names_without_leaves(flat.tree)]
    choice = f"Its inexact arrays are {shorten(names)}." if names else "It has none."
    return f"{choice} There is nothing at {shorten(empty)}." if empty else choice


def _describe_references(flat: FlatTree, mask: Any) -> str:
    if not any(mask[i] for i in flat.references):
        return ""
    return " To differentiate by states, pass them, as `vg.states(...)` gives them."


def shorten(texts: list[str], most: int = 5) -> str:
    """The first of them, and how many there are besides."""
    more = [f"and {len(texts) - most} more"] if len(texts) > most else []
    return ", ".join(texts[:most] + more)


def parse_selectors(grad_states: Any, caller: str) -> Any:
    """A selector, or the container of selectors that the user gave."""
    if isinstance(grad_states, list | tuple | dict) and not jtu.tree_leaves(grad_states):
        raise ValueError(
            f"`{caller}` must name at least one selector. Got {grad_states!r}. "
            "To differentiate arguments alone, leave `grad_states` out."
        )
    if _is_group(grad_states):
        return jtu.tree_map(
            lambda each: None if each is None else parse_selectors(each, caller),
            grad_states,
            is_leaf=lambda node: node is not grad_states,
        )
    return as_selector(grad_states)


def _is_group(grad_states: Any) -> bool:
    """Whether this is a container of selectors, and not itself a filter spec."""
    return isinstance(grad_states, list | tuple | dict) and any(
        isinstance(each, str | Selector) for each in jtu.tree_leaves(grad_states)
    )
