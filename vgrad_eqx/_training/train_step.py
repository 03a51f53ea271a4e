"""Compiled training steps whose cost in Python does not grow with the model."""

import dataclasses
import functools as ft
import inspect
import operator
import types
from collections.abc import Callable, Mapping, Sequence
from itertools import starmap
from typing import Any, cast, overload, TypeVar

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import jax.tree_util as jtu

from .._jit.callbacks import explain
from .._optimizers.fingerprint import Fingerprinted
from .._optimizers.optimizer import Optimizer
from .._optimizers.partition import check_tx, TxLike
from .._optimizers.state_optimizer import StateOptimizer
from .._select.grad_states import GradStates, GradStatesLike, parse_grad_states
from .._select.selectors import select
from .._tree.cache import Cache
from .._tree.flat import FlatTree
from .._tree.prompt import write_call
from .._tree.state import is_reference
from .._tree.text import check_flag, show
from .._tree.types import PyTree
from .flat_step import FlatStep, list_names, Metrics, Options, PLAIN
from .interrupts import held, release
from .over_states import StateFunction, UnknownStates
from .train_state import Training, TrainState


_M = TypeVar("_M")


class _OfTrainer(type):
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(getattr(instance, "__self__", None), _Trainer)


class TrainStep(metaclass=_OfTrainer):
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

    def __call__(
        self, state: TrainState[_M], /, *batch: PyTree, **kwargs: PyTree
    ) -> tuple[TrainState[_M], Metrics]:
        """Takes the steps of one call, and takes over the arrays of `state`.

        **Arguments:**

        - `state`: the state that `init` or the last step returned.
        - `batch`, `kwargs`: the arguments of `func` after the module. Arrays and numbers are
            traced; all else is constant, and so are the numbers in modules.

        **Returns:**

        The next state and the [`vgrad_eqx.Metrics`][]. It does not wait for the results.

        **Raises:**

        - `RuntimeError`: for a state that a step has taken over. An error that the program
            raises while it runs is raised as it is, and JAX has taken over the state by then.
        - `TypeError`: for something else than a state; and as [`vgrad_eqx.vector_grad`][].
        - `ValueError`: for a state of another `train_step`; for a batch without the first axes
            that `steps_per_call` and `accumulate` ask for; and as
            [`vgrad_eqx.vector_grad`][]. The state can still be used then.
        """
        ...

    @overload
    def init(
        self,
        model: _M,
        *,
        key: jax.Array | None = None,
        nn_state: eqx.nn.State | None = None,
        optimizer: Optimizer | None = None,
        batch: Sequence[PyTree] | None = None,
    ) -> TrainState[_M]: ...

    @overload
    def init(
        self,
        *,
        key: jax.Array | None = None,
        optimizer: StateOptimizer | None = None,
        batch: Sequence[PyTree] | None = None,
    ) -> TrainState[None]: ...

    def init(
        self,
        model: PyTree = None,
        *,
        key: jax.Array | None = None,
        nn_state: eqx.nn.State | None = None,
        optimizer: Optimizer | StateOptimizer | None = None,
        batch: Sequence[PyTree] | None = None,
    ) -> TrainState[Any]:
        """Makes the state to begin with.

        **Arguments:**

        - `model`: the module, or any pytree, of which leaves are trained. It stays as it is.
            None for states by reference.
        - `key`: a PRNG key, which each step splits. If given, `func` is passed `key=...`.
        - `nn_state`: the `equinox.nn.State` of the module, which `func` takes after the
            module and returns beside the value.
        - `optimizer`: a [`vgrad_eqx.Optimizer`][] to go on with, such as one of
            `reselect`, or a [`vgrad_eqx.StateOptimizer`][], of the `tx` of this step. Defaults
            to a new one.
        - `batch`: an example of the positional arguments, as a tuple. Over states by
            reference, a state is then made that carries all that `func` uses, as it does
            after the first step; [`vgrad_eqx.load`][] needs that. Without effect otherwise.

        **Returns:**

        A [`vgrad_eqx.TrainState`][].

        **Raises:**

        - `TypeError`: without a `model`, or with one for states by reference.
        - `ValueError`: as [`vgrad_eqx.Optimizer`][]; if `optimizer` is of another selection.
        """
        ...

    def lower(self, state: TrainState[Any], /, *batch: PyTree, **kwargs: PyTree) -> Any:
        """The step for arguments of these shapes, as `jax.jit(...).lower(...)` gives it."""
        ...


