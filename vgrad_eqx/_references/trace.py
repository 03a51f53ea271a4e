"""A function traced once: what it touches, what its output depends on, and itself again."""

import dataclasses
import functools as ft
import itertools
import types
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.tree_util as jtu

# The module is public, though its contents are not documented. The rules for scan, cond
# and while are JAX's own, and their parameters change from version to version.
from jax.interpreters.partial_eval import dce_jaxpr

from .._tree.state import read
from .replay import Cell, find_written, replay


@dataclasses.dataclass(frozen=True)
class Trace:
    """What a function did with arrays of some shapes, up to its end or to an error."""

    jaxpr: Any
    structure: Any
    error: Exception | None

    @ft.cached_property
    def refs(self) -> list[jax.Ref]:
        """The references that the function touches, without being passed them."""
        return [const for const in self.jaxpr.consts if isinstance(const, jax.Ref)]

    @ft.cached_property
    def written(self) -> list[jax.Ref]:
        written = find_written(self.jaxpr.jaxpr, self.jaxpr.jaxpr.constvars)
        return list(itertools.compress(self.jaxpr.consts, written))

    def call(self, args: Sequence[Any], values: dict[int, Any]) -> tuple[Any, list[Any]]:
        """Calls the function, with other values in its references, by their `id`.

        Returns its output, and what it leaves in those that it writes.
        """
        cells = {key: Cell(value) for key, value in values.items()}
        consts = [cells.get(id(const), const) for const in self.jaxpr.consts]
        leaves = replay(self.jaxpr.jaxpr, consts, args)
        finals = [cells[id(ref)].value for ref in self.written]
        return jtu.tree_unflatten(self.structure, leaves), finals

    def find_unused(self, num_outputs: int) -> list[int]:
        """The arguments on which none of the first `num_outputs` outputs depends."""
        outputs = [i < num_outputs for i in range(self.structure.num_leaves)]
        _, used = dce_jaxpr(self.jaxpr.jaxpr, outputs)
        return [i for i, is_used in enumerate(used) if not is_used]


def trace(func: Callable[..., Any], args: Sequence[Any]) -> Trace:
    """Traces `func`, which takes and returns arrays.

    An error ends it early. A function that looks at values, say in an `if`, can be called
    and yet not be traced.
    """
    error = None

    def run(*args: Any) -> Any:
        nonlocal error
        try:
            return func(*args)
        except Exception as caught:
            error = caught
            return ()

    jaxpr, shapes = jax.make_jaxpr(run, return_shape=True)(*args)
    return Trace(jaxpr, jtu.tree_structure(shapes), error)


def call_with(
    func: Callable[..., Any], values: dict[int, Any], *args: Any, **kwargs: Any
) -> Any:
    """Calls a function with other values in its references, by their `id`.

    What it would set is thrown away.
    """
    traced = trace(lambda: func(*args, **kwargs), ())
    if traced.error is not None:
        raise traced.error
    others = {id(ref): read(ref) for ref in traced.refs if id(ref) not in values}
    output, _ = traced.call((), {**others, **values})
    return output


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
