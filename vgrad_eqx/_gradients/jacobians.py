"""Jacobians and second derivatives: a rule of differentiation each, and nothing else."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from .._tree.missing import MISSING
from .engine import make_transform
from .rules import Operator, use_jax


_JACREV = Operator("jacrev", use_jax(jax.jacrev))
_JACFWD = Operator("jacfwd", use_jax(jax.jacfwd))
_HESSIAN = Operator("hessian", use_jax(jax.hessian), order=2)


def jacrev(
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
    """As [`vgrad_eqx.vector_grad`][], but for the Jacobian, by reverse mode.

    For `y = func(*args)` and a differentiated leaf `θ`, it is `J[i, j] = ∂y[i] / ∂θ[j]`. It
    costs a reverse pass for each element of `y`, so it suits few outputs of many inputs.

    **Returns:**

    A [`vgrad_eqx.GradientTransform`][], which returns `grads` and more as `vector_grad` does.
    Instead of a gradient in the shape of its leaf, there is a Jacobian, with the axes of the
    output first. If the output is a pytree, so is the Jacobian by each argument, and by
    the states: it has the structure of the output, with `None` at each leaf that is not
    inexact, and in the place of the others what `vector_grad` returns for one, as in JAX. If
    `unit_aware`, each block has the unit of its own output over that of its leaf, so
    outputs need not share a dimension.

    **Raises:**

    - `TypeError`: on calling, also for a complex output.

    **Example:**

        >>> import jax.numpy as jnp
        >>> import vgrad_eqx as vg
        >>> vg.jacrev(jnp.cumsum)(jnp.array([3.0, 4.0])).tolist()
        [[1.0, 0.0], [1.0, 1.0]]
        >>> tree = {"a": jnp.ones(2), "b": jnp.ones(3)}
        >>> jacobian = vg.jacrev(lambda tree: tree["a"] * tree["b"].sum(), "**")(tree)
        >>> {path: block.shape for path, block in jacobian.items()}
        {'a': (2, 2), 'b': (2, 3)}

    **Source:** `jax.jacrev`, JAX 0.10; `brainstate.transform.jacrev`, brainstate 0.5.
    """
    return make_transform(
        _JACREV,
        func,
        grad_states=grad_states,
        argnums=argnums,
        return_value=return_value,
        has_aux=has_aux,
        unit_aware=unit_aware,
        check_states=check_states,
        debug_nan=debug_nan,
    )


def jacfwd(
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
    """As [`vgrad_eqx.jacrev`][], but by forward mode.

    It costs a forward pass for each element of the inputs, so it suits few inputs.

    **Returns:**

    The same as `jacrev`.

    **Raises:**

    - `TypeError`: on calling, for a complex input instead of a complex output.

    **Example:**

        >>> import jax.numpy as jnp
        >>> import vgrad_eqx as vg
        >>> vg.jacfwd(lambda x: jnp.stack([x, x**2, x**3]))(2.0).tolist()
        [1.0, 4.0, 12.0]

    **Source:** `jax.jacfwd`, JAX 0.10; `brainstate.transform.jacfwd`, brainstate 0.5.
    """
    return make_transform(
        _JACFWD,
        func,
        grad_states=grad_states,
        argnums=argnums,
        return_value=return_value,
        has_aux=has_aux,
        unit_aware=unit_aware,
        check_states=check_states,
        debug_nan=debug_nan,
    )


def hessian(
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
    """As [`vgrad_eqx.jacrev`][], but for second derivatives.

    For `y = func(*args)` and differentiated leaves `θ` and `φ`, it is
    `H[i, j, k] = ∂²y[i] / ∂θ[j] ∂φ[k]`, by forward over reverse mode. It costs a forward and
    a reverse pass for each element of the inputs.

    **Returns:**

    A [`vgrad_eqx.GradientTransform`][], which returns `grads` and more as `vector_grad` does.
    Instead of a gradient, there is a dict or a pytree of all second derivatives by that
    leaf and another: by states `{path: {path: array}}`, and by several arguments a tuple of
    tuples, with the axes of the output first. Derivatives by one of the states and one of the
    arguments are left out. If `unit_aware`, the unit is that of the output over those of
    both leaves.

    **Raises:**

    - `TypeError`: on calling, also for a complex input or output.

    **Example:**

        >>> import jax.numpy as jnp
        >>> import vgrad_eqx as vg
        >>> tree = {"a": jnp.array(3.0), "b": jnp.array(4.0)}
        >>> hessian = vg.hessian(lambda tree: tree["a"] ** 2 * tree["b"], "**")(tree)
        >>> {path: {by: float(x) for by, x in row.items()} for path, row in hessian.items()}
        {'a': {'a': 8.0, 'b': 6.0}, 'b': {'a': 6.0, 'b': 0.0}}

    **Source:** `jax.hessian`, JAX 0.10; `brainstate.transform.hessian`, brainstate 0.5.
    """
    return make_transform(
        _HESSIAN,
        func,
        grad_states=grad_states,
        argnums=argnums,
        return_value=return_value,
        has_aux=has_aux,
        unit_aware=unit_aware,
        check_states=check_states,
        debug_nan=debug_nan,
    )
