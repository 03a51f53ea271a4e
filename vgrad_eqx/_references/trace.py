"""A function over references, traced once, and called again with values instead of them."""

import dataclasses
import functools as ft
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.tree_util as jtu

from .._tree.state import read
from .replay import Cell, find_written, replay


@dataclasses.dataclass(frozen=True)
class Trace:
    """What a function does with arrays of some shapes."""

    jaxpr: Any
    structure: Any

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

    def over_values(self, by_id: Iterable[int]) -> Callable[..., tuple[Any, list[Any]]]:
        """The function, with its first arguments in the references of these `id`s.

        All others have the value that they have now.
        """
        keys = list(by_id)
        others = {id(ref): read(ref) for ref in self.refs if id(ref) not in set(keys)}

        def evaluate(*args: Any) -> tuple[Any, list[Any]]:
            return self.call(args, {**others, **dict(zip(keys, args, strict=False))})

        return evaluate


def trace(func: Callable[..., Any], args: Sequence[Any]) -> Trace:
    """Traces `func`, which takes and returns pytrees of arrays."""
    jaxpr, shapes = jax.make_jaxpr(func, return_shape=True)(*args)
    return Trace(jaxpr, jtu.tree_structure(shapes))


def call_with(
    func: Callable[..., Any], values: dict[int, Any], *args: Any, **kwargs: Any
) -> Any:
    """Calls a function with other values in its references, by their `id`.

    What it would set is thrown away.
    """
    traced = trace(lambda: func(*args, **kwargs), ())
    others = {id(ref): read(ref) for ref in traced.refs if id(ref) not in values}
    output, _ = traced.call((), {**others, **values})
    return output