class _Trainer:
    """What a training step knows of its options, and the programs it has compiled."""

    def __init__(self, options: Options, grad_states: GradStates):
        self._options = options
        self._grad_states = grad_states
        self._tx = Fingerprinted(options.tx)
        # The compiled steps, by what tells them apart.
        self._flat_steps = Cache()

    def __reduce__(self) -> Any:
        return _Trainer, (self._options, self._grad_states)

    def __deepcopy__(self, memo: object) -> "_Trainer":
        return self  # whose states are known by it

    def __repr__(self) -> str:
        options, states = self._options._asdict(), self._grad_states
        options["grad_states"] = states.unflatten(states.entries)
        parameters = inspect.signature(train_step).parameters
        chosen = {
            name: value
            for name, value in options.items()
            if name not in ("func", "tx") and repr(value) != repr(parameters[name].default)
        }
        return write_call("train_step", self._options.func, **chosen)

    @property
    def step(self) -> TrainStep:
        return _make_step(self)

    def init(
        self,
        model: PyTree = None,
        *,
        key: jax.Array | None = None,
        nn_state: PyTree = None,
        optimizer: Any = None,
        batch: PyTree = None,
    ) -> TrainState:
        _check_parts(key, nn_state, batch)
        states = memory = None
        if self._grad_states.by_reference:
            over_states = self._init_over_states(model, nn_state, optimizer)
            states, memory = StateFunction(self._options, over_states), over_states.memory
            model, nn_state, optimizer = over_states.params(), [], memory.value
        flat = FlatTree(model)
        if states is None:
            optimizer = self._init_optimizer(model, flat, optimizer)
        flat_step = self._share(
            FlatStep(self, self._options, flat, optimizer, key, nn_state, states)
        )
        leaves, frozen = flat_step.start(flat, optimizer, key, nn_state)
        count = optimizer.count
        if not isinstance(count, jax.core.Tracer) and not jnp.ndim(count):
            count = int(count)
        state = TrainState(Training.begin(flat_step, frozen, memory), leaves, count)
        while state.training.flat_step.unknown is not None:
            state = self.extend(state, state.training.flat_step.unknown)
        if states is not None and batch is not None:
            try:
                self._evaluate_shapes(state, tuple(batch))
            except UnknownStates as unknown:
                return self.extend(state, unknown)
        return state

    def _share(self, flat_step: FlatStep) -> FlatStep:
        """The step that was made alike before, if there is one, which has its programs."""
        known = self._flat_steps.get(flat_step.signature)
        if known is None:
            self._flat_steps.set(flat_step.signature, flat_step)
        return flat_step if known is None else known

    def extend(self, state: TrainState, unknown: UnknownStates) -> TrainState:
        """The same state, which carries the values of more states by reference."""
        flat_step, leaves = state.training.flat_step.extend(state.leaves, unknown)
        training = dataclasses.replace(state.training, flat_step=self._share(flat_step))
        return TrainState(training, leaves, state.count)

    def _evaluate_shapes(self, state: TrainState, batch: tuple[PyTree, ...]) -> None:
        try:
            program, inputs = state.training.flat_step.find_program(batch, {})
            jax.eval_shape(program.compiled, state.leaves, state.training.frozen, inputs)
        finally:
            release()

    def _init_optimizer(self, model: PyTree, flat: FlatTree, optimizer: Any) -> Optimizer:
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
        self._check_tx(optimizer)
        return optimizer

    def _init_over_states(
        self, model: PyTree, nn_state: PyTree, optimizer: object
    ) -> StateOptimizer:
        if model is not None or nn_state is not None:
            raise TypeError(
                "`train_step(grad_states=...)` names states by reference, so `init` takes "
                f"no module. Got {show(nn_state if model is None else model)}. "
                "Let `func` close over it."
            )
        states = self._grad_states.unflatten(self._grad_states.entries)
        if optimizer is None:
            optimizer = StateOptimizer(self._options.tx, states)
        elif not isinstance(optimizer, StateOptimizer) or not _is_same(optimizer, states):
            raise ValueError(
                "`init(optimizer=...)` must be a `vg.StateOptimizer` of the states that "
                f"`grad_states` names, {show(states)}. Got "
                f"{show(getattr(optimizer, 'states', optimizer))}."
            )
        self._check_tx(optimizer.memory.value)
        return optimizer

    def _check_tx(self, optimizer: Optimizer) -> None:
        if optimizer.tx != self._tx:
            raise ValueError(
                "`init(optimizer=...)` must be of the transformation of `train_step(tx=...)`, "
                "which takes the steps. Got one of another. Use `optimizer.reselect(model, "
                "selector, tx=tx)`, or pass its own to `train_step`."
            )

    def lower(self, state: TrainState, /, *batch: PyTree, **kwargs: object) -> Any:
        self.check(state)
        program, inputs = state.training.flat_step.find_program(batch, kwargs)
        try:
            return program.compiled.lower(state.leaves, state.training.frozen, inputs)
        except UnknownStates as unknown:
            return self.lower(self.extend(state, unknown), *batch, **kwargs)
        finally:
            release()

    def check(self, state: PyTree) -> None:
        """Refuses what a step cannot take."""
        if not isinstance(state, TrainState):
            raise TypeError(
                "A training step takes the `TrainState` of `init`, and then the batch: "
                f"`state, metrics = step(state, *batch)`. Got {show(state)}."
            )
        if state.training.flat_step.owner is not self:
            raise ValueError(
                "A training step takes a state of its own. Got one of another `train_step`. "
                "Make one by `step.init(state.model, optimizer=state.optimizer)`, with "
                "`key=state.key` and `nn_state=state.nn_state` where it has these."
            )
        state.check()


