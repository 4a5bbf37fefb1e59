"""Holds Ctrl-C back while something is done that must not be broken off in the middle."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def uninterrupted() -> Iterator[Callable[[], None]]:
    """Ctrl-C takes effect at the end of the block; only a second one at once, in case the block does not end.

    Yields a function: where the block calls it, Ctrl-C takes effect before.

    try and finally are not enough: KeyboardInterrupt may come in the middle of finally. Only the main thread gets it.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield lambda: None
        return
    pending: list[int] = []

    def hold_back(number: int, frame: FrameType | None) -> None:
        if pending:
            handler(number, frame)
        pending.append(number)

    def take_effect() -> None:
        if pending:
            pending.clear()
            handler(signal.SIGINT, sys._getframe(1))

    signal.signal(signal.SIGINT, hold_back)
    try:
        yield take_effect
    finally:
        signal.signal(signal.SIGINT, handler)
        if pending:
            signal.raise_signal(signal.SIGINT)
