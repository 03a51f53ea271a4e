"""The transform that all operators share, and the differentiation rule of each.

For a function `y = f(p)`, `jax.vjp` gives `y` and the product `c ↦ c·J` with the Jacobian. The
vector gradient is this product for `c = 1`; the other operators use other products.
"""

import dataclasses
import functools as ft
from collections.abc import Callable, Sequence
from typing import Any, Concatenate, Generic, NamedTuple, overload, ParamSpec, Self, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu

from .._references.overlay import call_with
from .._references.values import StateValues
from .._select.grad_states import GradStates, parse_grad_states
from .._tree import state
from .._tree.flat import is_any_traced, refuse_endless, refuse_foreign
from .._tree.missing import MISSING
from .._tree.prompt import AtPrompt, write_call
from .._tree.sharding import shard_like
from .._tree.text import check_flag, name_shapes, show
from .._tree.types import PyTree, Unit
from .._tree.units import (
    attach_unit,
    divide_units,
    find_quotient,
    scale_number,
)
from .argnums import parse_argnums
from .check import refuse_unreached
from .cotangents import make_cotangents
from .finite import raise_if_not_finite
from .flat_function import FlatFunction, Output


@ft.partial(jtu.register_dataclass, data_fields=["grads"], meta_fields=["unit"])
@dataclasses.dataclass(frozen=True)
class Row:
    """The derivatives of one output, or of the sum of all, and the unit of that output.

    `grads` has one entry for each leaf; for second derivatives, each entry is itself a list.
    """

    grads: Sequence[Any]
    unit: Any


# Takes a function from arrays to a tuple of arrays and an `Output`, the point at which to
# differentiate it, and the call that it belongs to. Returns the function's results, and the
# derivatives.
Rule = Callable[
    [Callable[..., Any], Sequence[Any], FlatFunction],
    tuple[Sequence[Any], Output, Sequence[Row]],
]


class Operator(NamedTuple):
    """An operator: its rule, and the form of the derivatives that the rule returns."""

    name: str
    rule: Rule
    adds_up: bool = False  # if so, there is one row, for the sum of all outputs
    order: int = 1
    power: int = 1  # of the unit of the leaf


_P = ParamSpec("_P")
_Q = ParamSpec("_Q")
_Owner = TypeVar("_Owner")


def _has_hash(func: Callable[..., Any]) -> bool:
    """Whether `func` is hashable. If not, it may change and still compare equal."""
    try:
        hash(func)
    except TypeError:
        return False
    return True


@jtu.register_static
@dataclasses.dataclass(frozen=True)
class _Static:
    """A function that is not a pytree. As a leaf, it could not be passed to `jax.jit`."""

    func: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        return self.func(*args)

    @classmethod
    def wrap(cls, func: Any) -> Any:
        is_leaf = callable(func) and jtu.all_leaves([func])
        return cls(func) if is_leaf and _has_hash(func) else func

    @staticmethod
    def unwrap(wrapped: Any) -> Any:
        return wrapped.func if type(wrapped) is _Static else wrapped


def _is_wrapper(node: Any) -> bool:
    return type(node) is _Static and hasattr(node.func, "__wrapped__")


def expose(func: Callable[..., Any]) -> Any:
    """A copy of `func` in which functions wrapped by gradient transforms are leaves.

    Except functions such as `jax.vmap(model)`, because Equinox warns about these as leaves.
    """
    refuse_endless(func)
    return jtu.tree_map(
        lambda node: node if _is_wrapper(node) else _Static.unwrap(node),
        func,
        is_leaf=lambda node: type(node) is _Static,
    )