# What Python says of a wrong call.
_Trainer.init.__qualname__ = "TrainStep.init"
_Trainer.lower.__qualname__ = "TrainStep.lower"


def _make_step(trainer: _Trainer) -> TrainStep:
    # A method, which shows the options, because Python handles Ctrl-C when any other object has
    # been called, and nothing has stored its result yet; but not when a method has been.
    def step(
        trainer: _Trainer, state: TrainState, /, *batch: PyTree, **kwargs: object
    ) -> tuple[TrainState, Metrics]:
        if type(state) is not TrainState or state.training.flat_step.owner is not trainer:
            trainer.check(state)
        training, leaves = state.training, None
        flat_step = training.flat_step
        program, inputs, is_plain = flat_step.program, batch, not kwargs
        for each in batch:
            is_plain = is_plain and type(each) in PLAIN
        if not is_plain:
            program, inputs = flat_step.find_program(batch, kwargs)
        try:
            # Unpacked by C code, so that no interrupt comes before the results are stored.
            ((leaves, value, aux, norms),) = starmap(
                program.call, ((state.leaves, training.frozen, inputs),)
            )
            if held:
                release()
            count = state.count + flat_step.steps_per_call
            return training.make_next(training, leaves, count), Metrics(value, aux, norms)
        except UnknownStates as unknown:
            extended = trainer.extend(state, unknown)
        except BaseException as error:
            _recover(state, leaves, error)
            raise
        return step(trainer, extended, *batch, **kwargs)

    step.__doc__ = TrainStep.__call__.__doc__
    vars(step).update(init=trainer.init, lower=trainer.lower)
    step.__qualname__ = "TrainStep"
    return cast(TrainStep, types.MethodType(step, trainer))


def _recover(state: TrainState, leaves: Any, error: BaseException) -> None:
    """Leaves a state to go on with, if there is one, and says what `eqx.error_if` says."""
    try:
        if leaves is None and "has been deleted" in str(error):
            state.check()  # to look before each call would take a share of its time
        clear = explain(error)
        if state.is_donated and leaves is not None:
            state.take_over(leaves)
        elif state.is_donated:
            clear.add_note(
                "The step had taken over the arrays of its `TrainState`, so this state is "
                "gone. To go on after such an error, use `vg.train_step(..., keep_every=n)`, "
                "which copies each n-th state to `state.kept`, or `donate=False`, which keeps "
                "every state and takes twice the memory. `vg.save` writes one to a file."
            )
    finally:
        release()
    if clear is not error:
        raise clear from None


def _check_parts(key: jax.Array | None, nn_state: PyTree, batch: PyTree) -> None:
    """Refuses what is not meant for `init`."""
    dtype, ndim = getattr(key, "dtype", None), getattr(key, "ndim", None)
    is_typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key) and ndim == 0
    is_key = is_typed or (dtype == jnp.uint32 and ndim == 1)
    if key is not None and not is_key:
        raise TypeError(
            "`init(key=...)` must be a PRNG key, as `jax.random.key(seed)` makes one. Got "
            f"{show(key)}."
        )
    if nn_state is not None and not isinstance(nn_state, eqx.nn.State):
        raise TypeError(
            "`init(nn_state=...)` must be the `equinox.nn.State` of the module, as "
            "`eqx.nn.make_with_state` makes it. Got "
            f"{show(nn_state)}. Other values that change are auxiliary data, or in "
            "a `vg.State`."
        )
    if batch is not None and not isinstance(batch, tuple | list):
        raise TypeError(
            "`init(batch=...)` must be a tuple of the positional arguments of `func`, such as "
            f"`(x, y)`. Got {show(batch)}."
        )


