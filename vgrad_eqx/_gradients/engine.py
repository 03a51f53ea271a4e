"""The transform that all operators share, and the rule by which each differentiates.

For a call `y = f(p)`, `jax.vjp` gives `y` and the product `c ↦ c·J` with the Jacobian. The
vector gradient is that of ones; the other operators take other products.
"""

import dataclasses
import functools as ft
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import jax.tree_util as jtu

from .._references.trace import trace
from .._references.values import StateValues
from .._select.grad_states import GradStates, parse_grad_states
from .._tree.flat import is_any_traced
from .._tree.missing import MISSING
from .._tree.sharding import shard_like
from .._tree.state import (
    is_about_references,
    Journal,
    journals,
    set_by_compiled,
    states_exist,
    write,
)
from .._tree.text import name_shapes
from .._tree.units import attach_unit, divide_units, find_quotient, scale_number
from .argnums import parse_argnums
from .call import Call, Output
from .check import refuse_unreached, uses_references
from .cotangents import make_cotangents
from .finite import raise_if_not_finite


@ft.partial(jtu.register_dataclass, data_fields=["grads"], meta_fields=["unit"])
@dataclasses.dataclass(frozen=True)
class Row:
    """The derivatives of one output, or of the sum of all, and the unit of that output.

    There is one for each leaf; in place of a second derivative, such a list of them.
    """

    grads: Sequence[Any]
    unit: Any


class Context(NamedTuple):
    """What a rule may know of a call beside its numbers."""

    name: str
    names: Callable[[], Sequence[str]]
    # Takes what `jax.vjp` or `jax.linearize` returned.
    check: Callable[[Any], None]
    # Takes the outputs to differentiate and the rest. Gives cotangents, and a unit.
    seed: Callable[[Sequence[Any], Output], tuple[Sequence[Any], Any]]


# Takes a function from arrays to a tuple of arrays and an `Output`, and its arguments. Returns
# what the function does, and the derivatives.
Rule = Callable[
    [Callable[..., Any], Sequence[Any], Context],
    tuple[Sequence[Any], Output, Sequence[Row]],
]


class Operator(NamedTuple):
    """An operator: its rule, and the form of the derivatives that the rule returns."""

    name: str
    rule: Rule
    adds_up: bool = False  # one row, of the sum of all outputs
    order: int = 1
    power: int = 1  # of the unit of the leaf


