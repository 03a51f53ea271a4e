"""One call of a function that is differentiated, and the way it goes: directly, or traced."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu

from .._references.trace import describe_call, Trace, trace
from .._select.resolve import shorten
from .._tree.cache import Memory
from .._tree.flat import is_any_traced
from .._tree.state import read, write
from .._tree.units import attach_unit, divide_units, find_quotient, scale_number, split_unit
from .cotangent import parse_cotangent
from .inputs import ArgPart, Part, RefPart, StatePart
from .outputs import Output, split_output
from .rules import Context, Operator


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
    cotangent_unit: Any = None

    def __init__(
        self,
        operator: Operator,
        cotangent: Any,
        func: Callable[..., Any],
        has_aux: bool | None,
        states: StatePart | RefPart | None,
        arg_parts: Sequence[ArgPart],
        many_args: bool,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ):
        self._operator = operator
        self._name = operator.name
        self._cotangent = cotangent
        self._func = func
        self._has_aux = has_aux
        self._states = states
        self._many_args = many_args
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

    def differentiate(self, check_states: bool) -> tuple[Any, Any, Any]:
        """Does what the rule does, and checks before. States are not written yet."""
        checked = check_states and self._states is not None
        description = self._describe(checked)
        if description is not None and description in _known:
            return self._apply(self._run, self._diff)
        if description is not None and not check_states and is_any_traced(self._diff):
            result = self._differentiate_whole()
            if result is not None:
                _known[description] = True
                return result
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
            return self._apply(self._run, self._diff)
        diff_out, grads, (arrays, finals) = self._apply(
            self._make_replay(traced), self._diff, is_replay=True
        )
        self._finals = list(zip(traced.written, finals, strict=True))
        return diff_out, grads, arrays

    def _differentiate_whole(self) -> Any:
        """Traces the gradient at once, or gives `None` where `func` has to be looked at before.

        That is where it uses references, which are among the effects, and where it fails.
        """
        whole = jax.jit(lambda *diff: self._apply(self._run, diff))
        try:
            if whole.trace(*self._diff).jaxpr.effects:
                return None
        except Exception:
            return None
        return whole(*self._diff)  # as it was traced

    def write_states(self) -> None:
        """Gives the states by reference the values that `func` has left in them."""
        for ref, final in self._finals:
            write(ref, final, "A state that `func` sets")

    def _apply(
        self, func: Callable[..., Any], diff: Sequence[Any], is_replay: bool = False
    ) -> tuple[Any, Any, Any]:
        def seed(value: Sequence[Any], arrays: Any) -> Sequence[Any]:
            """The cotangents of the outputs, which are ones if nothing else is given."""
            if self._cotangent is None:
                return tuple(map(jnp.ones_like, value))
            output, _ = self.output.join(value, arrays[0] if is_replay else arrays)
            given = parse_cotangent(self._cotangent, output, self.output, self._name)
            numbers, self.cotangent_unit = given
            return numbers

        return self._operator.rule(func, diff, Context(self.names, seed))

    def collect(self, grads: Any, unit_aware: bool) -> list[Any]:
        """The derivatives by each part, as the user is to see them."""
        if self._operator.adds_up:
            unit = self.output.units[0] if self._cotangent is None else self.cotangent_unit
            return self._collect_row(grads, unit, unit_aware)
        rows = [
            self._collect_row(row, unit, unit_aware)
            for row, unit in zip(grads, self.output.units, strict=True)
        ]
        return [self.output.fill(entries) for entries in zip(*rows, strict=True)]

    def _collect_row(self, row: Sequence[Any], unit: Any, unit_aware: bool) -> list[Any]:
        """The derivatives of one output, or of the sum of all."""
        if self._operator.order == 1:
            grads = self._attach_units(row, unit, unit_aware)
            return [part.collect(values) for part, values in self._share(grads)]
        units = [find_quotient(unit, by) for by in self._units]
        pairs = list(zip(row, units, strict=True))
        return [
            part.collect([self._collect_second(part, pair, unit_aware) for pair in values])
            for part, values in self._share(pairs)
        ]

    def _collect_second(
        self, part: Part, derivative: tuple[Sequence[Any], Any], unit_aware: bool
    ) -> Any:
        """The derivatives of one derivative, in its unit, by the same part."""
        row, unit = derivative
        grads = self._attach_units(row, unit, unit_aware)
        collected = [(each, each.collect(values)) for each, values in self._share(grads)]
        if part is self._states:
            return collected[0][1]
        entries = [entry for each, entry in collected if each is not self._states]
        return tuple(entries) if self._many_args else entries[0]

    def _attach_units(self, row: Sequence[Any], unit: Any, unit_aware: bool) -> list[Any]:
        grads = []
        for number, by in zip(row, self._units, strict=True):
            quotient = unit
            for _ in range(1, self._operator.power):
                quotient = find_quotient(quotient, by)
            factor, quotient = divide_units(quotient, by)
            number = scale_number(number, factor)
            grads.append(attach_unit(number, quotient) if unit_aware else number)
        return grads

    def name_blocks(self, grads: Any) -> tuple[list[Any], list[str]]:
        """All derivatives, and the path by which each of them is."""
        rows = [grads] if self._operator.adds_up else grads
        pairs = [pair for row in rows for pair in zip(row, self.names, strict=True)]
        flat = [(array, name) for block, name in pairs for array in jtu.tree_leaves(block)]
        return [array for array, _ in flat], [name for _, name in flat]

    def _run(self, *diff: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """The inexact leaves of the output, and all its other arrays."""
        func, args = self._func, list(self._args)
        for part, values in self._share(list(map(attach_unit, diff, self._units))):
            func = part.insert(func, args, values)
        value, aux = func(*args, **self._kwargs), None
        if self._has_aux:
            value, aux = _split_pair(value, self._name)
        adds_up = self._operator.adds_up and self._cotangent is None
        diff_out, arrays, self.output = split_output(value, aux, self._name, adds_up)
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
                    f"of `func` depends. It does not depend on {shorten(names)}. Narrow the "
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