class GradientTransform(AtPrompt, eqx.Module, Generic[_P]):
    """A function turned into its gradient, as [`vgrad_eqx.vector_grad`][] returns it.

    It is a pytree with the leaves of `func`, of the `cotangent` and of the states by reference
    in `grad_states`; selectors and plain functions are static. So it passes through `jax.jit`,
    `jax.vmap` and `jax.lax.scan`, also as an argument, if `func` is a plain function or a
    pytree of arrays. A module with other leaves, such as the activation of `equinox.nn.MLP`,
    needs `equinox.filter_jit` or [`vgrad_eqx.jit`][], as it does on its own. In a class body,
    it binds like a method. Create it with `vector_grad` or one of its siblings, which check
    the options.

    **Arguments:**

    - `args`, `kwargs`: the arguments of `func`.

    **Returns:**

    The gradients, and the value and auxiliary data if requested, as listed in
    [`vgrad_eqx.vector_grad`][].

    **Example:**

        >>> import vgrad_eqx as vg
        >>> derivative = vg.vector_grad(lambda x: x**2)
        >>> isinstance(derivative, vg.GradientTransform), float(derivative(3.0))
        (True, 6.0)
    """

    wrapped: Any
    grad_states: GradStates | None
    cotangent: Any
    operator: Operator = eqx.field(static=True)
    argnums: int | tuple[int, ...] | None = eqx.field(static=True)
    return_value: bool = eqx.field(static=True)
    has_aux: bool | None = eqx.field(static=True)
    unit_aware: bool = eqx.field(static=True)
    check_states: bool = eqx.field(static=True)
    debug_nan: bool = eqx.field(static=True)

    _inner = frozenset(
        ["argnums", "check_states", "cotangent", "debug_nan", "grad_states", "has_aux"]
        + ["operator", "return_value", "unit_aware", "wrapped"]
    )

    @property
    def func(self) -> Callable[..., Any]:
        return _Static.unwrap(self.wrapped)

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        return self.func

    @overload
    def __get__(self, instance: None, owner: type) -> Self: ...

    @overload
    def __get__(
        self: "GradientTransform[Concatenate[_Owner, _Q]]", instance: _Owner, owner: type
    ) -> Callable[_Q, Any]: ...

    def __get__(self, instance: Any, owner: type) -> Any:
        return self if instance is None else eqx.Partial(self, instance)

    def __call__(self, /, *args: _P.args, **kwargs: _P.kwargs) -> Any:
        flat_func = FlatFunction(self, self.func, args, kwargs)
        refs: dict[int, jax.Ref] = {}
        numbers, output, rows = self._differentiate(flat_func, refs)
        results = [self._arrange(flat_func, output, rows)]
        if self.return_value or self.has_aux:
            value, aux = output.combine(numbers)
            results += [value] * self.return_value + [aux] * bool(self.has_aux)
        # The last thing that may fail.
        state.write_all([refs[key] for key in output.finals], output.finals.values())
        return results[0] if len(results) == 1 else tuple(results)

    def __repr__(self) -> str:
        states = self.grad_states
        return write_call(
            self.operator.name,
            self.func,
            grad_states=None if states is None else states.unflatten(states.entries),
            argnums=self.argnums,
            return_value=self.return_value or None,
            has_aux=self.has_aux or None,
            unit_aware=self.unit_aware or None,
            check_states=None if self.check_states else False,
            debug_nan=self.debug_nan or None,
            cotangent=_Static.unwrap(self.cotangent),
            order=self.operator.power if self.operator.power > 1 else None,
        )

    def _differentiate(self, flat_func: FlatFunction, refs: dict[int, jax.Ref]) -> Any:
        """The result of the rule. Adds the states that `func` uses to `refs`."""
        if not state.exists.is_set() and not isinstance(flat_func.states, StateValues):
            return self._apply_rule(flat_func, flat_func.diff, flat_func)
        over_values = ft.partial(_call_over_values, flat_func, refs)
        return self._apply_rule(over_values, flat_func.diff, flat_func)

    def _apply_rule(
        self, func: Callable[..., Any], diff: Sequence[Any], flat_func: FlatFunction
    ) -> Any:
        numbers, output, rows = self.operator.rule(func, diff, flat_func)
        if self.debug_nan:
            blocks = [
                block for row in rows for block in zip(row.grads, flat_func.names, strict=True)
            ]
            pairs = [
                (array, name) for block, name in blocks for array in jtu.tree_leaves(block)
            ]
            raise_if_not_finite(pairs, f"{flat_func.name}(debug_nan=True)")
        return numbers, output, rows

    def _arrange(self, flat_func: FlatFunction, output: Output, rows: Sequence[Row]) -> Any:
        """The derivatives with their units, in the structure of the outputs and the leaves."""
        arrange = flat_func.arrange if self.operator.order == 1 else flat_func.arrange_second
        arranged = []
        for row in rows:
            grads = row.grads
            if self.unit_aware and self.operator.order == 1:
                grads = _divide_row(grads, row.unit, flat_func.units, self.operator.power)
            elif self.unit_aware:
                firsts = [find_quotient(row.unit, by) for by in flat_func.units]
                pairs = zip(grads, firsts, strict=True)
                grads = [_divide_row(second, unit, flat_func.units) for second, unit in pairs]
            arranged.append(arrange(grads))
        if self.unit_aware:  # those of states are of the structure of their values
            refuse_foreign(arranged, f"{flat_func.name}(unit_aware=True)")
        return arranged[0] if self.operator.adds_up else output.arrange(arranged)


