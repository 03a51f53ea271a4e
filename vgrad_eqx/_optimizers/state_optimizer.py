"""The counterpart of `Optimizer` for states by reference."""

import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.tree_util as jtu
from jax.typing import ArrayLike

from .._references.overlay import call_with
from .._references.values import StateValues
from .._select.grad_states import parse_grad_states
from .._tree.flat import refuse_endless
from .._tree.prompt import AtPrompt, write_call
from .._tree.sharding import spread
from .._tree.state import is_reference, refuse_brainstate, State, write_all
from .._tree.text import show
from .._tree.types import PyTree
from .._tree.units import split_unit
from .optimizer import advance, check_structure, Optimizer
from .partition import check_tx, map_extra_args, TxLike


class StateOptimizer(AtPrompt, eqx.Module):
    """An optax transformation that updates states by reference, in place.

    The counterpart of [`vgrad_eqx.Optimizer`][]. It keeps the state of the transformation in a
    [`vgrad_eqx.State`][], so compiled functions can close over it and take steps.

    **Arguments:**

    - `tx`: as in [`vgrad_eqx.Optimizer`][]. The selectors of groups are applied to the paths of
        the states in `states`, such as `"layers.*.weight"` in a dict returned by
        [`vgrad_eqx.states`][].
    - `states`: a [`vgrad_eqx.State`][] or `jax.Ref`, or a pytree of them, as passed to
        `grad_states` of [`vgrad_eqx.vector_grad`][].

    **Returns:**

    An optimizer. It has the optax `opt_state`, the `count` of steps, the `hyperparams` kept by
    `optax.inject_hyperparams`, and the methods `step`, `params` and `set_hyperparams`.

    **Raises:**

    - `TypeError`: if `states` has no state, or one that contains no inexact array; and as
        [`vgrad_eqx.Optimizer`][].
    - `ValueError`: if two states have the same path; and as [`vgrad_eqx.Optimizer`][].

    **Example:**

        >>> import jax, jax.numpy as jnp, optax
        >>> import vgrad_eqx as vg
        >>> w = vg.State(jnp.array([3.0, 4.0]))
        >>> opt = vg.StateOptimizer(optax.sgd(0.25), {"w": w})
        >>> @jax.jit
        ... def step():
        ...     opt.step(vg.vector_grad(lambda _: w.value**2, {"w": w})(None))
        >>> step(), w.value.tolist(), int(opt.count)
        (None, [1.5, 2.0], 1)
    """

    states: Any
    memory: State[Optimizer]

    def __init__(self, tx: TxLike, states: PyTree):
        check_tx(tx, "StateOptimizer(tx=...)")
        caller = "StateOptimizer(states=...)"
        refuse_endless(states)
        leaves = jtu.tree_leaves(states, is_leaf=is_reference)
        refuse_brainstate(leaves, caller)
        if not any(map(is_reference, leaves)):
            raise TypeError(
                f"`{caller}` must be a `vg.State` or `jax.Ref`, or a pytree of them. Got "
                f"{show(states)}. For the leaves of a module, use "
                "`vg.Optimizer`."
            )
        self.states = states
        values = self.find_values()
        if len(set(values.names)) < len(values.names):
            twice = max(values.names, key=values.names.count)
            raise ValueError(
                f"`StateOptimizer(states=...)` must have names that differ. Got `{twice}` "
                "twice. Rename one of the keys."
            )
        optimizer = Optimizer(tx, dict(zip(values.names, values.params, strict=True)))
        # A compiled function takes references on the same devices only.
        arrays, structure = jtu.tree_flatten(optimizer)
        optimizer = jtu.tree_unflatten(structure, spread(arrays, values.diff))
        self.memory = State(optimizer, "the memory of an optimizer")

    _inner = frozenset({"find_values", "memory", "states"})

    def __repr__(self) -> str:
        return write_call("StateOptimizer", self.states)

    @property
    def opt_state(self) -> Any:
        return self.memory.value.opt_state

    @property
    def count(self) -> jax.Array:
        return self.memory.value.count

    @property
    def hyperparams(self) -> dict[str, Any]:
        """As in [`vgrad_eqx.Optimizer`][]."""
        return self.memory.value.hyperparams

    def set_hyperparams(self, group: str | None = None, /, **values: ArrayLike) -> None:
        """Changes hyperparameters in place, with the arguments of [`vgrad_eqx.Optimizer`][]."""
        self.memory.value = self.memory.value.set_hyperparams(group, **values)

    def params(self) -> dict[str, Any]:
        """Returns the arrays that are updated, by the paths of their states."""
        values = self.find_values()
        return dict(zip(values.names, values.params, strict=True))

    def step(self, var_grads: PyTree, **extra_args: object) -> None:
        """Updates the states along their gradients, in place.

        **Arguments:**

        - `var_grads`: the gradients, with the structure of `states`, as returned by
            [`vgrad_eqx.vector_grad`][].
        - `extra_args`: extra arguments of the transformation, as in [`vgrad_eqx.Optimizer`][].
            `grad` and the result of `grad_fn` have the structure of `var_grads`. Functions
            close over the states, so `value_fn` takes no argument.

        **Raises:**

        - `ValueError`: if `var_grads` differs from `states` in structure, or a gradient from
            its state in shape. Nothing is updated then.
        """
        caller = "StateOptimizer.step"
        values = self.find_values()
        params = dict(zip(values.names, values.params, strict=True))
        grads = self._name(values, var_grads, f"{caller}(var_grads=...)")
        extra_args = {
            name: _over_params(each, values)
            if name.endswith("_fn") and callable(each)
            else each
            for name, each in extra_args.items()
        }
        extra_args = map_extra_args(
            extra_args,
            lambda params: params,
            lambda grads: self._name(values, grads, f"{caller}(grad=...)"),
        )
        old = self.memory.value
        params, optimizer = advance(old, params, grads, extra_args, caller)
        check_structure(old, optimizer, "StateOptimizer", "Use `vg.Optimizer` for it.")
        numbers = [split_unit(params[name])[0] for name in values.names]
        refs = [*values.refs.values(), *self.memory.refs]
        write_all(refs, [*numbers, *jtu.tree_leaves(optimizer)])

    def find_values(self) -> StateValues:
        """The references in the states, and their values."""
        caller = "StateOptimizer(states=...)"
        grad_states = parse_grad_states(self.states, caller)
        assert grad_states is not None
        return StateValues(grad_states, caller)

    def _name(self, values: StateValues, grads: PyTree, caller: str) -> dict[str, Any]:
        try:
            return dict(zip(values.names, values.list_gradients(grads), strict=True))
        except ValueError as error:
            raise ValueError(
                f"`{caller}` must have the structure of the states, "
                f"{show(self.states)}. Got {show(grads)}."
            ) from error


def _over_params(value_fn: Callable[..., Any], values: StateValues) -> Callable[..., Any]:
    """Turns a function that closes over states into a function of their values, by name."""

    @ft.wraps(value_fn)  # optax reads the names of its arguments
    def evaluate(params: dict[str, Any], *args: object, **kwargs: object) -> Any:
        numbers = [split_unit(params[name])[0] for name in values.names]
        by_id = dict(zip(values.refs, numbers, strict=True))
        return call_with(ft.partial(value_fn, *args, **kwargs), by_id).output

    return evaluate
