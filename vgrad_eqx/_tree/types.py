"""Names for what Python's types cannot say."""

from typing import Any, TypeAlias


# Any pytree. `jaxtyping.PyTree` is an unknown type to checkers, and strict ones complain of it.
PyTree: TypeAlias = Any

# A unit of brainunit, which is not imported before it is used. By its own annotations,
# `mV / ms` may be a Quantity.
Unit: TypeAlias = Any
