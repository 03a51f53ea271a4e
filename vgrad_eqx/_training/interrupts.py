"""Ctrl-C, held back while JAX runs Python between taking arrays and returning others."""

import signal
import threading
from types import FrameType
from typing import Any


# The previous handler, while Ctrl-C is held back.
held: list[Any] = []

_noted: list[tuple[int, FrameType | None]] = []


def hold() -> None:
    """Holds Ctrl-C back until `release`, in the main thread.

    A second Ctrl-C is not held back, so that a callback that never ends can be stopped.
    """
    if held or threading.current_thread() is not threading.main_thread():
        return
    handler = signal.getsignal(signal.SIGINT)
    if callable(handler):
        _noted.clear()
        held.append(handler)
        signal.signal(signal.SIGINT, _note)


def release() -> None:
    """Ends `hold`. A Ctrl-C that was held back is handled now."""
    if held and threading.current_thread() is threading.main_thread():
        handler = held.pop()
        signal.signal(signal.SIGINT, handler)
        if _noted:
            handler(*_noted[0])


def _note(number: int, frame: FrameType | None) -> None:
    _noted.append((number, frame))
    if len(_noted) > 1:
        release()
