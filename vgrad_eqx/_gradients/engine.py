"""The transform that all operators share: options, parts, order of results."""

import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx

from .._tree.missing import MISSING
from .call import Call
from .finite import raise_if_not_finite
from .inputs import (
    ArgPart,
    find_positions,
    GradStates,
    parse_argnums,
    parse_grad_states,
    RefPart,
    StatePart,
)
from .rules import Operator


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
        states, arg_parts = self._find_parts(args)
        call = Call(
            self.operator,
            self.cotangent,
            self.func,
            self.has_aux,
            states,
            arg_parts,
            isinstance(self.argnums, tuple),
            args,
            kwargs,
        )
        diff_out, grads, arrays = call.differentiate(self.check_states)
        if self.debug_nan:
            raise_if_not_finite(*call.name_blocks(grads), f"{self.name}(debug_nan=True)")
        call.write_states()
        value, aux = call.output.join(diff_out, arrays)
        results = [self._order(call.collect(grads, self.unit_aware))]
        if self.return_value:
            results.append(value)
        if self.has_aux:
            results.append(aux)
        return results[0] if len(results) == 1 else tuple(results)

    def _find_parts(
        self, args: tuple[Any, ...]
    ) -> tuple[StatePart | RefPart | None, list[ArgPart]]:
        states = None
        if self.grad_states is not None:
            caller = f"{self.name}(grad_states=...)"
            if self.grad_states.by_reference:
                states = RefPart(self.grad_states, caller)
            else:
                states = StatePart(self.func, args, self.grad_states, caller)
            if self.argnums is None:
                return states, []
        elif not args:
            raise TypeError(
                f"`{self.name}` differentiates positional arguments of `func`. Got none. "
                "Pass the argument by position, not by keyword."
            )
        caller = f"{self.name}(argnums=...)"
        argnums = 0 if self.argnums is None else self.argnums
        positions = find_positions(argnums, len(args), states, caller)
        return states, [ArgPart(args, position, caller) for position in positions]

    def _order(self, grads: list[Any]) -> Any:
        var_grads = [] if self.grad_states is None else [grads.pop(0)]
        if isinstance(self.argnums, tuple):
            grads = [tuple(grads)]
        results = [*var_grads, *grads]
        return results[0] if len(results) == 1 else tuple(results)


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
