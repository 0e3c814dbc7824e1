"""SIGTERM and Ctrl-C -> KeyboardInterrupt, once: what ends the runs after it must not be interrupted itself."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
DEAF_S = 10.0
"""So long after a signal, others are not heard: ending every run takes less."""


@contextmanager
def interruptible() -> Iterator[None]:
    """Turns both signals into one KeyboardInterrupt while the block runs."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may hear signals
        return
    before = [signal.getsignal(number) for number in SIGNALS]
    _arm()
    try:
        yield
    except SystemExit as leaving:  # a library took SIGTERM meanwhile
        raise KeyboardInterrupt from leaving
    finally:
        for number, handler in zip(SIGNALS, before, strict=True):
            signal.signal(number, handler)


def _arm() -> None:
    last_s = -DEAF_S

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        nonlocal last_s
        now_s = time.monotonic()
        if now_s - last_s >= DEAF_S:
            last_s = now_s
            raise KeyboardInterrupt

    for number in SIGNALS:
        signal.signal(number, interrupt)
