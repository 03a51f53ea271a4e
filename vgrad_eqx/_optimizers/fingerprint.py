"""Functions that are compared by content rather than by identity."""

import dataclasses
import functools as ft
import types
from typing import Any


class Fingerprinted:
    """A value that equals another one with the same code and the same constants.

    Each call of, for example, `optax.adam(1e-3)` creates new functions, and JAX recompiles for
    a static value with other functions. Wrapped in this class, they are equal, so nothing is
    retraced. A value that has changed since it was wrapped, such as a list in a closure, equals
    only itself.
    """

    def __init__(self, value: Any):
        self.value = value
        self._print = _fingerprint(value, {})
        self._hash = hash(self._print)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Fingerprinted):
            return NotImplemented
        if self is other or self.value is other.value:
            return True
        try:
            return self._print == other._print and all(map(_is_unchanged, (self, other)))
        except Exception:  # raised by the `==` of a constant
            return False

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return repr(self.value)

    def __reduce__(self) -> Any:
        return Fingerprinted, (self.value,)

    def __deepcopy__(self, memo: object) -> "Fingerprinted":
        return self


def _is_unchanged(fingerprinted: Fingerprinted) -> bool:
    return _fingerprint(fingerprinted.value, {}) == fingerprinted._print  # noqa: SLF001


class _Same:
    """An object that equals only itself. It is kept alive, so that its `id` is not reused."""

    def __init__(self, value: Any):
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._value is other._value

    def __hash__(self) -> int:
        return id(self._value)


def _fingerprint(value: object, seen: dict[int, int]) -> Any:
    """A hashable description of a value, equal for values with equal content."""
    if id(value) in seen:  # a function that refers to itself
        return "seen", seen[id(value)]
    parts = _take_apart(value)
    if parts is not None:
        seen = {**seen, id(value): len(seen)}
        return type(value), *[_fingerprint(part, seen) for part in parts]
    if isinstance(value, float | complex):
        return type(value), repr(value)  # -0.0 is not 0.0, and a NaN is itself
    try:
        hash(value)
    except Exception:  # an array, or a class with a `__hash__` that raises
        return _Same(value)
    return type(value), value


def _take_apart(value: object) -> Any:
    if isinstance(value, types.FunctionType):
        cells = [_read_cell(cell) for cell in value.__closure__ or ()]
        names = _Same(value.__globals__)
        return value.__code__, names, value.__defaults__, value.__kwdefaults__, *cells
    if isinstance(value, types.MethodType):
        return value.__func__, value.__self__
    if isinstance(value, ft.partial):
        return value.func, value.args, value.keywords
    if isinstance(value, tuple | list):
        return value
    # A dataclass that equals another one by its fields, such as a selector.
    params = getattr(type(value), "__dataclass_params__", None)
    if params is not None and params.eq:
        return [getattr(value, field.name) for field in dataclasses.fields(value)]  # pyright: ignore[reportArgumentType]
    if isinstance(value, dict):
        return [part for item in value.items() for part in item]
    return None


def _read_cell(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None
