"""The sentinel that marks an argument as not given."""

from typing import Any, Final


class _Sentinel:
    def __repr__(self) -> str:
        return "MISSING"


MISSING: Final[Any] = _Sentinel()