class GradientTransform(eqx.Module):
    """A function turned into its gradient, as [`vgrad_eqx.vector_grad`][] returns it.

    It is a pytree with the leaves of `func`, so it passes through `jax.jit`,
    `equinox.filter_jit` and `jax.vmap`, also as an argument. In the body of a class it binds
    like a method. Make one by `vector_grad`, which checks the options.

    **Arguments:**

    - `args`, `kwargs`: those of `func`.

    **Returns:**

    The gradients, and more if asked for, as [`vgrad_eqx.vector_grad`][] lists them.

    **Example:**

        >>> import vgrad_eqx as vg
        >>> derivative = vg.vector_grad(lambda x: x**2)
        >>> isinstance(derivative, vg.GradientTransform), float(derivative(3.0))
        (True, 6.0)
    """

    func: Callable[..., Any]
    grad_states: GradStates | None
    cotangent: Any
    operator: Operator = eqx.field(static=True)
    argnums: int | tuple[int, ...] | None = eqx.field(static=True)
    return_value: bool = eqx.field(static=True)
    has_aux: bool | None = eqx.field(static=True)
    unit_aware: bool = eqx.field(static=True)
    check_states: bool = eqx.field(static=True)
    debug_nan: bool = eqx.field(static=True)

    @property
    def name(self) -> str:
        return self.operator.name

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        return self.func

    def __get__(self, instance: Any, owner: Any) -> Any:
        return self if instance is None else eqx.Partial(self, instance)

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        options = self.grad_states, self.argnums, self.has_aux
        call = Call(self.name, self.func, *options, args, kwargs)
        differentiate = self._differentiate
        if isinstance(call.states, StateValues) or _closes_over_ref(self.func):
            differentiate = self._differentiate_over_values
        numbers, output, rows, written = differentiate(call)
        if self.debug_nan:
            self._check_finite(call, rows)
        _set_states(written, output.finals)
        results = [self._arrange(call, output, rows)]
        if self.return_value or self.has_aux:
            value, aux = output.combine(numbers)
            results += [value] * self.return_value + [aux] * bool(self.has_aux)
        return results[0] if len(results) == 1 else tuple(results)

    def _make_context(self, call: Call, is_direct: bool) -> Context:
        def check(linear: Any) -> None:
            if is_direct and uses_references(linear, len(call.diff)):
                raise _UsesReferencesLater
            if self.check_states and call.selected:
                caller = f"{self.name}(grad_states=...)"
                refuse_unreached(linear, len(call.diff), call.selected, caller)

        def seed(numbers: Sequence[Any], output: Output) -> Any:
            return make_cotangents(self.cotangent, numbers, output, self.name, self.unit_aware)

        return Context(self.name, lambda: call.names, check, seed)

    def _differentiate(self, call: Call) -> Any:
        """The direct road: JAX differentiates `func` as it is."""
        rule = ft.partial(self.operator.rule, context=self._make_context(call, True))
        if not states_exist.is_set():
            return *rule(call, call.diff), ()
        if isinstance(jnp.zeros(()), jax.core.Tracer):
            return self._differentiate_apart(rule, call)
        journal = Journal()
        for ref in set_by_compiled:
            journal.record(ref)
        journals.active.append(journal)
        try:
            return *rule(call, call.diff), ()
        except BaseException as error:
            journal.restore()
            if not _needs_replay(error):
                raise
        finally:
            journals.active.remove(journal)
        return self._differentiate_over_values(call)

    def _differentiate_apart(self, rule: Any, call: Call) -> Any:
        """The direct road while JAX traces, in a trace of its own, which may be given up."""
        apart = jax.jit(lambda *diff: rule(call, diff))
        try:
            apart.trace(*call.diff)
        except Exception as error:
            if not _needs_replay(error):
                raise
            return self._differentiate_over_values(call)
        return *apart(*call.diff), ()  # as it was traced

    def _differentiate_over_values(self, call: Call) -> Any:
        """The road of references: `func` is traced, and JAX differentiates it over values."""
        try:
            traced = trace(call, call.diff)
        except _LOOKS_AT_VALUES as error:
            raise TypeError(
                f"`{self.name}` traces `func`, because it uses states by reference. So `func` "
                "cannot decide by the value of an array, as `if`, `bool`, `int`, `float` and "
                "NumPy do. Use `jnp.where`, `jax.lax.cond` or `jax.lax.while_loop`, or decide "
                "by a Python number that is passed as an argument."
            ) from error
        trained = {}
        if isinstance(call.states, StateValues):
            trained = call.states.refs
            if self.check_states:
                self._refuse_untouched(call.states.find_untouched(traced.refs))
        evaluate = traced.over_values(trained)

        def replay(*diff: Any) -> Any:
            (numbers, output), finals = evaluate(*diff)
            return numbers, output.replace(finals=finals)

        context = self._make_context(call, is_direct=False)
        return *self.operator.rule(replay, call.diff, context), traced.written

    def _refuse_untouched(self, untouched: Sequence[str]) -> None:
        if untouched:
            raise ValueError(
                f"`{self.name}(grad_states=...)` must name states that `func` reads. It does "
                f"not touch {'; '.join(untouched)}. Leave them out, or pass "
                "`check_states=False` to get zeros."
            )

    def _check_finite(self, call: Call, rows: Sequence[Row]) -> None:
        pairs = [
            (array, name)
            for row in rows
            for block, name in zip(row.grads, call.names, strict=True)
            for array in jtu.tree_leaves(block)
        ]
        arrays, names = zip(*pairs, strict=True)
        raise_if_not_finite(arrays, names, f"{self.name}(debug_nan=True)")

    def _arrange(self, call: Call, output: Output, rows: Sequence[Row]) -> Any:
        """The derivatives with their units, in the places of the outputs and the leaves."""
        if self.unit_aware:
            rows = [self._attach_units(row, call.units) for row in rows]
        arrange = call.arrange if self.operator.order == 1 else call.arrange_second
        arranged = [arrange(row.grads) for row in rows]
        return arranged[0] if self.operator.adds_up else output.arrange(arranged)

    def _attach_units(self, row: Row, units: Sequence[Any]) -> Row:
        if self.operator.order == 1:
            return Row(_divide_row(row.grads, row.unit, units, self.operator.power), None)
        firsts = [find_quotient(row.unit, by) for by in units]
        pairs = zip(row.grads, firsts, strict=True)
        return Row([_divide_row(second, unit, units) for second, unit in pairs], None)


class _UsesReferencesLater(Exception):
    """JAX would use references in the backward pass, when they may have other values."""


def _needs_replay(error: BaseException) -> bool:
    return isinstance(error, _UsesReferencesLater) or is_about_references(error)


def _closes_over_ref(func: Any) -> bool:
    """Whether a function names a bare `jax.Ref`, which nothing can set back."""
    if not isinstance(func, types.FunctionType):
        return False
    held = [func.__globals__.get(name) for name in func.__code__.co_names]
    for cell in func.__closure__ or ():
        try:
            held.append(cell.cell_contents)
        except ValueError:  # not assigned yet
            continue
    return any(isinstance(value, jax.Ref) for value in held)


