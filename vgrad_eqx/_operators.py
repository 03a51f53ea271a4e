"""The public operators. Each is a rule of differentiation, and nothing else."""

import functools as ft
from collections.abc import Callable, Sequence
from typing import Any, overload

import equinox as eqx
import jax
import jax.numpy as jnp

from ._call import Rule
from ._custom_types import MISSING
from ._parts import parse_argnums, parse_grad_states
from ._transform import GradientTransform


@overload
def vector_grad(
    *,
    grad_states: Any = None,
    argnums: int | Sequence[int] | None = None,
    return_value: bool = False,
    has_aux: bool | None = None,
    unit_aware: bool = False,
    check_states: bool = True,
    debug_nan: bool = False,
) -> Callable[[Callable[..., Any]], GradientTransform]: ...


@overload
def vector_grad(
    func: Callable[..., Any],
    grad_states: Any = None,
    argnums: int | Sequence[int] | None = None,
    return_value: bool = False,
    has_aux: bool | None = None,
    unit_aware: bool = False,
    check_states: bool = True,
    *,
    debug_nan: bool = False,
) -> GradientTransform: ...


def vector_grad(
    func=MISSING,
    grad_states=None,
    argnums=None,
    return_value=False,
    has_aux=None,
    unit_aware=False,
    check_states=True,
    *,
    debug_nan=False,
):
    """Creates a function that computes the vector gradient of `func`.

    For `y = func(*args)` and a differentiated leaf `θ`, the vector gradient is a row of ones
    times the Jacobian: `g[j] = Σ_i ∂y[i] / ∂θ[j]`, the column sums of the Jacobian. It is the
    elementwise derivative only if each `y[i]` depends on `θ[i]` alone; the full
    Jacobian is what `jax.jacrev` returns. For a scalar `y` it is the gradient.

    As a decorator, plain or with options, it turns a function or a method into its
    gradient.

    **Arguments:**

    - `func`: the function to differentiate. It may take and return any pytrees. The
        inexact leaves of its output are differentiated; the others pass through.
    - `grad_states`: which leaves of the state tree are differentiated. The state tree is
        `func` itself if that is an Equinox module, the module of a bound method, the
        first bound argument of an `equinox.Partial`, and else the first positional
        argument. One selector: a path such as `"layers.*.weight"`, one of
        [`vgrad_eqx.path`][], [`vgrad_eqx.instance`][], [`vgrad_eqx.at`][] and
        [`vgrad_eqx.leaf`][], or an Equinox filter spec (`True`, a predicate, or a
        pytree of them). Or several: a list, tuple or dict with a path or one of
        those four in it. Or else states by reference, which `func` closes over: a
        [`vgrad_eqx.State`][] or `jax.Ref`, or a pytree of them. Defaults to none.
    - `argnums`: which positional arguments are differentiated: an int, or a sequence of
        ints. Negative ones count from the end. Defaults to 0 without `grad_states`, and
        with it to none. Keyword arguments are never differentiated.
    - `return_value`: whether to return the output of `func` as well.
    - `has_aux`: whether `func` returns a pair `(value, aux)`, of which only `value` is
        differentiated. `aux` may hold anything.
    - `unit_aware`: whether a gradient carries the unit of `y` over that of `θ`. If `False`,
        it is the number of that same gradient. For arrays without units, it makes no
        difference.
    - `check_states`: whether to refuse selected leaves on which the output of `func` does
        not depend, and states by reference that it does not touch. Leaves are checked once
        for each structure of the arguments, and not at all where `func` cannot be traced.
        If `False`, the gradient of such a leaf or state is zero.
    - `debug_nan`: whether to raise if a gradient holds a NaN or an infinity. Under
        `jax.jit` this costs a callback.

    **Returns:**

    A [`vgrad_eqx.GradientTransform`][], a function with the arguments of `func`. It returns

    | `has_aux` | `return_value=False` | `return_value=True` |
    |---|---|---|
    | `False` | `grads` | `(grads, value)` |
    | `True` | `(grads, aux)` | `(grads, value, aux)` |

    where `grads` is `arg_grads` without `grad_states`, `var_grads` with `grad_states` alone,
    and `(var_grads, arg_grads)` with both:

    - `var_grads` is a flat dict `{path: gradient}` in leaf order, which optax takes as it
        is; for several selectors, the structure of `grad_states` with such a dict in
        the place of each. For states by reference, the structure of `grad_states` with
        a gradient in the place of each, which has the structure of its value.
    - `arg_grads` is one gradient for an int, and a tuple for a sequence. It has the structure
        of the argument, with `None` at each leaf that is no inexact array. An
        argument that is a Python float or complex is differentiated.

    A gradient has the shape and dtype of its leaf. If `unit_aware`, it has the unit of the
    output over that of the leaf, and is a plain array where these have one dimension. Outputs
    in several units of one dimension are added up in the unit of the first. For a complex
    leaf it follows JAX's convention: for a real output, descend along its conjugate. Without
    `func`, it returns a decorator.

    States by reference that `func` sets are set after the call. A `func` that uses any is
    traced at each call.

    **Raises:**

    - `TypeError`: on wrapping, for a `func` that is not callable, an `argnums` that is no int,
        or a `grad_states` that is no selector and no state; on calling, for an argument, a
        state or an output without anything to differentiate, without a positional argument,
        if `has_aux` and `func` returns no pair, or if a `func` that uses states by reference
        cannot be traced.
    - `ValueError`: on calling, for an `argnums` out of range, given twice, or naming the
        state tree; for a selector that chooses no inexact array; if two leaves have one path;
        for a selected leaf on which the output does not depend; or for a state that is not
        touched, or set under `jax.vmap`.
    - `brainunit.UnitMismatchError`: on calling, for outputs of several dimensions.
    - `FloatingPointError`: at run time, with `debug_nan`; from compiled code as a
        `jax.errors.JaxRuntimeError` that quotes it.

    **Example:**

        >>> import equinox as eqx, jax, jax.numpy as jnp
        >>> import vgrad_eqx as vg
        >>> vg.vector_grad(lambda x: x**2)(jnp.array([3.0, 4.0])).tolist()
        [6.0, 8.0]
        >>> vg.vector_grad(jnp.cumsum)(jnp.array([3.0, 4.0])).tolist()
        [2.0, 1.0]
        >>> mlp = eqx.nn.MLP(2, 1, 8, 1, key=jax.random.key(0))
        >>> @vg.vector_grad(grad_states="layers.*.weight", return_value=True)
        ... def errors(model, x, y):
        ...     return jnp.square(jax.vmap(model)(x) - y)
        >>> var_grads, value = errors(mlp, jnp.ones((5, 2)), jnp.ones((5, 1)))
        >>> {path: grad.shape for path, grad in var_grads.items()}, value.shape
        ({'layers.0.weight': (8, 2), 'layers.1.weight': (1, 8)}, (5, 1))
        >>> scale = vg.State(jnp.array(2.0))
        >>> float(vg.vector_grad(lambda x: scale.value * x, scale)(jnp.array([3.0, 4.0])))
        7.0
        >>> import brainunit as u
        >>> tau = jnp.array([3.0, 4.0]) * u.ms
        >>> print(vg.vector_grad(lambda tau: u.volt * tau / u.ms**3, unit_aware=True)(tau))
        [1. 1.] V / ms^3

    **Source:** `brainstate.transform.vector_grad`, brainstate 0.5, for the signature and the
    order of results; `equinox.filter_vjp`, equinox 0.13, for what is differentiable.
    """
    return make_transform(
        "vector_grad",
        pull_back_ones,
        func,
        grad_states=grad_states,
        argnums=argnums,
        return_value=return_value,
        has_aux=has_aux,
        unit_aware=unit_aware,
        check_states=check_states,
        debug_nan=debug_nan,
    )


def pull_back_ones(func: Callable[..., Any], diff: Sequence[Any]) -> tuple[Any, Any, Any]:
    value, pull_back, arrays = jax.vjp(func, *diff, has_aux=True)
    return value, pull_back(tuple(map(jnp.ones_like, value))), arrays


def make_transform(
    name: str, rule: Rule, func: Any, grad_states: Any, argnums: Any, **options: Any
) -> Any:
    """Both forms of every operator, the call and the decorator, with options checked."""
    options["argnums"] = parse_argnums(argnums, f"{name}(argnums=...)")
    options["grad_states"] = parse_grad_states(grad_states, f"{name}(grad_states=...)")
    if func is MISSING:
        return ft.partial(_wrap, name=name, rule=rule, **options)
    return _wrap(func, name=name, rule=rule, **options)


def _wrap(func: Any, *, name: str, **options: Any) -> Any:
    if not callable(func):
        raise TypeError(
            f"`{name}(func=...)` must be a callable. Got {func!r}. To set options first, "
            f"use `@{name}(grad_states=...)`."
        )
    return eqx.module_update_wrapper(GradientTransform(func, name=name, **options))
