"""Errors that `equinox.error_if` raises while a compiled program runs."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.core
from jax.extend.core import Jaxpr, jaxprs_in_params

from .._tree.types import PyTree


# `equinox.error_if` is of the first kind.
CALLBACKS = ("pure_callback",)
ANY_CALLBACK = (*CALLBACKS, "io_callback", "debug_callback")


def has_callback(jaxpr: Jaxpr, names: Sequence[str] = CALLBACKS) -> bool:
    """Whether a program calls Python, which may raise an error."""
    return any(
        eqn.primitive.name in names
        or any(has_callback(inner, names) for inner in jaxprs_in_params(eqn.params))
        for eqn in jaxpr.eqns
    )


def wait(compiled: Callable[..., Any], *inputs: PyTree) -> Any:
    """Calls a compiled function and blocks, so that its errors are raised here.

    JAX's own log of the callback's traceback is suppressed.
    """
    logger = logging.getLogger("jax._src.callback")
    # A separate filter for each call, since such calls nest during tracing.
    is_no_failure = lambda record: record.getMessage() != "jax.pure_callback failed"
    logger.addFilter(is_no_failure)
    try:
        result = compiled(*inputs)
        for leaf in jax.tree.leaves(result):
            if not isinstance(leaf, jax.core.Tracer):
                leaf.block_until_ready()
        return result
    finally:
        logger.removeFilter(is_no_failure)


def explain(error: BaseException) -> BaseException:
    """Equinox's own error for an `equinox.error_if`; any other error unchanged.

    Equinox does the same for functions that it compiles itself.
    """
    is_known = isinstance(error, jax.errors.JaxRuntimeError | ValueError)
    if not is_known or "_EquinoxRuntimeError: " not in str(error):
        return error

    @eqx.filter_jit
    def fail() -> None:
        raise error

    try:
        fail()
    except eqx.EquinoxRuntimeError as clear:
        return clear
    return error
