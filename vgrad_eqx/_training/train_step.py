"""Compiled training steps whose cost in Python does not grow with the model."""

import functools as ft
import operator
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.tree_util as jtu

from .._optimizers.optimizer import Optimizer
from .._optimizers.partition import check_tx
from .._optimizers.state_optimizer import StateOptimizer
from .._select.grad_states import GradStates, parse_grad_states
from .._select.selectors import select
from .._tree.cache import Cache
from .._tree.flat import FlatTree
from .._tree.state import is_reference
from .flat_step import FlatStep, list_names, Metrics, Options
from .over_states import StateFunction, UnknownStates
from .train_state import TrainState


class TrainStep:
    """A compiled training step, as [`vgrad_eqx.train_step`][] returns it.

    **Arguments:**

    It is made by `train_step`.

    **Returns:**

    A function `step(state, *batch) -> (state, metrics)`, whose `init` makes the first state,
    and whose `lower(state, *batch)` gives what `jax.jit(...).lower(...)` does, to look at the
    program.

    **Example:**

        >>> import jax.numpy as jnp, optax
        >>> import vgrad_eqx as vg
        >>> step = vg.train_step(lambda w, x: (w["a"] * x) ** 2, optax.sgd(0.25))
        >>> state = step.init({"a": jnp.array(1.0)})
        >>> "cosine" in step.lower(state, 1.0).as_text()
        False
    """

    def __init__(self, options: Options, grad_states: GradStates):
        self._options = options
        self._grad_states = grad_states
        # The compiled steps, by what tells them apart.
        self._flat_steps = Cache()

    def init(
        self,
        model: Any = None,
        *,
        key: Any = None,
        nn_state: Any = None,
        optimizer: Any = None,
        batch: Any = None,
    ) -> TrainState:
        """Makes the state to begin with.

        **Arguments:**

        - `model`: the module, or any pytree, of which leaves are trained. It stays as it is.
            None for states by reference.
        - `key`: a PRNG key, which each step splits. If given, `func` is passed `key=...`.
        - `nn_state`: the `equinox.nn.State` of the module, which `func` takes after the
            module and returns beside the value.
        - `optimizer`: a [`vgrad_eqx.Optimizer`][] to go on with, such as one of
            `reselect`, or a [`vgrad_eqx.StateOptimizer`][]. Defaults to a new one.
        - `batch`: an example of the positional arguments, as a tuple. Over states by
            reference, a state is then made that carries all that `func` uses, as it does
            after the first step; [`vgrad_eqx.load`][] needs that. Without effect otherwise.

        **Returns:**

        A [`vgrad_eqx.TrainState`][].

        **Raises:**

        - `TypeError`: without a `model`, or with one for states by reference.
        - `ValueError`: as [`vgrad_eqx.Optimizer`][]; if `optimizer` is of another selection.
        """
        states = None
        if self._grad_states.by_reference:
            optimizer, states = self._init_over_states(model, nn_state, optimizer)
            model, nn_state = states.params, []
        flat = FlatTree(model)
        if states is None:
            optimizer = self._init_optimizer(model, flat, optimizer)
        flat_step = FlatStep(self, self._options, flat, optimizer, key, nn_state, states)
        known = self._flat_steps.get(flat_step.signature)
        if known is None:
            self._flat_steps.set(flat_step.signature, flat_step)
        else:
            flat_step = known
        leaves, frozen = flat_step.start(flat, optimizer, key, nn_state)
        state = TrainState(flat_step, frozen, leaves, int(optimizer.count))
        if states is None or batch is None:
            return state
        try:
            jax.eval_shape(flat_step.run, leaves, frozen, tuple(batch))
        except UnknownStates as unknown:
            return _extend(state, unknown)
        return state

    def _init_optimizer(self, model: Any, flat: FlatTree, optimizer: Any) -> Optimizer:
        if model is None:
            raise TypeError(
                "`train_step(...).init(model)` needs the module, of which `grad_states` "
                "selects leaves. Got none."
            )
        selector = ft.reduce(operator.or_, self._grad_states.entries)
        names = select(flat, selector, "train_step(grad_states=...)").names
        if optimizer is None:
            return Optimizer(self._options.tx, model, selector)
        if not isinstance(optimizer, Optimizer) or optimizer.names != names:
            raise ValueError(
                "`init(optimizer=...)` must be a `vg.Optimizer` of the leaves that "
                f"`grad_states` selects, {list_names(names)}. Got "
                f"{list_names(getattr(optimizer, 'names', [type(optimizer).__name__]))}. Use "
                "`optimizer.reselect(model, selector)`."
            )
        return optimizer

    def _init_over_states(
        self, model: Any, nn_state: Any, optimizer: Any
    ) -> tuple[Optimizer, StateFunction]:
        if model is not None or nn_state is not None:
            raise TypeError(
                "`train_step(grad_states=...)` names states by reference, so `init` takes "
                f"no module. Got {eqx.tree_pformat(nn_state if model is None else model)}. "
                "Let `func` close over it."
            )
        states = self._grad_states.unflatten(self._grad_states.entries)
        if optimizer is None:
            optimizer = StateOptimizer(self._options.tx, states)
        elif not isinstance(optimizer, StateOptimizer) or not _is_same(optimizer, states):
            raise ValueError(
                "`init(optimizer=...)` must be a `vg.StateOptimizer` of the states that "
                f"`grad_states` names, {eqx.tree_pformat(states)}. Got "
                f"{eqx.tree_pformat(getattr(optimizer, 'states', optimizer))}."
            )
        return optimizer.memory.value, StateFunction(self._options, optimizer)

    def __call__(self, state: TrainState, /, *batch: Any) -> tuple[TrainState, Metrics]:
        """Takes the steps of one call, and takes over the arrays of `state`.

        **Arguments:**

        - `state`: the state that `init` or the last step returned.
        - `batch`: the positional arguments of `func` after the module, pytrees of arrays and
            numbers.

        **Returns:**

        The next state and the [`vgrad_eqx.Metrics`][]. It does not wait for the results.

        **Raises:**

        - `RuntimeError`: for a state that a step has taken over.
        - `TypeError`: for something else than a state; and as [`vgrad_eqx.vector_grad`][].
        - `ValueError`: for a state of another `train_step`; for a batch without the first axes
            that `steps_per_call` and `accumulate` ask for; and as
            [`vgrad_eqx.vector_grad`][]. The state can still be used then.
        """
        try:
            flat_step = state.flat_step
            if flat_step.owner is not self:
                raise ValueError
            frozen = state.frozen
            leaves, value, aux, norms = flat_step.compiled(state.leaves, frozen, batch)
        except UnknownStates as unknown:
            return self(_extend(state, unknown), *batch)
        except Exception:
            self._check(state)
            raise
        count, newest = state.count + flat_step.steps_per_call, state.newest
        following = TrainState(flat_step, frozen, leaves, count, newest)
        if newest is not None:
            newest[0] = following
        return following, Metrics(value, aux, norms)

    def lower(self, state: TrainState, /, *batch: Any) -> Any:
        """The step for arguments of these shapes, as `jax.jit(...).lower(...)` gives it."""
        self._check(state)
        try:
            return state.flat_step.compiled.lower(state.leaves, state.frozen, batch)
        except UnknownStates as unknown:
            return self.lower(_extend(state, unknown), *batch)

    def _check(self, state: Any) -> None:
        """Refuses what a step cannot take."""
        if not isinstance(state, TrainState):
            raise TypeError(
                "A training step takes the `TrainState` of `init`, and then the batch: "
                f"`state, metrics = step(state, *batch)`. Got {eqx.tree_pformat(state)}."
            )
        if state.flat_step.owner is not self:
            raise ValueError(
                "A training step takes a state of its own. Got one of another `train_step`. "
                "Make one by `step.init(state.model, optimizer=state.optimizer)`."
            )
        state.check()


