"""Holds Ctrl-C back while something is done that must not be broken off in the middle."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

# Seconds. A key held down, or a launcher that passes on what the terminal has sent already, gives it twice at once.
_PATIENCE = 1.0


@contextmanager
def uninterrupted() -> Iterator[Callable[[], None]]:
    """Ctrl-C takes effect at the end of the block; at once only when given again a second later: it may not end.

    Yields a function: where the block calls it, Ctrl-C takes effect before.

    try and finally are not enough: KeyboardInterrupt may come in the middle of finally. Only the main thread gets it.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield lambda: None
        return
    pending: list[float] = []

    def hold_back(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if pending and now - pending[0] > _PATIENCE:
            handler(number, frame)
        pending.append(now)

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
