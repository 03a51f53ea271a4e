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
    """A compiled training step, as returned by [`vgrad_eqx.train_step`][].

    **Arguments:**

    Created by `train_step`.

    **Returns:**

    A function `step(state, *batch) -> (state, metrics)`. Its method `init` creates the first
    state, and `lower(state, *batch)` lowers the step as `jax.jit(...).lower(...)` does, for
    example to inspect the compiled program.

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
        """Takes the steps of one call. The arrays of `state` are donated.

        **Arguments:**

        - `state`: the state that `init` or the last step returned.
        - `batch`, `kwargs`: the arguments of `func` after the module. Arrays and Python numbers
            are traced; everything else is static, including the Python numbers in modules.

        **Returns:**

        The next state and the [`vgrad_eqx.Metrics`][], without waiting for their values.

        **Raises:**

        - `RuntimeError`: if `state` has been donated to a step. Errors that the compiled
            program raises at run time are raised unchanged; by then `state` has been donated.
        - `TypeError`: if `state` is not a `TrainState`; and as [`vgrad_eqx.vector_grad`][].
        - `ValueError`: if `state` belongs to another `train_step`; if the batch lacks the
            leading axes that `steps_per_call` and `accumulate` require; and as
            [`vgrad_eqx.vector_grad`][]. After these, `state` can still be used.
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
        """Creates the initial training state.

        **Arguments:**

        - `model`: the module, or any pytree, whose leaves are trained. It is not modified.
            Omit it for states by reference.
        - `key`: a PRNG key, which each step splits. If given, `func` is passed `key=...`.
        - `nn_state`: the `equinox.nn.State` of the module, which `func` takes after the
            module and returns along with the value.
        - `optimizer`: a [`vgrad_eqx.Optimizer`][] to continue with, such as one returned by
            `reselect`, or a [`vgrad_eqx.StateOptimizer`][]. It must have the `tx` of this step.
            Defaults to a new one.
        - `batch`: an example of the positional arguments, as a tuple. Over states by
            reference, the training state then carries every state that `func` uses, as it
            does after the first step; [`vgrad_eqx.load`][] requires this. Otherwise it has no
            effect.

        **Returns:**

        A [`vgrad_eqx.TrainState`][].

        **Raises:**

        - `TypeError`: if `model` is missing, or is given for states by reference.
        - `ValueError`: as [`vgrad_eqx.Optimizer`][]; if `optimizer` updates other leaves than
            those selected, or has another `tx`.
        """
        ...

    def lower(self, state: TrainState[Any], /, *batch: PyTree, **kwargs: PyTree) -> Any:
        """Lowers the step for arguments of these shapes, as `jax.jit(...).lower(...)` does."""
        ...