_LOOKS_AT_VALUES = (
    jax.errors.ConcretizationTypeError,
    jax.errors.NonConcreteBooleanIndexError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)


def _set_states(refs: Sequence[jax.Ref], values: Sequence[Any]) -> None:
    """Gives references the values that `func` has left in them."""
    for ref, value in zip(refs, values, strict=True):
        write(ref, value, "A state that `func` sets")


def _divide_row(
    grads: Sequence[Any], unit: Any, units: Sequence[Any], power: int = 1
) -> list[Any]:
    """Derivatives in a unit over those of the leaves."""
    divided = []
    for number, by in zip(grads, units, strict=True):
        quotient = unit
        for _ in range(1, power):
            quotient = find_quotient(quotient, by)
        factor, quotient = divide_units(quotient, by)
        divided.append(attach_unit(scale_number(number, factor), quotient))
    return divided


def pull_back(func: Callable[..., Any], diff: Sequence[Any], context: Context) -> Any:
    """`vector_grad`: one product of cotangents and the Jacobian."""
    numbers, pull, output = jax.vjp(func, *diff, has_aux=True)
    context.check(pull)
    cotangents, unit = context.seed(numbers, output)
    grads = pull(cotangents)
    if is_any_traced(diff) and jax.device_count() > 1:
        grads = shard_like(grads, diff)
    return numbers, output, [Row(grads, unit)]


def pull_back_scalar(func: Callable[..., Any], diff: Sequence[Any], context: Context) -> Any:
    """`grad`: the same for one real number."""

    def return_scalar(*diff: Any) -> Any:
        numbers, output = func(*diff)
        if len(numbers) != 1 or jnp.ndim(numbers[0]) != 0 or jnp.iscomplexobj(numbers[0]):
            raise TypeError(
                f"`{context.name}(func=...)` must return a real scalar. Got outputs of "
                f"{name_shapes(numbers)}. Use `vector_grad` for the gradient of the sum of all "
                "outputs, or `jacrev` for all derivatives."
            )
        return numbers, output

    return pull_back(return_scalar, diff, context)


def pull_back_rows(func: Callable[..., Any], diff: Sequence[Any], context: Context) -> Any:
    """`jacrev`: a product for each element of the outputs, all at once."""
    numbers, pull, output = jax.vjp(func, *diff, has_aux=True)
    context.check(pull)

    # JAX's Jacobian, of a function that has been differentiated already.
    @jax.custom_vjp
    def evaluated(*diff: Any) -> Any:
        return numbers

    evaluated.defvjp(lambda *diff: (numbers, None), lambda _, cotangents: pull(cotangents))
    blocks = jax.jacrev(evaluated, argnums=tuple(range(len(diff))))(*diff)
    return numbers, output, list(map(Row, blocks, output.units))


def push_forward_columns(
    func: Callable[..., Any], diff: Sequence[Any], context: Context
) -> Any:
    """`jacfwd`: a product for each element of the leaves, all at once."""
    numbers, push, output = jax.linearize(func, *diff, has_aux=True)
    context.check(push)

    @jax.custom_jvp
    def evaluated(*diff: Any) -> Any:
        return numbers

    evaluated.defjvp(lambda _, tangents: (numbers, push(*tangents)))
    blocks = jax.jacfwd(evaluated, argnums=tuple(range(len(diff))))(*diff)
    return numbers, output, list(map(Row, blocks, output.units))


def push_forward_rows(func: Callable[..., Any], diff: Sequence[Any], context: Context) -> Any:
    """`hessian`: forward over reverse."""

    def differentiate(*diff: Any) -> Any:
        numbers, output, rows = pull_back_rows(func, diff, context)
        return [row.grads for row in rows], (numbers, output)

    transform = jax.jacfwd(differentiate, argnums=tuple(range(len(diff))), has_aux=True)
    blocks, (numbers, output) = transform(*diff)
    return numbers, output, list(map(Row, blocks, output.units))


def make_transform(
    operator: Operator,
    func: Any,
    grad_states: Any,
    argnums: Any,
    cotangent: Any = None,
    **options: Any,
) -> Any:
    """Both forms of every operator, the call and the decorator, with options checked."""
    name = operator.name
    options["argnums"] = parse_argnums(argnums, f"{name}(argnums=...)")
    options["grad_states"] = parse_grad_states(grad_states, f"{name}(grad_states=...)")
    make = ft.partial(_wrap, operator=operator, cotangent=cotangent, **options)
    return make if func is MISSING else make(func)


def _wrap(func: Any, *, operator: Operator, **options: Any) -> Any:
    name = operator.name
    if not callable(func):
        raise TypeError(
            f"`{name}(func=...)` must be a callable. Got {func!r}. To set options first, "
            f"use `@{name}(grad_states=...)`."
        )
    return eqx.module_update_wrapper(GradientTransform(func, operator=operator, **options))
