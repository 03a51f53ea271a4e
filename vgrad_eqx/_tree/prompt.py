"""How objects are shown at the prompt."""

from collections.abc import Iterable, Set
from typing import Any, ClassVar

import jax
import jax.core
import jax.numpy as jnp
import jax.tree_util as jtu
import wadler_lindig as wl

from .text import print_on_one_line


class AtPrompt:
    """An object that is printed with its `repr`, even inside a module that Equinox prints.

    Tab completion leaves out the attributes that are only for other rooms.
    """

    __slots__ = ()

    _inner: ClassVar[Set[str]] = frozenset()

    def __dir__(self) -> Iterable[str]:
        return [name for name in super().__dir__() if name not in self._inner]

    def __pdoc__(self, **options: object) -> wl.AbstractDoc:
        return wl.TextDoc(repr(self))


def brief(value: object) -> str:
    """A short text for a value: the name of a function, or the size of a long value."""
    name = getattr(value, "__qualname__", None)
    if isinstance(name, str) and callable(value) and not isinstance(value, AtPrompt):
        return name
    text = print_on_one_line(_show_numbers(value), struct_as_array=True)
    if text is not None:
        return text
    size = "" if jtu.all_leaves([value]) else f" of {len(jtu.tree_leaves(value)):,} leaves"
    return f"{type(value).__name__}{size}"


class _Shown(str):
    """A text that is printed without quotes."""

    __slots__ = ()
    __repr__ = str.__str__


def _show_numbers(value: object) -> Any:
    """Shows scalar arrays, alone or in a short dict, as numbers instead of dtypes."""
    if type(value) is dict and len(value) <= _MOST_NUMBERS:
        return {key: _show_numbers(each) for key, each in value.items()}
    return _Shown(value) if _is_known_number(value) else value


_MOST_NUMBERS = 8


def _is_known_number(leaf: object) -> bool:
    if not isinstance(leaf, jax.Array) or isinstance(leaf, jax.core.Tracer):
        return False
    return jnp.issubdtype(leaf.dtype, jnp.number) and not leaf.ndim and not leaf.is_deleted()


def write_call(name: str, *args: object, **options: object) -> str:
    """The call that creates an object. Options that are `None` are left out."""
    texts = [f"{name}={brief(value)}" for name, value in options.items() if value is not None]
    return f"{name}({', '.join([*map(brief, args), *texts])})"
