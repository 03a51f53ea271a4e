"""All that is known here about units; the only module that looks at brainunit."""

import functools as ft
import sys
from collections.abc import Callable
from typing import Any


def quantity_test() -> Callable[[Any], bool] | None:
    """The test for a Quantity, or `None` as long as nobody has imported brainunit.

    Importing brainunit takes longer than half of the rest, so a Quantity is looked for
    only where one can exist; and testing each node of a pytree costs, too.
    """
    return _make_quantity_test() if "saiunit" in sys.modules else None


@ft.cache
def _make_quantity_test() -> Callable[[Any], bool]:
    import brainunit

    # By the type, because `isinstance` looks at `__class__`, which a module computes.
    return lambda node: issubclass(type(node), brainunit.Quantity)
