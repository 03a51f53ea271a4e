"""The check that a gradient can reach each selected leaf, by data flow.

JAX has already traced the linear program, from the tangents of the leaves to those of the
outputs. A leaf that no gradient reaches does not occur in it: JAX drops products with symbolic
zeros, such as the derivative of `floor` or `stop_gradient`, also inside loops and compiled
functions. So a walk over the outermost equations is enough, and nothing is retraced.

A leaf whose derivative is zero may pass the check, for example in `0.0 * x`, or in a
`custom_vjp` whose backward pass ignores the cotangent. A leaf on which an output depends always
passes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.tree_util as jtu

from .._tree.text import shorten
from .flat_function import FlatFunction


def refuse_unreached(linear: Any, func: Callable[..., Any], flat_func: FlatFunction) -> None:
    """Raises an error if no output of a linear program depends on a selected leaf.

    `linear` is the function that `jax.vjp` or `jax.linearize` has returned for `func`.
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
            "Narrow the selector, as in `& ~vg.path(...)`, or for a model with frozen "
            "wrappers by `~vg.instance(paramax.NonTrainable)`; or pass `check_states=False` to "
            "get zeros. No gradient reaches a leaf that is used only behind `stop_gradient`."
        )


def _find_tangents(linear: Any, num_tangents: int) -> tuple[Any, Sequence[Any]]:
    """The linear program in a function returned by JAX, and its tangent inputs."""
    # Neither place is documented. `jax.vjp` returns an object with a `jaxpr`. `jax.linearize`
    # returns a `Partial` of a function whose first argument is the jaxpr, and of the residuals.
    if hasattr(linear, "jaxpr"):
        jaxpr, others = linear.jaxpr, getattr(linear, "structured_residuals", ())
    else:
        jaxpr, others = linear.func.args[0], linear.args[1:]
    # Residuals come first, as constants in JAX 0.10 and as inputs in 0.12. The leaves of
    # structured residuals, which are new in 0.12, come last.
    variables = [*jaxpr.constvars, *jaxpr.invars]
    stop = len(variables) - len(jtu.tree_leaves(others))
    return jaxpr, variables[stop - num_tangents : stop]
