"""Holds Ctrl-C back while something is changed that has to be put back."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C takes effect at the end of the block; only a second one at once, in case the block does not end.

    try and finally are not enough: KeyboardInterrupt may come in the middle of finally. Only the main thread gets it.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    pending: list[int] = []

    def hold_back(number: int, frame: FrameType | None) -> None:
        if pending:
            handler(number, frame)
        pending.append(number)

    signal.signal(signal.SIGINT, hold_back)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if pending:
            signal.raise_signal(signal.SIGINT)
