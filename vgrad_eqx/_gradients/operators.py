"""The operators: `vector_grad`, which explains all options, and its siblings."""

from collections.abc import Callable, Sequence
from typing import Any, cast, overload, ParamSpec, Protocol

from .._select.grad_states import GradStatesLike
from .._tree.missing import MISSING
from .._tree.types import PyTree
from .engine import (
    GradientTransform,
    make_transform,
    Operator,
    pull_back,
    pull_back_rows,
    pull_back_scalar,
    push_forward_columns,
    push_forward_rows,
)


_P = ParamSpec("_P")


@overload
def vector_grad(
    *,
    grad_states: GradStatesLike | None = None,
    argnums: int | Sequence[int] | None = None,
    return_value: bool = False,
    has_aux: bool | None = None,
    unit_aware: bool = False,
    check_states: bool = True,
    debug_nan: bool = False,
    cotangent: PyTree = None,
) -> Callable[[Callable[_P, Any]], GradientTransform[_P]]: ...


@overload
def vector_grad(
    func: Callable[_P, Any],
    grad_states: GradStatesLike | None = None,
    argnums: int | Sequence[int] | None = None,
    return_value: bool = False,
    has_aux: bool | None = None,
    unit_aware: bool = False,
    check_states: bool = True,
    *,
    debug_nan: bool = False,
    cotangent: PyTree = None,
) -> GradientTransform[_P]: ...


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
    cotangent=None,
):
    """Creates a function that computes the vector gradient of `func`.

    For `y = func(*args)` and a differentiated leaf `θ`, the vector gradient is a row of ones
    times the Jacobian: `g[j] = Σ_i ∂y[i] / ∂θ[j]`, the column sums of the Jacobian. It is the
    elementwise derivative only if each `y[i]` depends on `θ[i]` alone; the full
    Jacobian is what [`vgrad_eqx.jacrev`][] returns. For a scalar `y` it is the gradient.

    As a decorator, plain or with options, it turns a function or a method into its
    gradient.

    **Arguments:**

    - `func`: the function to differentiate. It may take and return arbitrary pytrees. The
        inexact leaves of its output are differentiated; the others are returned unchanged.
    - `grad_states`: which leaves of the state tree to differentiate with respect to. The
        state tree is `func` itself if that is an Equinox module, the module of a bound
        method, the first bound argument of an `equinox.Partial`, and otherwise the first
        positional argument. Pass one selector: a path such as `"layers.*.weight"`, one of
        [`vgrad_eqx.path`][], [`vgrad_eqx.instance`][], [`vgrad_eqx.at`][] and
        [`vgrad_eqx.leaf`][], or an Equinox filter spec (`True`, a predicate, or a
        pytree of them). Or pass several: a list, tuple or dict that contains a path or one
        of those four. Or pass states by reference that `func` closes over: a
        [`vgrad_eqx.State`][] or `jax.Ref`, or a pytree of them. Defaults to none.
    - `argnums`: which positional arguments to differentiate with respect to: an int or a
        sequence of ints. Negative values count from the end. Defaults to none if
        `grad_states` is given, and to 0 otherwise. Keyword arguments are never differentiated.
    - `return_value`: whether to also return the output of `func`.
    - `has_aux`: whether `func` returns a pair `(value, aux)`. Only `value` is differentiated;
        `aux` may be anything. `None` means `False`.
    - `unit_aware`: if `True`, a gradient has the unit of `y` divided by that of `θ`. If
        `False`, it is the derivative of the bare values of `y` with respect to those of `θ`,
        as computed by `jax.vjp`: for a map from V to mV, it is 1000. For arrays without
        units, this option makes no difference.
    - `check_states`: if `True`, raise an error for a selected leaf that no gradient can
        reach, because the output of `func` does not depend on it or depends on it only
        through `stop_gradient` and the like; and for a state by reference that `func` does
        not use. Each call is checked separately. If `False`, such gradients are zero.
    - `debug_nan`: whether to raise an error if a gradient contains a NaN or an infinity.
        Under `jax.jit`, this adds a callback.
    - `cotangent`: what to multiply the Jacobian by instead of a row of ones, so that
        `g[j] = Σ_i c[i] ∂y[i] / ∂θ[j]`. Either a pytree with the structure of the output,
        whose entries for leaves that are not inexact may be anything, or a function that
        computes such a pytree from the output. It may have a unit, which multiplies that of
        `y`. Defaults to ones.

    **Returns:**

    A [`vgrad_eqx.GradientTransform`][], a function with the arguments of `func`. It returns

    | `has_aux` | `return_value=False` | `return_value=True` |
    |---|---|---|
    | `False` | `grads` | `(grads, value)` |
    | `True` | `(grads, aux)` | `(grads, value, aux)` |

    where `grads` is `arg_grads` without `grad_states`, `var_grads` with `grad_states` alone,
    and `(var_grads, arg_grads)` with both:

    - `var_grads` is a flat dict `{path: gradient}`, sorted by path as JAX sorts dicts, which
        can be passed to optax as is. For several selectors, it has the structure of
        `grad_states`, with such a dict in place of each selector. For states by reference, it
        has the structure of `grad_states`, with each state replaced by a gradient that has
        the structure of its value.
    - `arg_grads` is a single gradient if `argnums` is an int, and a tuple if it is a sequence.
        A gradient has the structure of its argument, with `None` at each leaf that is not an
        inexact array. An argument that is itself a Python float or complex is differentiated.

    A gradient has the shape and dtype of its leaf. If `unit_aware`, it has the unit of the
    output divided by that of the leaf, and is a plain array where the two have the same
    dimension; outputs in different units of the same dimension are summed in the unit of the
    first. For a complex leaf, it follows JAX's convention: for a real output, descend along
    its conjugate. For a real leaf and a complex output, it is the gradient of the real part.
    If `func` is omitted, a decorator is returned.

    `func` is called once, as by `jax.vjp`; it is called a second time only if it sets a state
    by reference inside a loop or a compiled function. If it raises, every state keeps its old
    value.

    **Raises:**

    - `TypeError`: on wrapping, if `func` is not callable, `argnums` is not made of ints, or
        `grad_states` is neither a selector nor a state; on calling, if an argument, a state or
        the output has nothing to differentiate, if there is no positional argument, if the
        state tree would be an array because `func` hides a module, as `jax.vmap(model)` does,
        or if `has_aux` and `func` does not return a pair.
    - `ValueError`: on calling, if an `argnums` is out of range, repeated, or refers to the
        state tree; if a selector chooses no inexact array; if two leaves have the same path;
        if no gradient can reach a selected leaf; if a state is not used, or is set under
        `jax.vmap`; or if `cotangent` differs from the output in structure, shape or dtype.
    - `brainunit.UnitMismatchError`: on calling, if the outputs have different dimensions or,
        without `unit_aware`, different units.
    - `FloatingPointError`: at run time, with `debug_nan`; in compiled code, as a
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
    return make_transform(Operator("vector_grad", pull_back, adds_up=True), **locals())


class _Sibling(Protocol):
    """The signature of an operator, as a function and as a decorator."""

    @overload
    def __call__(
        self,
        *,
        grad_states: GradStatesLike | None = None,
        argnums: int | Sequence[int] | None = None,
        return_value: bool = False,
        has_aux: bool | None = None,
        unit_aware: bool = False,
        check_states: bool = True,
        debug_nan: bool = False,
    ) -> Callable[[Callable[_P, Any]], GradientTransform[_P]]: ...

    @overload
    def __call__(
        self,
        func: Callable[_P, Any],
        grad_states: GradStatesLike | None = None,
        argnums: int | Sequence[int] | None = None,
        return_value: bool = False,
        has_aux: bool | None = None,
        unit_aware: bool = False,
        check_states: bool = True,
        *,
        debug_nan: bool = False,
    ) -> GradientTransform[_P]: ...


def _with_overloads(operator: Callable[..., Any]) -> _Sibling:
    return cast(_Sibling, operator)


@_with_overloads
def grad(
    func: Callable[..., Any] = MISSING,
    grad_states: GradStatesLike | None = None,
    argnums: int | Sequence[int] | None = None,
    return_value: bool = False,
    has_aux: bool | None = None,
    unit_aware: bool = False,
    check_states: bool = True,
    *,
    debug_nan: bool = False,
) -> Any:
    """Like [`vgrad_eqx.vector_grad`][], but requires a function that returns a real scalar.

    For such a function, the result is the same. For any other, it raises an error, where
    `vector_grad` would return the gradient of a sum.

    **Returns:**

    A [`vgrad_eqx.GradientTransform`][], which returns `grads`, and the value and auxiliary
    data as in `vector_grad`.

    **Raises:**

    - `TypeError`: on calling, also if `func` returns anything but one real scalar.

    **Example:**

        >>> import jax.numpy as jnp
        >>> import vgrad_eqx as vg
        >>> vg.grad(lambda x: jnp.sum(x**2))(jnp.array([3.0, 4.0])).tolist()
        [6.0, 8.0]

    **Source:** `jax.grad`, JAX 0.10; `brainstate.transform.grad`, brainstate 0.5.
    """
    return make_transform(Operator("grad", pull_back_scalar, adds_up=True), **locals())


@_with_overloads
def jacrev(
    func: Callable[..., Any] = MISSING,
    grad_states: GradStatesLike | None = None,
    argnums: int | Sequence[int] | None = None,
    return_value: bool = False,
    has_aux: bool | None = None,
    unit_aware: bool = False,
    check_states: bool = True,
    *,
    debug_nan: bool = False,
) -> Any:
    """Like [`vgrad_eqx.vector_grad`][], but computes the Jacobian in reverse mode.

    For `y = func(*args)` and a differentiated leaf `θ`, it is `J[i, j] = ∂y[i] / ∂θ[j]`. It
    costs one reverse pass per element of `y`, so it suits functions with few outputs and many
    inputs.

    **Returns:**

    A [`vgrad_eqx.GradientTransform`][], which returns `grads`, and the value and auxiliary
    data as in `vector_grad`. In place of each gradient there is a Jacobian, whose first axes
    are those of the output and whose last axes are those of the leaf. If the output is a
    pytree, so is the result, as in JAX: it has the structure of the output, with `None` at
    each leaf that is not inexact, and at each other leaf the result for a function that
    returns this leaf alone. If `unit_aware`, each block has the unit of its own output
    divided by that of its leaf, so outputs need not have the same dimension.

    **Raises:**

    - `TypeError`: on calling, also for a complex output. Return its real and imaginary parts
        instead.

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
    return make_transform(Operator("jacrev", pull_back_rows), **locals())


