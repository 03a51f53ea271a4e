"""What a training step takes and returns."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.tree_util as jtu

from ._module_plan import ModulePlan
from ._state_plan import StatePlan


class _Lineage:
    """The states that were made of one another, of which only the latest is alive."""

    latest: Any = None


class TrainState:
    """Model, optimizer and key between two steps of [`vgrad_eqx.train_step`][].

    It holds flat arrays, which each step takes over: a state is used once, and the step
    returns the next one. The module is put together only when it is asked for. It is a pytree
    of those arrays.

    Over states by reference, it carries their values, and the states have old ones meanwhile.
    `sync()` sets them; so does the end of a `with` block, for the latest state that was made
    of the one that it was entered with.

    **Arguments:**

    It is made by `train_step(...).init(...)`, and by [`vgrad_eqx.load`][].

    **Returns:**

    A state with these properties, which are copies, and live on:

    - `model`: the module as it is now.
    - `optimizer`: its [`vgrad_eqx.Optimizer`][].
    - `nn_state`: its `equinox.nn.State`, or `None`.
    - `count`: the number of steps, an `int32` scalar.
    - `key`: the PRNG key that the next step splits, or `None`.

    **Raises:**

    - `RuntimeError`: for a property of a state that a step has taken over.
    - `TypeError`: for `model` and `nn_state` over states by reference, and for `sync` and
        `with` over a module.

    **Example:**

        >>> import jax.numpy as jnp, optax
        >>> import vgrad_eqx as vg
        >>> step = vg.train_step(lambda w, x: (w["a"] * x) ** 2, optax.sgd(0.25))
        >>> state = step.init({"a": jnp.array(1.0)})
        >>> state, metrics = step(state, 1.0)
        >>> float(state.model["a"]), int(state.count), float(metrics.value)
        (0.5, 1, 1.0)
    """

    __slots__ = ("_model", "frozen", "leaves", "lineage", "plan")

    def __init__(self, plan: Any, leaves: Any, frozen: Any, lineage: Any = None):
        self.plan = plan
        self.leaves = leaves
        self.frozen = frozen
        self.lineage = lineage
        self._model = None
        if lineage is not None:
            lineage.latest = self

    @property
    def model(self) -> Any:
        self.check()
        if self._model is None:
            plan = self._get_plan(ModulePlan, "model", "Read the states after `sync()`.")
            self._model = plan.get_model(self.leaves, self.frozen)
        return self._model

    @property
    def optimizer(self) -> Any:
        self.check()
        return self.plan.get_optimizer(self.leaves)

    @property
    def nn_state(self) -> Any:
        self.check()
        plan = self._get_plan(ModulePlan, "nn_state", "Read the states after `sync()`.")
        return plan.get_nn_state(self.leaves)

    @property
    def count(self) -> jax.Array:
        self.check()
        last = self.plan.num_trained
        return self.plan.copy(self.leaves, slice(last - 1, last))[0]

    @property
    def key(self) -> Any:
        self.check()
        keys = self.plan.copy(self.leaves, self.plan.key)
        return self.plan.wrap_key(keys[0]) if keys else None

    def sync(self) -> None:
        """Sets the states by reference to the values that are carried."""
        self.check()
        self._get_plan(StatePlan, "sync", "Its module is `model`.").sync(self.leaves)

    def __enter__(self) -> "TrainState":
        self._get_plan(StatePlan, "with", "Its module is `model`.")
        return self

    def __exit__(self, *args: object) -> None:
        self.lineage.latest.sync()

    def check(self) -> None:
        """Refuses a state that was taken over."""
        if self.is_donated:
            raise RuntimeError(
                "This `TrainState` was donated to a step, which has taken over its arrays. Go "
                "on with the state that the step returned: `state, metrics = step(state, "
                "*batch)`. To keep one, take its `model`, or save it by `vg.save`."
            )

    @property
    def is_donated(self) -> bool:
        return any(isinstance(x, jax.Array) and x.is_deleted() for x in self.leaves)

    def _get_plan(self, kind: Any, name: str, instead: str) -> Any:
        if not isinstance(self.plan, kind):
            over = "states by reference" if kind is ModulePlan else "a module"
            raise TypeError(
                f"`TrainState.{name}` is not for a state of {over}. {instead}"
            )
        return self.plan

    def __repr__(self) -> str:
        if self.is_donated:
            return "TrainState(donated)"
        return f"TrainState(count={self.count}, arrays={len(self.leaves)})"


def start_lineage() -> _Lineage:
    return _Lineage()


def _flatten(state: TrainState) -> tuple[Sequence[Any], Any]:
    return (state.leaves, state.frozen), (state.plan, state.lineage)


def _unflatten(aux: Any, children: Sequence[Any]) -> TrainState:
    leaves, frozen = children
    plan, lineage = aux
    return TrainState(plan, leaves, frozen, lineage)


jtu.register_pytree_node(TrainState, _flatten, _unflatten)
