"""What a training step takes and returns."""

from typing import Any

import jax
import jax.tree_util as jtu

from .flat_step import FlatStep


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
    __slots__ = ("_model", "count", "flat_step", "frozen", "leaves", "newest")

    def __init__(
        self, flat_step: FlatStep, frozen: Any, leaves: Any, count: Any, newest: Any = None
    ):
        self.flat_step = flat_step
        self.frozen = frozen
        self.leaves = leaves
        self.count = count
        # In a `with` block, a list of the latest state that was made of the first one.
        self.newest = newest

    @property
    def model(self) -> Any:
        self._check_kind(False, "model")
        if not hasattr(self, "_model"):
            self._model = self.flat_step.get_model(self.leaves, self.frozen)
        return self._model

    @property
    def optimizer(self) -> Any:
        self.check()
        return self.flat_step.get_optimizer(self.leaves, self.count)

    @property
    def nn_state(self) -> Any:
        self._check_kind(False, "nn_state")
        return self.flat_step.get_nn_state(self.leaves)

    @property
    def key(self) -> Any:
        self.check()
        return self.flat_step.get_key(self.leaves)

    def sync(self) -> None:
        """Sets the states by reference to the values that are carried."""
        self._check_kind(True, "sync")
        self.flat_step.sync(self.leaves, self.count)

    def __enter__(self) -> "TrainState":
        self._check_kind(True, "with")
        if self.newest is None:
            self.newest = [self]
        return self

    def __exit__(self, *args: object) -> None:
        self.newest[0].sync()

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
        return {"count": self.count, **self.flat_step.to_tree(self.leaves, self.frozen)}

    def from_tree(self, tree: dict[str, Any]) -> "TrainState":
        """A state like this one, of such arrays."""
        leaves, frozen = self.flat_step.from_tree(tree)
        return TrainState(self.flat_step, frozen, leaves, tree["count"])

    @property
    def is_donated(self) -> bool:
        return any(isinstance(x, jax.Array) and x.is_deleted() for x in self.leaves)

    def _check_kind(self, over_states: bool, name: str) -> None:
        self.check()
        if over_states == (self.flat_step.states is None):
            over, instead = ("a module", "Its module is `model`.")
            if not over_states:
                over, instead = "states by reference", "Read the states after `sync()`."
            raise TypeError(f"`TrainState.{name}` is not for a state of {over}. {instead}")

    def __repr__(self) -> str:
        if self.is_donated:
            return "TrainState(donated)"
        return f"TrainState(count={self.count}, arrays={len(self.leaves)})"


def _flatten(state: TrainState) -> tuple[Any, FlatStep]:
    return (state.leaves, state.frozen, state.count), state.flat_step


def _unflatten(flat_step: FlatStep, children: Any) -> TrainState:
    leaves, frozen, count = children
    return TrainState(flat_step, frozen, leaves, count)


jtu.register_pytree_node(TrainState, _flatten, _unflatten)
