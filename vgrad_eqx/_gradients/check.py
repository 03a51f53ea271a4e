"""The check that a gradient can reach each selected leaf, by data flow.

JAX has already made the linear program, from the tangents of the leaves to those of the
outputs. What no gradient reaches is not in it: JAX drops what is multiplied by a zero that it
knows, such as the derivative of `floor` or `stop_gradient`, also inside of loops and compiled
functions. So a walk over the equations of the outermost level is enough, and nothing is traced
again.

A leaf may pass that has a derivative of zero: behind `0.0 * x`, say, or in a `custom_vjp` whose
backward pass ignores the cotangent. A leaf on which an output depends is never refused.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.tree_util as jtu

from .._tree.text import shorten
from .flat_function import FlatFunction


def refuse_unreached(linear: Any, func: Callable[..., Any], flat_func: FlatFunction) -> None:
    """Raises if no output of a linear program depends on one of the selected leaves.

    `linear` is what `jax.vjp` or `jax.linearize` has returned for a `func`: the call itself,
    or one that was traced and takes values instead of references.
    """
    if not flat_func.transform.check_states or not flat_func.num_selected:
        return
    jaxpr, tangents = _find_tangents(linear, len(flat_func.diff))
    reaching = {id(var) for var in jaxpr.outvars}
    for eqn in reversed(jaxpr.eqns):
        if not reaching.isdisjoint(map(id, eqn.outvars)):
            reaching.update(map(id, eqn.invars))
    selected = tangents[: flat_func.num_selected]
    unreached = [i for i, var in enumerate(selected) if id(var) not in reaching]
    if unreached:
        names = [f"`{flat_func.names[i]}`" for i in unreached]
        raise ValueError(
            f"`{flat_func.name}(grad_states=...)` must select leaves on which the output of "
            f"`func` depends. It does not depend on {shorten(names)}. "
            "Narrow the selector, say by `& ~vg.path(...)`, or for a model with frozen "
            "wrappers by `~vg.instance(paramax.NonTrainable)`; or pass `check_states=False` to "
            "get zeros. No gradient reaches a leaf behind `stop_gradient` alone, either."
        )


def _find_tangents(linear: Any, num_tangents: int) -> tuple[Any, Sequence[Any]]:
    """The linear program of a function that JAX returned, and its inputs."""
    # Neither place is documented. `jax.vjp` returns an object with a `jaxpr`. `jax.linearize`
    # returns a `Partial` of a function whose first argument is the jaxpr, and of the residuals.
    if hasattr(linear, "jaxpr"):
        jaxpr, others = linear.jaxpr, getattr(linear, "structured_residuals", ())
    else:
        jaxpr, others = linear.func.args[0], linear.args[1:]
    # Residuals come first, as constants in JAX 0.10 and as inputs in 0.12. Of those that are
    # structured, which 0.12 has introduced, the leaves come last.
    variables = [*jaxpr.constvars, *jaxpr.invars]
    stop = len(variables) - len(jtu.tree_leaves(others))
    return jaxpr, variables[stop - num_tangents : stop]
