"""How a training step is made."""

from collections.abc import Callable
from typing import Any

from .._gradients.inputs import parse_grad_states
from .._optimizers.groups import check_tx
from .plan import Options
from .step import StateTrainStep, TrainStep


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
    return (StateTrainStep if parsed.by_reference else TrainStep)(options, parsed)
