"""The public operators: each one is its own rule of differentiation."""

import functools as ft
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from ._custom_types import MISSING
from ._parts import parse_argnums
from ._select import parse_grad_states
from ._transform import GradientTransform


def vector_grad(
    func: Callable[..., Any] = MISSING,
    grad_states: Any = None,
    argnums: int | Sequence[int] | None = None,
    return_value: bool = False,
    has_aux: bool | None = None,
    unit_aware: bool = False,
    check_states: bool = True,
    *,
    debug_nan: bool = False,
) -> Any:
    if func is MISSING:
        return ft.partial(
            vector_grad,
            grad_states=grad_states,
            argnums=argnums,
            return_value=return_value,
            has_aux=has_aux,
            unit_aware=unit_aware,
            check_states=check_states,
            debug_nan=debug_nan,
        )
    name = "vector_grad"
    if not callable(func):
        raise TypeError(
            f"`{name}(func=...)` must be a callable. Got {func!r}. To set options first, "
            f"use `@{name}(grad_states=...)`."
        )
    return eqx.module_update_wrapper(
        GradientTransform(
            func,
            grad_states=None if grad_states is None else parse_grad_states(grad_states, f"{name}(grad_states=...)"),
            rule=_pull_back_ones,
            name=name,
            argnums=parse_argnums(argnums, f"{name}(argnums=...)"),
            return_value=return_value,
            has_aux=bool(has_aux),
            check_states=check_states,
            debug_nan=debug_nan,
        )
    )


def _pull_back_ones(func: Callable[..., Any], diff: Sequence[Any]) -> tuple[Any, Any, Any]:
    value, pull_back, arrays = jax.vjp(func, *diff, has_aux=True)
    return pull_back(tuple(map(jnp.ones_like, value))), value, arrays
