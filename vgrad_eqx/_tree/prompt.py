"""What objects look like at the prompt."""

from collections.abc import Iterable, Set
from typing import ClassVar

import jax
import jax.core
import jax.numpy as jnp
import jax.tree_util as jtu
import wadler_lindig as wl

from .text import print_on_one_line


class AtPrompt:
    """An object that is printed by its `repr`, also inside of a module that Equinox prints.

    Completion by tab leaves out the attributes that are for other rooms.
    """

    __slots__ = ()

    _inner: ClassVar[Set[str]] = frozenset()

    def __dir__(self) -> Iterable[str]:
        return [name for name in super().__dir__() if name not in self._inner]

    def __pdoc__(self, **options: object) -> wl.AbstractDoc:
        return wl.TextDoc(repr(self))


def brief(value: object) -> str:
    """A value in a few words: a function by its qualified name, what is long by its size."""
    name = getattr(value, "__qualname__", None)
    if isinstance(name, str) and callable(value) and not isinstance(value, AtPrompt):
        return name
    if isinstance(value, jax.Array) and _is_known_number(value):
        return str(value)
    text = print_on_one_line(value, struct_as_array=True)
    if text is not None:
        return text
    size = "" if jtu.all_leaves([value]) else f" of {len(jtu.tree_leaves(value)):,} leaves"
    return f"{type(value).__name__}{size}"


def _is_known_number(array: jax.Array) -> bool:
    is_number = jnp.issubdtype(array.dtype, jnp.number) and array.ndim == 0
    return is_number and not isinstance(array, jax.core.Tracer) and not array.is_deleted()


def write_call(name: str, *args: object, **options: object) -> str:
    """The call that makes an object. Options that are `None` are left out."""
    texts = [f"{name}={brief(value)}" for name, value in options.items() if value is not None]
    return f"{name}({', '.join([*map(brief, args), *texts])})"
