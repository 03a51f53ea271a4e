"""Chosen leaves of a pytree as a flat dict, and back."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from .._tree.flat import cast, FlatTree, widen
from .._tree.state import find_states
from .._tree.text import near_misses, quote, show
from .._tree.types import PyTree, Unit
from .._tree.units import attach_unit, find_factors, scale_number, split_unit
from .selectors import as_selector, select, select_any, SelectorLike


_T = TypeVar("_T")


def states(tree: PyTree, selector: SelectorLike = True) -> dict[str, Any]:
    """Returns the leaves of a pytree that a selector chooses, by their dotted path.

    They are inexact arrays or, if the selector chooses them, states by reference
    ([`vgrad_eqx.State`][]), as accepted by `grad_states`.

    **Arguments:**

    - `tree`: any pytree, such as an Equinox module.
    - `selector`: which of its leaves to choose: a path such as `"layers.*.weight"`, one of
        [`vgrad_eqx.path`][], [`vgrad_eqx.instance`][], [`vgrad_eqx.at`][] and
        [`vgrad_eqx.leaf`][], or an Equinox filter spec. Defaults to all.

    **Returns:**

    A flat dict `{path: leaf}` of inexact arrays and Quantities, sorted by path as JAX sorts
    dicts. It never contains integers, PRNG keys, functions or bare Python numbers. Any optax
    transformation accepts it as parameters (Quantities with [`vgrad_eqx.unitful`][]), and
    `jax.flatten_util.ravel_pytree` turns it into a vector for SciPy and back. If the selector
    chooses states by reference, the result is `{path: State}`.

    **Raises:**

    - `TypeError`: if `selector` is none of these.
    - `ValueError`: if `selector` chooses neither an inexact array nor a state, or chooses both,
        or if two of the chosen leaves have the same dotted path.

    **Example:**

        >>> import equinox as eqx, jax
        >>> import vgrad_eqx as vg
        >>> mlp = eqx.nn.MLP(2, 1, 8, 1, key=jax.random.key(0))
        >>> {path: leaf.shape for path, leaf in vg.states(mlp, "**.bias").items()}
        {'layers.0.bias': (8,), 'layers.1.bias': (1,)}
    """
    flat = FlatTree(tree)
    indices, names = select_any(flat, as_selector(selector), "states(selector=...)")
    return dict(zip(names, [flat.leaves[i] for i in indices], strict=True))


def replace_states(tree: _T, values: Mapping[str, Any]) -> _T:
    """Returns a copy of a pytree with some of its leaves replaced.

    The inverse of [`vgrad_eqx.states`][]. `__init__` and `__check_init__` of a module are
    not called again.

    **Arguments:**

    - `tree`: any pytree.
    - `values`: a dict `{path: value}`. Each value must have the shape and dtype of the leaf
        that it replaces. A Quantity is converted to the unit of its leaf. Other leaves are
        left unchanged.

    **Returns:**

    A pytree of the structure of `tree`.

    **Raises:**

    - `TypeError`: if `values` is not a dict.
    - `ValueError`: if a path does not name an inexact array of `tree`, or a value differs from
        its leaf in shape or dtype.
    - `brainunit.UnitMismatchError`: if a value and its leaf have different dimensions.

    **Example:**

        >>> import jax.numpy as jnp
        >>> import vgrad_eqx as vg
        >>> tree = {"a": jnp.zeros(2), "b": jnp.ones(2)}
        >>> vg.replace_states(tree, {"a": jnp.full(2, 7.0)})["a"].tolist()
        [7.0, 7.0]
    """
    return _merge(tree, values, "replace_states(values=...)", _replace)


def apply_updates(tree: _T, updates: PyTree) -> _T:
    """Returns a copy of a pytree with updates added to some of its leaves.

    The counterpart of `optax.apply_updates` for updates that an optax transformation computes
    from `{path: gradient}`.

    **Arguments:**

    - `tree`: any pytree.
    - `updates`: a dict `{path: update}`. Each update must have the shape of its leaf. A
        Quantity is converted to the unit of its leaf. Other leaves are left unchanged.
        Updates are added in float32 at least, also for bfloat16 and float8.

    **Returns:**

    A pytree with the structure of `tree`. Each leaf keeps its dtype: a bfloat16 leaf stays
    bfloat16 under a float32 update.

    **Raises:**

    - `TypeError`: if `updates` is not a dict.
    - `ValueError`: if a path does not name an inexact array of `tree`, or an update differs
        from its leaf in shape, is not inexact, or is complex where the leaf is real.
    - `brainunit.UnitMismatchError`: if an update and its leaf have different dimensions.

    **Example:**

        >>> import jax.numpy as jnp, optax
        >>> import vgrad_eqx as vg
        >>> tree = {"a": jnp.ones(2), "b": jnp.ones(2)}
        >>> tx = optax.sgd(0.5)
        >>> grads = {"a": jnp.ones(2)}
        >>> updates, _ = tx.update(grads, tx.init(grads))
        >>> vg.apply_updates(tree, updates)["a"].tolist()
        [0.5, 0.5]
    """
    return _merge(tree, updates, "apply_updates(updates=...)", add)


def _merge(
    tree: PyTree,
    values: Mapping[str, Any],
    caller: str,
    merge_leaf: Callable[[Any, Any, str], Any],
) -> Any:
    if not isinstance(values, Mapping):
        raise TypeError(
            f"`{caller}` must be a dict from dotted path to array. Got {show(values)}. "
            "`vg.states(tree)` makes such a dict of a pytree."
        )
    if not values:
        return tree
    flat = FlatTree(tree)
    states = find_states(flat.leaves)
    by_reference = [flat.names[i] for i in states if flat.names[i] in values]
    if by_reference:
        raise ValueError(
            f"`{caller}` must name inexact arrays of the `{type(tree).__name__}`. Got "
            f"{quote(by_reference[0])}, a state by reference. Set its `value` instead."
        )
    indices, names = select(flat, as_selector(True), caller)
    positions = dict(zip(names, indices, strict=True))
    merged = list(flat.leaves)
    for name, value in values.items():
        if name not in positions:
            raise ValueError(
                f"`{caller}` must name inexact arrays of the `{type(tree).__name__}`. Got "
                f"{quote(str(name))}. {near_misses(str(name), flat)}"
            )
        i = positions[name]
        merged[i] = merge_leaf(merged[i], value, f"`{caller}` at {quote(name)}")
    return flat.unflatten(merged)


def _replace(leaf: object, value: object, where: str) -> Any:
    old, unit = split_unit(leaf)
    new, new_unit = split_unit(value)
    if not eqx.is_array_like(new) or not (hasattr(new, "dtype") or new_unit is not None):
        raise ValueError(f"{where} must be an array. Got {show(value)}.")
    new = _convert(new, new_unit, unit, where)
    # `result_type`, because without x64 a NumPy leaf of float64 is float32 to JAX.
    if jnp.shape(new) != jnp.shape(old) or jnp.result_type(new) != jnp.result_type(old):
        raise ValueError(
            f"{where} must have the shape and dtype of the leaf, "
            f"{show(leaf)}. Got {show(value)}."
        )
    return attach_unit(new, unit)


def add(leaf: object, update: Any, where: str) -> Any:
    """The sum, in the dtype and unit of the leaf."""
    if update is None:
        raise ValueError(f"{where} must be an array. Got None. Leave the path out instead.")
    old, unit = split_unit(leaf)
    new, new_unit = split_unit(update)
    dtype = jnp.result_type(new) if eqx.is_array_like(new) else None
    if dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
        raise ValueError(f"{where} must be an inexact array. Got {show(update)}.")
    if jnp.shape(new) != jnp.shape(old):
        raise ValueError(
            f"{where} must have the shape of the leaf, {show(leaf)}. Got {show(update)}."
        )
    if jnp.iscomplexobj(new) and not jnp.iscomplexobj(old):
        raise ValueError(
            f"{where} must be real, as the leaf {show(leaf)} is. Got {show(update)}."
        )
    new = _convert(new, new_unit, unit, where)
    # Both in one dtype, because JAX promotes no float8, and nothing at all if it is strict.
    old_dtype = jnp.result_type(old)
    dtype = np.promote_types(widen(dtype), widen(old_dtype))
    total = cast(old, dtype) + cast(new, dtype)
    return attach_unit(cast(total, old_dtype), unit)


def _convert(number: ArrayLike, unit: Unit, to: Unit, where: str) -> Any:
    """The number in another unit of the same dimension."""
    text = f"{where} must have the dimension of the leaf."
    _, factor = find_factors([to, unit], text, ["leaf", "value"])
    return scale_number(number, factor)