def _call_over_values(
    flat_func: FlatFunction, refs: dict[int, jax.Ref], *diff: jax.Array
) -> Any:
    """Calls `func` with the differentiated arrays in place of states."""
    states = flat_func.states if isinstance(flat_func.states, StateValues) else None
    values = {} if states is None else dict(zip(states.refs, diff, strict=False))
    called = call_with(flat_func, values, *diff, refs=refs)
    if flat_func.transform.check_states and states is not None:
        states.refuse_untouched(refs.values(), f"{flat_func.name}(grad_states=...)")
    numbers, output = called.output
    return numbers, dataclasses.replace(output, finals=called.finals)


def _divide_row(
    grads: Sequence[Any], unit: Unit, units: Sequence[Any], power: int = 1
) -> list[Any]:
    """Derivatives with their units: `unit` divided by the unit of each leaf."""
    divided = []
    for number, by in zip(grads, units, strict=True):
        quotient = unit
        for _ in range(1, power):
            quotient = find_quotient(quotient, by)
        factor, quotient = divide_units(quotient, by)
        divided.append(attach_unit(scale_number(number, factor), quotient))
    return divided


def pull_back(
    func: Callable[..., Any],
    diff: Sequence[Any],
    flat_func: FlatFunction,
    of_scalar: bool = False,
) -> Any:
    """`vector_grad` and `grad`: one product of cotangents and the Jacobian."""
    numbers, pull, output = jax.vjp(func, *diff, has_aux=True)
    if of_scalar and (numbers[1:] or jnp.ndim(numbers[0]) or jnp.iscomplexobj(numbers[0])):
        hint = " Pass `has_aux=True` if the others are auxiliary." if numbers[1:] else ""
        raise TypeError(
            f"`{flat_func.name}(func=...)` must return a real scalar. Got outputs of "
            f"{name_shapes(numbers)}.{hint} Use `vector_grad` for the gradient of the sum of "
            "all outputs, or, if they are real, `jacrev` for all derivatives."
        )
    refuse_unreached(pull, func, flat_func)
    if flat_func.transform.cotangent is None and output.rest.units is None:
        cotangents, unit = tuple(map(jnp.ones_like, numbers)), None
    else:
        cotangents, unit = make_cotangents(numbers, output, flat_func)
    grads = pull(cotangents)
    if jax.device_count() > 1 and is_any_traced(diff):
        grads = shard_like(grads, diff)
    return numbers, output, [Row(grads, unit)]


