"""What was found out before, and need not be found out again."""

from typing import Any


class Memory(dict[Any, Any]):
    """A dict that forgets everything when it is full."""

    def __init__(self, most: int = 256):
        super().__init__()
        self._most = most

    def __setitem__(self, key: Any, value: Any) -> None:
        if len(self) >= self._most and key not in self:
            self.clear()
        super().__setitem__(key, value)
