"""One call of a function that is differentiated, and the way it goes: directly, or traced."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import equinox as eqx
import jax

from ._memory import Memory
from ._output import Output, split_output
from ._parts import ArgPart, Part, RefPart, StatePart
from ._state import read, write
from ._trace import describe_call, Trace, trace
from ._units import attach_unit, divide_units, scale_number, split_unit


# Takes a function of flat arrays, which returns a tuple to differentiate and other arrays,
# and its arguments. Returns the first tuple, a gradient for each argument, and the others.
Rule = Callable[[Callable[..., Any], Sequence[Any]], tuple[Any, Sequence[Any], Any]]

# Calls that touch no state by reference, and of which all selected leaves matter.
_known = Memory()

_LOOKS_AT_VALUES = (
    jax.errors.ConcretizationTypeError,
    jax.errors.NonConcreteBooleanIndexError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)


class Call:
    """A function with its arguments, as a function of the values to differentiate by."""

    output: Output

    def __init__(
        self,
        name: str,
        func: Callable[..., Any],
        has_aux: bool | None,
        states: StatePart | RefPart | None,
        arg_parts: Sequence[ArgPart],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ):
        self._name = name
        self._func = func
        self._has_aux = has_aux
        self._states = states
        self._parts: list[Part] = [*([] if states is None else [states]), *arg_parts]
        self._args = args
        self._kwargs = kwargs
        leaves = [split_unit(leaf) for part in self._parts for leaf in part.diff]
        self._diff = [number for number, _ in leaves]
        self._units = [unit for _, unit in leaves]
        self._finals: list[tuple[jax.Ref, Any]] = []

    @property
    def names(self) -> list[str]:
        return [name for part in self._parts for name in part.names]

    def differentiate(self, rule: Rule, check_states: bool) -> tuple[Any, Any, Any]:
        """Does what the rule does, and checks before. States are not written yet."""
        checked = check_states and self._states is not None
        description = self._describe(checked)
        if description is not None and description in _known:
            return rule(self._run, self._diff)
        # `func` is called only once: what was traced is replayed, and JAX differentiates that.
        traced = trace(self._run, self._diff)
        by_reference = isinstance(self._states, RefPart) or bool(traced.refs)
        if traced.error is not None and by_reference:
            self._raise(traced.error)
        if traced.error is None and checked:
            self._check(traced)
        if description is not None and not by_reference:
            _known[description] = True
        if traced.error is not None:
            del traced  # its error holds tracers
            return rule(self._run, self._diff)
        diff_out, grads, (arrays, finals) = rule(self._make_replay(traced), self._diff)
        self._finals = list(zip(traced.written, finals, strict=True))
        return diff_out, grads, arrays

    def write_states(self) -> None:
        """Gives the states by reference the values that `func` has left in them."""
        for ref, final in self._finals:
            write(ref, final, "A state that `func` sets")

    def collect(self, grads: Sequence[Any], unit_aware: bool) -> list[Any]:
        """The gradients of each part, as the user is to see them."""
        grads = list(grads)
        for i, by in enumerate(self._units):
            factor, unit = divide_units(self.output.unit, by)
            number = scale_number(grads[i], factor)
            grads[i] = attach_unit(number, unit) if unit_aware else number
        return [part.collect(values) for part, values in self._share(grads)]

    def _run(self, *diff: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """The inexact leaves of the output, and all its other arrays."""
        func, args = self._func, list(self._args)
        for part, values in self._share(list(map(attach_unit, diff, self._units))):
            func = part.insert(func, args, values)
        value, aux = func(*args, **self._kwargs), None
        if self._has_aux:
            value, aux = _split_pair(value, self._name)
        diff_out, arrays, self.output = split_output(value, aux, self._name)
        return diff_out, arrays

    def _share(self, values: Sequence[Any]) -> Iterator[tuple[Part, Sequence[Any]]]:
        start = 0
        for part in self._parts:
            stop = start + len(part.diff)
            yield part, values[start:stop]
            start = stop

    def _make_replay(self, traced: Trace) -> Callable[..., Any]:
        """The function again, which returns what it leaves in states as well."""
        trained = self._states.refs if isinstance(self._states, RefPart) else {}
        others = {id(ref): read(ref) for ref in traced.refs if id(ref) not in trained}

        def replay(*diff: Any) -> tuple[Any, tuple[Any, list[Any]]]:
            values = {**others, **dict(zip(trained, diff, strict=False))}
            (diff_out, arrays), finals = traced.call(diff, values)
            return diff_out, (arrays, finals)

        return replay

    def _describe(self, checked: bool) -> Any:
        if isinstance(self._states, RefPart):
            return None
        described = describe_call(self._func, self._args, self._kwargs)
        selected = () if self._states is None else tuple(self._states.indices)
        return described and (described, selected, self._has_aux, checked)

    def _check(self, traced: Trace) -> None:
        """Refuses states that do not matter."""
        if isinstance(self._states, RefPart):
            untouched = self._states.find_untouched(traced.refs)
            if untouched:
                raise ValueError(
                    f"`{self._name}(grad_states=...)` must name states that `func` reads. It "
                    f"does not touch {'; '.join(untouched)}. Leave them out, or pass "
                    "`check_states=False` to get zeros."
                )
        elif self._states is not None:
            if traced.written:  # what only reaches a state does not reach the output
                traced = trace(self._make_replay(traced), self._diff)
            unused = traced.find_unused(len(self.output.places))
            names = [f"`{name}`" for i, name in enumerate(self._states.names) if i in unused]
            if names:
                raise ValueError(
                    f"`{self._name}(grad_states=...)` must select leaves on which the output "
                    f"of `func` depends. It does not depend on {', '.join(names)}. Narrow the "
                    "selector, or pass `check_states=False` to get zeros."
                )

    def _raise(self, error: Exception) -> NoReturn:
        if not isinstance(error, _LOOKS_AT_VALUES):
            raise error
        raise TypeError(
            f"`{self._name}` traces `func`, because it uses states by reference. So `func` "
            "cannot decide by the value of an array, as `if`, `bool`, `int`, `float` and NumPy "
            "do. Use `jnp.where`, `jax.lax.cond` or `jax.lax.while_loop`, or decide by a "
            "Python number that is passed as an argument."
        ) from error


def _split_pair(out: Any, name: str) -> tuple[Any, Any]:
    if not isinstance(out, tuple | list) or len(out) != 2:
        raise TypeError(
            f"`{name}(has_aux=True)` needs a `func` that returns a pair `(value, aux)`. Got "
            f"{eqx.tree_pformat(out)}."
        )
    value, aux = out
    return value, aux
