"""What a training step takes and returns."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.tree_util as jtu

from .module_step import ModuleStep
from .state_step import StateStep


class Run:
    """What stays the same from state to state."""

    __slots__ = ("compiled", "frozen", "lineage", "owner", "flat_step", "steps")

    def __init__(self, flat_step: Any, frozen: Any, lineage: Any = None):
        self.flat_step = flat_step
        self.owner = flat_step.owner
        self.compiled = flat_step.compiled
        self.steps = flat_step.steps_per_call
        self.frozen = frozen
        self.lineage = lineage


class Lineage:
    """States that were made of one another, of which only the latest is alive."""

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

    A state with the `count` of steps, an int, and these properties, which are copies, and
    live on:

    - `model`: the module as it is now.
    - `optimizer`: its [`vgrad_eqx.Optimizer`][].
    - `nn_state`: its `equinox.nn.State`, or `None`.
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
        >>> float(state.model["a"]), state.count, float(metrics.value)
        (0.5, 1, 1.0)
    """

    # Few, because setting each takes a share of the time of a step.
    __slots__ = ("_model", "count", "leaves", "run")

    def __init__(self, run: Run, leaves: Any, count: Any):
        self.run = run
        self.leaves = leaves
        self.count = count

    @property
    def model(self) -> Any:
        self.check()
        if not hasattr(self, "_model"):
            flat_step = self._get_step(ModuleStep, "model", "Read the states after `sync()`.")
            self._model = flat_step.get_model(self.leaves, self.run.frozen)
        return self._model

    @property
    def optimizer(self) -> Any:
        self.check()
        return self.run.flat_step.get_optimizer(self.leaves, self.count)

    @property
    def nn_state(self) -> Any:
        self.check()
        flat_step = self._get_step(ModuleStep, "nn_state", "Read the states after `sync()`.")
        return flat_step.get_nn_state(self.leaves)

    @property
    def key(self) -> Any:
        self.check()
        keys = self.run.flat_step.copy(self.leaves, self.run.flat_step.key)
        return self.run.flat_step.wrap_key(keys[0]) if keys else None

    def sync(self) -> None:
        """Sets the states by reference to the values that are carried."""
        self.check()
        flat_step = self._get_step(StateStep, "sync", "Its module is `model`.")
        flat_step.sync(self.leaves, self.count)

    def __enter__(self) -> "TrainState":
        self._get_step(StateStep, "with", "Its module is `model`.")
        return self

    def __exit__(self, *args: object) -> None:
        self.run.lineage.latest.sync()

    def check(self) -> None:
        """Refuses a state that was taken over."""
        if self.is_donated:
            raise RuntimeError(
                "This `TrainState` was donated to a step, which has taken over its arrays. Go "
                "on with the state that the step returned: `state, metrics = step(state, "
                "*batch)`. To keep one, take its `model`, or save it by `vg.save`."
            )

    def to_tree(self) -> dict[str, Any]:
        """All arrays by name, for a checkpoint."""
        self.check()
        return {"count": self.count, **self.run.flat_step.to_tree(self.leaves, self.run.frozen)}

    def from_tree(self, tree: dict[str, Any]) -> "TrainState":
        """A state like this one, of such arrays."""
        flat_step = self.run.flat_step
        leaves, frozen = flat_step.from_tree(tree)
        state = TrainState(Run(flat_step, frozen, self.run.lineage), leaves, tree["count"])
        if self.run.lineage is not None:
            self.run.lineage.latest = state
        return state

    @property
    def is_donated(self) -> bool:
        return any(isinstance(x, jax.Array) and x.is_deleted() for x in self.leaves)

    def _get_step(self, kind: Any, name: str, instead: str) -> Any:
        if not isinstance(self.run.flat_step, kind):
            over = "states by reference" if kind is ModuleStep else "a module"
            raise TypeError(f"`TrainState.{name}` is not for a state of {over}. {instead}")
        return self.run.flat_step

    def __repr__(self) -> str:
        if self.is_donated:
            return "TrainState(donated)"
        return f"TrainState(count={self.count}, arrays={len(self.leaves)})"


def _flatten(state: TrainState) -> tuple[Sequence[Any], Any]:
    return (state.leaves, state.run.frozen, state.count), state.run


def _unflatten(run: Run, children: Sequence[Any]) -> TrainState:
    leaves, frozen, count = children
    return TrainState(Run(run.flat_step, frozen, run.lineage), leaves, count)


jtu.register_pytree_node(TrainState, _flatten, _unflatten)
