"""A function over references, traced once, and called with values instead."""

import dataclasses
import functools as ft
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.core
import jax.tree_util as jtu

from .._tree.state import describe
from .._tree.text import shorten
from .replay import Cell, find_written, NotFollowed, replay


@dataclasses.dataclass(frozen=True)
class Trace:
    """The jaxpr of a function for arrays of given shapes."""

    jaxpr: Any
    structure: Any

    @ft.cached_property
    def refs(self) -> list[jax.Ref]:
        """The references that the function closes over."""
        return list(filter(is_concrete_ref, self.jaxpr.consts))

    @ft.cached_property
    def written(self) -> list[jax.Ref]:
        written = find_written(self.jaxpr.jaxpr, self.jaxpr.jaxpr.constvars)
        return list(itertools.compress(self.jaxpr.consts, written))

    def call(self, args: Sequence[Any], values: Mapping[int, Any]) -> tuple[Any, list[Any]]:
        """Calls the function with other values in its references, by their `id`.

        Returns its output, and the final values of the references that it writes.
        """
        # When JAX stages an equation, it turns the constants of its jaxprs into inputs.
        assert not any(find_refs((), eqn.params) for eqn in self.jaxpr.jaxpr.eqns)
        cells = {key: Cell(value) for key, value in values.items()}
        consts = [cells.get(id(const), const) for const in self.jaxpr.consts]
        try:
            leaves = replay(self.jaxpr.jaxpr, consts, args)
        except NotFollowed as error:
            raise ValueError(
                f"{shorten(list(map(describe, self.refs)))}: a state that is set in a loop or "
                f"compiled function cannot be read or set inside of `{error}`. No gradient "
                "would follow. Read its `value` before, and pass it as an argument; set it "
                "outside."
            ) from error
        finals = [cells[id(ref)].value for ref in self.written]
        return jtu.tree_unflatten(self.structure, leaves), finals


def trace(func: Callable[..., Any], args: Sequence[Any]) -> Trace:
    """Traces `func`, which takes and returns pytrees of arrays."""
    jaxpr, shapes = jax.make_jaxpr(func, return_shape=True)(*args)
    return Trace(jaxpr, jtu.tree_structure(shapes))


def trace_operation(primitive: Any, params: Any, inputs: Sequence[Any]) -> Trace:
    """Traces one operation as a function of the inputs that are not references."""

    def bind(*others: object) -> Any:
        left = iter(others)
        filled = [value if is_concrete_ref(value) else next(left) for value in inputs]
        return primitive.bind(*filled, **params)

    return trace(bind, [value for value in inputs if not is_concrete_ref(value)])


def find_refs(inputs: Sequence[Any], params: Any) -> list[jax.Ref]:
    """The references among the inputs of an operation, and in its jaxprs."""
    found = list(filter(is_concrete_ref, inputs))
    for param in params.values():
        for jaxpr in param if isinstance(param, tuple | list) else [param]:
            found += filter(is_concrete_ref, getattr(jaxpr, "consts", ()))
    return found


def is_concrete_ref(value: object) -> bool:
    return isinstance(value, jax.Ref) and not isinstance(value, jax.core.Tracer)
