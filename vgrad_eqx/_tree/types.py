"""Type aliases for what Python's types cannot express."""

from typing import Any, TypeAlias


# Any pytree. Type checkers do not know `jaxtyping.PyTree`, and strict ones complain about it.
PyTree: TypeAlias = Any

# A unit of brainunit, which is imported lazily. By its own annotations, `mV / ms` may be a
# Quantity.
Unit: TypeAlias = Any