@_with_overloads
def jacfwd(
    func: Callable[..., Any] = MISSING,
    grad_states: GradStatesLike | None = None,
    argnums: int | Sequence[int] | None = None,
    return_value: bool = False,
    has_aux: bool | None = None,
    unit_aware: bool = False,
    check_states: bool = True,
    *,
    debug_nan: bool = False,
) -> Any:
    """Like [`vgrad_eqx.jacrev`][], but uses forward mode.

    It costs one forward pass per element of the inputs, so it suits functions with few inputs.

    **Returns:**

    The same as `jacrev`, except for dtypes: as in JAX, a block has the dtype of its output, so
    it may be complex, while a block of `jacrev` has the dtype of its leaf.

    **Raises:**

    - `TypeError`: on calling, for a complex leaf that is differentiated, instead of a complex
        output.

    **Example:**

        >>> import jax.numpy as jnp
        >>> import vgrad_eqx as vg
        >>> vg.jacfwd(lambda x: jnp.stack([x, x**2, x**3]))(2.0).tolist()
        [1.0, 4.0, 12.0]

    **Source:** `jax.jacfwd`, JAX 0.10; `brainstate.transform.jacfwd`, brainstate 0.5.
    """
    return make_transform(Operator("jacfwd", push_forward_columns), **locals())


