"""The weights of the outputs in their sum: ones, or the user's `cotangent`."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jax.typing import ArrayLike

from .._tree.flat import refuse_endless, refuse_foreign
from .._tree.text import show
from .._tree.types import PyTree
from .._tree.units import (
    find_factors,
    multiply_units,
    raise_mismatch,
    scale_number,
    split_unit,
)
from .flat_function import FlatFunction, Output


def make_cotangents(
    numbers: Sequence[Any], output: Output, flat_func: FlatFunction
) -> tuple[tuple[Any, ...], Any]:
    """The cotangent of each differentiated output, and the unit of their sum."""
    name = flat_func.name
    cotangents, units = tuple(map(jnp.ones_like, numbers)), output.units
    text = f"`{name}(func=...)` must return outputs of one dimension, because it adds them."
    if flat_func.transform.cotangent is not None:
        cotangents, units = _parse_cotangent(flat_func.transform, numbers, output, name)
        text = (
            f"`{name}(cotangent=...)` times the output must have one dimension, because it is "
            "added up."
        )
    factors = find_factors(units, text, output.names)
    if flat_func.transform.unit_aware:
        return tuple(map(scale_number, cotangents, factors)), units[0]
    if any(factor != 1.0 for factor in factors):
        pairs = zip(output.names, units, strict=True)
        raise_mismatch(
            f"`{name}(unit_aware=False)` adds up bare numbers, so all outputs must have one "
            f"unit. Got {', '.join(f'`{path}` in {unit}' for path, unit in pairs)}. Convert "
            "them to one, or pass `unit_aware=True`."
        )
    return cotangents, units[0]


def _parse_cotangent(
    transform: Any, numbers: Sequence[Any], output: Output, name: str
) -> tuple[tuple[Any, ...], list[Any]]:
    """The given array for each differentiated output, and the unit of their product."""
    caller = f"{name}(cotangent=...)"
    value, _ = output.combine(numbers)
    cotangent = transform.cotangent
    given = cotangent(value) if callable(cotangent) else cotangent
    refuse_endless(given)
    if transform.unit_aware:
        refuse_foreign(given, caller)
    try:
        entries = output.structure.flatten_up_to(given)
    except ValueError as error:
        raise ValueError(
            f"`{caller}` must have the structure of the output, {show(value)}. Got "
            f"{show(given)}."
        ) from error
    cotangents, units = [], []
    for i, number, unit in zip(output.indices, numbers, output.units, strict=True):
        entry, own_unit = split_unit(entries[i])
        cotangents.append(_parse_number(entry, number, caller))
        units.append(multiply_units(own_unit, unit))
    return tuple(cotangents), units


def _parse_number(number: ArrayLike, output: PyTree, caller: str) -> Any:
    shape, dtype = jnp.shape(output), jnp.result_type(output)
    if not eqx.is_array_like(number):
        raise TypeError(
            f"`{caller}` must hold an array for each inexact output. Got "
            f"{show(number)} for one of shape {shape}."
        )
    if hasattr(number, "dtype"):
        fits = jnp.result_type(number) == dtype
    else:  # a Python number has no dtype of its own
        fits = jnp.iscomplexobj(output) or not jnp.iscomplexobj(number)
    if jnp.shape(number) != shape or not fits:
        raise ValueError(
            f"`{caller}` must have the shape and dtype of the output, {shape} and {dtype}. Got "
            f"{jnp.shape(number)} and {jnp.result_type(number)}. Convert it by "
            "`jnp.broadcast_to` and `astype`."
        )
    return jnp.asarray(number, dtype)