class _Trainer:
    """The options of a training step and the programs compiled for it."""

    def __init__(self, options: Options, grad_states: GradStates):
        self._options = options
        self._grad_states = grad_states
        self._tx = Fingerprinted(options.tx)
        # The compiled steps, keyed by their signature.
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
        """An equal step made before, if there is one, to reuse its compiled programs."""
        known = self._flat_steps.get(flat_step.signature)
        if known is None:
            self._flat_steps.set(flat_step.signature, flat_step)
        return flat_step if known is None else known

    def extend(self, state: TrainState, unknown: UnknownStates) -> TrainState:
        """The same training state, with the values of more states by reference."""
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
                "`train_step(...).init(model)` needs the module whose leaves `grad_states` "
                "selects. Got none."
            )
        selector = ft.reduce(operator.or_, self._grad_states.entries)
        names = select(flat, selector, "train_step(grad_states=...)").names
        if optimizer is None:
            return Optimizer(self._options.tx, model, selector)
        if not isinstance(optimizer, Optimizer) or optimizer.names != names:
            raise ValueError(
                "`init(optimizer=...)` must be a `vg.Optimizer` for the leaves that "
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
                "`init(optimizer=...)` must be a `vg.StateOptimizer` for the states that "
                f"`grad_states` names, {show(states)}. Got "
                f"{show(getattr(optimizer, 'states', optimizer))}."
            )
        self._check_tx(optimizer.memory.value)
        return optimizer

    def _check_tx(self, optimizer: Optimizer) -> None:
        if optimizer.tx != self._tx:
            raise ValueError(
                "`init(optimizer=...)` must have the transformation of `train_step(tx=...)`, "
                "which takes the steps. Got another one. Use `optimizer.reselect(model, "
                "selector, tx=tx)`, or pass the optimizer's own to `train_step`."
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
        """Raises an error for anything that a step cannot take."""
        if not isinstance(state, TrainState):
            raise TypeError(
                "A training step takes the `TrainState` of `init`, and then the batch: "
                f"`state, metrics = step(state, *batch)`. Got {show(state)}."
            )
        if state.training.flat_step.owner is not self:
            raise ValueError(
                "A training step takes only its own states. Got one of another `train_step`. "
                "Make one with `step.init(state.model, optimizer=state.optimizer)`, and pass "
                "`key=state.key` and `nn_state=state.nn_state` if it has these."
            )
        state.check()


# Shown by Python's own error for a wrong call.
_Trainer.init.__qualname__ = "TrainStep.init"
_Trainer.lower.__qualname__ = "TrainStep.lower"


def _make_step(trainer: _Trainer) -> TrainStep:
    # A bound method, whose `repr` shows the options. After a call of any other object, Python
    # handles Ctrl-C before the result is stored; after a call of a method it does not.
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
    """Leaves a usable state, if there is one, and raises the error of `eqx.error_if`."""
    try:
        if leaves is None and "has been deleted" in str(error):
            state.check()  # not before each call, which would slow it down
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
    """Checks the arguments of `init`."""
    dtype, ndim = getattr(key, "dtype", None), getattr(key, "ndim", None)
    is_typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key) and ndim == 0
    is_key = is_typed or (dtype == jnp.uint32 and ndim == 1)
    if key is not None and not is_key:
        raise TypeError(
            "`init(key=...)` must be a PRNG key, such as `jax.random.key(seed)`. Got "
            f"{show(key)}."
        )
    if nn_state is not None and not isinstance(nn_state, eqx.nn.State):
        raise TypeError(
            "`init(nn_state=...)` must be the `equinox.nn.State` of the module, as returned by "
            f"`eqx.nn.make_with_state`. Got {show(nn_state)}. Return other values that change "
            "as auxiliary data, or keep them in a `vg.State`."
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
    """Creates a compiled training step: the gradient of `func` and an update by `tx`.

    The training state is kept as flat arrays, which are donated to each step. A call therefore
    costs little more than `jax.jit` on a tuple of these arrays, and takes half the memory of a
    step without donation. Calls are dispatched asynchronously, so steps overlap.

    **Arguments:**

    - `func`: the loss, called as `func(model, *batch, **kwargs)`. It returns one array or
        Quantity: a scalar, or a vector of losses, whose sum is differentiated.
    - `tx`: an optax transformation, or a dict from selector to transformation, as in
        [`vgrad_eqx.Optimizer`][]. It is passed those of the extra arguments `value`, `grad`,
        `value_fn`, `obj_fn` and `grad_fn` that it accepts, as line searches do. If
        `optax.apply_if_finite` rejects a step, `nn_state` is left unchanged.
    - `grad_states`: what to train: a selector of leaves of the module, or states by
        reference, as in [`vgrad_eqx.vector_grad`][]. Defaults to all inexact arrays of the
        module. With states, `func(*batch)` closes over them.
    - `has_aux`: whether `func` returns a pair `(value, aux)`. `aux` must be a pytree of arrays.
    - `check_states`: as in [`vgrad_eqx.vector_grad`][].
    - `steps_per_call`: the number of steps per call, run as a `jax.lax.scan` over the first
        axis of each array of the batch. Metrics are stacked.
    - `accumulate`: the number of microbatches per step, whose gradients are averaged. They
        are processed one after the other, along the first axis of each array of the batch (the
        second axis with `steps_per_call`). Outputs and auxiliary data are stacked.
    - `packed`: whether to pack small parameters, up to 32 of the same dtype, into one buffer,
        and likewise each moment of the optimizer. For models with many small arrays, this is
        several times faster, but compilation takes longer. Larger arrays are not packed.
    - `grad_norms`: whether the metrics contain the norm of each gradient.
    - `donate`: whether to donate the arrays of the state to the step. If `False`, every state
        remains usable, also when a step fails, and a step takes twice the memory.
    - `keep_every`: if not zero, every `keep_every`-th state is copied to `state.kept`, to
        continue from if a step fails. This takes the memory of one more state, and blocks
        until that state has been computed.
    - `extra_args`: a function of the auxiliary data (`None` without `has_aux`) that returns
        more extra arguments for `tx`, which take precedence over those above, as in
        [`vgrad_eqx.Optimizer`][]: `lambda aux: {"value": aux["validation_loss"]}`.

    **Returns:**

    A function `step(state, *batch) -> (state, metrics)`, with the methods `init`, which creates
    the first [`vgrad_eqx.TrainState`][], and `lower`. `metrics` is a
    [`vgrad_eqx.Metrics`][].

    With `step.init(model, key=key)`, `func` is passed a fresh `key=...` at each step. With
    `step.init(model, nn_state=nn_state)`, it is called as `func(model, nn_state, *batch)` and
    must return `(value, nn_state)`, or `(value, (nn_state, aux))` if `has_aux`.

    **Raises:**

    - `TypeError`: at once, if `func` or `extra_args` is not callable, if `tx` is not an optax
        transformation, or if `steps_per_call`, `accumulate` or `keep_every` is not an int.
    - `ValueError`: at once, if `steps_per_call` or `accumulate` is below 1, or `keep_every` is
        below 0. `init` and the step list their own errors.

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