def pull_back_scalar(
    func: Callable[..., Any], diff: Sequence[Any], flat_func: FlatFunction
) -> Any:
    """`grad`: the same, of one real scalar. A `functools.partial` would not equal its copy."""
    return pull_back(func, diff, flat_func, of_scalar=True)


def pull_back_rows(
    func: Callable[..., Any], diff: Sequence[Any], flat_func: FlatFunction
) -> Any:
    """`jacrev`: a product for each element of the outputs, all at once."""
    numbers, pull, output = jax.vjp(func, *diff, has_aux=True)
    if any(map(jnp.iscomplexobj, numbers)):
        raise TypeError(
            f"`{flat_func.name}(func=...)` must return real outputs. Got outputs of "
            f"{name_shapes(numbers)}. Return the pair `(y.real, y.imag)`, or for first "
            "derivatives by real leaves use `jacfwd`."
        )
    refuse_unreached(pull, func, flat_func)

    # JAX's Jacobian, of a function that has been differentiated already.
    @jax.custom_vjp
    def evaluated(*diff: jax.Array) -> Any:
        return numbers

    evaluated.defvjp(lambda *diff: (numbers, None), lambda _, cotangents: pull(cotangents))
    blocks = jax.jacrev(evaluated, argnums=tuple(range(len(diff))))(*diff)
    return numbers, output, list(map(Row, blocks, output.units))


def push_forward_columns(
    func: Callable[..., Any], diff: Sequence[Any], flat_func: FlatFunction
) -> Any:
    """`jacfwd`: a product for each element of the leaves, all at once."""
    flat_func.refuse_complex()
    numbers, push, output = jax.linearize(func, *diff, has_aux=True)
    refuse_unreached(push, func, flat_func)

    @jax.custom_jvp
    def evaluated(*diff: jax.Array) -> Any:
        return numbers

    evaluated.defjvp(lambda _, tangents: (numbers, push(*tangents)))
    blocks = jax.jacfwd(evaluated, argnums=tuple(range(len(diff))))(*diff)
    return numbers, output, list(map(Row, blocks, output.units))


def push_forward_rows(
    func: Callable[..., Any], diff: Sequence[Any], flat_func: FlatFunction
) -> Any:
    """`hessian`: forward over reverse."""
    flat_func.refuse_complex()

    def differentiate(*diff: jax.Array) -> Any:
        numbers, output, rows = pull_back_rows(func, diff, flat_func)
        return [row.grads for row in rows], (numbers, output)

    transform = jax.jacfwd(differentiate, argnums=tuple(range(len(diff))), has_aux=True)
    blocks, (numbers, output) = transform(*diff)
    return numbers, output, list(map(Row, blocks, output.units))


def make_transform(
    operator: Operator,
    func: Callable[..., Any],
    grad_states: object,
    argnums: object,
    cotangent: PyTree = None,
    **options: Any,
) -> Any:
    """Checks the options and creates either form of an operator, call or decorator."""
    name = operator.name
    options["argnums"] = parse_argnums(argnums, f"{name}(argnums=...)")
    options["grad_states"] = parse_grad_states(grad_states, f"{name}(grad_states=...)")
    for option, flag in options.items():
        if option not in ("argnums", "grad_states") and (option, flag) != ("has_aux", None):
            check_flag(flag, f"{name}({option}=...)")
    refuse_endless(cotangent)
    make = ft.partial(_wrap, operator=operator, cotangent=cotangent, **options)
    return make if func is MISSING else make(func)


def _wrap(func: Callable[..., Any], *, operator: Operator, **options: Any) -> Any:
    name = operator.name
    if not callable(func):
        raise TypeError(
            f"`{name}(func=...)` must be a callable. Got {show(func)}. To set options first, "
            f"use `@{name}(grad_states=...)`."
        )
    options["cotangent"] = _Static.wrap(options["cotangent"])
    transform = GradientTransform(_Static.wrap(func), operator=operator, **options)
    return eqx.module_update_wrapper(transform)
