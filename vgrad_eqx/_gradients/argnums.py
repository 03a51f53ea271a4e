"""Which positional arguments are differentiated."""

import operator
from typing import Any

from .._tree.text import show


def parse_argnums(argnums: object, caller: str) -> int | tuple[int, ...] | None:
    """An int or a tuple of ints."""
    if argnums is None:
        return None
    if isinstance(argnums, list | tuple | range):
        if not argnums:
            raise ValueError(
                f"`{caller}` must name at least one argument. Got {show(argnums)}."
            )
        return tuple([_parse_argnum(argnum, argnums, caller) for argnum in argnums])
    return _parse_argnum(argnums, argnums, caller)


def _parse_argnum(argnum: Any, argnums: object, caller: str) -> int:
    try:
        if isinstance(argnum, bool):
            raise TypeError
        return operator.index(argnum)
    except TypeError:
        raise TypeError(
            f"`{caller}` must be an int, or a list or tuple of ints. Got {show(argnums)}."
        ) from None
