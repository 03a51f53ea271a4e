"""The rule of differentiation of each operator."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._tree.sharding import lay_out_like
from .finite import name_shapes


class Context(NamedTuple):
    """What a rule may know of a call beside its numbers."""

    names: Sequence[str]
    # Takes the outputs to differentiate and the other arrays, and gives the cotangents.
    seed: Callable[[Sequence[Any], Any], Sequence[Any]]


# Takes a function of flat arrays, which returns a tuple to differentiate and other arrays, its
# arguments, and a context. Returns the first tuple, the derivatives, and the others.
Rule = Callable[[Callable[..., Any], Sequence[Any], Context], tuple[Any, Any, Any]]


class Operator(NamedTuple):
    """An operator: its rule, and the form of what the rule returns.

    That is a derivative for each argument if the outputs are added up, and else such a list
    for each output. In place of a derivative of order 2, there is again one for each argument.
    """

    name: str
    rule: Rule
    adds_up: bool = False
    order: int = 1
    power: int = 1  # of the unit of the argument


def pull_back(func: Callable[..., Any], diff: Sequence[Any], context: Context) -> Any:
    """The product of cotangents and the Jacobian."""
    value, pull, arrays = jax.vjp(func, *diff, has_aux=True)
    grads = pull(tuple(context.seed(value, arrays)))
    return value, lay_out_like(grads, diff), arrays


def pull_back_scalar(func: Callable[..., Any], diff: Sequence[Any], context: Context) -> Any:
    """The gradient of a function with a real scalar output."""
    value, pull, arrays = jax.vjp(func, *diff, has_aux=True)
    if len(value) != 1 or jnp.ndim(value[0]) != 0 or jnp.iscomplexobj(value[0]):
        raise TypeError(
            "`grad(func=...)` must return a real scalar. Got outputs of "
            f"{name_shapes(value)}. Use `vector_grad` for the gradient of the sum of all "
            "outputs, or `jacrev` for all derivatives."
        )
    return value, lay_out_like(pull((jnp.ones_like(value[0]),)), diff), arrays


def use_jax(differentiate: Callable[..., Any]) -> Rule:
    """The rule of an operator of JAX that returns a block for each output and argument."""

    def rule(func: Callable[..., Any], diff: Sequence[Any], context: Context) -> Any:
        def with_value(*diff: Any) -> Any:
            value, arrays = func(*diff)
            return value, (value, arrays)

        transform = differentiate(with_value, argnums=tuple(range(len(diff))), has_aux=True)
        blocks, (value, arrays) = transform(*diff)
        return value, blocks, arrays

    return rule
