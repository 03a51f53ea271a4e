"""The transform that all operators share: options, parts, order of results."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import equinox as eqx

from ._debug import raise_if_not_finite
from ._memory import Memory
from ._output import Output, split_output
from ._parts import ArgPart, find_positions, Part, StatePart
from ._trace import describe_call, stage


# Takes a function of flat arrays, which returns a tuple to differentiate and a tuple of
# other arrays, and its arguments. Returns the first tuple, a gradient for each argument,
# and the second tuple.
Rule = Callable[[Callable[..., Any], Sequence[Any]], tuple[Any, Sequence[Any], Any]]

# Calls in which every selected leaf was found to matter, or that cannot be traced.
_checked = Memory()


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
    grad_states: Any
    rule: Rule = eqx.field(static=True)
    name: str = eqx.field(static=True)
    argnums: int | tuple[int, ...] | None = eqx.field(static=True)
    return_value: bool = eqx.field(static=True)
    has_aux: bool | None = eqx.field(static=True)
    unit_aware: bool = eqx.field(static=True)
    check_states: bool = eqx.field(static=True)
    debug_nan: bool = eqx.field(static=True)

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        return self.func

    def __get__(self, instance: Any, owner: Any) -> Any:
        return self if instance is None else eqx.Partial(self, instance)

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        states, arg_parts = self._find_parts(args)
        parts = [*([] if states is None else [states]), *arg_parts]
        call = _Call(self, parts, args, kwargs)
        diff_out, grads, arrays = self._differentiate(call, states)
        if self.debug_nan:
            names = [name for part in parts for name in part.names]
            raise_if_not_finite(grads, names, f"{self.name}(debug_nan=True)")
        value, aux = call.output.join(diff_out, arrays)
        results = [self._order(states, call.collect(grads))]
        if self.return_value:
            results.append(value)
        if self.has_aux:
            results.append(aux)
        return results[0] if len(results) == 1 else tuple(results)

    def _find_parts(self, args: tuple[Any, ...]) -> tuple[StatePart | None, list[ArgPart]]:
        states = None
        if self.grad_states is not None:
            caller = f"{self.name}(grad_states=...)"
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

    def _differentiate(self, call: "_Call", states: StatePart | None) -> tuple[Any, Any, Any]:
        def differentiate(*diff: Any) -> tuple[Any, Any, Any]:
            return self.rule(call.run, diff)

        if states is None or not self.check_states:
            return differentiate(*call.diff)
        description = self._describe(call, states)
        if description in _checked:
            return differentiate(*call.diff)
        # The rule is traced along with `func`, so that `func` is called only once, and JAX
        # differentiates it as it always does, which is twice as fast as differentiating a
        # jaxpr: the traced gradient only has to be replayed.
        staged = stage(differentiate, call.diff)
        if staged is None:
            results = differentiate(*call.diff)
        else:
            self._check_used(staged.find_unused(len(call.output.diff_indices)), states)
            results = staged(*call.diff)
        if description is not None:
            _checked[description] = True
        return results

    def _describe(self, call: "_Call", states: StatePart) -> Any:
        described = describe_call(self.func, call.args, call.kwargs)
        return described and (described, tuple(states.indices), self.has_aux)

    def _check_used(self, unused: Sequence[int], states: StatePart) -> None:
        names = [f"`{name}`" for i, name in enumerate(states.names) if i in unused]
        if names:
            raise ValueError(
                f"`{self.name}(grad_states=...)` must select leaves on which the output of "
                f"`func` depends. It does not depend on {', '.join(names)}. Narrow the "
                "selector, or pass `check_states=False` to get zeros."
            )

    def _order(self, states: StatePart | None, grads: list[Any]) -> Any:
        var_grads = [] if states is None else [grads.pop(0)]
        if isinstance(self.argnums, tuple):
            grads = [tuple(grads)]
        results = [*var_grads, *grads]
        return results[0] if len(results) == 1 else tuple(results)


class _Call:
    """One call of a function, as a function of the leaves that are differentiated."""

    output: Output

    def __init__(
        self,
        transform: GradientTransform,
        parts: Sequence[Part],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ):
        self.transform = transform
        self.parts = parts
        self.args = args
        self.kwargs = kwargs
        self.diff = [leaf for part in parts for leaf in part.diff]

    def run(self, *diff: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """The inexact leaves of the output, and all its other arrays."""
        func, args = self.transform.func, list(self.args)
        for part, values in self._share(diff):
            func = part.insert(func, args, values)
        value, aux = func(*args, **self.kwargs), None
        if self.transform.has_aux:
            value, aux = _split_pair(value, self.transform.name)
        diff_out, arrays, self.output = split_output(value, aux, self.transform.name)
        return diff_out, arrays

    def collect(self, grads: Sequence[Any]) -> list[Any]:
        """The gradients of each part, as the user is to see them."""
        return [part.collect(values) for part, values in self._share(grads)]

    def _share(self, values: Sequence[Any]) -> Iterator[tuple[Part, Sequence[Any]]]:
        start = 0
        for part in self.parts:
            stop = start + len(part.diff)
            yield part, values[start:stop]
            start = stop


def _split_pair(out: Any, name: str) -> tuple[Any, Any]:
    if not isinstance(out, tuple | list) or len(out) != 2:
        raise TypeError(
            f"`{name}(has_aux=True)` needs a `func` that returns a pair `(value, aux)`. Got "
            f"{eqx.tree_pformat(out)}."
        )
    value, aux = out
    return value, aux
