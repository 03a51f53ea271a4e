"""All that is known here about units; the only module that looks at brainunit."""

import sys
from typing import Any


def quantity_test() -> Any:
    """`is_quantity`, or `None` as long as nobody has imported brainunit.

    Importing brainunit takes longer than half of the rest, so a Quantity is looked for
    only where one can exist; and testing each node of a pytree costs, too.
    """
    return is_quantity if "saiunit" in sys.modules else None


def is_quantity(node: Any) -> bool:
    import brainunit

    return isinstance(node, brainunit.Quantity)
