"""Bounded caches, and comparisons that a user's classes cannot break."""

from collections.abc import Hashable
from typing import Any


class Cache:
    """A dict that is emptied when it is full. It ignores keys that do not hash or compare.

    In JAX 0.12, a structure with an array in a static field is hashable, but raises when it is
    compared.
    """

    def __init__(self, max_size: int = 256):
        self._max_size = max_size
        self._entries: dict[Any, Any] = {}

    def get(self, key: Hashable) -> Any:
        try:
            return self._entries.get(key)
        except Exception:
            return None

    def set(self, key: Hashable, value: object) -> None:
        try:
            if len(self._entries) >= self._max_size and key not in self._entries:
                self._entries.clear()
            self._entries[key] = value
        except Exception:
            return


def is_equal(value: object, other: object) -> bool:
    """Whether two values have the same type and are equal. `False` if comparison raises."""
    if value is other:
        return True
    try:
        return type(value) is type(other) and bool(value == other)
    except Exception:
        return False
