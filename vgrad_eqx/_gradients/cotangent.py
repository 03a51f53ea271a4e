"""Cotangents that are given, in the form of the output."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp

from .._tree.units import find_factors, multiply_units, scale_number, split_unit
from .outputs import Output


def parse_cotangent(
    cotangent: Any, value: Any, output: Output, name: str
) -> tuple[tuple[Any, ...], Any]:
    """The number for each differentiated output, and the unit that their products share."""
    caller = f"{name}(cotangent=...)"
    given = cotangent(value) if callable(cotangent) else cotangent
    try:
        entries = output.value_structure.flatten_up_to(given)
    except ValueError as error:
        raise ValueError(
            f"`{caller}` must have the structure of the output, {eqx.tree_pformat(value)}. Got "
            f"{eqx.tree_pformat(given)}."
        ) from error
    outputs = output.value_structure.flatten_up_to(value)
    numbers, units = [], []
    for i, unit in zip(output.indices, output.units, strict=True):
        number, own_unit = split_unit(entries[i])
        numbers.append(_parse_number(number, split_unit(outputs[i])[0], caller))
        units.append(multiply_units(own_unit, unit))
    factors = find_factors(
        units,
        f"`{caller}` times the output must have one dimension, because it is added up.",
        [output.names[i] for i in output.indices],
    )
    return tuple(map(scale_number, numbers, factors)), units[0]


def _parse_number(number: Any, output: Any, caller: str) -> Any:
    shape, dtype = jnp.shape(output), jnp.result_type(output)
    if not eqx.is_array_like(number):
        raise TypeError(
            f"`{caller}` must hold an array for each inexact output. Got "
            f"{eqx.tree_pformat(number)} for one of shape {shape}."
        )
    # A Python number has no dtype of its own.
    fits = jnp.result_type(number, dtype) == dtype and not (
        hasattr(number, "dtype") and jnp.result_type(number) != dtype
    )
    if jnp.shape(number) != shape or not fits:
        raise ValueError(
            f"`{caller}` must have the shape and dtype of the output, {shape} and {dtype}. Got "
            f"{jnp.shape(number)} and {jnp.result_type(number)}. Convert it by "
            "`jnp.broadcast_to` and `astype`."
        )
    return jnp.asarray(number, dtype)
