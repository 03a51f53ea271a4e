"""A function over states by reference, as a function of their values."""

import copy
from collections.abc import Sequence
from typing import Any

import jax

from .._optimizers.state_optimizer import StateOptimizer
from .._references.trace import Trace, trace
from .._tree.cache import Cache
from .._tree.flat import Split, split_arrays
from .._tree.state import read
from .._tree.units import attach_unit, split_unit
from .accumulation import is_array
from .loss import make_loss


class UnknownStates(Exception):
    """The function uses states whose values are not carried yet."""

    def __init__(self, refs: Sequence[jax.Ref]):
        super().__init__()
        self.refs = refs


class StateFunction:
    """`func` as a function `(params, others, *batch) -> (value, (others, (aux, written)))`.

    `params` are the values of the trained states by name, and `others` those of all other
    references that `func` uses, in a list. `written` are the trained states that it sets.
    """

    def __init__(self, options: Any, optimizer: StateOptimizer):
        self.optimizer = optimizer
        values = optimizer.find_values()
        self.trained = dict(zip(values.names, values.refs.values(), strict=True))
        self.others: list[jax.Ref] = []
        self._options = options
        self._func = make_loss(options.func, options.has_aux)
        self._traces = Cache()

    def extend(self, unknown: UnknownStates) -> tuple["StateFunction", list[Any]]:
        """One that takes the values of more states, and the values that these have now."""
        known = {id(ref) for ref in (*self.trained.values(), *self.others)}
        new = [ref for ref in unknown.refs if id(ref) not in known]
        extended = copy.copy(self)
        extended.others = [*self.others, *new]
        return extended, list(map(read, new))

    def __call__(
        self, params: dict[str, Any], others: Sequence[Any], *batch: Any, **kwargs: Any
    ) -> Any:
        inputs = split_arrays((batch, kwargs), is_array)
        traced = self._trace(inputs)
        numbers = [split_unit(params[name])[0] for name in self.trained]
        refs = [*self.trained.values(), *self.others]
        values = dict(zip(map(id, refs), [*numbers, *others], strict=True))
        if any(id(ref) not in values for ref in traced.refs):
            raise UnknownStates(traced.refs)
        out, finals = traced.call(inputs.diff, values)
        value, aux = out if self._options.has_aux else (out, None)
        values.update(zip(map(id, traced.written), finals, strict=True))
        written = {
            name: attach_unit(values[id(ref)], split_unit(params[name])[1])
            for name, ref in self.trained.items()
            if any(ref is each for each in traced.written)
        }
        return value, ([values[id(ref)] for ref in self.others], (aux, written))

    def _trace(self, inputs: Split) -> Trace:
        rest = inputs.rest
        key = (rest.structure, tuple(rest.constants), tuple(map(jax.typeof, inputs.diff)))
        traced = self._traces.get(key)
        if traced is None:

            def call(*arrays: Any) -> Any:
                args, kwargs = rest.combine(arrays)
                return self._func(*args, **kwargs)

            traced = trace(call, inputs.diff)
            self._traces.set(key, traced)
            if self._options.check_states:
                values = self.optimizer.find_values()
                values.refuse_untouched(traced.refs, "train_step(grad_states=...)")
        return traced
