"""The mean gradient of several microbatches, processed one after the other."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.typing import ArrayLike

from .._tree.flat import widen
from .._tree.text import show
from .._tree.types import PyTree
from .._tree.units import attach_unit, split_unit


class Result(NamedTuple):
    """The gradients, output and auxiliary data of a microbatch, and its carry."""

    grads: list[Any]
    value: Any
    aux: Any
    nn_state: Any


# Takes the carry, a key or `None`, and the arrays of a batch.
Differentiate = Callable[[Any, Any, Sequence[Any]], Result]


def is_array(leaf: object) -> bool:
    """Whether a leaf of a batch is traced. All others are static."""
    return isinstance(leaf, jax.Array | jax.ShapeDtypeStruct | np.ndarray | np.generic)


def accumulate(
    differentiate: Differentiate,
    params: Sequence[Any],
    num_parts: int,
    nn_state: PyTree,
    key: jax.Array | None,
    inputs: Sequence[Any],
) -> Result:
    """Differentiates one microbatch at a time. Outputs and auxiliary data are stacked."""
    if num_parts == 1:
        return differentiate(nn_state, key, inputs)
    check_leading_axis(inputs, num_parts, "accumulate")
    keys = None if key is None else jr.split(key, num_parts)
    units: list[Any] = []

    def body(carry: PyTree, xs: PyTree) -> Any:
        sums, nn_state = carry
        result = differentiate(nn_state, *xs)
        pairs = list(map(split_unit, result.grads))
        units[:] = [unit for _, unit in pairs]
        sums = [
            total + number.astype(total.dtype)
            for total, (number, _) in zip(sums, pairs, strict=True)
        ]
        return (sums, result.nn_state), (result.value, result.aux)

    zeros = [_make_zeros(split_unit(param)[0]) for param in params]
    (sums, nn_state), (values, aux) = jax.lax.scan(
        body, (zeros, nn_state), (keys, inputs), length=num_parts
    )
    dtypes = [jnp.result_type(split_unit(param)[0]) for param in params]
    means = [
        jnp.asarray(total / num_parts, dtype) for total, dtype in zip(sums, dtypes, strict=True)
    ]
    return Result(list(map(attach_unit, means, units)), values, aux, nn_state)


def _make_zeros(number: ArrayLike) -> Any:
    """Zeros to add gradients to, in float32 at least, so that no digits are lost."""
    return jnp.zeros(jnp.shape(number), widen(jnp.result_type(number)))


def check_leading_axis(inputs: Sequence[Any], length: int, option: str) -> None:
    for leaf in inputs:
        if jnp.ndim(leaf) == 0 or jnp.shape(leaf)[0] != length:
            raise ValueError(
                f"`train_step({option}={length})` takes a batch in which the first axis of "
                f"each array has the length {length}. Got {show(leaf)}. Reshape it, stack the "
                "batches by `jnp.stack`, or close over what stays the same. A Python number "
                "counts as an array."
            )
