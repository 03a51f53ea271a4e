"""A function over states by reference, as a function of their values."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import jax

from .._optimizers.state_optimizer import StateOptimizer
from .._references.overlay import call_with
from .._tree.state import find_stand_in, list_content, read, State
from .._tree.types import PyTree
from .._tree.units import attach_unit, split_unit
from .loss import make_loss


class UnknownStates(Exception):
    """Raised when the function uses states whose values are not in the carry yet."""

    def __init__(self, refs: Sequence[jax.Ref]):
        super().__init__()
        self.refs = refs


class StateFunction:
    """`func` as a function `(params, others, *batch) -> (value, (others, (aux, written)))`.

    `params` are the values of the trained states by name, and `others` those of all other
    references that `func` uses, in a list. `written` are the trained states that it sets.
    """

    def __init__(self, options: Any, optimizer: StateOptimizer):
        self._values = values = optimizer.find_values()
        self.trained = dict(zip(values.names, values.refs.values(), strict=True))
        self.others: list[jax.Ref] = []
        # A weak reference to the `vg.State` of each of these, or `None` for a bare `jax.Ref`.
        self.owners: list[Callable[[], State | None] | None] = []
        self._options = options
        self._func = make_loss(options.func, options.has_aux)

    @property
    def _refs(self) -> list[jax.Ref]:
        return [*self.trained.values(), *self.others]

    @property
    def _key(self) -> Any:
        return *self.trained, *map(id, self._refs)

    # Equal for the same states, so that a training step reuses its compiled program.
    def __eq__(self, other: Any) -> bool:
        return isinstance(other, StateFunction) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def extend(self, unknown: UnknownStates) -> tuple["StateFunction", list[Any]]:
        """A function that takes the values of more states, and their current values."""
        known = set(map(id, self._refs))
        new = [ref for ref in unknown.refs if id(ref) not in known]
        extended = copy.copy(self)
        extended.others = [*self.others, *new]
        owners = [None if each is None else each.state for each in map(find_stand_in, new)]
        extended.owners = [*self.owners, *owners]
        return extended, list(map(read, new))

    def name_others(self) -> dict[str, int]:
        """The places of the other references by name, or in order if they have no name.

        States that have been garbage-collected are left out.
        """
        states = [None if owner is None else owner() for owner in self.owners]
        places = [
            i for i, owner in enumerate(self.owners) if owner is None or states[i] is not None
        ]
        names = [_find_name(self.others[i], states[i]) for i in places]
        return {
            name if name and names.count(name) == 1 else str(k): places[k]
            for k, name in enumerate(names)
        }

    def __call__(
        self, params: dict[str, Any], others: Sequence[Any], *batch: PyTree, **kwargs: object
    ) -> Any:
        numbers = [split_unit(params[name])[0] for name in self.trained]
        values = dict(zip(map(id, self._refs), [*numbers, *others], strict=True))
        called = call_with(lambda: self._func(*batch, **kwargs), values)
        if self._options.check_states:
            caller = "train_step(grad_states=...)"
            self._values.refuse_untouched(called.refs.values(), caller)
        unknown = [ref for key, ref in called.refs.items() if key not in values]
        if unknown:
            raise UnknownStates(unknown)
        value, aux = called.output if self._options.has_aux else (called.output, None)
        values.update(called.finals)
        written = {
            name: attach_unit(values[id(ref)], split_unit(params[name])[1])
            for name, ref in self.trained.items()
            if id(ref) in called.finals
        }
        return value, ([values[id(ref)] for ref in self.others], (aux, written))


def _find_name(ref: jax.Ref, state: State | None) -> str | None:
    if state is None or state.name is None:
        return None
    content = list_content(state, state.name).items()
    return next(name for name, leaf in content if split_unit(leaf)[0] is ref)
