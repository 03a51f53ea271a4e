"""The training step of a function over states by reference."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu

from .._optimizers.state_optimizer import StateOptimizer
from .._references.trace import Trace, trace
from .._tree.cache import Cache
from .._tree.state import read, State, write
from .._tree.units import attach_unit, split_unit
from .accumulation import accumulate, Result
from .flat_step import FlatStep, list_kinds, Metrics, name_key, Options, strip_key


class UnknownStates(Exception):
    """The function uses states whose values are not carried yet."""

    def __init__(self, refs: Sequence[jax.Ref]):
        super().__init__()
        self.refs = refs


class StateStep(FlatStep):
    """States are trained. The values of all that the function uses are carried.

    Written down with states, as one would by hand, the step is traced; and the trace is called
    with values instead of the states.
    """

    def __init__(
        self,
        owner: Any,
        options: Options,
        optimizer: StateOptimizer,
        key: Any,
        others: Sequence[jax.Ref] = (),
        traces: Cache | None = None,
    ):
        self.state_optimizer = optimizer
        self._key = key
        self._others = list(others)
        self._traces = Cache() if traces is None else traces
        values, memory = optimizer.find_values(), optimizer.memory
        self._names = values.names
        self._units = values.units
        self._key_state = None if key is None else State(*strip_key(key))
        keys = [] if self._key_state is None else self._key_state.refs
        *of_state, self._count = memory.refs
        self.refs = [*values.refs.values(), *of_state, *keys, *others]
        arrays = list(map(read, self.refs))
        kinds = list_kinds(len(values.diff), memory.value)
        super().__init__(owner, options, kinds, arrays, key)
        self._transform = self.make_gradient(options.func, optimizer.states, options.has_aux)

    def start(self) -> tuple[Any, ...]:
        """The values that the states have now."""
        return self.enter(list(map(read, self.refs)))

    def extend(self, leaves: Sequence[Any], refs: Sequence[jax.Ref]) -> Any:
        """A step that carries the values of more states, and its leaves."""
        known = {id(self._count), *map(id, self.refs)}
        new = [ref for ref in refs if id(ref) not in known]
        flat_step = StateStep(
            self.owner,
            self.options,
            self.state_optimizer,
            self._key,
            [*self._others, *new],
            self._traces,
        )
        values = [*self.unpack(leaves), *map(read, new)]
        return flat_step, flat_step.enter(values)

    def once(self, arrays: list[Any], frozen: Any, batch: Any) -> tuple[list[Any], Metrics]:
        inputs, structure = jtu.tree_flatten(batch)
        traced = self._trace(inputs, structure)
        values = {id(ref): array for ref, array in zip(self.refs, arrays, strict=True)}
        values[id(self._count)] = jnp.zeros((), jnp.int32)
        if any(id(ref) not in values for ref in traced.refs):
            raise UnknownStates(traced.refs)
        metrics, finals = traced.call(inputs, values)
        values.update(zip(map(id, traced.written), finals, strict=True))
        return [values[id(ref)] for ref in self.refs], metrics

    def _trace(self, inputs: Sequence[Any], structure: Any) -> Trace:
        key = (structure, tuple(map(jax.typeof, inputs)))
        traced = self._traces.get(key)
        if traced is None:
            traced = trace(lambda *leaves: self._step(structure.unflatten(leaves)), inputs)
            self._traces.set(key, traced)
        return traced

    def _step(self, batch: Sequence[Any]) -> Metrics:
        """Takes one step with states."""
        subkey = None
        if self._key_state is not None:
            (self._key_state.value,), subkey = self.split_key([self._key_state.value])
        values = self.state_optimizer.find_values()

        def differentiate(_: Any, key: Any, batch: Sequence[Any]) -> Result:
            var_grads, value, *rest = self._transform(*batch, **name_key(key))
            return Result(
                values.list_gradients(var_grads), value, rest[0] if rest else None, None
            )

        def evaluate() -> Any:
            def value(_: Any, key: Any, batch: Sequence[Any]) -> Result:
                out = self.options.func(*batch, **name_key(key))
                return Result([], out[0] if self.options.has_aux else out, None, None)

            return self.average(self._accumulate(value, [], subkey, batch).value)

        result = self._accumulate(differentiate, values.params, subkey, batch)
        var_grads = values.arrange(result.grads)
        value = self.average(result.value)
        self.state_optimizer.step(var_grads, value=value, grad=var_grads, value_fn=evaluate)
        return self.measure(result.value, result.aux, var_grads)

    def _accumulate(self, part: Any, params: Any, key: Any, batch: Sequence[Any]) -> Result:
        return accumulate(part, params, self.options.accumulate, None, key, batch)

    def sync(self, leaves: Sequence[Any], count: int) -> None:
        """Gives the states the values that are carried."""
        arrays = [*self.copy(leaves, slice(None)), jnp.asarray(count, jnp.int32)]
        for ref, array in zip([*self.refs, self._count], arrays, strict=True):
            write(ref, jax.device_put(array, ref.sharding), "A state")

    def get_optimizer(self, leaves: Sequence[Any], count: int) -> Any:
        """The optimizer of the values, by name."""
        arrays = self.copy(leaves, self.opt_state)
        return self._build_optimizer([*arrays, jnp.asarray(count, jnp.int32)])

    def _build_optimizer(self, arrays: Sequence[Any]) -> Any:
        return self.state_optimizer.memory.content.rest.combine(arrays)

    def to_tree(self, leaves: Sequence[Any], frozen: Sequence[Any]) -> dict[str, Any]:
        """All arrays by name, for a checkpoint."""
        arrays = self.unpack(leaves)
        params = map(attach_unit, arrays[self.params], self._units)
        optimizer = self._build_optimizer([*arrays[self.opt_state], None])
        return {
            "states": dict(zip(self._names, params, strict=True)),
            "opt_state": optimizer.opt_state,
            "key": list(map(self.wrap_key, arrays[self.key])),
            "others": arrays[self.others],
        }

    def from_tree(self, tree: dict[str, Any]) -> tuple[tuple[Any, ...], list[Any]]:
        """The inverse of `to_tree`."""
        params = [split_unit(tree["states"][name])[0] for name in self._names]
        keys = [data for key in tree["key"] for data in strip_key(key)]
        opt_state = jtu.tree_leaves(tree["opt_state"])
        return self.enter([*params, *opt_state, *keys, *tree["others"]]), []
