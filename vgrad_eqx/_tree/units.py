"""Everything about units; the only module that imports brainunit."""

import functools as ft
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from jax.typing import ArrayLike

from .types import Unit


def quantity_test() -> Callable[[Any], bool] | None:
    """The test for a Quantity, or `None` if brainunit has not been imported.

    Importing brainunit takes longer than half of everything else, so Quantities are only
    searched for where they can exist; testing each node of a pytree also takes time.
    """
    return make_quantity_test() if "saiunit" in sys.modules else None


@ft.cache
def make_quantity_test() -> Callable[[Any], bool]:
    import brainunit

    # `isinstance` with its second argument bound, so that JAX calls no Python for each node.
    return type.__instancecheck__.__get__(brainunit.Quantity)


def split_unit(leaf: Any) -> tuple[Any, Any]:
    """The mantissa and the unit of a leaf, or the leaf and `None` if it is not a Quantity."""
    is_quantity = quantity_test()
    if is_quantity is not None and is_quantity(leaf):
        return leaf.mantissa, leaf.unit
    return leaf, None


def split_units(leaves: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    """The mantissas of leaves, and their units."""
    return tuple(zip(*map(split_unit, leaves), strict=True))  # pyright: ignore[reportReturnType]


def attach_unit(number: ArrayLike, unit: Unit) -> Any:
    """A Quantity, or the number itself if the unit is `None`."""
    if unit is None:
        return number
    import brainunit

    return brainunit.Quantity(number, unit=unit)


def scale_number(number: ArrayLike, factor: float) -> Any:
    """The product, or the number itself if the factor is one."""
    return number if factor == 1.0 else number * factor


def _as_unit(unit: Unit) -> Any:
    import brainunit

    return brainunit.UNITLESS if unit is None else unit


def find_quotient(unit: Unit, by: Unit) -> Any:
    """The quotient of two units, or `None` if neither is given."""
    if unit is None and by is None:
        return None
    return _as_unit(unit) / _as_unit(by)


def multiply_units(unit: Unit, by: Unit) -> Any:
    """The product of two units, or `None` if neither is given."""
    if unit is None and by is None:
        return None
    return _as_unit(unit) * _as_unit(by)


def divide_units(unit: Unit, by: Unit) -> tuple[float, Any]:
    """A factor and a unit, which is `None` if the quotient is dimensionless."""
    quotient = find_quotient(unit, by)
    if quotient is not None and quotient.dim.is_dimensionless:
        return quotient.magnitude, None
    return 1.0, quotient


def find_factor(unit: Unit, to: Unit) -> float | None:
    """The factor that converts one unit to another, or `None` if their dimensions differ."""
    if unit is None and to is None:
        return 1.0
    unit, to = _as_unit(unit), _as_unit(to)
    return unit.magnitude / to.magnitude if unit.has_same_dim(to) else None


def raise_mismatch(text: str, *units: Any) -> NoReturn:
    """Raises the error of brainunit, which appends units that are passed, and a full stop."""
    import brainunit

    raise brainunit.UnitMismatchError(text, *map(_as_unit, units))


def find_factors(units: Sequence[Any], text: str, names: Sequence[str]) -> list[float]:
    """What converts numbers in these units to the first one, which share a dimension.

    Where they do not, an error that opens with `text` names them.
    """
    factors = [find_factor(unit, units[0]) for unit in units]
    if any(factor is None for factor in factors):
        listed = [
            f"`{name}` in {'1' if unit is None else unit}"
            for name, unit in zip(names, units, strict=True)
        ]
        raise_mismatch(f"{text} Got {', '.join(listed)}.")
    return [factor for factor in factors if factor is not None]


def parse_unit(unit: Unit, caller: str) -> Any:
    if unit is None:
        return None
    import brainunit

    if not isinstance(unit, brainunit.Unit):
        raise TypeError(
            f"`{caller}` must be a unit, such as `brainunit.mvolt`. Got one of type "
            f"`{type(unit).__name__}`."
        )
    return unit


def is_unit(leaf: object) -> bool:
    if "saiunit" not in sys.modules:
        return False
    import brainunit

    return isinstance(leaf, brainunit.Unit)


def describe_unit(unit: Unit) -> list[str] | None:
    """How a unit is written, its size, and its dimension, all as text."""
    if unit is None:
        return None
    return [str(unit), repr(float(unit.magnitude)), str(unit.dim)]