@_with_overloads
def hessian(
    func: Callable[..., Any] = MISSING,
    grad_states: GradStatesLike | None = None,
    argnums: int | Sequence[int] | None = None,
    return_value: bool = False,
    has_aux: bool | None = None,
    unit_aware: bool = False,
    check_states: bool = True,
    *,
    debug_nan: bool = False,
) -> Any:
    """Like [`vgrad_eqx.jacrev`][], but computes second derivatives.

    For `y = func(*args)` and differentiated leaves `θ` and `φ`, it is
    `H[i, j, k] = ∂²y[i] / ∂θ[j] ∂φ[k]`, computed by forward over reverse mode. It costs one
    forward and one reverse pass per element of the inputs.

    **Returns:**

    A [`vgrad_eqx.GradientTransform`][], which returns `grads`, and the value and auxiliary
    data as in `vector_grad`. In place of each gradient there is a dict or a pytree of all
    second derivatives with respect to that leaf and another: `{path: {path: array}}` for
    states, and a tuple of tuples for several arguments, with the axes of the output first.
    Mixed derivatives with respect to a state and an argument are left out. As in JAX, a block
    has the dtype of the first of its two leaves. If `unit_aware`, the unit is that of the
    output divided by those of both leaves.

    **Raises:**

    - `TypeError`: on calling, also for a complex leaf that is differentiated, or a complex
        output.

    **Example:**

        >>> import jax.numpy as jnp
        >>> import vgrad_eqx as vg
        >>> tree = {"a": jnp.array(3.0), "b": jnp.array(4.0)}
        >>> hessian = vg.hessian(lambda tree: tree["a"] ** 2 * tree["b"], "**")(tree)
        >>> {path: {by: float(x) for by, x in row.items()} for path, row in hessian.items()}
        {'a': {'a': 8.0, 'b': 6.0}, 'b': {'a': 6.0, 'b': 0.0}}

    **Source:** `jax.hessian`, JAX 0.10; `brainstate.transform.hessian`, brainstate 0.5.
    """
    return make_transform(Operator("hessian", push_forward_rows, order=2), **locals())