def train_step(
    func: Callable[..., Any],
    tx: Any,
    grad_states: Any = True,
    *,
    has_aux: bool = False,
    check_states: bool = True,
    steps_per_call: int = 1,
    accumulate: int = 1,
    packed: bool = False,
    grad_norms: bool = False,
) -> TrainStep:
    """Creates a compiled training step: the gradient of `func`, and a step of `tx`.

    The state of the training travels as flat arrays, which each step takes over, so a call
    costs little more than `jax.jit` over a tuple of these arrays, and takes half of the memory
    of a step that does not take them over. Nothing waits for results, so steps overlap.

    **Arguments:**

    - `func`: the loss, `func(model, *batch)`. Its output may be what
        [`vgrad_eqx.vector_grad`][] takes, a scalar or a vector of losses: the step goes
        along the gradient of the sum of all outputs.
    - `tx`: an optax transformation, or a dict from selector to transformation, as in
        [`vgrad_eqx.Optimizer`][]. Line searches get their extra arguments.
    - `grad_states`: what is trained: a selector of leaves of the module, or states by
        reference, as in [`vgrad_eqx.vector_grad`][]. Defaults to all inexact arrays of the
        module. Over states, `func(*batch)` closes over them.
    - `has_aux`: whether `func` returns a pair `(value, aux)`. `aux` must be of arrays.
    - `check_states`: as in [`vgrad_eqx.vector_grad`][].
    - `steps_per_call`: how many steps a call takes, by a `jax.lax.scan` over the first axis
        of each array of the batch. Metrics are stacked.
    - `accumulate`: of how many parts of a batch, one after the other, the mean gradient is
        taken for a step. The parts are the first axis of each array of the batch (the
        second one with `steps_per_call`). Outputs and auxiliary data are stacked.
    - `packed`: whether to keep small parameters in common buffers, one for up to 32 of one
        dtype, and so with each moment of the optimizer. For models of many small arrays,
        this is several times faster, but compiling takes longer. Larger arrays stay alone.
    - `grad_norms`: whether the metrics hold the norm of each gradient.

    **Returns:**

    A function `step(state, *batch) -> (state, metrics)`, with the methods `init`, which makes
    the first [`vgrad_eqx.TrainState`][], and `lower`. `metrics` is a
    [`vgrad_eqx.Metrics`][].

    With `step.init(model, key=key)`, `func` is passed a fresh `key=...` at each step. With
    `step.init(model, nn_state=nn_state)`, it is `func(model, nn_state, *batch)`, and returns
    `(value, nn_state)`, or `(value, (nn_state, aux))` if `has_aux`.

    **Raises:**

    - `TypeError`: at once, if `func` is not callable or `tx` is no optax transformation; if
        `steps_per_call` or `accumulate` is no int.
    - `ValueError`: at once, if one of those is below 1. For the errors of `init` and of the
        step, see there.

    **Example:**

        >>> import equinox as eqx, jax, jax.numpy as jnp, optax
        >>> import vgrad_eqx as vg
        >>> mlp = eqx.nn.MLP(2, 1, 8, 1, key=jax.random.key(0))
        >>> def loss(model, x, y):
        ...     return jnp.mean((jax.vmap(model)(x) - y) ** 2)
        >>> step = vg.train_step(loss, optax.adam(1e-2), grad_states="**.weight")
        >>> state = step.init(mlp)
        >>> x, y = jnp.ones((5, 2)), jnp.zeros((5, 1))
        >>> for _ in range(100):
        ...     state, metrics = step(state, x, y)
        >>> state.count, bool(metrics.value < loss(mlp, x, y))
        (100, True)
        >>> bool(state.model.layers[0].bias[0] == mlp.layers[0].bias[0])
        True
    """
    if not callable(func):
        raise TypeError(f"`train_step(func=...)` must be a callable. Got {func!r}.")
    check_tx(tx, "train_step(tx=...)")
    for name, number in {"steps_per_call": steps_per_call, "accumulate": accumulate}.items():
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"`train_step({name}=...)` must be an int. Got {number!r}.")
        if number < 1:
            raise ValueError(f"`train_step({name}=...)` must be at least 1. Got {number}.")
    parsed = parse_grad_states(grad_states, "train_step(grad_states=...)")
    if parsed is None:
        raise TypeError(
            "`train_step(grad_states=...)` must be a selector or states by reference. Got "
            "None. To train all inexact arrays, leave it out."
        )
    options = Options(
        func, tx, has_aux, check_states, steps_per_call, accumulate, packed, grad_norms
    )
    return TrainStep(options, parsed)


def _extend(state: TrainState, unknown: UnknownStates) -> TrainState:
    """The same state, which carries the values of more states by reference."""
    flat_step, leaves = state.flat_step.extend(state.leaves, unknown)
    return TrainState(flat_step, state.frozen, leaves, state.count, state.newest)


def _is_same(optimizer: StateOptimizer, states: Any) -> bool:
    entries = [
        jtu.tree_flatten(tree, is_leaf=is_reference) for tree in (optimizer.states, states)
    ]
    (ours, structure), (theirs, other) = entries
    return structure == other and all(map(operator.is_, ours, theirs))
