"""SIGTERM and Ctrl-C -> KeyboardInterrupt, once: what ends the runs after it must not be interrupted itself."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def interruptible() -> Iterator[None]:
    """Turns both signals into one KeyboardInterrupt while the block runs."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may hear signals
        return
    before = [signal.getsignal(number) for number in SIGNALS]
    arm()
    try:
        yield
    finally:
        for number, handler in zip(SIGNALS, before, strict=True):
            signal.signal(number, handler)


def arm() -> None:
    """Takes both signals, also from a library that took them meanwhile."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, _interrupt)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt
