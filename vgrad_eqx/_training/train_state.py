"""The training state, which a training step takes and returns."""

import dataclasses
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Generic, Self, TypeVar

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.typing import ArrayLike

from .._optimizers.optimizer import Optimizer
from .._tree.prompt import AtPrompt, write_call
from .._tree.state import is_evaluating, State
from .._tree.types import PyTree
from .flat_step import CONCRETE, FlatStep
from .interrupts import hold, release


_M = TypeVar("_M", covariant=True)


class TrainState(AtPrompt, Generic[_M]):
    """Model, optimizer and key between two steps of [`vgrad_eqx.train_step`][].

    It consists of flat arrays, which are donated to the next step: each training state is
    used once, and the step returns the next one. The module is built only on request. A
    training state is a pytree of those arrays and the count, so it works with `jax.lax.scan`,
    `jax.tree.map` and so on.

    Over states by reference, it carries their values, and the states themselves keep their old
    values for the time being. `sync()` sets them. So does leaving a `with` block, to the values
    of the last step or the last `sync()` in it. The steps do not see values that are set in a
    state in the meantime.

    **Arguments:**

    Created by `train_step(...).init(...)` and by [`vgrad_eqx.load`][].

    **Returns:**

    A training state with the `count` of steps; `copy()`, which returns an independent training
    state; `set_hyperparams`; and these properties, which are copies and so remain valid after
    the next step:

    - `model`: the current module.
    - `optimizer`: its [`vgrad_eqx.Optimizer`][].
    - `nn_state`: its `equinox.nn.State`, or `None`.
    - `key`: the PRNG key that the next step splits, or `None`.
    - `hyperparams`: those kept by `optax.inject_hyperparams`.
    - `kept`: the last training state copied by `train_step(keep_every=n)`, or `None`.

    **Raises:**

    - `RuntimeError`: on reading a property of a training state that was donated to a step; on
        leaving a `with` block whose last training state was made by JAX or by
        [`vgrad_eqx.load`][], unless `sync()` was called.
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

    # Few, because setting each one adds to the time of a step.
    __slots__ = ("__weakref__", "_is_rebuilt", "_model", "count", "leaves", "training")

    _inner = frozenset(
        ["check", "from_tree", "is_donated", "leaves", "take_over", "to_tree", "training"]
    )

    def __init__(
        self, training: "Training", leaves: Sequence[jax.Array], count: int | jax.Array
    ):
        self.training = training
        self.leaves = leaves
        self.count = count

    @property
    def model(self) -> _M:
        self._check_kind(False, "model")
        if not hasattr(self, "_model"):
            self._model = self.training.flat_step.get_model(self.leaves, self.training.frozen)
        return self._model

    @property
    def optimizer(self) -> Optimizer:
        self.check()
        return self.training.flat_step.get_optimizer(self.leaves, self.count)

    @property
    def hyperparams(self) -> dict[str, Any]:
        """As in [`vgrad_eqx.Optimizer`][]."""
        return self.optimizer.hyperparams

    def set_hyperparams(self, group: str | None = None, /, **values: ArrayLike) -> Self:
        """Returns a training state with other hyperparameters, as in [`vgrad_eqx.Optimizer`][].

        It shares its other arrays with this one, so only one of the two can be used.
        """
        self.check()
        leaves = self.training.flat_step.set_hyperparams(self.leaves, group, values)
        return type(self)(self.training, leaves, self.count)

    @property
    def nn_state(self) -> Any:
        self._check_kind(False, "nn_state")
        return self.training.flat_step.get_nn_state(self.leaves)

    @property
    def key(self) -> Any:
        self.check()
        return self.training.flat_step.get_key(self.leaves)

    @property
    def kept(self) -> Self | None:
        """The last training state copied by `train_step(keep_every=...)`, or `None`."""
        return None if self.training.history is None else self.training.history.kept

    def sync(self) -> None:
        """Sets the states by reference to the values that this training state carries."""
        self._check_kind(True, "sync")
        jax.block_until_ready(self.leaves)  # raises an error of the step before any is set
        try:
            hold()  # all of them are set, or none
            self.training.flat_step.sync(self.leaves, self.count, self.training.memory)
        finally:
            release()
        if self.training.history is not None:
            self.training.history.add(self)

    def __enter__(self) -> Self:
        self._check_kind(True, "with")
        if self.training.history is None:
            History(0).attach(self.training)
        assert self.training.history is not None
        self.training.history.add(self)
        _entered[self.training.memory] = self.training.history
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        assert self.training.history is not None
        history = _entered.pop(self.training.memory, self.training.history)
        if error is None and history.rebuilt:
            raise RuntimeError(
                "The end of `with` cannot tell which `TrainState` is the last one, because one "
                "was made by `jax.jit`, `jax.lax.scan`, `jax.tree.map` or `vg.load`, and no "
                "step has taken it since. The states by reference are as they were before: "
                "call `state.sync()` of the last one."
            )
        if error is None or _is_good(history.latest):
            history.latest.sync()
        elif _is_good(history.kept):
            history.kept.sync()

    def check(self) -> None:
        """Refuses a state that was taken over."""
        if self.is_donated:
            raise RuntimeError(
                "This `TrainState` was donated to a step, which has taken over its arrays. Go "
                "on with the state that the step returned: `state, metrics = step(state, "
                "*batch)`. To keep one, take its `copy()` or its `model` before the step, or "
                "save it with `vg.save`."
            )

    def to_tree(self) -> dict[str, Any]:
        """All arrays by name, for a checkpoint."""
        self.check()
        count = self.count
        if not jnp.ndim(count):
            count = 0 if isinstance(count, jax.ShapeDtypeStruct) else int(count)
        flat_step, frozen = self.training.flat_step, self.training.frozen
        return {"count": count, **flat_step.to_tree(self.leaves, frozen)}

    def from_tree(self, tree: dict[str, Any]) -> Self:
        """A state like this one, of such arrays."""
        flat_step, memory = self.training.flat_step, self.training.memory
        leaves, frozen = flat_step.from_tree(tree)
        return _rebuild(flat_step, frozen, memory, leaves, tree["count"])

    @property
    def is_donated(self) -> bool:
        return any(type(leaf) in CONCRETE and leaf.is_deleted() for leaf in self.leaves)

    def take_over(self, leaves: Sequence[jax.Array]) -> None:
        """Becomes the next state, which an interrupt kept from being returned."""
        if hasattr(self, "_model"):
            del self._model
        self.leaves, self.count = leaves, self.count + self.training.flat_step.steps_per_call
        if self.training.history is not None:
            self.training.history.add(self)

    def copy(self) -> Self:
        """Returns an independent copy, which remains valid when this one is donated."""
        self.check()
        leaves = jtu.tree_map(jnp.copy, self.leaves)
        each = self.training
        training = Training.begin(each.flat_step, each.frozen, each.memory)
        return type(self)(training, leaves, self.count)

    __copy__ = copy

    def __deepcopy__(self, memo: object) -> Self:
        return self.copy()

    def __reduce__(self) -> Any:
        if self.training.flat_step.states is not None:
            raise TypeError(
                "A `TrainState` over states by reference cannot be pickled, because its copy "
                "would refer to other states. Pickle the states after `sync()`, or save it "
                "with `vg.save`."
            )
        parts = self.model, self.key, self.nn_state, self.optimizer
        return _restore, (self.training.flat_step.owner, *parts)

    def _check_kind(self, over_states: bool, name: str) -> None:
        self.check()
        if over_states == (self.training.flat_step.states is None):
            over, instead = ("a module", "Its module is `model`.")
            if not over_states:
                over, instead = "states by reference", "Read the states after `sync()`."
            raise TypeError(f"`TrainState.{name}` is not for a state of {over}. {instead}")

    def __repr__(self) -> str:
        if self.is_donated:
            return "TrainState(donated)"
        return write_call("TrainState", count=self.count, arrays=len(self.leaves))


@dataclasses.dataclass(slots=True, eq=False)
class Training:
    """What a training state shares with those derived from it.

    Over states by reference, `memory` is the state of their optimizer.
    """

    flat_step: FlatStep
    frozen: Any
    memory: Any
    history: "History | None" = None
    make_next: Callable[..., TrainState] = TrainState

    @classmethod
    def begin(cls, flat_step: FlatStep, frozen: Any, memory: Any) -> "Training":
        training, keep_every = cls(flat_step, frozen, memory), flat_step.options.keep_every
        history = None if memory is None else _entered.get(memory)
        if history is None and keep_every:
            history = History(keep_every)
        if history is not None:
            history.attach(training)
        return training


class History:
    """The latest and the last kept state among those derived from one another.

    `rebuilt` are the states that JAX or `load` has made since the `latest`.
    """

    def __init__(self, keep_every: int):
        self._keep_every = keep_every
        self.latest: Any = None
        self.kept: Any = None
        self.rebuilt: weakref.WeakSet[TrainState] = weakref.WeakSet()

    def add(self, state: TrainState) -> None:
        """Records a state as the latest, unless it was made inside a transformation."""
        # Looking at each leaf for a tracer would take a share of the time of a step.
        if is_evaluating():
            self.latest = state
            self.rebuilt.clear()

    def add_rebuilt(self, state: TrainState) -> None:
        # JAX also builds states of other objects than arrays.
        leaves = state.leaves
        if isinstance(leaves, tuple) and all(type(leaf) in CONCRETE for leaf in leaves):
            self.rebuilt.add(state)

    def attach(self, training: Training) -> None:
        training.history, training.make_next = self, self._make_next

    def _make_next(self, training: Training, leaves: Any, count: Any) -> TrainState:
        state = TrainState(training, leaves, count)
        self.add(state)
        if self._keep_every and is_evaluating():
            before = count - training.flat_step.steps_per_call
            if before // self._keep_every < count // self._keep_every:
                # This waits for the values, so that only those of a successful step are kept.
                self.kept = jax.block_until_ready(state.copy())
        return state


# The histories inside a `with` block, keyed by the state of their optimizer.
_entered: weakref.WeakKeyDictionary[Any, History] = weakref.WeakKeyDictionary()


def _is_good(state: TrainState | None) -> bool:
    if state is None or state.is_donated:
        return False
    try:
        jax.block_until_ready(state.leaves)
    except Exception:  # the step has failed
        return False
    return True


def _restore(
    owner: Any, model: PyTree, key: jax.Array | None, nn_state: PyTree, optimizer: Any
) -> TrainState:
    return owner.init(model, key=key, nn_state=nn_state, optimizer=optimizer)


_NAMES = tuple(map(jtu.GetAttrKey, ("leaves", "frozen", "count")))


def _flatten(state: TrainState) -> tuple[Any, Any]:
    count, training = state.count, state.training
    # A state that JAX has built may contain anything, such as the axes of `jax.vmap`.
    if isinstance(count, int) and not hasattr(state, "_is_rebuilt"):
        count = jnp.asarray(count, jnp.int32)
    children = zip(_NAMES, (state.leaves, training.frozen, count), strict=True)
    return tuple(children), (training.flat_step, training.memory)


def _unflatten(common: Any, children: PyTree) -> TrainState:
    (flat_step, memory), (leaves, frozen, count) = common, children
    state = _rebuild(flat_step, frozen, memory, leaves, count)
    state._is_rebuilt = True  # noqa: SLF001
    return state


def _rebuild(
    flat_step: FlatStep,
    frozen: Sequence[jax.Array],
    memory: State[Optimizer] | None,
    leaves: Sequence[jax.Array],
    count: int | jax.Array,
) -> Any:
    """A state that was not returned by a step."""
    state = TrainState(Training.begin(flat_step, frozen, memory), leaves, count)
    if state.training.history is not None:
        state.training.history.add_rebuilt(state)
    return state


jtu.register_pytree_with_keys(TrainState, _flatten, _unflatten)
