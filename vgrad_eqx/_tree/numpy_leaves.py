"""NumPy arrays among traced arguments, which predicates must distinguish from JAX arrays."""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import numpy as np


class _NumPyLeaf(np.ndarray):
    """What a predicate sees of a traced NumPy array: everything but its values."""


def _refuse(self: Any, *args: object, **kwargs: object) -> NoReturn:
    raise TypeError(
        "A predicate may use the shape and dtype of a traced array, but not its values. Select "
        "with a path, or outside of `vg.jit`."
    )


for _name in (
    *("__array_ufunc__", "__array_function__", "__jax_array__", "__getitem__", "__iter__"),
    *("__bool__", "__int__", "__float__", "__complex__", "__index__", "item", "tolist"),
):
    setattr(_NumPyLeaf, _name, _refuse)


class _Traced(threading.local):
    """The traced arguments of this thread that were NumPy arrays, by their `id`."""

    arrays: dict[int, Any] | None = None
    is_asked = False


_traced = _Traced()


@contextlib.contextmanager
def remember_types(tracers: Sequence[Any], types: Sequence[type]) -> Iterator[list[bool]]:
    """A context in which predicates know the types that traced arguments had.

    At the end, the list says whether a predicate was called, so that the types matter.
    """
    before, answer = (_traced.arrays, _traced.is_asked), []
    pairs = zip(tracers, types, strict=True)
    _traced.arrays = {id(tracer): tracer for tracer, each in pairs if is_numpy(each)}
    _traced.is_asked = False
    try:
        yield answer
    finally:
        answer.append(_traced.is_asked)
        _traced.arrays, _traced.is_asked = before


def is_numpy(array_type: type) -> bool:
    return issubclass(array_type, np.ndarray | np.generic)


def as_given(leaves: Sequence[Any]) -> list[Any]:
    """The leaves for a predicate, with NumPy arrays where there were some before tracing."""
    arrays = _traced.arrays
    if arrays is None:
        return list(leaves)
    _traced.is_asked = True
    return [_stand_in(leaf) if id(leaf) in arrays else leaf for leaf in leaves]


def _stand_in(tracer: Any) -> np.ndarray:
    return np.broadcast_to(np.zeros((), tracer.dtype), tracer.shape).view(_NumPyLeaf)