def train_step(
    func: Callable[..., Any],
    tx: TxLike,
    grad_states: GradStatesLike = True,
    *,
    has_aux: bool = False,
    check_states: bool = True,
    steps_per_call: int = 1,
    accumulate: int = 1,
    packed: bool = False,
    grad_norms: bool = False,
    donate: bool = True,
    keep_every: int = 0,
    extra_args: Callable[[Any], Mapping[str, Any]] | None = None,
) -> TrainStep:
    """Creates a compiled training step: the gradient of `func`, and a step of `tx`.

    The state of the training travels as flat arrays, which each step takes over, so a call
    costs little more than `jax.jit` over a tuple of these arrays, and takes half of the memory
    of a step that does not take them over. Nothing waits for results, so steps overlap.

    **Arguments:**

    - `func`: the loss, `func(model, *batch, **kwargs)`. It returns one array or Quantity, a
        scalar or a vector of losses: the step goes along the gradient of their sum.
    - `tx`: an optax transformation, or a dict from selector to transformation, as in
        [`vgrad_eqx.Optimizer`][]. It gets those of the extra arguments `value`, `grad`,
        `value_fn`, `obj_fn` and `grad_fn` that it takes, as line searches do. With
        `optax.apply_if_finite`, a step that is rejected leaves `nn_state` as it was.
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
    - `donate`: whether a step takes over the arrays of its state. If `False`, every state
        lives on, also when a step fails, and a step takes twice the memory.
    - `keep_every`: if not zero, every `keep_every`-th state is copied to `state.kept`, to go on
        with after a step that fails. That takes the memory of one more state, and waits for it.
    - `extra_args`: a function of the auxiliary data (`None` without `has_aux`) that returns
        further extra arguments of `tx`, or others of the names above, as in
        [`vgrad_eqx.Optimizer`][]: `lambda aux: {"value": aux["validation_loss"]}`.

    **Returns:**

    A function `step(state, *batch) -> (state, metrics)`, with the methods `init`, which makes
    the first [`vgrad_eqx.TrainState`][], and `lower`. `metrics` is a
    [`vgrad_eqx.Metrics`][].

    With `step.init(model, key=key)`, `func` is passed a fresh `key=...` at each step. With
    `step.init(model, nn_state=nn_state)`, it is `func(model, nn_state, *batch)`, and returns
    `(value, nn_state)`, or `(value, (nn_state, aux))` if `has_aux`.

    **Raises:**

    - `TypeError`: at once, if `func` or `extra_args` is not callable or `tx` is no optax
        transformation; if `steps_per_call`, `accumulate` or `keep_every` is no int.
    - `ValueError`: at once, if one of those is below 1, or `keep_every` below 0. For the
        errors of `init` and of the step, see there.

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
        raise TypeError(f"`train_step(func=...)` must be a callable. Got {show(func)}.")
    if extra_args is not None and not callable(extra_args):
        raise TypeError(
            "`train_step(extra_args=...)` must be a function of the auxiliary data that "
            f"returns a dict. Got {show(extra_args)}."
        )
    check_tx(tx, "train_step(tx=...)")
    numbers = {"steps_per_call": steps_per_call, "accumulate": accumulate}
    for name, number in {**numbers, "keep_every": keep_every}.items():
        least = 1 if name in numbers else 0
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"`train_step({name}=...)` must be an int. Got {show(number)}.")
        if number < least:
            raise ValueError(
                f"`train_step({name}=...)` must be at least {least}. Got {number}."
            )
    flags = {"has_aux": has_aux, "check_states": check_states, "packed": packed}
    for name, flag in (flags | {"grad_norms": grad_norms, "donate": donate}).items():
        check_flag(flag, f"train_step({name}=...)")
    parsed = parse_grad_states(grad_states, "train_step(grad_states=...)")
    if parsed is None:
        raise TypeError(
            "`train_step(grad_states=...)` must be a selector or states by reference. Got "
            "None. To train all inexact arrays, leave it out."
        )
    options = Options(
        func,
        tx,
        has_aux,
        check_states,
        steps_per_call,
        accumulate,
        packed,
        grad_norms,
        donate,
        keep_every,
        extra_args,
    )
    return _Trainer(options, parsed).step


def _is_same(optimizer: StateOptimizer, states: PyTree) -> bool:
    entries = [
        jtu.tree_flatten(tree, is_leaf=is_reference) for tree in (optimizer.states, states)
    ]
    (ours, structure), (theirs, other) = entries
    return structure == other and all(map(operator.is_, ours, theirs))
