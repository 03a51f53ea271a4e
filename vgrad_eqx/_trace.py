"""A function traced once: what its output depends on, and the function again."""

import types
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.extend as jex
import jax.tree_util as jtu

# The module is public, though its contents are not documented. The rules for scan, cond
# and while are JAX's own, and their parameters change from version to version.
from jax.interpreters.partial_eval import dce_jaxpr


class Staged(NamedTuple):
    """A function that has been traced for arrays of some shapes."""

    jaxpr: Any
    structure: Any

    def __call__(self, *args: Any) -> Any:
        leaves = jex.core.jaxpr_as_fun(self.jaxpr)(*args)
        return jtu.tree_unflatten(self.structure, leaves)

    def find_unused(self, num_outputs: int) -> list[int]:
        """The arguments on which none of the first `num_outputs` outputs depends."""
        outputs = [i < num_outputs for i in range(self.structure.num_leaves)]
        _, used = dce_jaxpr(self.jaxpr.jaxpr, outputs)
        return [i for i, is_used in enumerate(used) if not is_used]


def stage(func: Callable[..., Any], args: Sequence[Any]) -> Staged | None:
    """Traces `func`. Returns `None` if that fails.

    A function that looks at values, say in an `if`, can be differentiated eagerly
    and yet not be traced.
    """
    try:
        jaxpr, shapes = jax.make_jaxpr(func, return_shape=True)(*args)
    except Exception:  # what is wrong for good will be raised again without tracing
        return None
    return Staged(jaxpr, jtu.tree_structure(shapes))


def describe_call(func: Callable[..., Any], *rest: Any) -> Any:
    """What is alike in calls of one kind, or `None` if that cannot be hashed."""
    try:
        call = (_identify(func), *map(_describe, rest))
        hash(call)
    except TypeError:
        return None
    return call


def _identify(func: Callable[..., Any]) -> Any:
    if isinstance(func, eqx.Module):
        return _describe(func)
    if isinstance(func, types.MethodType):
        return weakref.WeakMethod(func)
    return weakref.ref(func)


def _describe(tree: Any) -> Any:
    """The structure of a pytree, and the shapes and dtypes of its arrays.

    Of other leaves only flags and names count: numbers change from step to step, and an
    object must not be kept alive for being remembered.
    """
    leaves, structure = jtu.tree_flatten(tree)
    return structure, tuple(map(_describe_leaf, leaves))


def _describe_leaf(leaf: Any) -> Any:
    try:
        return leaf.shape, leaf.dtype
    except AttributeError:
        return leaf if isinstance(leaf, bool | str) else type(leaf)
