"""The function of a training step, with clear errors for what it must take and return."""

import inspect
from collections.abc import Callable
from typing import Any

import equinox as eqx

from .._tree.text import show
from .._tree.units import split_unit


def make_loss(
    func: Callable[..., Any], has_aux: bool, has_nn_state: bool = False
) -> Callable[..., Any]:
    """`func`, with checks that it returns one array or Quantity, and the rest as requested."""
    wanted, reason = "(value, aux)", "by `has_aux=True`"
    if has_nn_state:
        wanted = "(value, (nn_state, aux))" if has_aux else "(value, nn_state)"
        reason = "because the state was made by `init(..., nn_state=...)`"
    is_pair = has_aux or has_nn_state

    def loss(*args: object, **kwargs: object) -> Any:
        try:
            out = func(*args, **kwargs)
        except TypeError as error:
            if not _takes(func, args, kwargs):
                error.add_note(
                    "A training step calls `func(model, *batch)`. It passes `key=...` too with "
                    "`step.init(model, key=key)`, and the `equinox.nn.State` after the model "
                    "with `step.init(model, nn_state=nn_state)`. The batch is that of "
                    "`step(state, *batch, **kwargs)`."
                )
            raise
        if is_pair and not (isinstance(out, tuple | list) and len(out) == 2):
            raise TypeError(
                f"`train_step(func=...)` must return a pair `{wanted}`, {reason}. Got "
                f"{show(out)}."
            )
        value = out[0] if is_pair else out
        if not eqx.is_array_like(split_unit(value)[0]):
            hint = (
                f"As `func` must return a pair, return `{wanted}`."
                if is_pair
                else "To return more than that, return `(value, aux)` and pass `has_aux=True`; "
                "for an `equinox.nn.State`, use `step.init(model, nn_state=nn_state)`."
            )
            raise TypeError(
                "`train_step(func=...)` must return one array or Quantity, the loss or a "
                f"vector of losses. Got {show(value)}. {hint}"
            )
        return out

    return loss


def _takes(func: Callable[..., Any], args: Any, kwargs: Any) -> bool:
    """Whether a function can be called with these arguments."""
    try:
        inspect.signature(func).bind(*args, **kwargs)
    except (TypeError, ValueError):
        return False
    return True
